"""Pastes restored crops back into their pictures, changing only pixels under the mask."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..chunks import Progress, is_out_of_memory, no_progress, on_first
from ..errors import OSDFaceError
from ..pictures.color import COLOR_MATCHES, match_color
from ..pictures.geometry import Affine, bounds, compose, inverse, scale_of, scaling, translated
from ..pictures.picture import all_finite, check_pictures, rgb_of, value_range
from ..pictures.resampling import antialiased, back_project, sample_affine, warp
from ..pictures.tone import LUMA, tone_curve
from .face import Faces, has_place
from .face_parser import feather_mask

log = logging.getLogger(__name__)

MASK_TYPES = ("parsing", "ellipse", "box")

# The ellipse of a face in the FFHQ crop, as fractions of its side: chin and ears lie inside, the
# crop's border outside.
ELLIPSE_CENTRE = (0.5, 0.52)
ELLIPSE_RADII = (0.42, 0.47)
PARSED_AT_ONCE = 8

Parser = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PasteOptions:
    """How restored faces are put into their pictures.

    strength: how much of the restored face shows, 0..1.
    mask_type: one of MASK_TYPES.
    feather: width of the mask's soft edge, as a fraction of the crop's side; it lies inside of the
        mask, whose weight is 0 at the crop's border.
    color_match: one of COLOR_MATCHES, towards the picture's own colours inside of the mask. Where
        a face lies in a part of one tone (black-and-white, sepia), it keeps that tone in any case.
    keep_detail: how much of the picture's own detail stays that is finer than the crop can hold, in
        faces larger than the crop, 0..1.
    """

    strength: float = 1.0
    mask_type: str = "parsing"
    feather: float = 0.1
    color_match: str = "none"
    keep_detail: float = 0.0


DEFAULT = PasteOptions()


@dataclass(frozen=True)
class _Patch:
    """A restored face at its place in a picture.

    rows, columns: the place.
    pixels: (h,w,3) fp32.
    weight: (h,w) fp32, 0..1.
    """

    rows: slice
    columns: slice
    pixels: Tensor
    weight: Tensor


def paste(
    images: Tensor,
    faces: Faces,
    restored: Tensor,
    options: PasteOptions = DEFAULT,
    *,
    keep: Tensor | None = None,
    parser: Parser | None = None,
    skip_unchanged: bool = True,
    device: torch.device | None = None,
    out_of_memory: Callable[[BaseException], bool] = is_out_of_memory,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Pastes every restored face into its picture.

    Returns the pictures, of the same type, and the mask (B,H,W) fp32 of the weights that were used.
    A pixel whose weight is 0 keeps its bits; without a face the very `images` come back.
    Overlapping faces share a pixel by their weights, whatever their order. A restored face that is
    not finite is left out with a warning. Raises OSDFaceError if the inputs do not fit together.

    images: (B,H,W,C), any float type and range: the pictures that the faces were found in, or the
        same enlarged or shrunk; the scale is taken from their size. The first three channels are
        colour (one or two: grey), further ones stay as they are.
    faces: where the N faces are.
    restored: (N,S,S,3), S any size.
    options: strength, mask and colours.
    keep: (B,H,W) or (1,H,W) in [0,1], 1 where the picture must stay; of another size, it is
        resized.
    parser: needed for the mask "parsing": crops (n,S,S,3) -> face maps (n,h,w), 1 where a pixel is
        face, as face_parser.parse_faces gives them. It is given a few crops at a time.
    skip_unchanged: a restored crop that equals its face's own crop bit for bit stands for a face
        that was not restored, and is not pasted.
    device: that resamples the crops; the pictures', if None. Only the faces' places go there.
    out_of_memory: tells whether an error says that the pictures' own device may do it.
    progress: called with 1 and the restored crop (3,S,S) for each face; what it raises ends the
        job.
    """
    check(images, faces, restored, options, keep, parser)
    frames, height, width = images.shape[:3]
    mask = torch.zeros(frames, height, width, device=images.device)
    report = progress or no_progress
    device = device or images.device
    chosen = _pasted(faces, restored, skip_unchanged)
    report(len(faces) - len(chosen))
    if not chosen or options.strength <= 0:
        report(len(chosen))
        return images, mask
    chosen.sort(key=lambda i: faces.faces[i].frame)
    detail = min(max(options.keep_detail, 0.0), 1.0)
    options = replace(options, strength=min(options.strength, 1.0), keep_detail=detail)
    from_image = scaling(faces.width / width, faces.height / height)
    to_restored = scaling(restored.shape[2] / faces.crop_size, restored.shape[1] / faces.crop_size)
    out = images.clone()
    total = torch.empty(height, width, device=images.device)
    masks = (
        _parsed_masks(restored, chosen, parser, options.feather, device)
        if options.mask_type == "parsing" and parser
        else itertools.repeat(None)
    )
    members = zip(chosen, masks, strict=False)
    for frame, of_frame in itertools.groupby(
        members, key=lambda member: faces.faces[member[0]].frame
    ):
        kept = None
        if keep is not None:
            kept = _keep_mask(keep[frame if len(keep) > 1 else 0], height, width, images.device)
        patches = []
        for i, face_mask in of_frame:
            to_crop = compose(to_restored, compose(faces.faces[i].matrix, from_image))
            make = partial(
                _make_patch,
                image=images[frame],
                restored=restored[i],
                to_crop=to_crop,
                grown=1 / scale_of(from_image),
                options=options,
                face_mask=face_mask,
                kept=kept,
            )
            patch = on_first((device, images.device), make, out_of_memory)
            if patch is not None:
                patches.append(patch)
            report(1, restored[i].movedim(-1, 0))
        _blend(images[frame], out[frame], mask[frame], total, patches)
    return out, mask


