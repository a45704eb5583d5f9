"""Measures the memory that a large picture takes on the CPU, through diffusers, in fp32.

    python -m benchmarks.upscale_memory --model v2-1_512-ema-pruned.safetensors
                                        --osediff osediff.safetensors [--size 4000x3000] [--tiles 1]

The networks run on the first --tiles tiles of each stage, and their last result stands for the
others', which takes the same memory and a fraction of the time; 0 runs them on all. Prints the peak
of the process, with everything that it loads, and the time a tile took.
"""

from __future__ import annotations

import argparse
import resource
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from osdface_core.diffusers.osediff import load_osediff
from osdface_core.osediff.upscale import UpscaleOptions, upscale
from osdface_core.osediff.weights import parse_weights
from osdface_core.sd21.backbone import Backbone
from osdface_core.weights.reading import read_tensors

SCALE = 4


def peak() -> float:
    """The most memory that this process has held, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Sparing:
    """A Backbone that runs its networks on the first tiles of each stage alone."""

    def __init__(self, backbone: Backbone, tiles: int) -> None:
        self.backbone, self.tiles = backbone, tiles
        self.seconds: dict[str, list[float]] = {}
        self.last: dict[str, Tensor] = {}

    def _run(self, stage: str, *given: object) -> Tensor:
        done = self.seconds.setdefault(stage, [])
        if not self.tiles or len(done) < self.tiles:
            start = time.perf_counter()
            self.last[stage] = getattr(self.backbone, stage)(*given)
            done.append(time.perf_counter() - start)
            print(f"{stage}: {done[-1]:.0f} s, peak {peak():.1f} GB", flush=True)
        return self.last[stage].clone()

    def encode(self, pixels: Tensor) -> Tensor:
        return self._run("encode", pixels)

    def denoise(self, latents: Tensor, prompts: Tensor, timestep: int) -> Tensor:
        return self._run("denoise", latents, prompts, timestep)

    def decode(self, latents: Tensor) -> Tensor:
        return self._run("decode", latents)

    def max_batch(self, height: int, width: int) -> int:
        return 1

    def fp32_fallback(self) -> AbstractContextManager[bool]:
        return nullcontext(False)

    def out_of_memory(self, error: BaseException) -> bool:
        return self.backbone.out_of_memory(error)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--osediff", type=Path, required=True)
    parser.add_argument("--size", default="4000x3000", help="of the result")
    parser.add_argument("--tile", type=int, default=UpscaleOptions().tile)
    parser.add_argument("--tiles", type=int, default=1)
    given = parser.parse_args()
    width, height = (int(side) // SCALE for side in given.size.split("x"))
    weights = parse_weights(read_tensors(given.osediff), given.osediff.name)
    cpu = torch.device("cpu")
    backbone = Sparing(
        load_osediff(given.model, weights, device=cpu, dtype=torch.float32), given.tiles
    )
    print(f"networks loaded, peak {peak():.1f} GB", flush=True)
    with torch.inference_mode():
        found = upscale(
            torch.rand(1, height, width, 3),
            torch.randn(1, 77, 1024),
            backbone,
            UpscaleOptions(SCALE, tile=given.tile),
        )
    print(f"{tuple(found.pictures.shape)}, peak {peak():.1f} GB")


if __name__ == "__main__":
    main()
