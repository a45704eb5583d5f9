"""Restores pictures that are face crops already, each of them whole: `--aligned`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chunks import Progress
from ..faces.choose import CHOSEN
from ..faces.face import Face
from ..pictures.color import as_given, match_color
from ..pictures.geometry import scaling
from ..pictures.picture import rgb_of
from ..pictures.resampling import warp
from ..sd21.backbone import SIDE
from .restorer import Restorer, describe_faces

# The shorter side at which a larger crop is restored: what crops are made at most elsewhere.
LARGEST = 1024


class Aligned(Restorer):
    """Restores all of each picture or frame, without looking for faces.

    A square under 512 px is enlarged to 512, as the core does it, and any other crop until its
    shorter side has 512; one whose shorter side has more than 1024 is shrunk. The result has the
    size of what was given.
    """

    @torch.inference_mode()
    def picture(
        self, pixels: Tensor, progress: Progress | None = None
    ) -> tuple[Tensor, Tensor, list[dict[str, Any]]]:
        height, width = pixels.shape[:2]
        after, mask, notes = self._whole(pixels[None], progress)
        faces = _faces(1, width, height)
        return after[0], mask[0], describe_faces(faces, [CHOSEN], notes)

    def detect(self, frames: Tensor) -> list[Any]:
        return [[] for _ in frames]

    def place_faces(
        self, found: list[Any], small: Tensor, width: int, height: int
    ) -> tuple[tuple[Face, ...], tuple[str, ...]]:
        return _faces(len(found), width, height), (CHOSEN,) * len(found)

    @torch.inference_mode()
    def frames(
        self, frames: Tensor, chosen: Sequence[Face]
    ) -> tuple[Tensor, Tensor, dict[tuple[int, int], str]]:
        return self._whole(frames, None)

    def _whole(
        self, images: Tensor, progress: Progress | None
    ) -> tuple[Tensor, Tensor, dict[tuple[int, int], str]]:
        """Restores pictures (B,H,W,C). Returns what `paste` returns."""
        count, height, width = images.shape[:3]
        options = self.paste_options
        weight = torch.full((height, width), options.strength)
        if self.keep is not None:
            keep = F.interpolate(self.keep[None], (height, width), mode="bilinear")[0, 0]
            weight = weight * (1 - keep)
        if not bool((weight > 0).any()):
            return images, torch.zeros(count, height, width), {}
        after = images.clone()
        notes: dict[tuple[int, int], str] = {}
        for i, image in enumerate(images):
            own = rgb_of(image)
            crop = _resized(own, *_working_size(height, width))[None]
            result = self._restored(crop.to(images.device), progress)
            if result.failed:
                notes[i, 0] = "came out as NaN, left as it was"
                continue
            if result.recomputed:
                notes[i, 0] = "computed again in fp32"
            restored = _resized(result.pictures[0].float().cpu(), height, width)
            restored = match_color(restored, own, weight, options.color_match)
            mixed = own + weight[..., None] * (restored - own)
            colors = as_given(mixed.movedim(-1, 0), image)
            after[i, ..., : colors.shape[2]] = colors
        mask = weight.expand(count, height, width).clone()
        for i, _ in notes:
            if notes[i, 0].startswith("came"):
                mask[i] = 0
        return after, mask, notes


def _faces(count: int, width: int, height: int) -> tuple[Face, ...]:
    """A face in each frame that is all of it."""
    centre = width / 2, height / 2
    matrix = scaling(SIDE / width, SIDE / height)
    box = 0.0, 0.0, float(width), float(height)
    return tuple(Face(i, box, (centre,) * 5, 1.0, 0, matrix) for i in range(count))


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
