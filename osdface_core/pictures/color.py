"""Gives a restored crop the colours of the original, measured where the face is."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .picture import value_range
from .tone import LUMA, luminance, tone_curve

COLOR_MATCHES = ("none", "mean-std", "wavelet", "luminance")

# Linear sRGB (IEC 61966-2-1) to CIE XYZ divided by the white point D65.
_XYZ = (
    (0.412453 / 0.950456, 0.357580 / 0.950456, 0.180423 / 0.950456),
    (0.212671, 0.715160, 0.072169),
    (0.019334 / 1.088754, 0.119193 / 1.088754, 0.950227 / 1.088754),
)
_DELTA = 6 / 29
WAVELET_LEVELS = 5
WAVELET_SIDE = 512


def match_color(restored: Tensor, original: Tensor, weight: Tensor, method: str) -> Tensor:
    """`restored` in the colours of `original`, both (H,W,3) fp32.

    weight: (H,W), how much of each pixel is face. method: one of COLOR_MATCHES. The result stays
    within [0,1], or within the range of the two inputs where that is wider.
    """
    if method == "none":
        return restored
    if method == "luminance":
        result = match_luminance(restored, original)
    elif method == "mean-std":
        result = match_mean_std(restored, original, weight)
    else:
        result = match_wavelet(restored, original, weight)
    result = result.clamp(*value_range(restored, original))
    # Nothing is known where no pixel is face.
    return torch.where((weight > 0).any(), result, restored)


def match_luminance(restored: Tensor, original: Tensor) -> Tensor:
    """Keeps the restored crop's luminance, and the original's differences of colour from it.

    restored, original (H,W,3) -> (H,W,3).
    """
    return original + (luminance(restored) - luminance(original))[..., None]


def match_mean_std(restored: Tensor, original: Tensor, weight: Tensor) -> Tensor:
    """Gives each channel of CIE L*a*b* the original's weighted mean and standard deviation.

    Reinhard et al. 2001. restored, original (H,W,3), weight (H,W) -> (H,W,3).
    """
    share = (weight / weight.sum().clamp_min(torch.finfo(torch.float32).tiny))[..., None]
    source, target = to_lab(restored), to_lab(original)
    source_mean, target_mean = (share * source).sum((0, 1)), (share * target).sum((0, 1))
    source_std = (share * (source - source_mean) ** 2).sum((0, 1)).sqrt()
    target_std = (share * (target - target_mean) ** 2).sum((0, 1)).sqrt()
    # A channel that hardly varies has no contrast to match: only its mean is moved.
    gain = torch.where(source_std > 0.01, target_std / source_std.clamp_min(0.01), 1.0)
    return to_rgb((source - source_mean) * gain + target_mean)


def match_wavelet(restored: Tensor, original: Tensor, weight: Tensor) -> Tensor:
    """Keeps the restored crop's detail and takes the coarse rest from the original.

    The a-trous wavelet of StableSR (Wang et al. 2023), five levels at 512 px, with its smoothing
    confined to the mask. restored, original (H,W,3), weight (H,W) -> (H,W,3).
    """
    difference = (original - restored).movedim(-1, 0)
    stack = torch.cat([difference * weight, weight[None]])
    levels = WAVELET_LEVELS + max(0, round(math.log2(max(stack.shape[-1], 1) / WAVELET_SIDE)))
    stack = coarse_part(stack, levels)
    return restored + (stack[:3] / stack[3:].clamp_min(1e-6)).movedim(0, -1)


def coarse_part(pictures: Tensor, levels: int = WAVELET_LEVELS) -> Tensor:
    """What is left of (C,H,W) after the details of so many levels of the a-trous wavelet."""
    stack = pictures[:, None]
    kernel = torch.tensor([0.25, 0.5, 0.25], device=stack.device)
    for level in range(levels):
        gap = 2**level
        stack = F.conv2d(_pad(stack, gap), kernel.view(1, 1, 1, 3), dilation=gap)
        stack = F.conv2d(_pad(stack, gap, down=True), kernel.view(1, 1, 3, 1), dilation=gap)
    return stack[:, 0]


def _pad(stack: Tensor, gap: int, down: bool = False) -> Tensor:
    return F.pad(stack, (0, 0, gap, gap) if down else (gap, gap, 0, 0), mode="replicate")


def to_lab(rgb: Tensor) -> Tensor:
    """sRGB (...,3) -> CIE L*a*b* (D65).

    Values beyond [0,1] continue the ends of the curves, so that `to_rgb` brings them back.
    """
    linear = torch.where(
        rgb <= 0.04045, rgb / 12.92, ((rgb.clamp_min(0.04045) + 0.055) / 1.055) ** 2.4
    )
    xyz = linear @ rgb.new_tensor(_XYZ).T
    f = torch.where(
        xyz > _DELTA**3, xyz.clamp_min(_DELTA**3) ** (1 / 3), xyz / (3 * _DELTA**2) + 4 / 29
    )
    x, y, z = f.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def to_rgb(lab: Tensor) -> Tensor:
    """CIE L*a*b* (D65) (...,3) -> sRGB."""
    y = (lab[..., 0] + 16) / 116
    f = torch.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], -1)
    xyz = torch.where(f > _DELTA, f**3, 3 * _DELTA**2 * (f - 4 / 29))
    linear = xyz @ torch.linalg.inv(lab.new_tensor(_XYZ)).T
    return torch.where(
        linear <= 0.0031308,
        linear * 12.92,
        1.055 * linear.clamp_min(0.0031308) ** (1 / 2.4) - 0.055,
    )


def as_given(picture: Tensor, given: Tensor) -> Tensor:
    """RGB (3,H,W) in [0,1] as (H,W,C), with as many colours as `given` (h,w,C) in [0,1] has.

    It is grey where that is, and keeps to its tone curve where it has one. C counts the colours
    alone: channels beyond the third are left to the caller.
    """
    channels = min(given.shape[2], 3)
    if channels == 2:
        channels = 1
    if channels < 3 or bool((given[..., :1] == given[..., 1:3]).all()):
        grey = torch.einsum("c,chw->hw", picture.new_tensor(LUMA), picture)
        return grey.expand(channels, *grey.shape).movedim(0, -1)
    picture = picture.movedim(0, -1)
    curve = tone_curve(given)
    if curve is None:
        return picture
    there = curve.holds(given)[None, None].to(picture)
    there = F.interpolate(there, picture.shape[:2], mode="nearest")[0, 0, ..., None]
    return torch.where(there > 0, curve.toned(picture), picture)
