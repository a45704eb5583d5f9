"""Carries a mask that was painted on a picture into the crops of its faces."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import OSDFaceError
from ..pictures.geometry import compose, scaling
from ..pictures.picture import holes_of
from ..pictures.resampling import touched
from .face import Faces, has_place


def mask_to_crops(mask: Tensor, faces: Faces) -> Tensor:
    """The mask (N,S,S) fp32 of each face's crop: 1 where it shows something of a hole, else 0.

    A hole is every pixel where the mask is not 0. It keeps at least its width, however thin it is
    and whatever the scale. Beyond the picture nothing is a hole. Raises OSDFaceError if the two do
    not fit together.

    mask: (H,W), (1,H,W) or one for each picture (B,H,W), on the pictures that the faces were found
        in, or on the same enlarged or shrunk. Without a hole it may have any size.
    faces: where the N faces are.
    """
    holes = check(mask, faces)
    count, height, width = holes.shape
    size = faces.crop_size
    out = torch.zeros(len(faces), size, size, device=mask.device)
    has_hole: list[bool] = holes.flatten(1).any(1).tolist()
    if not any(has_hole):
        return out
    from_mask = scaling(faces.width / width, faces.height / height)
    for i, face in enumerate(faces.faces):
        frame = face.frame if count > 1 else 0
        if has_hole[frame] and has_place(faces, i):
            out[i] = touched(holes[frame], compose(face.matrix, from_mask), size, size)
    return out


def check(mask: Tensor, faces: Faces) -> Tensor:
    """The holes (B,H,W) of truth values. Raises OSDFaceError if mask and faces do not fit."""
    faces.check()
    holes = holes_of(mask)
    if not bool(holes.any()):
        # Of any size: a picture without alpha is loaded with an empty mask of 64 x 64 px.
        return holes
    count, height, width = holes.shape
    # A resize may have rounded either side by up to a pixel.
    if abs(width * faces.height - height * faces.width) > faces.width + faces.height:
        raise OSDFaceError(
            f"`mask` is {width} x {height} px and the faces come from a picture of {faces.width} x "
            f"{faces.height} px; a mask of that picture, or of the same one enlarged, is wanted: "
            "connect the mask that was painted on it."
        )
    if count not in (1, faces.frames):
        raise OSDFaceError(
            f"`mask` holds {count} masks and `faces` come from {faces.frames} pictures; one mask, "
            "or one for each picture, is wanted: connect the mask of this batch."
        )
    return holes
