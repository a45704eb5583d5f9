"""Restores pictures that are face crops already, each of them whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..faces.paste import PasteOptions
from ..pictures.color import as_given, match_color
from ..pictures.geometry import scaling
from ..pictures.picture import rgb_of
from ..pictures.resampling import warp
from ..sd21.backbone import SIDE
from ..sd21.one_step import Restored

# The shorter side at which a larger crop is restored: what crops are made at most elsewhere.
LARGEST = 1024


def restore_whole(
    images: Tensor,
    restored: Callable[[Tensor], Restored],
    options: PasteOptions,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor, dict[tuple[int, int], str]]:
    """Restores all of each picture.

    A square under 512 px is enlarged to 512, as `restore` does it, and any other crop until its
    shorter side has 512; one whose shorter side has more than 1024 is shrunk. The result has the
    size of what was given. Returns the pictures, the masks (B,H,W), and a note for each that went
    wrong, by its number and 0.

    images: (B,H,W,C) in [0,1].
    restored: restores crops (1,h,w,3).
    options: of which strength and color_match are used.
    keep: (1,h,w), 1 where pixels must stay as they are.
    """
    count, height, width = images.shape[:3]
    weight = torch.full((height, width), options.strength)
    if keep is not None:
        keep = F.interpolate(keep[None], (height, width), mode="bilinear")[0, 0]
        weight = weight * (1 - keep)
    if not bool((weight > 0).any()):
        return images, torch.zeros(count, height, width), {}
    after = images.clone()
    notes: dict[tuple[int, int], str] = {}
    for i, image in enumerate(images):
        own = rgb_of(image)
        crop = _resized(own, *_working_size(height, width))[None]
        result = restored(crop.to(images.device))
        if result.failed:
            notes[i, 0] = "came out as NaN, left as it was"
            continue
        if result.recomputed:
            notes[i, 0] = "computed again in fp32"
        fresh = _resized(result.pictures[0].float().cpu(), height, width)
        fresh = match_color(fresh, own, weight, options.color_match)
        mixed = own + weight[..., None] * (fresh - own)
        colors = as_given(mixed.movedim(-1, 0), image)
        after[i, ..., : colors.shape[2]] = colors
    mask = weight.expand(count, height, width).clone()
    for i, _ in notes:
        if notes[i, 0].startswith("came"):
            mask[i] = 0
    return after, mask, notes


def _working_size(height: int, width: int) -> tuple[int, int]:
    shorter = min(height, width)
    if height == width < SIDE:  # the core enlarges it, as the released code does
        return height, width
    scale = max(SIDE / shorter, 1.0) if shorter < SIDE else min(LARGEST / shorter, 1.0)
    return round(height * scale), round(width * scale)


def _resized(picture: Tensor, height: int, width: int) -> Tensor:
    """(h,w,3) -> (height,width,3)."""
    if picture.shape[:2] == (height, width):
        return picture
    matrix = scaling(width / picture.shape[1], height / picture.shape[0])
    resized = warp(picture.movedim(-1, 0), matrix, height, width)
    return resized.movedim(0, -1).clamp(0, 1)
