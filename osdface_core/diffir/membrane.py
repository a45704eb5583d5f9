"""The smooth fill that a small network begins with, and adds its details to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Rounds in which each pixel becomes the mean of its neighbours, at each size.
ROUNDS = 24


def membrane(pictures: Tensor, holes: Tensor) -> Tensor:
    """Pictures with a membrane across their holes: about each pixel's mean of its four neighbours.

    A picture of half the size is filled first and gives the values to begin with (push and pull,
    Gortler et al. 1996), so that a few rounds at each size do for holes of any width. What is known
    stays as it is; a picture that is nothing but a hole is 0.

    pictures: (B,C,H,W), of any values in the holes.
    holes: (B,1,H,W), 1 in them and 0 elsewhere.
    """
    inside = holes > 0
    known = 1 - inside.to(pictures)
    sums = pictures.masked_fill(inside, 0)
    if not bool(inside.any()) or max(holes.shape[-2:]) == 1:
        return sums
    smaller, share = (F.avg_pool2d(x, 2, ceil_mode=True) for x in (sums, known))
    unknown = share == 0
    coarse = membrane(smaller / share.masked_fill(unknown, 1), unknown.to(pictures))
    below = F.interpolate(coarse, holes.shape[-2:], mode="bilinear", align_corners=False)
    filled = torch.where(inside, below, sums)
    for _ in range(ROUNDS):
        y = F.pad(filled, (1, 1, 1, 1), mode="replicate")
        around = y[..., 1:-1, 2:] + y[..., 1:-1, :-2] + y[..., 2:, 1:-1] + y[..., :-2, 1:-1]
        filled = torch.where(inside, around / 4, filled)
    return filled
