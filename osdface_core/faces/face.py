"""The faces that go from detection to pasting.

Coordinates are (x, y) in pixels of the picture, pixel centres at .5.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OSDFaceError
from ..pictures.geometry import Affine, Box, Points, scale_of

log = logging.getLogger(__name__)

# Limits of a crop's side in the picture, in pixels and in multiples of the picture's longer side:
# no face lies beyond them, and a larger crop would not fit into memory.
SMALLEST_CROP, LARGEST_CROP = 0.5, 100


@dataclass(frozen=True)
class Face:
    """One face of one picture.

    frame: index of the picture in its batch.
    box: x1, y1, x2, y2.
    landmarks: left eye, right eye, nose, left and right mouth corner, as seen by the viewer.
    score: the detector's confidence, 0..1.
    number: the face's number in its picture (over a video: its person's number), as drawn in the
        preview and named by `indices`.
    matrix: the similarity from the picture to the crop.
    angle: with `any_angle`, how far the face is turned clockwise: 0, 90, 180 or 270 degrees.
    shot: the run of frames between two cuts that the face belongs to; a number names a person only
        within a shot.
    bridged: whether the frame's detection was missed, and its place is that between its neighbours.
    """

    frame: int
    box: Box
    landmarks: Points
    score: float
    number: int
    matrix: Affine
    angle: int = 0
    shot: int = 0
    bridged: bool = False

    @property
    def size(self) -> float:
        """The shorter side of the box in pixels."""
        return min(self.box[2] - self.box[0], self.box[3] - self.box[1])


@dataclass(frozen=True)
class Faces:
    """The chosen faces of a batch of pictures.

    faces: the faces.
    crops: (N,S,S,3), one for each of `faces`, in the same order, in the picture's value range.
    frames: pictures in the batch.
    height: of a picture, in pixels.
    width: of a picture, in pixels.
    crop_size: S.
    """

    faces: tuple[Face, ...]
    crops: Tensor
    frames: int
    height: int
    width: int
    crop_size: int = 512

    def __len__(self) -> int:
        return len(self.faces)

    def check(self) -> None:
        """Raises OSDFaceError unless each face has a crop, at its size, and lies in a picture."""
        remedy = "take them as Face Detect & Align made them."
        shape, wanted = tuple(self.crops.shape), (len(self), self.crop_size, self.crop_size, 3)
        if shape != wanted:
            raise OSDFaceError(
                f"`faces` hold {len(self)} faces and crops {shape}; {wanted} are wanted: {remedy}"
            )
        if len(self) and min(self.height, self.width, self.crop_size) < 1:
            raise OSDFaceError(
                f"`faces` come from a picture of {self.width} x {self.height} px in crops of "
                f"{self.crop_size} px; no face does: {remedy}"
            )
        for face in self.faces:
            if not 0 <= face.frame < self.frames:
                raise OSDFaceError(
                    f"`faces` name picture {face.frame} of a batch of {self.frames}: {remedy}"
                )

    @staticmethod
    def empty(frames: int, height: int, width: int, crop_size: int = 512) -> Faces:
        """No face: a batch of zero crops."""
        return Faces((), torch.zeros(0, crop_size, crop_size, 3), frames, height, width, crop_size)


def has_place(faces: Faces, i: int) -> bool:
    """Whether the matrix of face `i` puts its crop near the picture; the log tells if not."""
    face = faces.faces[i]
    scale = scale_of(face.matrix)
    placed = (
        math.isfinite(scale)
        and scale > 0
        and all(map(math.isfinite, face.matrix[0] + face.matrix[1]))
        and SMALLEST_CROP < faces.crop_size / scale < LARGEST_CROP * max(faces.width, faces.height)
    )
    if not placed:
        log.warning(
            "Face %d of picture %d has no place in it (its matrix is %s) and is left out.",
            face.number,
            face.frame,
            face.matrix,
        )
    return placed
