"""The step over latents in overlapping tiles, for pictures larger than the UNet takes at once."""

from __future__ import annotations

import math

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
    """x0 (B,4,h,w) of latents (B,4,h,w), denoised tile by tile, or whole where one tile holds them.

    Overlapping tiles are averaged by Gaussian weights. x0 is linear in the predicted noise, so that
    is the same as averaging the noise, as the released code of OSEDiff does.

    backbone: the networks.
    latents: scaled.
    prompts: (B,77,1024), the same for every tile.
    timestep: 0..999.
    tile: latents a side.
    overlap: latents that two neighbours share.
    progress: called with 0 before each tile; what it raises ends the job.
    """
    report = progress or no_progress
    height, width = latents.shape[-2:]
    if height * width <= tile * tile:
        report(0)
        return backbone.denoise(latents, prompts, timestep)
    side = min(tile, height, width)
    weights = tile_weights(side, side).to(latents.device)
    total = torch.zeros(latents.shape, dtype=torch.float64, device=latents.device)
    share = torch.zeros(height, width, dtype=torch.float64, device=latents.device)
    for top in tile_starts(height, side, overlap):
        for left in tile_starts(width, side, overlap):
            report(0)
            place = slice(top, top + side), slice(left, left + side)
            x0 = backbone.denoise(latents[..., place[0], place[1]], prompts, timestep)
            total[..., place[0], place[1]] += weights * x0.to(latents.device)
            share[place] += weights
    return (total / share).float()