def check(
    images: Tensor,
    faces: Faces,
    restored: Tensor,
    options: PasteOptions,
    keep: Tensor | None,
    parser: Parser | None,
) -> None:
    """Raises OSDFaceError if the arguments of `paste` do not fit together.

    images: (B,H,W,C).
    faces: where the N faces are.
    restored: (N,S,S,3).
    options: strength, mask and colours.
    keep: (B,H,W) or (1,H,W), or None.
    parser: needed for the mask "parsing".
    """
    check_pictures(images)
    faces.check()
    frames, height, width = images.shape[:3]
    if frames != faces.frames:
        raise OSDFaceError(
            f"`image` holds {frames} pictures and `faces` come from {faces.frames}; the same "
            "batch is wanted: "
            "connect the picture that went into Face Detect & Align."
        )
    # A resize may have rounded either side by up to a pixel.
    if abs(width * faces.height - height * faces.width) > faces.width + faces.height or (
        len(faces) and min(width, height) < 1
    ):
        raise OSDFaceError(
            f"`image` is {width} x {height} px and the faces come from a picture of {faces.width} "
            f"x {faces.height} px; the same picture "
            "or one enlarged or shrunk with the same aspect ratio is wanted: crop or pad after "
            "pasting."
        )
    if restored.ndim != 4 or restored.shape[3] != 3:
        raise OSDFaceError(
            f"`restored` is {tuple(restored.shape)}; a batch of RGB crops (N,S,S,3) is wanted: "
            "connect the output of OSDFace One Step."
        )
    if len(restored) and min(restored.shape[1:3]) < 1:
        raise OSDFaceError(
            f"`restored` is {tuple(restored.shape)}, which holds no pixel: connect the output of "
            "OSDFace One Step."
        )
    if len(restored) != len(faces):
        raise OSDFaceError(
            f"`restored` holds {len(restored)} crops and `faces` {len(faces)} faces; one crop for "
            "each face, in the same order, is wanted: "
            "connect the crops that were made with these faces."
        )
    if options.mask_type not in MASK_TYPES:
        raise OSDFaceError(
            f"`mask_type` is {options.mask_type!r}; one of {', '.join(MASK_TYPES)} is wanted."
        )
    if options.mask_type == "parsing" and parser is None:
        raise OSDFaceError(
            "`mask_type` is parsing and no face parser is given: give `parser`, or choose ellipse "
            "or box."
        )
    if options.color_match not in COLOR_MATCHES:
        names = ", ".join(COLOR_MATCHES)
        raise OSDFaceError(f"`color_match` is {options.color_match!r}; one of {names} is wanted.")
    if keep is not None and (
        keep.ndim != 3 or len(keep) not in (1, frames) or (frames and not keep.numel())
    ):
        raise OSDFaceError(
            f"`keep` is {tuple(keep.shape)} for {frames} pictures; a mask (1,H,W) for all or "
            f"({frames},H,W) is wanted: connect a MASK."
        )


