"""Similarities between a picture and its face crops, and resampling through them.

Coordinates are (x, y) in pixels with pixel centres at .5: the pixel in row j, column i spans
[i,i+1] x [j,j+1].
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import OSDFaceError
from ..faces.face import Affine, Points

# FFHQ's eyes, nose and mouth corners in a crop of 512 px, as facexlib and so OSDFace's training
# data have them, moved by half a pixel because their pixel centres are at whole numbers.
TEMPLATE_SIZE = 512
TEMPLATE: Points = (
    (193.48138, 240.44708),
    (319.40277, 240.6936),
    (257.13416, 314.51935),
    (201.76117, 371.91043),
    (313.58905, 371.65118),
)

# The cubic kernel reaches so many pixels to each side, the filter for shrinking so many of the
# smaller picture's.
CUBIC = 2
FILTER = 6
# Up to here a picture is made smaller by interpolation alone: the filter would gain 2 dB there, for
# four times the samples.
SHRINKS = 1.2
# Enlarged by more than SHRINKS and less than this, the waves that cubic interpolation leaves are
# aliased to ones that a picture may have.
WAVES = 1.65
# Samples worked on at once; bounds the memory that a picture of any size takes.
SAMPLES = 2**22
# Rows that are worth a thread of their own.
STRIP = 32


def similarity(landmarks: Points, size: int) -> Affine:
    """The similarity that takes five landmarks of a picture nearest to the FFHQ template in a crop
    of `size` px.

    Least squares in closed form (Umeyama 1991; in the plane a similarity is w = a z + b over the
    complex numbers). A landmark that is far off is left out of it, by the rule of least median of
    squares (Rousseeuw 1984) with the bound that OpenCV's estimateAffinePartial2D uses, so that a
    crop is the one that the network was trained on; all pairs are tried instead of random ones.
    Raises OSDFaceError if the landmarks are not five finite points, or too close together to have a
    direction.
    """
    if len(landmarks) != len(TEMPLATE) or not all(
        math.isfinite(c) for point in landmarks for c in point
    ):
        raise OSDFaceError(
            f"A face has the landmarks {landmarks}; five finite points are wanted: detect the "
            f"face again."
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
            f"again."
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


def inverse(matrix: Affine) -> Affine:
    """The affine map back. Raises ZeroDivisionError for a map that has none."""
    (a, b, c), (d, e, f) = matrix
    det = a * e - b * d
    return (e / det, -b / det, (b * f - c * e) / det), (-d / det, a / det, (c * d - a * f) / det)


def compose(after: Affine, first: Affine) -> Affine:
    """The map that applies `first`, then `after`."""
    (a, b, c), (d, e, f) = first
    (p, q, r), (s, t, u) = after
    return (p * a + q * d, p * b + q * e, p * c + q * f + r), (
        s * a + t * d,
        s * b + t * e,
        s * c + t * f + u,
    )


def apply(matrix: Affine, x: float, y: float) -> tuple[float, float]:
    (a, b, c), (d, e, f) = matrix
    return a * x + b * y + c, d * x + e * y + f


def scaling(x: float, y: float) -> Affine:
    """The map that multiplies by x and y: from a picture to the same picture resized."""
    return (x, 0.0, 0.0), (0.0, y, 0.0)


def moved(matrix: Affine, x: float, y: float) -> Affine:
    """`matrix` followed by a step of (x, y)."""
    (a, b, c), (d, e, f) = matrix
    return (a, b, c + x), (d, e, f + y)


def reach(matrix: Affine) -> float:
    """How many times a length grows under the map (the root of its determinant's size)."""
    (a, b, _), (d, e, _) = matrix
    return math.sqrt(abs(a * e - b * d))


def bounds(matrix: Affine, width: float, height: float) -> tuple[float, float, float, float]:
    """x1, y1, x2, y2 of the box around the image of a width x height rectangle at the origin."""
    corners = [apply(matrix, x, y) for x in (0.0, width) for y in (0.0, height)]
    xs, ys = zip(*corners, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def warp(source: Tensor, matrix: Affine, height: int, width: int, grain: float = 1.0) -> Tensor:
    """Resamples `source` (C,H,W) through `matrix`, which takes a point of it to its place in the
    result (C,height,width) fp32.

    Cubic convolution (Keys 1981, a = -0.75 as in OpenCV) where the result is as large or larger.
    Where it is smaller, the least squares counterpart of that: the picture which, enlarged by cubic
    convolution, comes nearest to the source (Unser, Aldroubi and Eden 1995). So nothing is aliased,
    and what was enlarged comes back as it was. Beyond the source's edge its outermost pixels are
    repeated. grain: width, in pixels of the result, of the pixels that the source was enlarged
    from; 1 if the result is to have those very pixels, as in a picture that was not resized since.
    """
    back = inverse(matrix)
    step = reach(back)
    x1, y1, x2, y2 = bounds(back, width, height)
    margin = math.ceil((FILTER if step > SHRINKS else 0) * step * math.sqrt(2)) + CUBIC + 1
    left, right = _span(x1 - margin, x2 + margin, source.shape[2])
    top, bottom = _span(y1 - margin, y2 + margin, source.shape[1])
    region = source[:, top:bottom, left:right].float()
    back = moved(back, -left, -top)
    # By a whole number first, to pixels at most a third as wide as the result's: the time then
    # depends on the result's size.
    block = max(1, int(step / 3))
    if block > 1:
        region = F.pad(
            region[None],
            (0, -region.shape[2] % block, 0, -region.shape[1] % block),
            mode="replicate",
        )
        size = region.shape[2] // block, region.shape[3] // block
        region = F.interpolate(region, size, mode="bicubic", antialias=True)[0]
        back = compose(scaling(1 / block, 1 / block), back)
    if step <= SHRINKS:
        fine, border = 1, 0
    else:
        fine, border = max(3, math.ceil(1.25 * step / block)), FILTER
        kernel = _shrinking(step, block, fine, max(grain, 1 / step))
    result = torch.empty(source.shape[0], height, width, device=source.device)
    columns = (width + 2 * border) * fine
    at_once = max(1, SAMPLES // (columns * fine) - 2 * border)
    for first in range(0, height, at_once):
        rows = min(at_once, height - first)
        to_fine = (1 / fine, 0.0, -border), (0.0, 1 / fine, first - border)
        samples = sampled(region, compose(back, to_fine), (rows + 2 * border) * fine, columns)
        if step > SHRINKS:
            samples = filtered(samples, kernel, fine).transpose(1, 2).contiguous()
            samples = filtered(samples, kernel, fine).transpose(1, 2)
        result[:, first : first + rows] = samples
    return result


def _span(low: float, high: float, size: int) -> tuple[int, int]:
    """The pixels of range(size) between low and high; the nearest one where there are none."""
    first = min(max(math.floor(low), 0), size - 1)
    return first, max(min(math.ceil(high), size), first + 1)


def sampled(source: Tensor, back: Affine, height: int, width: int, mode: str = "bicubic") -> Tensor:
    """`source` (C,H,W) fp32, interpolated at the places that `back` gives for the pixel centres of
    the result (C,height,width).

    mode: torch's grid_sample's. Nothing is smoothed: where the result is smaller, `warp` is what is
    wanted.
    """
    # torch shares out the pictures of a batch among the processor's threads, not the rows of one:
    # so strips of it are made a batch.
    strips = (
        max(1, min(torch.get_num_threads(), height // STRIP)) if source.device.type == "cpu" else 1
    )
    rows = math.ceil(height / strips)
    grid = torch.empty(strips * rows, width, 2, device=source.device)
    across = torch.arange(width, dtype=torch.float64) + 0.5
    down = torch.arange(strips * rows, dtype=torch.float64) + 0.5
    for axis, ((from_x, from_y, shift), size) in enumerate(
        zip(back, (source.shape[2], source.shape[1]), strict=True)
    ):
        # fp64 up to the sum of a row and a column: at 8000 px that holds a place to 0.001 px
        # without a table in fp64.
        row = ((from_x * across + shift) * (2 / size) - 1).float().to(source.device)
        column = (from_y * down * (2 / size)).float().to(source.device)
        torch.add(row[None, :], column[:, None], out=grid[:, :, axis])
    pictures = source.expand(strips, *source.shape)
    result = F.grid_sample(
        pictures,
        grid.view(strips, rows, width, 2),
        mode=mode,
        padding_mode="border",
        align_corners=False,
    )
    return result.transpose(0, 1).reshape(source.shape[0], strips * rows, width)[:, :height]


def _shrinking(step: float, block: int, fine: int, grain: float) -> Tensor:
    """The filter that turns `fine` samples a pixel into pixels of `step` source pixels each, fp64.
    The samples are taken from the source after torch has shrunk it `block` times.

    For every place that a pixel of width `grain` may have had before it was enlarged, the least
    filter that gives back what that enlargement is at the pixel's centre (for a smaller grain its
    mean, over as much of the pixel as makes the sharpness a pixel's).
    """
    taps = (torch.arange((2 * FILTER + 1) * fine, dtype=torch.float64) + 0.5) / fine - FILTER - 0.5
    same = abs(grain - 1) < 1e-3
    grain = 1.0 if same else max(grain, 0.25)
    apart = grain if same else grain / 8
    count = math.ceil((FILTER + CUBIC * grain + 1) / apart)
    places = torch.arange(-count, count + 1, dtype=torch.float64)[:, None] * apart
    # The source is itself sampled by cubic interpolation, which on average convolves it with that
    # kernel, and was shrunk with one.
    blur = torch.linspace(-2 * CUBIC, 2 * CUBIC, 81, dtype=torch.float64)
    weight = _cubic(blur)
    if block > 1:
        pixels = (torch.arange(2 * CUBIC * block, dtype=torch.float64) + 0.5) / block - CUBIC
        weight = (_cubic(blur[:, None] - pixels) * _cubic(pixels, -0.5)).sum(1)
    weight = weight / weight.sum()
    enlarged = (
        _cubic((taps - places - blur[:, None, None] * block / step) / grain) * weight[:, None, None]
    ).sum(0)
    within = torch.linspace(-0.5, 0.5, 17, dtype=torch.float64) * math.sqrt(max(0.0, 1 - grain**2))
    wanted = _cubic((within - places) / grain).mean(1)
    # The ridge is what smooths: all else that the source may hold is kept out as far as this
    # leaves. It is the larger the nearer the sizes are, for there the source may hold as much at
    # the limit as anywhere.
    ridge = (
        (0.05 / step**3 if grain <= 1 else 3e-5)
        * fine
        * (grain / apart)
        * torch.eye(len(taps), dtype=torch.float64)
    )
    kernel = torch.linalg.solve(enlarged.T @ enlarged + ridge, enlarged.T @ wanted)
    return kernel / kernel.sum()


def filtered(samples: Tensor, kernel: Tensor, stride: int = 1) -> Tensor:
    """A strided convolution down the columns of (C,H,W), nothing padded.

    A sum of slices: on a CPU that is several times as fast as torch's convolution of so few
    channels.
    """
    rows = (samples.shape[1] - len(kernel)) // stride + 1
    result = samples.new_zeros(samples.shape[0], rows, samples.shape[2])
    for first, tap in enumerate(kernel.tolist()):
        result.add_(samples[:, first : first + (rows - 1) * stride + 1 : stride], alpha=tap)
    return result


def _cubic(x: Tensor, a: float = -0.75) -> Tensor:
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x < 1, near, torch.where(x < CUBIC, far, 0.0))


def colour(picture: Tensor) -> Tensor:
    """The red, green and blue of a picture (...,C): its first three channels, or its grey three
    times where it has one or two.
    """
    return (
        picture[..., :3]
        if picture.shape[-1] >= 3
        else picture[..., :1].expand(*picture.shape[:-1], 3)
    )


def cut(image: Tensor, matrix: Affine, size: int) -> Tensor:
    """The crop (size,size,C) fp32 of `image` (H,W,C) of any float type and range; the picture's
    edge is repeated beyond it.
    """
    return warp(image.movedim(-1, 0), matrix, size, size).movedim(0, -1)


def reconciled(crop: Tensor, matrix: Affine) -> Tensor:
    """`crop` (C,h,w), changed so that put back into the picture, from which `matrix` leads to it,
    it is cut out as it was.

    A step of iterative back-projection (Irani and Peleg 1991). Cubic convolution with a = -0.75
    puts a ramp up to 0.047 px off, by turns to either side between two pixels. In a crop that is
    enlarged by SHRINKS to WAVES these waves are aliased to longer ones, which the filter cannot
    tell from the picture's own; what that makes of smooth skin is taken off here. Other crops are
    returned as they are.
    """
    if not SHRINKS < reach(matrix) < WAVES:
        return crop
    height, width = crop.shape[1:]
    x1, y1, x2, y2 = bounds(inverse(matrix), width, height)
    left, top = math.floor(x1), math.floor(y1)
    to_crop = compose(matrix, ((1.0, 0.0, left), (0.0, 1.0, top)))
    there = warp(crop, inverse(to_crop), math.ceil(y2) - top, math.ceil(x2) - left)
    return crop.lerp(warp(there, to_crop, height, width), -1)


def cut_all(images: Tensor, frames: Sequence[int], matrices: Sequence[Affine], size: int) -> Tensor:
    """The crops (N,size,size,3) of the pictures images[frames[i]] through matrices[i]; images
    (B,H,W,C), alpha is left out.
    """
    crops = torch.empty(len(matrices), size, size, 3, device=images.device)
    for crop, frame, matrix in zip(crops, frames, matrices, strict=True):
        crop.copy_(cut(colour(images[frame]), matrix, size))
    return crops
