"""Resamples pictures through affine maps.

Coordinates are (x, y) in pixels with pixel centres at .5: the pixel in row j, column i spans
[i,i+1] x [j,j+1].
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chunks import is_out_of_memory
from .geometry import Affine, bounds, compose, inverse, scale_of, scaling, translated

# Reach to each side: of the cubic kernel in source pixels, of the shrinking filter in pixels of the
# result.
CUBIC_RADIUS = 2
FILTER_RADIUS = 6
# The part of the shrinking filter that counts, in the same pixels: its waves beyond carry less than
# a tenth of an edge.
WAVES = 3
# What devices say of an operator that they lack.
LACKS = re.compile("not (currently )?(implemented|supported)|[Uu]nsupported")
# A picture is shrunk up to this factor by interpolation alone: the filter would gain 2 dB there,
# for four times the samples.
MAX_UNFILTERED = 1.2
# Where an enlargement lies between MAX_UNFILTERED and this, the waves that cubic interpolation
# leaves are aliased to wavelengths that a picture itself may have (see back_project).
MAX_RIPPLED = 1.65
# Samples computed at once, which bounds the memory for a picture of any size.
SAMPLES_AT_ONCE = 2**22
# Fewest rows that are worth a thread of their own.
MIN_STRIP = 32


def warp(
    source: Tensor,
    matrix: Affine,
    height: int,
    width: int,
    grain: float = 1.0,
    device: torch.device | None = None,
) -> Tensor:
    """Resamples `source` through an affine map: (C,H,W) -> (C,height,width) fp32.

    Cubic convolution (Keys 1981, a = -0.75 as in OpenCV) where the result is as large or larger.
    Where it is smaller, the least-squares counterpart of that: the picture that, enlarged by cubic
    convolution, comes nearest to the source (Unser, Aldroubi and Eden 1995). So nothing is aliased,
    and an enlarged picture comes back as it was.

    source: (C,H,W), any range; beyond its edge the outermost pixels are repeated.
    matrix: takes a point of the source to its place in the result.
    height: of the result.
    width: of the result.
    grain: width, in pixels of the result, of the pixels that the source was enlarged from; 1 if the
        result is to have those very pixels, as in a picture that was not resized since.
    device: that computes and holds the result; the source's, if None. Only the part of the source
        that is needed is copied there.
    """
    back = inverse(matrix)
    step = scale_of(back)
    x1, y1, x2, y2 = bounds(back, width, height)
    margin = (
        math.ceil((FILTER_RADIUS if step > MAX_UNFILTERED else 0) * step * math.sqrt(2))
        + CUBIC_RADIUS
        + 1
    )
    left, right = _span(x1 - margin, x2 + margin, source.shape[2])
    top, bottom = _span(y1 - margin, y2 + margin, source.shape[1])
    region = source[:, top:bottom, left:right].to(device or source.device, torch.float32)
    back = translated(back, -left, -top)
    # Shrunk by a whole number first, to pixels at most a third as wide as the result's: the time
    # then depends on the result's size, not on the source's.
    block = max(1, int(step / 3))
    if block > 1:
        region = F.pad(
            region[None],
            (0, -region.shape[2] % block, 0, -region.shape[1] % block),
            mode="replicate",
        )
        size = region.shape[2] // block, region.shape[3] // block
        region = antialiased(region, size, "bicubic")[0]
        back = compose(scaling(1 / block, 1 / block), back)
    if step <= MAX_UNFILTERED:
        fine, border = 1, 0
    else:
        fine, border = max(3, math.ceil(1.25 * step / block)), FILTER_RADIUS
        kernel = _shrinking_filter(step, block, fine, max(grain, 1 / step))
    result = torch.empty(source.shape[0], height, width, device=region.device)
    columns = (width + 2 * border) * fine
    at_once = max(1, SAMPLES_AT_ONCE // (columns * fine) - 2 * border)
    for first in range(0, height, at_once):
        rows = min(at_once, height - first)
        to_fine = (1 / fine, 0.0, -border), (0.0, 1 / fine, first - border)
        samples = sample_affine(region, compose(back, to_fine), (rows + 2 * border) * fine, columns)
        if step > MAX_UNFILTERED:
            samples = filter_columns(samples, kernel, fine).transpose(1, 2).contiguous()
            samples = filter_columns(samples, kernel, fine).transpose(1, 2)
        result[:, first : first + rows] = samples
    return result


def touched(holes: Tensor, matrix: Affine, height: int, width: int) -> Tensor:
    """Where the result of `warp` shows something of the picture's holes: true in (height,width).

    That is every pixel whose kernel reaches a hole, the shrinking filter's up to WAVES, so that
    nothing of a hole is lost however thin it is. A pixel whose centre lies outside of the source is
    never one.

    holes: (H,W) of truth values.
    matrix: takes a point of the source to its place in the result.
    height: of the result.
    width: of the result.
    """
    back = inverse(matrix)
    step = scale_of(back)
    reach = WAVES * step if step > MAX_UNFILTERED else CUBIC_RADIUS
    across = torch.arange(width, dtype=torch.float64) + 0.5
    down = (torch.arange(height, dtype=torch.float64) + 0.5)[:, None]
    inside = torch.ones(height, width, dtype=torch.bool)
    spans = []
    for (from_x, from_y, shift), size in zip(back, (holes.shape[1], holes.shape[0]), strict=True):
        place = from_x * across + from_y * down + shift
        inside &= (place >= 0) & (place <= size)
        # The first and past the last of the pixels whose centres lie within reach.
        ends = (place - reach - 0.5).floor() + 1, (place + reach - 0.5).ceil()
        spans.append([end.clamp(0, size).long().to(holes.device) for end in ends])
    (left, right), (top, bottom) = spans
    # How many holes lie above and to the left of each corner between four pixels.
    count = F.pad(holes.cumsum(0, dtype=torch.int32).cumsum(1, dtype=torch.int32), (1, 0, 1, 0))
    found = count[bottom, right] - count[top, right] - count[bottom, left] + count[top, left]
    return (found > 0) & inside.to(holes.device)


def antialiased(pictures: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """torch's interpolation of (B,C,H,W) to (B,C,*size), with a wider kernel where it shrinks.

    mode: "bilinear" or "bicubic".
    """
    return _here_or_on_cpu(
        lambda pictures: F.interpolate(pictures, size, mode=mode, antialias=True), pictures
    )


def _here_or_on_cpu(work: Callable[..., Tensor], *given: Tensor) -> Tensor:
    """What `work` gives on the tensors' own device, or on the CPU if that one lacks the operator.

    Apple's MPS does, up to torch 2.10: it has no antialiased interpolation, and no cubic sampling
    or padding by the border's pixels.
    """
    try:
        return work(*given)
    except RuntimeError as error:
        device = given[0].device
        lacks = isinstance(error, NotImplementedError) or LACKS.search(str(error))
        if device.type == "cpu" or is_out_of_memory(error) or not lacks:
            raise
    return work(*(tensor.cpu() for tensor in given)).to(device)


def _span(low: float, high: float, size: int) -> tuple[int, int]:
    """First and past-the-last pixel of range(size) between low and high, at least one pixel."""
    first = min(max(math.floor(low), 0), size - 1)
    return first, max(min(math.ceil(high), size), first + 1)


def sample_affine(
    source: Tensor,
    back: Affine,
    height: int,
    width: int,
    mode: str = "bicubic",
) -> Tensor:
    """Interpolates `source` at the result's pixel centres: (C,H,W) -> (C,height,width) fp32.

    Nothing is smoothed: for a smaller result take `warp`. Beyond the edge the outermost pixels are
    repeated.

    source: (C,H,W) fp32.
    back: takes a point of the result to its place in the source.
    height: of the result.
    width: of the result.
    mode: as in torch's grid_sample.
    """
    # torch shares the pictures of a batch among the CPU's threads, not the rows of one picture:
    # strips of it are made a batch.
    strips = (
        max(1, min(torch.get_num_threads(), height // MIN_STRIP))
        if source.device.type == "cpu"
        else 1
    )
    rows = math.ceil(height / strips)
    grid = torch.empty(strips * rows, width, 2, device=source.device)
    across = torch.arange(width, dtype=torch.float64) + 0.5
    down = torch.arange(strips * rows, dtype=torch.float64) + 0.5
    for axis, ((from_x, from_y, shift), size) in enumerate(
        zip(back, (source.shape[2], source.shape[1]), strict=True)
    ):
        # fp64 until a row's and a column's part are added: at 8000 px that keeps a position to
        # 0.001 px without a table in fp64.
        row = ((from_x * across + shift) * (2 / size) - 1).float().to(source.device)
        column = (from_y * down * (2 / size)).float().to(source.device)
        torch.add(row[None, :], column[:, None], out=grid[:, :, axis])
    pictures = source.expand(strips, *source.shape)

    def sample(pictures: Tensor, grid: Tensor) -> Tensor:
        return F.grid_sample(pictures, grid, mode, padding_mode="border", align_corners=False)

    result = _here_or_on_cpu(sample, pictures, grid.view(strips, rows, width, 2))
    return result.transpose(0, 1).reshape(source.shape[0], strips * rows, width)[:, :height]


def _shrinking_filter(step: float, block: int, fine: int, grain: float) -> Tensor:
    """The filter (fp64) from `fine` samples a pixel to pixels of `step` source pixels each.

    The samples are taken from the source after torch has shrunk it `block` times. By ridge
    regression, an enlarged pixel of width `grain`, at each place that it may have had, is filtered
    to the value that the enlargement has at the result pixel's centre; for a smaller grain, to its
    mean over the part of the pixel that makes the result as sharp as a pixel.
    """
    taps = (
        (torch.arange((2 * FILTER_RADIUS + 1) * fine, dtype=torch.float64) + 0.5) / fine
        - FILTER_RADIUS
        - 0.5
    )
    same = abs(grain - 1) < 1e-3
    grain = 1.0 if same else max(grain, 0.25)
    apart = grain if same else grain / 8
    count = math.ceil((FILTER_RADIUS + CUBIC_RADIUS * grain + 1) / apart)
    places = torch.arange(-count, count + 1, dtype=torch.float64)[:, None] * apart
    # The samples themselves come from cubic interpolation, which on average convolves the source
    # with that kernel, after a shrinking with another cubic kernel.
    blur = torch.linspace(-2 * CUBIC_RADIUS, 2 * CUBIC_RADIUS, 81, dtype=torch.float64)
    weight = _cubic_kernel(blur)
    if block > 1:
        pixels = (
            torch.arange(2 * CUBIC_RADIUS * block, dtype=torch.float64) + 0.5
        ) / block - CUBIC_RADIUS
        weight = (_cubic_kernel(blur[:, None] - pixels) * _cubic_kernel(pixels, -0.5)).sum(1)
    weight = weight / weight.sum()
    enlarged = (
        _cubic_kernel((taps - places - blur[:, None, None] * block / step) / grain)
        * weight[:, None, None]
    ).sum(0)
    within = torch.linspace(-0.5, 0.5, 17, dtype=torch.float64) * math.sqrt(max(0.0, 1 - grain**2))
    wanted = _cubic_kernel((within - places) / grain).mean(1)
    # The ridge keeps out what else the source may hold. It is larger the nearer the two sizes are:
    # there the source may hold as much near the limit of resolution as anywhere.
    ridge = (
        (0.05 / step**3 if grain <= 1 else 3e-5)
        * fine
        * (grain / apart)
        * torch.eye(len(taps), dtype=torch.float64)
    )
    kernel = torch.linalg.solve(enlarged.T @ enlarged + ridge, enlarged.T @ wanted)
    return kernel / kernel.sum()


def filter_columns(samples: Tensor, kernel: Tensor, stride: int = 1) -> Tensor:
    """A strided convolution down the columns of (C,H,W), without padding.

    A sum of slices: on a CPU several times as fast as torch's convolution of so few channels.
    """
    rows = (samples.shape[1] - len(kernel)) // stride + 1
    result = samples.new_zeros(samples.shape[0], rows, samples.shape[2])
    for first, tap in enumerate(kernel.tolist()):
        result.add_(samples[:, first : first + (rows - 1) * stride + 1 : stride], alpha=tap)
    return result


def _cubic_kernel(x: Tensor, a: float = -0.75) -> Tensor:
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x < 1, near, torch.where(x < CUBIC_RADIUS, far, 0.0))


def back_project(crop: Tensor, matrix: Affine) -> Tensor:
    """`crop` (C,h,w), changed so that pasting it and cutting it out again gives it back as it was.

    matrix: from the picture that it is pasted into to the crop. A step of iterative back-projection
    (Irani and Peleg 1991). Cubic convolution with a = -0.75 moves a ramp by up to 0.047 px, to
    alternating sides between two pixels. In a crop enlarged by MAX_UNFILTERED to MAX_RIPPLED these
    waves are aliased to longer ones, which the filter cannot tell from the picture's own; their
    trace in smooth skin is subtracted here. Other crops are returned as they are.
    """
    if not MAX_UNFILTERED < scale_of(matrix) < MAX_RIPPLED:
        return crop
    height, width = crop.shape[1:]
    x1, y1, x2, y2 = bounds(inverse(matrix), width, height)
    left, top = math.floor(x1), math.floor(y1)
    to_crop = compose(matrix, ((1.0, 0.0, left), (0.0, 1.0, top)))
    there = warp(crop, inverse(to_crop), math.ceil(y2) - top, math.ceil(x2) - left)
    return crop.lerp(warp(there, to_crop, height, width), -1)
