"""The networks in plain torch beside diffusers': time, memory and agreement, for one 512 px crop.

    python -m benchmarks.plain_networks --weights DIR [--rounds 3] [--dtype fp32] [--small]

--weights: Stable Diffusion 2.1-base and OSDFace's LoRA, or stand-ins, as
`v2-1_512-seeded.safetensors` and `osdface/pytorch_lora_weights.safetensors`. --small: the built-in
model in their place, to see that it runs. Each way runs in a process of its own: diffusers, plain
torch from the file with the LoRA merged, and on lent tensors, as a WebUI holds them, with the LoRA
merged at each call. `held` is the memory that a way takes beyond the lent tensors, before its
first crop; `peak` that of its whole run, with the lent tensors and torch itself. On a device other
than the CPU both are that device's.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WAYS = ("diffusers", "file", "lent")
STAGES = ("load", "encode", "step", "decode")
KILO = 1 if sys.platform == "darwin" else 1024


def maker(way: str, given: argparse.Namespace, device: torch.device) -> Callable[[], Any]:
    """What makes the backbone of a way. Its lent tensors are read before."""
    from osdface_core.diffusers import builtin as theirs
    from osdface_core.diffusers.backbone import DiffusersBackbone
    from osdface_core.ldm import builtin as ours
    from osdface_core.ldm.backbone import LdmBackbone
    from osdface_core.ldm.loading import read
    from osdface_core.osdface.lora import parse_lora
    from osdface_core.weights.reading import read_tensors

    options: dict[str, Any] = {"device": device, "dtype": DTYPES[given.dtype]}
    if given.small:
        small = theirs if way == "diffusers" else ours
        return lambda: small.load_backbone(**options)
    file = given.weights / "v2-1_512-seeded.safetensors"
    lora = parse_lora(read_tensors(given.weights / "osdface" / "pytorch_lora_weights.safetensors"))
    if way == "diffusers":
        return lambda: DiffusersBackbone.from_files(file, lora, **options)
    if way == "file":
        return lambda: LdmBackbone.from_file(file, lora, **options)
    parts = [{name: tensor.to(**options) for name, tensor in part.items()} for part in read(file)]
    return lambda: LdmBackbone.from_tensors(*parts, "lent", lora, **options)


def memory(device: torch.device, peak: bool = False) -> float:
    """Bytes that are taken now, or were at most."""
    if device.type != "cpu":
        module: Any = getattr(torch, device.type)
        return module.max_memory_allocated() if peak else module.memory_allocated()
    if peak:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KILO
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * resource.getpagesize()


def measure(way: str, given: argparse.Namespace, answers: Any) -> None:
    """Puts the best times in s, memory in bytes, and the restored crop into `answers`."""
    torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    make = maker(way, given, device)
    generator = torch.Generator().manual_seed(0)
    crop = torch.rand(1, 3, 64, 64, generator=generator)
    crop = torch.nn.functional.interpolate(crop, (512, 512), mode="bicubic").clamp(0, 1)
    prompts = torch.rand(1, 77, 1024, generator=generator)
    before = memory(device)
    start = time.perf_counter()
    backbone = make()
    times = dict.fromkeys(STAGES, float("inf")) | {"load": time.perf_counter() - start}
    held = memory(device) - before
    result: Tensor = crop
    for _ in range(given.rounds):
        stages: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
            ("encode", backbone.encode),
            ("step", lambda latents: backbone.denoise(latents, prompts, 399)),
            ("decode", backbone.decode),
        )
        result = crop
        for stage, work in stages:
            start = time.perf_counter()
            result = work(result)
            result.sum().item()  # waits for the device
            times[stage] = min(times[stage], time.perf_counter() - start)
    answers.put((times, held, memory(device, peak=True), result.cpu().numpy()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    if given.weights is None and not given.small:
        parser.error("--weights is wanted, or --small")
    context = multiprocessing.get_context("spawn")
    found = {}
    for way in WAYS:
        answers = context.Queue()
        process = context.Process(target=measure, args=(way, given, answers))
        process.start()
        found[way] = answers.get()
        process.join()
    print(f"torch {torch.__version__}, {given.device}, {given.dtype}")
    print("| way | " + " | ".join(f"{stage}, s" for stage in STAGES) + " | ", end="")
    print("encode to decode, ratio | held, GB | peak, GB (ratio) | largest distance |")
    print("|---" * (len(STAGES) + 5) + "|")
    times, _, peak, wanted = found["diffusers"]
    usual, usual_peak = sum(times[stage] for stage in STAGES[1:]), peak
    for way, (times, held, peak, result) in found.items():
        cells = [f"{times[stage]:.2f}" for stage in STAGES]
        cells.append(f"{sum(times[stage] for stage in STAGES[1:]) / usual:.2f}")
        cells += [f"{held / 1e9:.2f}", f"{peak / 1e9:.2f} ({peak / usual_peak:.2f})"]
        cells.append(f"{abs(result - wanted).max():.1e}")
        print(f"| {way} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