def _pasted(faces: Faces, restored: Tensor, skip_unchanged: bool) -> list[int]:
    """The numbers of the restored crops that can be pasted and are to be."""
    changed = [True] * len(faces)
    if skip_unchanged and faces.crops.shape == restored.shape and len(faces):
        same = faces.crops.to(restored.device) == restored
        changed = (~same.flatten(1).all(1)).tolist()
    fit = all_finite(restored)
    for face, is_finite in zip(faces.faces, fit, strict=True):
        if not is_finite:
            log.warning(
                "Face %d of picture %d came out as NaN or infinite and is left as it was.",
                face.number,
                face.frame,
            )
    return [i for i in range(len(faces)) if fit[i] and changed[i] and has_place(faces, i)]


def _parsed_masks(
    restored: Tensor, chosen: Sequence[int], parser: Parser, feather: float, device: torch.device
) -> Iterator[Tensor]:
    """The feathered mask (h,w) of each chosen crop, on `device`, parsed a few at a time."""
    for first in range(0, len(chosen), PARSED_AT_ONCE):
        crops = restored[list(chosen[first : first + PARSED_AT_ONCE])]
        for face_map in parser(crops.to(device)):
            yield feather_mask(face_map, feather)


def _keep_mask(keep: Tensor, height: int, width: int, device: torch.device) -> Tensor:
    # Where the mask is NaN, the picture stays.
    keep = keep.to(device, torch.float32).nan_to_num(1.0)
    if keep.shape != (height, width):
        keep = antialiased(keep[None, None], (height, width), "bilinear")[0, 0]
    return keep.clamp(0, 1)


