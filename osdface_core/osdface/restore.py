"""One diffusion step: crops, visual prompts and a Backbone -> restored crops (OSDFace, section
3.1).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chunks import Progress, in_chunks
from ..errors import OSDFaceError
from ..sd21.backbone import STRIDE, TIMESTEP, TIMESTEPS, Backbone
from .vre.embedder import SIDE, TOKENS, WIDTH

log = logging.getLogger(__name__)

# No visual prompt is below this, since SiLU made it; what a text encoder makes always is.
SILU_MINIMUM = -0.28


@dataclass(frozen=True)
class Restored:
    """crops: (N,H,W,3) in [0,1]. failed: indices of the crops that came out as NaN and are returned
    as they were. again: indices of those that came out as NaN in half precision, and as numbers
    when they were computed again in fp32.
    """

    crops: Tensor
    failed: tuple[int, ...] = ()
    again: tuple[int, ...] = ()


def check_crops(crops: Tensor, name: str = "crops") -> None:
    """Raises OSDFaceError unless `crops` is (N,H,W,3), at least 8 px a side, and finite."""
    if crops.ndim != 4:
        raise OSDFaceError(
            f"`{name}` has {crops.ndim} dimensions {tuple(crops.shape)}; a batch of pictures "
            f"(N,H,W,3) is wanted: connect an IMAGE."
        )
    if crops.shape[3] != 3:
        raise OSDFaceError(
            f"`{name}` has {crops.shape[3]} colour channels; 3 (red, green, blue) are wanted: "
            "convert the picture to RGB, or take the crops from Face Detect & Align."
        )
    if len(crops) and min(crops.shape[1:3]) < STRIDE:
        raise OSDFaceError(
            f"`{name}` are {crops.shape[2]} x {crops.shape[1]} px; at least {STRIDE} x {STRIDE} "
            f"are wanted: connect larger pictures."
        )
    for i, crop in enumerate(crops):
        if not bool(crop.isfinite().all()):
            raise OSDFaceError(
                f"`{name}` number {i} holds values that are not numbers (NaN or infinite); finite "
                f"values in [0,1] are wanted: "
                "look for the node before this one that makes them."
            )


def check_prompts(prompts: Tensor, count: int) -> None:
    """Raises OSDFaceError unless `prompts` is (count,77,1024)."""
    remedy = "connect the conditioning of OSDFace Visual Prompts made from the same crops."
    if prompts.ndim != 3 or tuple(prompts.shape[1:]) != (TOKENS, WIDTH):
        raise OSDFaceError(
            f"`conditioning` is {tuple(prompts.shape)}; OSDFace's visual prompts "
            f"(N,{TOKENS},{WIDTH}) are wanted: {remedy}"
        )
    if len(prompts) and not float(prompts.min()) >= SILU_MINIMUM:  # NaN too
        raise OSDFaceError(
            f"`conditioning` was not made by OSDFace's visual embedder (a text prompt, perhaps); "
            f"{remedy}"
        )
    if len(prompts) != count:
        raise OSDFaceError(
            f"`conditioning` holds prompts for {len(prompts)} faces and `crops` holds {count}; "
            f"they must be equal: {remedy}"
        )


def working_size(height: int, width: int) -> tuple[int, int]:
    """The size at which a crop is worked: a square under 512 is enlarged to 512, anything else
    keeps its own (height, width).
    """
    return (SIDE, SIDE) if height == width < SIDE else (height, width)


def network_input(crops: Tensor) -> Tensor:
    """(B,H,W,3) in [0,1] -> (B,3,H',W') fp32 at the working size, padded below and to the right to
    multiples of 8.
    """
    pixels = crops.movedim(-1, 1).float()
    height, width = working_size(*pixels.shape[-2:])
    if pixels.shape[-2:] != (height, width):
        pixels = F.interpolate(pixels, (height, width), mode="bilinear", align_corners=True)
    # torch's group norm on the CPU loses four digits in channels-last order, which is how a picture
    # arrives.
    return F.pad(pixels, (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate").contiguous()


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

    crops: (N,H,W,3) in [0,1], any size from 8 px. A square under 512 comes back at 512, anything
    else at its own size. prompts: (N,77,1024). timestep: 0..999; the weights were trained at 399.
    faces_per_batch: 0 = as many as fit. progress: called with 1 and the picture (3,H,W) for each
    finished face, with 0 between the networks; what it raises ends the job. Raises OSDFaceError for
    input that does not fit together.
    """
    check_crops(crops)
    count = len(crops)
    check_prompts(prompts, count)
    if not 0 <= timestep < TIMESTEPS:
        raise OSDFaceError(
            f"`timestep` is {timestep}; a whole number from 0 to {TIMESTEPS - 1} is wanted: set "
            f"it to {TIMESTEP}."
        )
    if faces_per_batch < 0:
        raise OSDFaceError(
            f"`faces_per_batch` is {faces_per_batch}; a number of faces, or 0 for as many as fit, "
            f"is wanted: set it to 0."
        )
    height, width = working_size(*crops.shape[1:3])
    out = torch.empty(count, height, width, 3, device=crops.device)
    failed: list[int] = []

    report = progress or (lambda done, picture=None: None)

    def work(part: slice, done: int = 1) -> None:
        pixels = network_input(crops[part])
        report(0)
        latents = backbone.encode(pixels)
        report(0)
        latents = backbone.denoise(latents, prompts[part], timestep)
        report(0)
        result = backbone.decode(latents)[:, :, :height, :width].to(out.device, out.dtype)
        for i, (given, picture) in enumerate(zip(pixels, result, strict=True), start=part.start):
            whole = bool(picture.isfinite().all())
            if not whole:
                failed.append(i)
            out[i] = (picture if whole else given[:, :height, :width]).movedim(0, -1)
            report(done, picture)

    if count:
        in_chunks(
            count,
            faces_per_batch or backbone.faces_that_fit(height, width),
            work,
            backbone.out_of_memory,
        )
    again: tuple[int, ...] = ()
    if failed:
        with backbone.precisely() as other:
            if other:
                again = tuple(failed)
                failed.clear()
                for i in again:
                    log.warning("Face %d came out as NaN and is computed again in fp32.", i)
                    work(slice(i, i + 1), 0)
    for i in failed:
        log.warning("Face %d came out as NaN and is left as it was.", i)
    return Restored(out, tuple(failed), tuple(i for i in again if i not in failed))
