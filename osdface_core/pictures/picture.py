"""Batches of pictures (B,H,W,C): their channels, shape and values."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import OSDFaceError


def rgb_of(picture: Tensor) -> Tensor:
    """RGB (...,3) of a picture (...,C): its first three channels, or its grey where C is 1 or 2."""
    return (
        picture[..., :3]
        if picture.shape[-1] >= 3
        else picture[..., :1].expand(*picture.shape[:-1], 3)
    )


def check_pictures(images: Tensor) -> None:
    """Raises OSDFaceError unless `images` is (B,H,W,C) with C at least 1."""
    wanted = "a batch (B,H,W,C) is wanted: connect an IMAGE."
    if images.ndim != 4:
        raise OSDFaceError(f"`image` has {images.ndim} dimensions {tuple(images.shape)}; {wanted}")
    if images.shape[3] < 1:
        raise OSDFaceError(
            f"`image` is {tuple(images.shape)}, which holds no colour channel; {wanted}"
        )


def all_finite(pictures: Tensor) -> list[bool]:
    """For each picture of a batch (B,...), whether it holds neither NaN nor infinity."""
    if not pictures.numel():
        return [True] * len(pictures)
    finite: list[bool] = pictures.isfinite().flatten(1).all(1).tolist()
    return finite


def value_range(*pictures: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest value of pictures, or 0 and 1 where they stay within.

    A picture that holds NaN counts as within. The two are tensors, so that nobody waits for them.
    """
    lowest = torch.stack([picture.amin() for picture in pictures])
    highest = torch.stack([picture.amax() for picture in pictures])
    return (
        torch.where(lowest.isnan(), 0.0, lowest).amin().clamp(max=0.0),
        torch.where(highest.isnan(), 1.0, highest).amax().clamp(min=1.0),
    )


def holes_of(mask: Tensor) -> Tensor:
    """The holes (B,H,W) of a mask (H,W) or (B,H,W): true where it is not 0.

    Raises OSDFaceError for another shape, and for values that are not numbers.
    """
    holes = (mask[None] if mask.ndim == 2 else mask) != 0
    if holes.ndim != 3:
        raise OSDFaceError(
            f"`mask` is {tuple(mask.shape)}; (H,W) or (B,H,W) is wanted: connect a MASK."
        )
    if not bool(mask.isfinite().all()):
        raise OSDFaceError(
            "`mask` holds values that are not numbers (NaN or infinite): look for the node before "
            "this one that makes them."
        )
    return holes


def finite(values: Tensor) -> Tensor:
    """The values as fp32 in [0,1]: NaN becomes 0, the rest is clamped."""
    return values.float().nan_to_num(0.0, 1.0, 0.0).clamp(0, 1)


def mirrored(x: Tensor, multiple: int, *, edge: bool) -> Tensor:
    """(...,H,W) continued to the right and down, by its mirror image, to sides of a multiple.

    edge: whether the outermost pixels are repeated (numpy's "symmetric") or not ("reflect"). A
    picture smaller than what is added is mirrored again.
    """
    for axis in (-2, -1):
        length = x.shape[axis]
        if length % multiple:
            places = torch.arange(length + -length % multiple)
            period = max(1, 2 * length - (0 if edge else 2))
            places %= period
            back = period - (1 if edge else 0) - places
            x = x.index_select(axis, torch.where(places < length, places, back).to(x.device))
    return x
