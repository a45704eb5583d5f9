"""Restores pictures that are face crops already, each of them whole: `--aligned`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..chunks import Progress
from ..faces.choose import CHOSEN, describe_faces
from ..faces.face import Face
from ..osdface.whole import restore_whole
from ..pictures.geometry import scaling
from ..sd21.backbone import SIDE
from .restorer import Restorer


class Aligned(Restorer):
    """Restores all of each picture or frame, as `restore_whole` does, without looking for faces."""

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
        return restore_whole(
            images, lambda crop: self._restored(crop, progress), self.paste_options, self.keep
        )


def _faces(count: int, width: int, height: int) -> tuple[Face, ...]:
    """A face in each frame that is all of it."""
    centre = width / 2, height / 2
    matrix = scaling(SIDE / width, SIDE / height)
    box = 0.0, 0.0, float(width), float(height)
    return tuple(Face(i, box, (centre,) * 5, 1.0, 0, matrix) for i in range(count))
