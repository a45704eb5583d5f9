"""Enlarges and restores whole pictures in one step, conditioned on a text (OSEDiff, section 3)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..chunks import Progress, no_progress
from ..errors import OSDFaceError
from ..pictures.color import as_given, coarse_part, match_luminance
from ..pictures.picture import all_finite, check_pictures, rgb_of
from ..pictures.resampling import antialiased
from ..sd21.backbone import SIDE, STRIDE, TEXT_WIDTH, TOKENS, VISUAL_MINIMUM, Backbone
from ..sd21.one_step import Restored, padded, retry_in_fp32
from ..sd21.tiles import OVERLAP, TILE, denoise_in_tiles, in_tiles, tile_starts

log = logging.getLogger(__name__)

# The timestep that the weights were trained at.
TIMESTEP = 999
MAX_SCALE = 8.0
COLOR_MATCHES = ("adain", "wavelet", "none", "luminance")
# Pixels a side of the smallest tile, to which memory that runs out may shrink one.
LEAST_TILE = 256
# The VAE takes this times the tile's side whole, as the released encoder does (1024 px for 768).
VAE_WHOLE = 4 / 3
# A thin strip is not enlarged for its short side beyond this many pixels of its long one.
LONGEST = 4096
# Pictures that are encoded before the first is denoised, so that networks change places seldom.
GROUP = 16
PREVIEW_SIDE = 512
EPSILON = 1e-5


@dataclass(frozen=True)
class UpscaleOptions:
    """How a picture is enlarged.

    scale: of the result's sides, 1..8.
    tile: pixels of the result a side, 0 for the whole picture at once.
    overlap: pixels that neighbouring tiles share; at most half a tile does.
    color_match: one of COLOR_MATCHES.
    """

    scale: float = 4.0
    tile: int = TILE * STRIDE
    overlap: int = OVERLAP * STRIDE
    color_match: str = COLOR_MATCHES[0]


DEFAULT = UpscaleOptions()


# Sizes


def result_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """The (height, width) of the result."""
    return max(1, round(height * scale)), max(1, round(width * scale))


def working_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """The (height, width) at which the networks see a picture: the result's, or larger.

    A result with a side under 512 px is made with that side at 512, for which the networks were
    trained, and shrunk afterwards.
    """
    height, width = result_size(height, width, scale)
    short, long = sorted((height, width))
    factor = max(1.0, min(SIDE / short, LONGEST / long))
    return round(height * factor), round(width * factor)


def steps(height: int, width: int, options: UpscaleOptions) -> int:
    """How often `upscale` reports for one picture, as long as memory does not run out."""
    rows, columns = (
        math.ceil(side / STRIDE) for side in working_size(height, width, options.scale)
    )
    unet, vae = _first_tiles(rows, columns, options)

    def count(tile: int) -> int:
        if rows * columns <= tile * tile:
            return 1
        side = min(tile, rows, columns)
        shared = _shared(options, side)
        return len(tile_starts(rows, side, shared)) * len(tile_starts(columns, side, shared))

    return count(unet) + 2 * count(vae)


def _first_tiles(rows: int, columns: int, options: UpscaleOptions) -> tuple[int, int]:
    """Latents a side of the first tile that is tried: of the UNet, and of the VAE."""
    whole = max(rows, columns)
    if not options.tile:
        return whole, whole
    tile = options.tile // STRIDE
    fits_vae = rows * columns <= (VAE_WHOLE * tile) ** 2
    return tile, whole if fits_vae else tile


def _shared(options: UpscaleOptions, tile: int) -> int:
    """Latents that neighbouring tiles of so many latents share."""
    return min(options.overlap // STRIDE, tile // 2)


# Pixels


def resized(pictures: Tensor, height: int, width: int) -> Tensor:
    """(B,C,H,W) -> (B,C,height,width) fp32 within the pictures' own range of [0,1].

    Cubic convolution with a = -0.5 and, for a smaller picture, a wider kernel: Pillow's BICUBIC, by
    which the released code enlarges.
    """
    pictures = pictures.float()
    if pictures.shape[-2:] == (height, width):
        return pictures
    done = antialiased(pictures, (height, width), "bicubic")
    return done.clamp(0, 1)


def match_color(picture: Tensor, original: Tensor, method: str) -> Tensor:
    """`picture` in the colours of `original`, both (3,H,W) in [0,1], as the released code does it.

    adain gives each channel the original's mean and standard deviation (Huang and Belongie 2017),
    wavelet keeps the picture's detail and takes the rest from the original (Wang et al. 2023).
    luminance, which the released code lacks, takes the light from the picture and the colours from
    the original.
    """
    if method == "adain":
        (mean, std), (wanted_mean, wanted_std) = map(_mean_std, (picture, original))
        picture = (picture - mean) / std * wanted_std + wanted_mean
    elif method == "wavelet":
        picture = picture + coarse_part(original - picture)
    elif method == "luminance":
        picture = match_luminance(picture.movedim(0, -1), original.movedim(0, -1)).movedim(-1, 0)
    return picture.clamp(0, 1)


def _mean_std(picture: Tensor) -> tuple[Tensor, Tensor]:
    values = picture.flatten(1)
    variance, mean = torch.var_mean(values, 1, keepdim=True)
    return mean[..., None], (variance + EPSILON).sqrt()[..., None]


# Input


def check(pictures: Tensor, prompts: Tensor, options: UpscaleOptions) -> None:
    """Raises OSDFaceError for pictures, prompts or options that do not fit."""
    check_pictures(pictures)
    for i, is_whole in enumerate(all_finite(pictures)):
        if not is_whole:
            raise OSDFaceError(
                f"`image` number {i} holds values that are not numbers (NaN or infinite); finite "
                "values in [0,1] are wanted: look for the node before this one that makes them."
            )
    if len(pictures) and not min(pictures.shape[1:3]):
        raise OSDFaceError(
            f"`image` is {pictures.shape[2]} x {pictures.shape[1]} px, which holds no pixel; a "
            "picture is wanted: connect another."
        )
    check_prompts(prompts, len(pictures))
    limits = (
        ("upscale", options.scale, 1 <= options.scale <= MAX_SCALE, f"1 to {MAX_SCALE:g}"),
        (
            "tile",
            options.tile,
            options.tile == 0 or options.tile >= LEAST_TILE,
            f"{LEAST_TILE} or more, or 0 for the whole picture at once,",
        ),
        ("overlap", options.overlap, options.overlap >= 0, "0 or more"),
        (
            "color_match",
            options.color_match,
            options.color_match in COLOR_MATCHES,
            " or ".join(COLOR_MATCHES),
        ),
    )
    for name, value, is_right, wanted in limits:
        if not is_right:
            raise OSDFaceError(f"`{name}` is {value}; {wanted} is wanted: set it so.")


def check_prompts(prompts: Tensor, count: int) -> None:
    """Raises OSDFaceError unless `prompts` is a text (1 or count,77,1024), or of more tokens."""
    remedy = "connect the CLIP Text Encode of the same checkpoint; an empty text is right."
    shape = tuple(prompts.shape)
    if len(shape) != 3 or shape[2] != TEXT_WIDTH or not shape[1] or shape[1] % TOKENS:
        raise OSDFaceError(
            f"`conditioning` is {shape}; a text for Stable Diffusion 2.1, (1,{TOKENS},"
            f"{TEXT_WIDTH}), is wanted: {remedy}"
        )
    if len(prompts) and not bool(prompts.isfinite().all()):
        raise OSDFaceError(
            f"`conditioning` holds values that are not numbers (NaN or infinite); {remedy}"
        )
    if len(prompts) and float(prompts.min()) >= VISUAL_MINIMUM:
        raise OSDFaceError(
            f"`conditioning` holds OSDFace's visual prompts and OSEDiff wants a text; {remedy}"
        )
    if len(prompts) not in (1, count):
        raise OSDFaceError(
            f"`conditioning` holds {len(prompts)} texts and `image` {count} pictures; one text, or "
            f"one for each, is wanted: {remedy}"
        )


# The work


def upscale(
    pictures: Tensor,
    prompts: Tensor,
    backbone: Backbone,
    options: UpscaleOptions = DEFAULT,
    *,
    progress: Progress | None = None,
) -> Restored:
    """Enlarges and restores every picture in one step; (B,H,W,C) become (B,H*scale,W*scale,C).

    Channels beyond the third, such as alpha, are only enlarged. A picture without colour stays so.
    Raises OSDFaceError for input that does not fit together.

    pictures: (B,H,W,C) in [0,1], any size; the first three channels are colour (one or two: grey).
    prompts: (1,77,1024) or (B,77,1024), the last hidden state of the text encoder.
    backbone: the networks with OSEDiff's adapters, whose `encode` uses those of the encoder.
    options: scale, tiles and colours.
    progress: called with 1 for each tile that is done, with the picture as far as it is where that
        shows something; with 0 in between; what it raises ends the job.
    """
    check(pictures, prompts, options)
    count, height, width, channels = pictures.shape
    size = result_size(height, width, options.scale)
    working = working_size(height, width, options.scale)
    out = torch.empty(count, *size, channels, device=pictures.device, dtype=pictures.dtype)
    if not count:
        return Restored(out)
    rows, columns = (math.ceil(side / STRIDE) for side in working)
    unet, vae = _first_tiles(rows, columns, options)
    # The tiles' sides that memory has held, by stage.
    sides = {"encode": vae, "denoise": unet, "decode": vae}
    report = progress or no_progress
    failed: list[int] = []

    def shrinking(stage: str, work: Callable[[int], Tensor]) -> Tensor:
        while True:
            side = sides[stage]
            try:
                return work(side)
            except Exception as error:
                if side <= LEAST_TILE // STRIDE or not backbone.out_of_memory(error):
                    raise
            # Outside of `except`, where the traceback would keep the failed tile's tensors alive.
            sides[stage] = max(side // 2, LEAST_TILE // STRIDE)
            log.warning(
                "Out of memory with tiles of %d px; going on with %d.",
                side * STRIDE,
                sides[stage] * STRIDE,
            )

    def network_input(i: int) -> Tensor:
        return resized(rgb_of(pictures[i : i + 1]).movedim(-1, 1), *working).clamp(0, 1)

    def encode(i: int) -> Tensor:
        pixels = padded(network_input(i))

        def one(rows: slice, columns: slice) -> Tensor:
            report(0)
            latents = backbone.encode(pixels[..., _pixels(rows), _pixels(columns)].contiguous())
            report(1)
            return latents

        return shrinking("encode", lambda side: _tiled(one, rows, columns, side, options))

    def denoise(i: int, latents: Tensor) -> Tensor:
        text = prompts[min(i, len(prompts) - 1)][None]

        def work(side: int) -> Tensor:
            done = -1

            def before(_: int) -> None:
                nonlocal done
                done += 1
                report(min(done, 1))

            x0 = denoise_in_tiles(
                backbone,
                latents,
                text,
                TIMESTEP,
                tile=side,
                overlap=_shared(options, min(side, rows, columns)),
                progress=before,
            )
            report(1)
            return x0

        return shrinking("denoise", work)

    def decode(i: int, x0: Tensor) -> None:
        pixels = network_input(i)
        step = math.ceil(max(working) / PREVIEW_SIDE)
        seen = pixels[0, :, ::step, ::step].clone()

        def one(rows: slice, columns: slice) -> Tensor:
            report(0)
            part = backbone.decode(x0[..., rows, columns])
            first = [-at.start * STRIDE % step for at in (rows, columns)]
            shown = part[0, :, first[0] :: step, first[1] :: step].to(seen.device)
            top, left = (math.ceil(at.start * STRIDE / step) for at in (rows, columns))
            place = seen[:, top : top + shown.shape[1], left : left + shown.shape[2]]
            place.copy_(shown[:, : place.shape[1], : place.shape[2]])
            report(1, seen)
            return part

        decoded = shrinking("decode", lambda side: _tiled(one, rows, columns, side, options))
        picture = decoded[0, :, : working[0], : working[1]].to(pixels.device)
        if bool(picture.isfinite().all()):
            picture = match_color(picture, pixels[0], options.color_match)
        else:
            failed.append(i)
            picture = pixels[0]
        out[i] = _with_channels(resized(picture[None], *size)[0], pictures[i])

    def work(which: list[int]) -> None:
        latents = [encode(i) for i in which]
        latents = [denoise(i, latent) for i, latent in zip(which, latents, strict=True)]
        for i, x0 in zip(which, latents, strict=True):
            decode(i, x0)

    for start in range(0, count, GROUP):
        work(list(range(start, min(start + GROUP, count))))
    again, starved = retry_in_fp32(backbone, failed, lambda i: work([i]))
    for i in failed:
        log.warning("Picture %d came out as NaN and is only enlarged.", i)
    return Restored(out, tuple(failed), tuple(i for i in again if i not in failed), starved)


def _pixels(latents: slice) -> slice:
    return slice(latents.start * STRIDE, latents.stop * STRIDE)


def _tiled(
    work: Callable[[slice, slice], Tensor],
    rows: int,
    columns: int,
    side: int,
    options: UpscaleOptions,
) -> Tensor:
    shared = _shared(options, min(side, rows, columns))
    return in_tiles(work, rows, columns, tile=side, overlap=shared)


def _with_channels(picture: Tensor, given: Tensor) -> Tensor:
    """The picture (3,H,W) as (H,W,C), with the channels and the lack of colour of `given`."""
    colours = as_given(picture, given)
    extra = given[..., colours.shape[2] :].movedim(-1, 0)
    if not len(extra):
        return colours
    extra = resized(extra[None].to(picture.device), *picture.shape[1:])[0]
    return torch.cat([colours, extra.movedim(0, -1)], -1)