def _make_patch(
    device: torch.device,
    image: Tensor,
    restored: Tensor,
    to_crop: Affine,
    grown: float,
    options: PasteOptions,
    face_mask: Tensor | None,
    kept: Tensor | None,
) -> _Patch | None:
    """The face at its place in `image`, or None where no pixel of it would change.

    device: that computes.
    image: (H,W,C).
    restored: (h,w,3).
    to_crop: from `image` to `restored`.
    grown: how many times `image` is as large as the picture that the face was cut from.
    options: strength, mask and colours.
    face_mask: the feathered mask of a parsed crop, or None.
    kept: (H,W) in [0,1], 1 where the picture must stay, or None.
    """
    restored = restored.to(device, torch.float32)
    height, width = restored.shape[:2]
    to_unit = scaling(1 / width, 1 / height)
    x1, y1, x2, y2 = bounds(inverse(to_crop), width, height)
    left, right = max(math.floor(x1), 0), min(math.ceil(x2), image.shape[1])
    top, bottom = max(math.floor(y1), 0), min(math.ceil(y2), image.shape[0])
    if left >= right or top >= bottom:
        return None
    from_region = compose(compose(to_unit, to_crop), ((1.0, 0.0, left), (0.0, 1.0, top)))
    weight = options.strength * _weight(
        from_region, bottom - top, right - left, options, face_mask, device
    )
    if kept is not None:
        weight = weight * (1 - kept[top:bottom, left:right].to(device))
    used = (torch.cat([weight.amax(1), weight.amax(0)]) > 0).tolist()
    if not any(used):
        return None
    rows, columns = _ones(used[: bottom - top], top), _ones(used[bottom - top :], left)
    weight = weight[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    crop = restored.movedim(-1, 0)
    if options.color_match != "none" or options.keep_detail > 0:
        picture = rgb_of(image).movedim(-1, 0)
        own = warp(picture, to_crop, height, width, device=device)
        # A NaN has no colour to match.
        own = torch.where(own.isfinite(), own, crop)
        if options.color_match != "none":
            inside = _weight(to_unit, height, width, options, face_mask, device)
            crop = match_color(restored, own.movedim(0, -1), inside, options.color_match).movedim(
                -1, 0
            )
    # Cubic resampling overshoots at edges: values stay within [0,1], or within a wider range given.
    shown = [crop]
    if options.keep_detail > 0:
        before = rgb_of(image[rows, columns]).to(device, torch.float32)
        shown.append(before)
    lowest, highest = value_range(*shown)
    if options.keep_detail > 0:
        crop = crop - options.keep_detail * own
    if abs(grown - 1) < 1e-3:
        crop = back_project(crop, to_crop)
    from_crop = translated(inverse(to_crop), -columns.start, -rows.start)
    pixels = warp(crop, from_crop, weight.shape[0], weight.shape[1], grown).movedim(0, -1)
    if options.keep_detail > 0:
        pixels = pixels + options.keep_detail * before
    pixels = pixels.clamp(lowest, highest)
    curve = tone_curve(image, (left, top, right, bottom)) if image.shape[-1] >= 3 else None
    if curve is not None:
        there = curve.holds(image[rows, columns])[..., None].to(device)
        pixels = torch.where(there, curve.toned(pixels), pixels)
    # One copy back for both.
    patch = torch.cat([pixels, weight[..., None]], -1).to(image.device)
    return _Patch(rows, columns, patch[..., :3], patch[..., 3])


def _ones(used: list[bool], start: int) -> slice:
    """From the first to the last one that is used, counted from `start`."""
    last = len(used) - used[::-1].index(True)
    return slice(start + used.index(True), start + last)


def _weight(
    to_unit: Affine,
    height: int,
    width: int,
    options: PasteOptions,
    face_mask: Tensor | None,
    device: torch.device,
) -> Tensor:
    """The mask (height,width) of a crop, 0 at the crop's border.

    to_unit: from the mask's pixels to the crop as the unit square.
    height: of the mask.
    width: of the mask.
    options: shape and feather.
    face_mask: the feathered mask of a parsed crop, or None.
    device: of the mask.
    """
    (a, b, c), (d, e, f) = to_unit
    across = torch.arange(width, dtype=torch.float64) + 0.5
    down = (torch.arange(height, dtype=torch.float64) + 0.5)[:, None]
    u = (a * across + c).float().to(device) + (b * down).float().to(device)
    v = (d * across + f).float().to(device) + (e * down).float().to(device)
    # An edge narrower than a pixel would be a staircase.
    edge = max(options.feather, scale_of(to_unit))
    if options.mask_type == "ellipse":
        (x, y), (x_radius, y_radius) = ELLIPSE_CENTRE, ELLIPSE_RADII
        distance = torch.hypot((u - x) / x_radius, (v - y) / y_radius)
        return _ramp((1 - distance) * (x_radius / edge))
    box = _ramp(torch.minimum(u, 1 - u) / edge) * _ramp(torch.minimum(v, 1 - v) / edge)
    if face_mask is None:
        return box
    to_mask = compose(scaling(face_mask.shape[1], face_mask.shape[0]), to_unit)
    return (
        box * sample_affine(face_mask[None].to(device), to_mask, height, width, mode="bilinear")[0]
    )


def _ramp(x: Tensor) -> Tensor:
    """Smoothstep: rises from 0 to 1 between x = 0 and x = 1, level at both ends."""
    x = x.clamp(0, 1)
    return x * x * (3 - 2 * x)


def _blend(
    image: Tensor,
    out: Tensor,
    mask: Tensor,
    total: Tensor,
    patches: list[_Patch],
) -> None:
    """Blends the patches of one picture.

    Where faces overlap, their pixels are averaged by weight, and the average has the weight that
    pasting one after the other gives.

    image: (H,W,C), the picture.
    out: (H,W,C), where the result is written.
    mask: (H,W), where the joint weight is written.
    total: (H,W), scratch space.
    patches: the restored faces.
    """
    for patch in patches:
        total[patch.rows, patch.columns] = 0
    for patch in patches:
        place = patch.rows, patch.columns
        total[place] += patch.weight
        mask[place] += patch.weight - mask[place] * patch.weight
    for patch in patches:
        place = patch.rows, patch.columns
        share = (
            mask[place] * (patch.weight / total[place].clamp_min(torch.finfo(torch.float32).tiny))
        )[..., None]
        picture = image[place]
        channels = 3 if picture.shape[-1] >= 3 else 1
        pixels = (
            patch.pixels
            if channels == 3
            else (patch.pixels * patch.pixels.new_tensor(LUMA)).sum(-1, keepdim=True)
        )
        before = out[place][..., :channels]
        after = before.float() + share * (pixels - picture[..., :channels].float())
        before.copy_(torch.where(share > 0, after.to(out.dtype), before))
