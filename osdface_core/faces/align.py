"""Aligns faces: landmarks -> the similarity to the FFHQ template -> crops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import OSDFaceError
from ..pictures.geometry import Affine, Points
from ..pictures.picture import rgb_of
from ..pictures.resampling import warp

# FFHQ's eyes, nose and mouth corners in a crop of 512 px, as in facexlib and so in OSDFace's
# training data, moved by half a pixel because their pixel centres are at whole numbers.
TEMPLATE_SIZE = 512
TEMPLATE: Points = (
    (193.48138, 240.44708),
    (319.40277, 240.6936),
    (257.13416, 314.51935),
    (201.76117, 371.91043),
    (313.58905, 371.65118),
)


def similarity(landmarks: Points, size: int) -> Affine:
    """The similarity that takes the landmarks of a picture to the template in a crop of `size` px.

    Least squares in closed form (Umeyama 1991; in the plane a similarity is w = a z + b over the
    complex numbers). A landmark that is far off is left out, by the rule of least median of squares
    (Rousseeuw 1984) with the bound of OpenCV's estimateAffinePartial2D, so that crops are as the
    network was trained on; all pairs are tried instead of random ones. Raises OSDFaceError if the
    landmarks are not five finite points, or too close together to have a direction.
    """
    if len(landmarks) != len(TEMPLATE) or not all(
        math.isfinite(c) for point in landmarks for c in point
    ):
        raise OSDFaceError(
            f"A face has the landmarks {landmarks}; five finite points are wanted: detect the "
            "face again."
        )
    source = [complex(*point) for point in landmarks]
    target = [complex(*point) * size / TEMPLATE_SIZE for point in TEMPLATE]
    spread = max(abs(z - w) for z, w in itertools.combinations(source, 2))
    if spread < 1e-3:
        raise OSDFaceError(
            "A face has five landmarks on one spot; eyes, nose and mouth apart are wanted: detect "
            "the face again."
        )
    a, b = _fit(source, target, _inliers(source, target))
    if abs(a) * spread < 1e-3:
        raise OSDFaceError(
            f"A face has landmarks in an order that no face has ({landmarks}): detect the face "
            "again."
        )
    return (a.real, -a.imag, b.real), (a.imag, a.real, b.imag)


def _fit(
    source: Sequence[complex], target: Sequence[complex], chosen: Sequence[int]
) -> tuple[complex, complex]:
    z_mean = sum(source[i] for i in chosen) / len(chosen)
    w_mean = sum(target[i] for i in chosen) / len(chosen)
    power = sum(abs(source[i] - z_mean) ** 2 for i in chosen)
    a = sum((target[i] - w_mean) * (source[i] - z_mean).conjugate() for i in chosen) / power
    return a, w_mean - a * z_mean


def _inliers(source: Sequence[complex], target: Sequence[complex]) -> list[int]:
    everything = list(range(len(source)))
    best, errors = math.inf, [0.0] * len(source)
    for pair in itertools.combinations(everything, 2):
        if source[pair[0]] == source[pair[1]]:
            continue
        a, b = _fit(source, target, pair)
        of_pair = [abs(a * z + b - w) ** 2 for z, w in zip(source, target, strict=True)]
        median = sorted(of_pair)[len(of_pair) // 2]
        if median < best:
            best, errors = median, of_pair
    bound = max(2.5 * 1.4826 * (1 + 5 / (len(source) - 2)) * math.sqrt(best), 0.001)
    return [i for i in everything if errors[i] <= bound**2]


def crop_face(
    image: Tensor, matrix: Affine, size: int, device: torch.device | None = None
) -> Tensor:
    """The crop (size,size,C) fp32 of `image` (H,W,C) of any float type and range.

    Beyond the picture its edge is repeated. device: that computes; the picture's, if None.
    """
    return warp(image.movedim(-1, 0), matrix, size, size, device=device).movedim(0, -1)


def crop_faces(
    images: Tensor,
    frames: Sequence[int],
    matrices: Sequence[Affine],
    size: int,
    device: torch.device | None = None,
) -> Tensor:
    """The crops (N,size,size,3) of images[frames[i]] through matrices[i], without alpha.

    images: (B,H,W,C).
    frames: N numbers of pictures.
    matrices: N maps from a picture to its crop.
    size: of the crops, in pixels.
    device: that computes; the pictures', if None. The crops are on the pictures' device.
    """
    crops = torch.empty(len(matrices), size, size, 3, device=images.device)
    for crop, frame, matrix in zip(crops, frames, matrices, strict=True):
        crop.copy_(crop_face(rgb_of(images[frame]), matrix, size, device))
    return crops
