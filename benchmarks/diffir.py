"""Compares DiffIR with the paper's released code: seconds a picture, and how far they are apart.

    python -m benchmarks.diffir --paper DIR [--jobs deblur ...] [--side 256] [--rounds 3]

--paper: a checkout of Zj-BinXia/DiffIR. Its networks are drawn anew in their released sizes, and
ours get the same weights. Both take one picture of random numbers from tensor to tensor, in turn,
in one process for each network, in fp32. Both draw the same start vector.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed import agreement, processor
from osdface_core.diffir.enhance import EnhanceOptions, enhance
from osdface_core.diffir.inpaint import SIDES, InpaintOptions, inpaint
from osdface_core.diffir.network import DiffIR, build_network
from osdface_core.diffir.weights import PARTS

ROOT = Path(__file__).resolve().parents[1]
SUPER = {
    "dim": 64,
    "num_blocks": [13, 1, 1, 1],
    "num_refinement_blocks": 13,
    "ffn_expansion_factor": 2.2,
    "LayerNorm_type": "BiasFree",
    "n_encoder_res": 9,
}
INPAINTING = {
    "dim": 52,
    "num_blocks": [1, 1, 1, 9],
    "num_refinement_blocks": 0,
    "ffn_expansion_factor": 1.8,
    "LayerNorm_type": "WithBias",
    "n_encoder_res": 5,
    "inp_channels": 4,
}
DEBLUR = {
    "dim": 48,
    "num_blocks": [3, 5, 6, 6],
    "num_refinement_blocks": 4,
    "ffn_expansion_factor": 2,
    "LayerNorm_type": "WithBias",
    "n_encoder_res": 5,
}
# The released folder, its module, what its configurations say, and what the result enlarges by.
JOBS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "x4": ("DiffIR-RealSR", "DiffIR.archs.S2_arch", SUPER | {"scale": 4}, 4),
    "x2": ("DiffIR-RealSR", "DiffIR.archs.S2_arch", SUPER | {"scale": 2}, 2),
    "x1": ("DiffIR-RealSR", "DiffIR.archs.S2_arch", SUPER | {"scale": 1}, 1),
    "deblur": ("DiffIR-demotionblur", "DiffIR.archs.S2_arch", DEBLUR, 1),
    "inpaint": ("DiffIR-inpainting", "archs.S2_arch", INPAINTING, 1),
    "inpaint_big": (
        "DiffIR-inpainting",
        "archs.S2_arch",
        INPAINTING | {"num_blocks": [1, 1, 1, 20], "n_encoder_res": 8},
        1,
    ),
}
COMMON = {"heads": [1, 2, 4, 8], "bias": False, "n_denoise_res": 1, "timesteps": 4}


def released(paper: Path, job: str) -> torch.nn.Module:
    """The released class with weights drawn at random, as its configuration builds it."""
    folder, module, options, _ = JOBS[job]
    package = types.ModuleType("DiffIR")  # without the training code that its own __init__ imports
    archs = types.ModuleType("DiffIR.archs")
    package.__path__ = [str(paper / folder / "DiffIR")]
    archs.__path__ = [f"{package.__path__[0]}/archs"]
    registry: Any = types.ModuleType("basicsr.utils.registry")
    registry.ARCH_REGISTRY = types.SimpleNamespace(register=lambda: lambda network: network)
    sys.modules |= {"DiffIR": package, "DiffIR.archs": archs, registry.__name__: registry}
    sys.modules |= {name: types.ModuleType(name) for name in ("basicsr", "basicsr.utils")}
    sys.path.insert(0, str(paper / folder))
    torch.manual_seed(0)
    network: torch.nn.Module = importlib.import_module(module).DiffIRS2(**options, **COMMON)
    return network.eval()


def both(paper: Path, job: str, side: int) -> dict[str, Callable[[], Tensor]]:
    """What restores a picture whose result has `side` pixels a side, by name: (1,3,side,side)."""
    network = released(paper, job)
    state = {name: x for name, x in network.state_dict().items() if name.startswith(PARTS)}
    ours = build_network(state, torch.nn, job).eval()
    scale = JOBS[job][3]
    picture = torch.rand(1, side // scale, side // scale, 3)
    start = torch.manual_seed(0) and torch.randn(1, 256)
    lq, mask = picture.movedim(-1, 1).contiguous(), torch.zeros(1, side // scale, side // scale)
    mask[:, side // 4 : side // 2, side // 4 : side // 2] = 1

    def load(memory: int) -> tuple[DiffIR, torch.device]:
        return ours, torch.device("cpu")

    def theirs() -> Tensor:
        torch.manual_seed(0)
        if not job.startswith("inpaint"):
            made: Tensor = network(lq)
            return made.clamp(0, 1)
        holes = mask[:, None]
        made = network(torch.cat([lq * (1 - holes), holes], 1))[0]
        return (holes * made + (1 - holes) * lq).clamp(0, 1)

    def own() -> Tensor:
        if job.startswith("inpaint"):
            done = inpaint(picture, mask, load, InpaintOptions(SIDES[-1]), start=start)
        else:
            done = enhance(picture, load, EnhanceOptions(0), start=start)
        return done.pictures.movedim(-1, 1)

    return {"released code": theirs, "ours": own}


def measure(paper: Path, job: str, side: int, rounds: int) -> None:
    """Prints the rows of a network: best of the rounds, after one that does not count."""
    programs = both(paper, job, side)
    best = dict.fromkeys(programs, float("inf"))
    made: dict[str, Tensor] = {}
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for name, program in programs.items():
                begun = time.perf_counter()
                made[name] = program()
                if turn:
                    best[name] = min(best[name], time.perf_counter() - begun)
    first = next(iter(programs))
    for name, seconds in best.items():
        row = job, side, name, f"{seconds:.2f}", f"{seconds / best[first]:.3f}"
        print("| " + " | ".join(map(str, row)), agreement(made[name], made[first]), "", sep=" | ")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--paper", type=Path, required=True)
    parser.add_argument("--jobs", nargs="*", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", choices=list(JOBS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        measure(given.paper.resolve(), given.worker, given.side, given.rounds)
        return
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| network | px a side of the result | program | s a picture | ratio | apart |")
    print("|---|---|---|---|---|---|", flush=True)
    again = partial(subprocess.run, cwd=ROOT, check=True)
    for job in given.jobs:
        passed = "--paper", given.paper.resolve(), "--worker", job
        sizes = "--side", given.side, "--rounds", given.rounds
        again([sys.executable, "-m", "benchmarks.diffir", *map(str, (*passed, *sizes))])


if __name__ == "__main__":
    main()
