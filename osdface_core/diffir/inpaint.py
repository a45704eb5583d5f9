"""Fills holes by DiffIR: what is not in a hole stays as it is, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chunks import Progress, is_out_of_memory, no_progress
from ..cpu import exact
from ..errors import OSDFaceError
from ..pictures.color import as_given
from ..pictures.picture import all_finite, holes_of, mirrored, rgb_of
from ..pictures.resampling import antialiased
from .enhance import Enhanced, Load, check_whole, log, shrinking
from .membrane import membrane
from .network import INPAINT, DiffIR, start_vector

# Pixels of the shorter side at which a picture is filled: that of CelebA-HQ's faces, that at which
# Places were tested, and the picture's own.
SIDES = ("256", "512", "picture")
LEAST_SIDE = 128
# Peak of the activations for a pixel, in bytes.
BYTES_PER_PIXEL = 6000


@dataclass(frozen=True)
class InpaintOptions:
    """How holes are filled.

    side: one of SIDES.
    feather: pixels, inside of the hole's edge, over which the fill fades into the picture.
    """

    side: str = SIDES[0]
    feather: int = 0


DEFAULT = InpaintOptions()


def check(pictures: Tensor, mask: Tensor, options: InpaintOptions = DEFAULT) -> Tensor:
    """The holes, (B,H,W) of truth values: every pixel where the mask is not 0.

    Raises OSDFaceError for pictures, a mask or options that do not fit.
    """
    check_whole(pictures)
    if options.side not in SIDES:
        raise OSDFaceError(
            f"`working_size` is {options.side}; {', '.join(SIDES)} is wanted: set it so."
        )
    if options.feather < 0:
        raise OSDFaceError(f"`feather` is {options.feather}; 0 or more is wanted: set it so.")
    holes = holes_of(mask)
    count, height, width = pictures.shape[:3]
    if not bool(holes.any()):
        # Of any size: a picture without alpha is loaded with an empty mask of 64 x 64 px.
        return torch.zeros(count, height, width, dtype=torch.bool)
    if holes.shape[1:] != (height, width):
        raise OSDFaceError(
            f"`mask` is {holes.shape[2]} x {holes.shape[1]} px and `image` {width} x {height}; one "
            "size is wanted: make the mask from this picture, or resize it."
        )
    if len(holes) not in (1, count):
        raise OSDFaceError(
            f"`mask` holds {len(holes)} masks and `image` {count} pictures; one mask, or one for "
            "each, is wanted: connect the mask of this batch."
        )
    return holes.expand(count, height, width)


@exact()
def inpaint(
    pictures: Tensor,
    mask: Tensor,
    load: Load,
    options: InpaintOptions = DEFAULT,
    *,
    start: Tensor | None = None,
    progress: Callable[[int], Progress] = lambda total: no_progress,
    out_of_memory: Callable[[BaseException], bool] = is_out_of_memory,
) -> Enhanced:
    """Pictures (B,H,W,C) in [0,1] with their holes filled.

    Every pixel outside of the holes, and every channel beyond the third, is the given one. A
    picture without colour stays so. Where no picture has a hole, no network is loaded. Raises
    OSDFaceError for input that does not fit.

    pictures: any size; the first three channels are colour (one or two: grey).
    mask: (H,W), (1,H,W) or (B,H,W); every pixel that is not 0 is a hole, as in the released code.
    load: gives the network.
    options: the size to work at, and the fading.
    start: (1,256) that the diffusion starts from, for every picture and tile; a fixed one, if None.
    progress: takes the number of steps and gives what is called with 1 after each of them, with the
        picture, and with 0 often in between; what it raises ends the job.
    out_of_memory: whether an error says that a smaller size may work.
    """
    holes = check(pictures, mask, options).to(pictures.device)
    out = pictures.clone()
    wanted: list[int] = holes.flatten(1).any(1).nonzero().flatten().tolist()
    if not wanted:
        return Enhanced(out)
    height, width = pictures.shape[1:3]
    own = min(height, width)
    side = own if options.side == SIDES[-1] else int(options.side)
    network, device = load(BYTES_PER_PIXEL * height * width * side**2 // own**2)
    if network.shape.job != INPAINT:
        raise OSDFaceError(
            "The file holds a network that enlarges or sharpens; one that fills holes is wanted: "
            "choose another file, or take DiffIR Enhance."
        )
    report = progress(len(wanted))
    start = (start_vector() if start is None else start).to(device, network.dtype)
    failed: list[int] = []
    for i in wanted:
        colours = rgb_of(pictures[i]).movedim(-1, 0)[None].float().clamp(0, 1)
        hole = holes[i][None, None].float()
        work = partial(_filled, network, colours, hole, start, partial(report, 0))
        result, side = shrinking(work, side, min(side, LEAST_SIDE), out_of_memory)
        if not all_finite(result)[0]:
            failed.append(i)
            log.warning("Picture %d came out as NaN and is left as it was.", i)
            continue
        fill = as_given(result[0].clamp(0, 1), pictures[i])
        share = _depth(hole, options.feather)[0, 0, ..., None]
        before = out[i, ..., : fill.shape[2]]
        mixed = before.lerp(fill.to(before), share.to(before))
        out[i, ..., : fill.shape[2]] = torch.where(holes[i][..., None], mixed, before)
        report(1, rgb_of(out[i]).movedim(-1, 0))
    return Enhanced(out, tuple(failed))


def _filled(
    network: DiffIR,
    colours: Tensor,
    hole: Tensor,
    start: Tensor,
    tick: Callable[[], None],
    side: int,
) -> Tensor:
    """The picture (1,3,H,W) with its hole filled, as the network sees it at a size.

    network: that fills, on the device of `start`.
    colours: (1,3,H,W) in [0,1].
    hole: (1,1,H,W), 1 in the hole.
    start: (1,256).
    tick: called often; what it raises ends the work.
    side: pixels of the shorter side at which the network works.
    """
    height, width = colours.shape[-2:]
    factor = side / min(height, width)
    size = max(1, round(height * factor)), max(1, round(width * factor))
    # By filters that reach no further for the picture than for the hole: so whatever the hole's
    # pixels have touched is a hole too.
    seen, hollow = (_resized(part, size) for part in (colours, hole))
    hollow = (hollow > 0).float()
    if network.shape.prefilled:
        seen = membrane(seen, hollow)
    given = torch.cat([seen, hollow], 1)
    given = mirrored(given, network.shape.multiple, edge=True).to(start)
    if not network.shape.prefilled:
        given[:, :3] *= 1 - given[:, 3:]
    given = given.contiguous(memory_format=torch.channels_last)
    prior = network.prior(given, start, tick)
    made = network.restore(given, prior, tick)[..., : size[0], : size[1]].to(colours)
    filled = torch.where(hollow > 0, made, seen)
    if size == (height, width):
        return filled
    return antialiased(filled, (height, width), "bicubic")


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    if x.shape[-2:] == size:
        return x
    if size[0] < x.shape[-2] or size[1] < x.shape[-1]:
        return F.interpolate(x, size, mode="area")
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def _depth(hole: Tensor, feather: int) -> Tensor:
    """How much of the fill is taken at each pixel of the hole (1,1,H,W): 1 deeper than `feather`.

    Beyond the picture's edge the hole goes on.
    """
    depth = left = hole
    for _ in range(feather):
        left = -F.max_pool2d(-left, 3, 1, 1)
        depth = depth + left
    return depth / (feather + 1)
