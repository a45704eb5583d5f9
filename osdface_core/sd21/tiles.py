"""The step over latents in overlapping tiles, for pictures larger than the UNet takes at once."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..chunks import Progress, no_progress
from .backbone import Backbone

# Latents a side of a tile, and latents that two neighbours share, as OSEDiff was released.
TILE, OVERLAP = 96, 32
VARIANCE = 0.01


def tile_weights(height: int, width: int) -> Tensor:
    """The Gaussian weights (height,width) fp64 of a tile, as OSEDiff was released.

    Centred at (width - 1) / 2 across and, half a latent off, at height / 2 down.
    """

    def weights(length: int, centre: float) -> Tensor:
        places = torch.arange(length, dtype=torch.float64)
        return torch.exp(-((places - centre) ** 2) / length**2 / (2 * VARIANCE))

    return torch.outer(weights(height, height / 2), weights(width, (width - 1) / 2))


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along a side: every tile - overlap latents, the last at the far edge."""
    count = max(1, math.ceil((length - overlap) / (tile - overlap)))
    return [min(i * (tile - overlap), length - tile) for i in range(count)]


def in_tiles(
    work: Callable[[slice, slice], Tensor],
    height: int,
    width: int,
    *,
    tile: int,
    overlap: int,
) -> Tensor:
    """What `work` gives for all of height x width latents: tile by tile, or at once where one tile
    has their area.

    Overlapping tiles are averaged by Gaussian weights, as the released code of OSEDiff does.

    work: takes rows and columns of latents, gives (B,C,n,m), any whole number of values a latent.
    height: in latents.
    width: in latents.
    tile: latents a side.
    overlap: latents that two neighbours share.
    """
    if height * width <= tile * tile:
        return work(slice(0, height), slice(0, width))
    side = min(tile, height, width)
    total = share = weights = torch.empty(0)
    for top in tile_starts(height, side, overlap):
        for left in tile_starts(width, side, overlap):
            part = work(slice(top, top + side), slice(left, left + side))
            scale = part.shape[-1] // side
            if not total.numel():
                # fp32, which every device has.
                size = height * scale, width * scale
                total = torch.zeros(*part.shape[:2], *size, device=part.device)
                share = torch.zeros(size, device=part.device)
                weights = tile_weights(side * scale, side * scale).float().to(part.device)
            down, across = (slice(at * scale, (at + side) * scale) for at in (top, left))
            total[..., down, across] += weights * part
            share[down, across] += weights
    return total / share


def denoise_in_tiles(
    backbone: Backbone,
    latents: Tensor,
    prompts: Tensor,
    timestep: int,
    *,
    tile: int = TILE,
    overlap: int = OVERLAP,
    progress: Progress | None = None,
) -> Tensor:
    """x0 (B,4,h,w) of latents (B,4,h,w), denoised as `in_tiles` does it.

    x0 is linear in the predicted noise, so that its average over tiles is that of the noise.

    backbone: the networks.
    latents: scaled.
    prompts: (B,77,1024), the same for every tile.
    timestep: 0..999.
    tile: latents a side.
    overlap: latents that two neighbours share.
    progress: called with 0 before each tile; what it raises ends the job.
    """
    report = progress or no_progress

    def work(rows: slice, columns: slice) -> Tensor:
        report(0)
        return backbone.denoise(latents[..., rows, columns], prompts, timestep)

    return in_tiles(work, *latents.shape[-2:], tile=tile, overlap=overlap)
