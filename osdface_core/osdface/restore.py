"""Restores face crops in one step, conditioned on their visual prompts (OSDFace, section 3.1)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..chunks import Progress
from ..errors import OSDFaceError
from ..pictures.picture import all_finite
from ..sd21.backbone import SIDE, STRIDE, TEXT_WIDTH, TOKENS, VISUAL_MINIMUM, Backbone
from ..sd21.one_step import Restored, check_timestep, one_step, padded

# The timestep that the weights were trained at.
TIMESTEP = 399


def check_crops(crops: Tensor, name: str = "crops") -> None:
    """Raises OSDFaceError unless `crops` is (N,H,W,3), at least 8 px a side, and finite."""
    if crops.ndim != 4:
        raise OSDFaceError(
            f"`{name}` has {crops.ndim} dimensions {tuple(crops.shape)}; a batch of pictures "
            "(N,H,W,3) is wanted: connect an IMAGE."
        )
    if crops.shape[3] != 3:
        raise OSDFaceError(
            f"`{name}` has {crops.shape[3]} colour channels; 3 (red, green, blue) are wanted: "
            "convert the picture to RGB, or take the crops from Face Detect & Align."
        )
    if len(crops) and min(crops.shape[1:3]) < STRIDE:
        raise OSDFaceError(
            f"`{name}` are {crops.shape[2]} x {crops.shape[1]} px; at least {STRIDE} x {STRIDE} "
            "are wanted: connect larger pictures."
        )
    for i, is_finite in enumerate(all_finite(crops)):
        if not is_finite:
            raise OSDFaceError(
                f"`{name}` number {i} holds values that are not numbers (NaN or infinite); finite "
                "values in [0,1] are wanted: "
                "look for the node before this one that makes them."
            )


def check_prompts(prompts: Tensor, count: int) -> None:
    """Raises OSDFaceError unless `prompts` is (count,77,1024)."""
    remedy = "connect the conditioning of OSDFace Visual Prompts made from the same crops."
    if prompts.ndim != 3 or tuple(prompts.shape[1:]) != (TOKENS, TEXT_WIDTH):
        raise OSDFaceError(
            f"`conditioning` is {tuple(prompts.shape)}; OSDFace's visual prompts "
            f"(N,{TOKENS},{TEXT_WIDTH}) are wanted: {remedy}"
        )
    if len(prompts) and not float(prompts.min()) >= VISUAL_MINIMUM:  # NaN too
        raise OSDFaceError(
            "`conditioning` was not made by OSDFace's visual embedder (a text prompt, perhaps); "
            f"{remedy}"
        )
    if len(prompts) != count:
        raise OSDFaceError(
            f"`conditioning` holds prompts for {len(prompts)} faces and `crops` holds {count}; "
            f"they must be equal: {remedy}"
        )


def working_size(height: int, width: int) -> tuple[int, int]:
    """The (height, width) at which a crop of this size is restored.

    A square under 512 is enlarged to 512, any other crop keeps its size.
    """
    return (SIDE, SIDE) if height == width < SIDE else (height, width)


def network_input(crops: Tensor) -> Tensor:
    """(B,H,W,3) in [0,1] -> (B,3,H',W') fp32 at the working size, padded to multiples of 8."""
    pixels = crops.movedim(-1, 1).float()
    size = working_size(*pixels.shape[-2:])
    if pixels.shape[-2:] != size:
        pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=True)
    return padded(pixels)


def restore(
    crops: Tensor,
    prompts: Tensor,
    backbone: Backbone,
    *,
    timestep: int = TIMESTEP,
    faces_per_batch: int = 0,
    progress: Progress | None = None,
) -> Restored:
    """Restores every crop in one step.

    Raises OSDFaceError for input that does not fit together.

    crops: (N,H,W,3) in [0,1], any size from 8 px. A square under 512 comes back at 512, anything
        else at its own size.
    prompts: (N,77,1024).
    backbone: the networks.
    timestep: 0..999; the weights were trained at 399.
    faces_per_batch: crops at once; 0 takes as many as fit.
    progress: called with 1 and the picture (3,H,W) for each crop that is done, with 0 between the
        networks; what it raises ends the job.
    """
    check_crops(crops)
    check_prompts(prompts, len(crops))
    check_timestep(timestep, TIMESTEP)
    if faces_per_batch < 0:
        raise OSDFaceError(
            f"`faces_per_batch` is {faces_per_batch}; a number of faces, or 0 for as many as fit, "
            "is wanted: set it to 0."
        )
    return one_step(
        lambda part: network_input(crops[part]),
        prompts,
        working_size(*crops.shape[1:3]),
        backbone,
        timestep=timestep,
        batch=faces_per_batch,
        device=crops.device,
        progress=progress,
    )
