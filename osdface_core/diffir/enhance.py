"""Enlarges or sharpens pictures by DiffIR: whole, or in tiles that share the whole's prior."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..chunks import Progress, is_out_of_memory, no_progress
from ..cpu import exact
from ..errors import OSDFaceError
from ..pictures.color import as_given
from ..pictures.picture import all_finite, check_pictures, mirrored, rgb_of
from ..pictures.resampling import antialiased
from ..pictures.tiles import tile_shares, tile_spans
from .network import AT_ONCE, INPAINT, DiffIR, start_vector

log = logging.getLogger(__name__)

# Pixels of the result a side of the smallest tile, to which memory that runs out may shrink one.
LEAST_TILE = 128
# The same of the pixels whose condition is read at once.
LEAST_AT_ONCE = 2**14
PREVIEW_SIDE = 512
# Peak of the activations for a pixel of the result, in bytes.
BYTES_PER_PIXEL = 6000

# Gives a network and the device that it computes on, with memory made free for so many bytes.
Load = Callable[[int], tuple[DiffIR, torch.device]]


@dataclass(frozen=True)
class EnhanceOptions:
    """How a picture is done.

    tile: pixels of the result a side, 0 for the whole picture at once.
    overlap: pixels that neighbouring tiles share; at most half a tile does.
    """

    tile: int = 768
    overlap: int = 96


DEFAULT = EnhanceOptions()


@dataclass(frozen=True)
class Enhanced:
    """pictures: (B,H,W,C). failed: numbers of those that came out as NaN and are as they were."""

    pictures: Tensor
    failed: tuple[int, ...] = ()


def check(pictures: Tensor, options: EnhanceOptions = DEFAULT) -> None:
    """Raises OSDFaceError for pictures or options that do not fit."""
    check_whole(pictures)
    limits = (
        (
            "tile",
            options.tile,
            options.tile == 0 or options.tile >= LEAST_TILE,
            f"{LEAST_TILE} or more, or 0 for the whole picture at once,",
        ),
        ("overlap", options.overlap, options.overlap >= 0, "0 or more"),
    )
    for name, value, is_right, wanted in limits:
        if not is_right:
            raise OSDFaceError(f"`{name}` is {value}; {wanted} is wanted: set it so.")


def check_whole(pictures: Tensor) -> None:
    """Raises OSDFaceError unless `pictures` is (B,H,W,C) with pixels, all of them finite."""
    check_pictures(pictures)
    if len(pictures) and not min(pictures.shape[1:3]):
        raise OSDFaceError(
            f"`image` is {pictures.shape[2]} x {pictures.shape[1]} px, which holds no pixel; a "
            "picture is wanted: connect another."
        )
    for i, is_finite in enumerate(all_finite(pictures)):
        if not is_finite:
            raise OSDFaceError(
                f"`image` number {i} holds values that are not numbers (NaN or infinite); finite "
                "values in [0,1] are wanted: look for the node before this one that makes them."
            )


def memory_for(pixels: int, options: EnhanceOptions = DEFAULT) -> int:
    """Bytes for a result of so many pixels."""
    return BYTES_PER_PIXEL * (min(pixels, options.tile**2) if options.tile else pixels)


def steps(height: int, width: int, network: DiffIR, options: EnhanceOptions = DEFAULT) -> int:
    """How often `enhance` reports for one picture, as long as memory does not run out."""
    rows, columns = _spans(height, width, network, options.tile, options.overlap)
    return 1 + len(rows) * len(columns)


def _spans(
    height: int, width: int, network: DiffIR, tile: int, overlap: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Rows and columns of the tiles of a padded picture, in pixels of it.

    height: of the picture, before it is padded.
    width: the same.
    network: whose grid the tiles lie on.
    tile: pixels of the result a side; 0 for one tile.
    overlap: pixels of the result.
    """
    grain, scale = network.shape.multiple, network.shape.scale
    sides = [(side + grain - 1) // grain for side in (height, width)]
    most = max(1, tile // (grain * scale))
    if not tile or sides[0] * sides[1] <= most * most:
        most = max(sides)
    shared = min(-(-overlap // (grain * scale)), most // 2)
    rows, columns = (
        [(start * grain, stop * grain) for start, stop in tile_spans(side, most, shared)]
        for side in sides
    )
    return rows, columns


@exact()
def enhance(
    pictures: Tensor,
    load: Load,
    options: EnhanceOptions = DEFAULT,
    *,
    start: Tensor | None = None,
    progress: Callable[[int], Progress] = lambda total: no_progress,
    out_of_memory: Callable[[BaseException], bool] = is_out_of_memory,
) -> Enhanced:
    """(B,H,W,C) in [0,1] -> (B,H*scale,W*scale,C), by a network for enlarging or deblurring.

    Channels beyond the third, such as alpha, are only enlarged. A picture without colour stays so.
    Pictures are done one by one. Raises OSDFaceError for input that does not fit.

    pictures: any size; the first three channels are colour (one or two: grey).
    load: gives the network.
    options: tiles.
    start: (1,256) that the diffusion starts from, for every picture and tile; a fixed one, if None.
    progress: takes the number of steps and gives what is called with 1 after each of them, with the
        picture as far as it is where that shows something, and with 0 often in between; what it
        raises ends the job.
    out_of_memory: whether an error says that a smaller tile may work.
    """
    check(pictures, options)
    count, height, width, channels = pictures.shape
    network, device = load(memory_for(16 * height * width, options))
    shape, scale = network.shape, network.shape.scale
    if shape.job == INPAINT:
        raise OSDFaceError(
            "The file holds a network that fills holes; one that enlarges or sharpens is wanted: "
            "choose another file, or take DiffIR Inpaint."
        )
    size = height * scale, width * scale
    out = torch.empty(count, *size, channels, device=pictures.device, dtype=pictures.dtype)
    report = progress(count * steps(height, width, network, options))
    tick = partial(report, 0)
    start = (start_vector() if start is None else start).to(device, network.dtype)
    failed: list[int] = []
    # What memory has held, also for the next picture.
    longest = scale * -(-max(height, width) // shape.multiple) * shape.multiple
    tile, at_once = min(options.tile or longest, longest), AT_ONCE
    for i in range(count):
        colours = rgb_of(pictures[i]).movedim(-1, 0).float().clamp(0, 1)
        lq = mirrored(colours[None], shape.multiple, edge=False)
        read = partial(network.prior, lq.to(start), start, tick)
        prior, at_once = shrinking(read, at_once, LEAST_AT_ONCE, out_of_memory)
        report(1)
        work = partial(_restored, network, lq, prior, report, options.overlap)
        result, tile = shrinking(work, tile, LEAST_TILE, out_of_memory)
        result = result[:, : size[0], : size[1]].to(out.device)
        if not all_finite(result[None])[0]:
            failed.append(i)
            result = antialiased(colours[None], size, "bicubic")[0]
            log.warning("Picture %d came out as NaN and is only enlarged.", i)
        done = as_given(result.clamp(0, 1), pictures[i])
        colour = done.shape[2]
        out[i, ..., :colour] = done
        if colour < channels:
            out[i, ..., colour:] = _enlarged(pictures[i, ..., colour:], size)
    return Enhanced(out, tuple(failed))


def _enlarged(channels: Tensor, size: tuple[int, int]) -> Tensor:
    """(H,W,C) -> (*size,C) in [0,1], or as it was where that is its size."""
    if channels.shape[:2] == size:
        return channels
    given = channels.movedim(-1, 0)[None].float()
    larger = antialiased(given, size, "bicubic")[0]
    return larger.clamp(0, 1).movedim(0, -1)


def shrinking(
    work: Callable[[int], Tensor],
    size: int,
    least: int,
    out_of_memory: Callable[[BaseException], bool],
) -> tuple[Tensor, int]:
    """What `work` gives for `size`, or for the first half of it that memory holds, and that size.

    work: takes a size.
    size: that is tried first.
    least: at which the error is raised.
    out_of_memory: whether an error is of that kind.
    """
    while True:
        try:
            return work(size), size
        except Exception as error:
            if size <= least or not out_of_memory(error):
                raise
        # Outside of `except`, where the traceback would keep the failed tensors alive.
        log.warning("Out of memory at a size of %d; going on with half.", size)
        size = max(size // 2, least)


def _restored(
    network: DiffIR, lq: Tensor, prior: Tensor, report: Progress, overlap: int, tile: int
) -> Tensor:
    """The result (3,H*scale,W*scale) of a padded picture, on the device of the picture.

    network: that restores.
    lq: (1,3,H,W) in [0,1].
    prior: (1,256), on the network's device.
    report: called with 1 after each tile.
    overlap: pixels of the result that tiles share.
    tile: pixels of the result a side.
    """
    scale, tick = network.shape.scale, partial(report, 0)
    rows, columns = _spans(lq.shape[-2], lq.shape[-1], network, tile, overlap)
    total = torch.zeros(3, lq.shape[-2] * scale, lq.shape[-1] * scale, device=lq.device)
    step = -(-max(total.shape) // PREVIEW_SIDE)
    shares = [
        tile_shares([(start * scale, stop * scale) for start, stop in spans])
        for spans in (rows, columns)
    ]
    for (top, bottom), down in zip(rows, shares[0], strict=True):
        for (left, right), across in zip(columns, shares[1], strict=True):
            tick()
            given = lq[..., top:bottom, left:right].to(prior)
            given = given.contiguous(memory_format=torch.channels_last)
            part = network.restore(given, prior, tick)[0].to(total)
            place = total[:, top * scale : bottom * scale, left * scale : right * scale]
            place += part * torch.outer(down, across).to(total)
            report(1, total[:, ::step, ::step])
    return total
