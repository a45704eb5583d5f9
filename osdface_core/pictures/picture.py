"""What a picture is: a batch (B,H,W,C), its channels and its values."""

from __future__ import annotations

from torch import Tensor

from ..errors import OSDFaceError


def rgb_of(picture: Tensor) -> Tensor:
    """The red, green and blue of a picture (...,C): its first three channels, or its grey three
    times where it has one or two.
    """
    return (
        picture[..., :3]
        if picture.shape[-1] >= 3
        else picture[..., :1].expand(*picture.shape[:-1], 3)
    )


def check_pictures(images: Tensor) -> None:
    """Raises OSDFaceError unless `images` is (B,H,W,C) with a channel at least."""
    wanted = "a batch (B,H,W,C) is wanted: connect an IMAGE."
    if images.ndim != 4:
        raise OSDFaceError(f"`image` has {images.ndim} dimensions {tuple(images.shape)}; {wanted}")
    if images.shape[3] < 1:
        raise OSDFaceError(
            f"`image` is {tuple(images.shape)}, which holds no colour channel; {wanted}"
        )


def finite(values: Tensor) -> Tensor:
    """fp32 in [0,1], whatever the picture held."""
    return values.float().nan_to_num(0.0, 1.0, 0.0).clamp(0, 1)
