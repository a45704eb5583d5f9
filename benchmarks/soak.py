"""Many runs in a row in one real ComfyUI server: the memory that its process holds after each.

    python -m benchmarks.soak [--runs 300] [--core] [--comfyui DIR] [--csv FILE]

Each run finds, restores and pastes the faces of a picture with the small built-in model. Picture,
mask and strength differ from run to run, so that the host's cache answers nothing. Prints the
process's private memory (USS) every tenth run, its growth in per cent after the tenth run and after
the fiftieth, and what is held once the host was asked to free everything (POST /free), before these
runs, after them, and after each of a few more. --core runs graphs of the host's own nodes alone,
over the same pictures: what the host itself keeps.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import requests

from benchmarks.fuzz import populate
from tests.conftest import comfyui_path
from tests.frontend import server
from tests.prompts import Prompts

MIB = 1024**2
PICTURES = ("astronaut.png", "astronaut.webp", "two.png", "face_alpha.png")
WARM = 10
# Seconds for the server's start, on a machine with other work; and until the host has collected
# what it has released.
START, COLLECTED = 900, 15
# Runs at the end, with everything freed after each.
AGAIN = 6


def graph(run: int, core: bool) -> dict[str, Any]:
    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    load = node("LoadImage", image=PICTURES[run % len(PICTURES)])
    # Other noise each time, at the same size, so that all four of our stages run.
    noisy = node("ImageAddNoise", image=["load", 0], seed=run, strength=0.01)
    end = node("SaveImage", images=["work", 0], filename_prefix="soak")
    if core:
        work = node("ImageBlur", image=["noisy", 0], blur_radius=2, sigma=1.0)
        return {"load": load, "noisy": noisy, "work": work, "end": end}
    work = node(
        "OSDFaceRestore",
        image=["noisy", 0],
        model=["model", 0],
        vae=["model", 1],
        vre_name="builtin",
        lora_name="none",
        detector="builtin",
        select="all",
        order="left to right",
        indices="0",
        max_faces=0,
        min_size=24,
        confidence=0.9,
        any_angle=False,
        crop_size=512,
        smoothing=0.0,
        strength=0.5 + run % 50 / 100,
        mask_type=("ellipse", "box")[run % 2],
        feather=0.1,
        color_match=("none", "mean-std", "wavelet")[run % 3],
    )
    return {
        "load": load,
        "noisy": noisy,
        "model": node("OSDFaceBuiltinModel"),
        "work": work,
        "end": end,
    }


def held(process: psutil.Process) -> float:
    """MiB that would come back if the process ended."""
    return process.memory_full_info().uss / MIB


def after_free(address: str, process: psutil.Process) -> float:
    """MiB held once the host has unloaded every model and emptied its caches."""
    requests.post(f"{address}/free", json={"unload_models": True, "free_memory": True}, timeout=60)
    time.sleep(COLLECTED)
    return held(process)


def growth(curve: list[float], first: int) -> float:
    """The rise in per cent of the line fitted to the runs from `first` on.

    Two single runs would not do: they differ by what the allocator holds.
    """
    line = statistics.linear_regression(range(first, len(curve)), curve[first:])
    return 100 * line.slope * (len(curve) - first) / (line.intercept + line.slope * first)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--core", action="store_true")
    parser.add_argument("--comfyui", type=Path, default=comfyui_path())
    parser.add_argument("--csv", type=Path, help="where every run's memory is written")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        populate(base)
        with server(given.comfyui, base, START) as address:
            prompts = Prompts(address, base)
            process = psutil.Process(int((base / "pid").read_text()))
            before = held(process)
            print(f"after start: {before:.1f} MiB", flush=True)
            curve: list[float] = []
            for run in range(len(PICTURES)):
                prompts.run(graph(given.runs + run, given.core))
            freed = [after_free(address, process)]
            for run in range(given.runs):
                prompts.run(graph(run, given.core))
                curve.append(held(process))
                if (run + 1) % 10 == 0:
                    print(f"run {run + 1:4}: {curve[-1]:8.1f} MiB", flush=True)
            for first in (WARM, min(50, given.runs // 2)):
                spread = f"between {min(curve[first:]):.1f} and {max(curve[first:]):.1f} MiB"
                print(f"growth after run {first}: {growth(curve, first):+.2f} % ({spread})")
            freed.append(after_free(address, process))
            for run in range(AGAIN):
                prompts.run(graph(run, given.core))
                freed.append(after_free(address, process))
            print("after /free, MiB: " + ", ".join(f"{held:.1f}" for held in freed))
            print(
                f"the first after {len(PICTURES)} runs, the second after {given.runs} more, the "
                "others after one more each"
            )
    if given.csv:
        given.csv.write_text(
            "run,MiB\n" + "".join(f"{i + 1},{value:.2f}\n" for i, value in enumerate(curve))
        )
    return 0 if growth(curve, WARM) <= 1 else 1


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
