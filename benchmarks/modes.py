"""Runs one graph in real ComfyUI servers started in different modes, and compares the results.

    python -m benchmarks.modes [--stand-ins DIR] [--compiled] [--only MODE ...] [--comfyui DIR]

The graph restores the faces of a picture with the small built-in model, whose networks are in fp32
in every mode: so the saved picture must have the same bits as the plain server's, or the row says
by how much it differs. --stand-ins: the folder of full-size weights; with it a crop of 64 x 72 px
also goes through the visual embedder, the LoRA, the UNet and the VAE at their full size, in the
types that the mode chooses.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.fuzz import START, populate
from tests.conftest import comfyui_path
from tests.frontend import server
from tests.prompts import Prompts
from tests.widgets import RESTORE

# All run with --cpu, beside which the host takes no --lowvram or --novram: FUZZ_VRAM makes
# fuzz_nodes.py imitate these.
MODES = (
    *(
        "",
        "FUZZ_VRAM=LOW_VRAM",
        "FUZZ_VRAM=NO_VRAM",
        "--cpu",
        "--fp16-vae",
        "--bf16-vae",
        "--fp32-vae",
        "--cpu-vae",
        "--bf16-unet",
    ),
    *(
        "--fp16-unet",
        "--fp32-unet",
        "--fp8_e4m3fn-unet",
        "--force-fp16",
        "--force-fp32",
        "--cache-none",
        "--cache-lru 4",
    ),
    *(
        "--disable-smart-memory",
        "--deterministic",
        "--use-pytorch-cross-attention",
        "--use-split-cross-attention",
    ),
)


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def small_graph(name: str, compiled: bool = False) -> dict[str, Any]:
    graph = {
        "load": node("LoadImage", image="two.png"),
        "model": node("OSDFaceBuiltinModel"),
        "work": node(
            "OSDFaceRestore", image=["load", 0], model=["model", 0], vae=["model", 1], **RESTORE
        ),
        "save": node("SaveImage", images=["work", 0], filename_prefix=name),
        "keep": node("FuzzKeep", image=["work", 0], name=name),
    }
    if compiled:
        graph["compiled"] = node("TorchCompileModel", model=["model", 0], backend="inductor")
        graph["work"]["inputs"]["model"] = ["compiled", 0]
    return graph


def full_graph(name: str) -> dict[str, Any]:
    return {
        "load": node("LoadImage", image="astronaut.png"),
        "crop": node(
            "ImageScale",
            image=["load", 0],
            upscale_method="area",
            width=72,
            height=64,
            crop="disabled",
        ),
        "base": node("CheckpointLoaderSimple", ckpt_name="v2-1_512-ema-pruned.safetensors"),
        "prompts": node("OSDFaceVRE", crops=["crop", 0], vre_name="associate_2.ckpt"),
        "work": node(
            "OSDFaceOneStep",
            model=["base", 0],
            vae=["base", 2],
            crops=["crop", 0],
            conditioning=["prompts", 0],
            lora_name="pytorch_lora_weights.safetensors",
            lora_strength=1.0,
            timestep=399,
            faces_per_batch=0,
        ),
        "keep": node("FuzzKeep", image=["work", 0], name=name),
    }


def beside(made: Tensor, plain: Tensor) -> str:
    if torch.equal(made, plain):
        return "same bits"
    error = float((made - plain).square().mean())
    if not math.isfinite(error):
        return "not finite"
    largest = float((made - plain).abs().max())
    return f"{-10 * math.log10(error):.1f} dB, largest difference {largest:.4f}"


def link_stand_ins(base: Path, folder: Path) -> None:
    (base / "models" / "checkpoints").mkdir(exist_ok=True)
    (base / "models" / "checkpoints" / "v2-1_512-ema-pruned.safetensors").symlink_to(
        folder / "v2-1_512-seeded.safetensors"
    )
    for file in (folder / "osdface").iterdir():
        (base / "models" / "osdface" / file.name).symlink_to(file)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stand-ins", type=Path)
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="also with TorchCompileModel's inductor, which takes minutes",
    )
    parser.add_argument("--only", nargs="*", help="modes without their dashes")
    parser.add_argument("--comfyui", type=Path, default=comfyui_path())
    given = parser.parse_args()
    modes = [
        "",
        *(mode for mode in MODES if mode and (not given.only or mode.strip("-") in given.only)),
    ]
    rows, wrong = [], 0
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        populate(base)
        if given.stand_ins:
            link_stand_ins(base, given.stand_ins)
        plain: dict[str, Tensor] = {}
        for mode in modes:
            jobs = {"built-in": small_graph("small")}
            if mode == "" and given.compiled:
                jobs["built-in, TorchCompileModel inductor"] = small_graph(
                    "compiled", compiled=True
                )
            if given.stand_ins:
                jobs["full size"] = full_graph("full")
            settings = dict(word.split("=") for word in mode.split() if "=" in word)
            flags = [word for word in mode.split() if "=" not in word and word != "--cpu"]
            os.environ.update(settings)
            with server(given.comfyui, base, START, flags) as address:
                prompts = Prompts(address, base)
                for what, graph in jobs.items():
                    start = time.monotonic()
                    try:
                        prompts.run(graph)
                        made = prompts.kept(graph["keep"]["inputs"]["name"])
                        says = beside(made, plain.setdefault(what.split(",")[0], made))
                        wrong += not bool(made.isfinite().all()) or (
                            what == "built-in" and says != "same bits"
                        )
                    except RuntimeError as error:
                        says = f"one sentence: {error}"
                        wrong += not str(error).strip().endswith(".")
                    rows.append(
                        f"| {mode or '(none)'} | {what} | {says} | {time.monotonic() - start:.1f} "
                        "s |"
                    )
                    print(rows[-1], flush=True)
            for name in settings:
                del os.environ[name]
    print("\n| started with | model | result beside the plain server's | run |\n|---|---|---|---|")
    print("\n".join(rows))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
