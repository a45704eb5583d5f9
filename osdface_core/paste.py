"""Restored crops back into the pictures they came from: only there, and only as far as the mask says."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .align import bounds, compose, inverse, moved, reach, scaling, warp
from .chunks import Progress
from .errors import OSDFaceError
from .types import Affine, Faces

log = logging.getLogger(__name__)

MASK_TYPES = ("ellipse", "box")

# The ellipse of a face in the FFHQ crop, as fractions of its side: chin and ears are inside, the crop's border is not.
ELLIPSE_CENTRE = (0.5, 0.52)
ELLIPSE_RADII = (0.42, 0.47)
LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class _Patch:
    """A restored face at its place: pixels (h,w,3) and their weight (h,w), both fp32, for picture[rows, columns]."""

    rows: slice
    columns: slice
    pixels: Tensor
    weight: Tensor


def paste(
    images: Tensor,
    faces: Faces,
    restored: Tensor,
    *,
    strength: float = 1.0,
    mask_type: str = "ellipse",
    feather: float = 0.1,
    keep: Tensor | None = None,
    skip_unchanged: bool = True,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Pastes every restored face into its picture.

    images: (B,H,W,C), any float type and range: the pictures that the faces were found in, or the same enlarged or shrunk, whose
    scale is taken from their size. The first three channels are colour (one or two: grey), further ones stay as they are.
    restored: (N,S,S,3) for the N faces, S any size. strength: 0..1, how much of the restored face shows. mask_type: one of
    MASK_TYPES. feather: width of the mask's soft edge as a fraction of the crop's side; it lies inside, and the weight is 0 at the
    crop's border. keep: (B,H,W) or (1,H,W) in [0,1], 1 where the picture must stay; of another size, it is resized.
    skip_unchanged: a restored crop that equals its face's own crop bit for bit stands for a face that was not restored, and is not
    pasted. progress: called with 1 for each face; what it raises ends the job.

    Returns the pictures, of the same type, and the mask (B,H,W) fp32 of the weights that were used. A pixel whose weight is 0 keeps
    its bits; without a face the very `images` come back. Overlapping faces share a pixel by their weights, in any order alike.
    A restored face that is not finite is left out with a warning. Raises OSDFaceError if the inputs do not fit together.
    """
    _check(images, faces, restored, mask_type, keep)
    frames, height, width = images.shape[:3]
    mask = torch.zeros(frames, height, width, device=images.device)
    report = progress or (lambda done, picture=None: None)
    chosen = [i for i in range(len(faces)) if _usable(faces, restored, i, skip_unchanged)]
    report(len(faces) - len(chosen))
    if not chosen or strength <= 0:
        report(len(chosen))
        return images, mask
    out = images.clone()
    to_image = scaling(width / faces.width, height / faces.height)
    total = torch.empty(height, width, device=images.device)
    for frame, members in _by_frame(faces, chosen):
        kept = None if keep is None else _kept(keep[frame if len(keep) > 1 else 0], images)
        patches = []
        for i in members:
            side_y, side_x = restored.shape[1:3]
            to_crop = compose(scaling(side_x / faces.crop_size, side_y / faces.crop_size), faces.faces[i].matrix)
            to_crop = compose(to_crop, inverse(to_image))
            patch = _patch(images[frame], restored[i], to_crop, strength, mask_type, feather, kept)
            if patch is not None:
                patches.append(patch)
            report(1)
        _blend(images[frame], out[frame], mask[frame], total, patches)
    return out, mask


def _check(images: Tensor, faces: Faces, restored: Tensor, mask_type: str, keep: Tensor | None) -> None:
    if images.ndim != 4:
        raise OSDFaceError(f"`image` has {images.ndim} dimensions {tuple(images.shape)}; a batch (B,H,W,C) is wanted: connect an IMAGE.")
    frames, height, width = images.shape[:3]
    if frames != faces.frames:
        raise OSDFaceError(
            f"`image` holds {frames} pictures and `faces` come from {faces.frames}; the same batch is wanted: "
            "connect the picture that went into Face Detect & Align."
        )
    # Either side may have been rounded by up to a pixel.
    if abs(width * faces.height - height * faces.width) > faces.width + faces.height:
        raise OSDFaceError(
            f"`image` is {width} x {height} px and the faces come from a picture of {faces.width} x {faces.height} px; the same picture "
            "or one enlarged or shrunk with the same aspect ratio is wanted: crop or pad after pasting."
        )
    if restored.ndim != 4 or restored.shape[3] != 3:
        raise OSDFaceError(
            f"`restored` is {tuple(restored.shape)}; a batch of RGB crops (N,S,S,3) is wanted: connect the output of OSDFace One Step."
        )
    if len(restored) != len(faces):
        raise OSDFaceError(
            f"`restored` holds {len(restored)} crops and `faces` {len(faces)} faces; one crop for each face, in the same order, is wanted: "
            "connect the crops that were made with these faces."
        )
    if mask_type not in MASK_TYPES:
        raise OSDFaceError(f"`mask_type` is {mask_type!r}; one of {', '.join(MASK_TYPES)} is wanted.")
    if keep is not None and (keep.ndim != 3 or len(keep) not in (1, frames)):
        raise OSDFaceError(
            f"`keep` is {tuple(keep.shape)} for {frames} pictures; a mask (1,H,W) for all or ({frames},H,W) is wanted: connect a MASK."
        )


def _usable(faces: Faces, restored: Tensor, i: int, skip_unchanged: bool) -> bool:
    face = faces.faces[i]
    if not bool(restored[i].isfinite().all()):
        log.warning("Face %d of picture %d came out as NaN or infinite and is left as it was.", face.number, face.frame)
        return False
    scale = reach(face.matrix)
    if not (math.isfinite(scale) and scale > 0 and all(map(math.isfinite, face.matrix[0] + face.matrix[1]))):
        log.warning("Face %d of picture %d has no place in it (its matrix is %s) and is left out.", face.number, face.frame, face.matrix)
        return False
    crop = faces.crops[i]
    return not (skip_unchanged and crop.shape == restored[i].shape and torch.equal(crop.to(restored.device), restored[i]))


def _by_frame(faces: Faces, chosen: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    members: dict[int, list[int]] = {}
    for i in chosen:
        members.setdefault(faces.faces[i].frame, []).append(i)
    yield from sorted(members.items())


def _kept(keep: Tensor, images: Tensor) -> Tensor:
    keep = keep.to(images.device, torch.float32)
    height, width = images.shape[1:3]
    if keep.shape != (height, width):
        keep = torch.nn.functional.interpolate(keep[None, None], (height, width), mode="bilinear", antialias=True)[0, 0]
    return keep.clamp(0, 1)


def _patch(
    image: Tensor, crop: Tensor, to_crop: Affine, strength: float, mask_type: str, feather: float, kept: Tensor | None
) -> _Patch | None:
    """The face at its place in `image` (H,W,C), or None where no pixel of it would change. to_crop: from there to `crop` (h,w,3)."""
    height, width = crop.shape[:2]
    x1, y1, x2, y2 = bounds(inverse(to_crop), width, height)
    left, right = max(math.floor(x1), 0), min(math.ceil(x2), image.shape[1])
    top, bottom = max(math.floor(y1), 0), min(math.ceil(y2), image.shape[0])
    if left >= right or top >= bottom:
        return None
    from_region = compose(scaling(1 / width, 1 / height), _starting_at(to_crop, left, top))
    weight = strength * _shape(from_region, bottom - top, right - left, mask_type, feather, image.device)
    if kept is not None:
        weight = weight * (1 - kept[top:bottom, left:right])
    used_rows, used_columns = weight.amax(1).nonzero(), weight.amax(0).nonzero()
    if not len(used_rows):
        return None
    first_row, last_row = int(used_rows[0]), int(used_rows[-1]) + 1
    first_column, last_column = int(used_columns[0]), int(used_columns[-1]) + 1
    weight = weight[first_row:last_row, first_column:last_column]
    left, top = left + first_column, top + first_row
    restored = crop.to(image.device).movedim(-1, 0)
    pixels = warp(restored, moved(inverse(to_crop), -left, -top), *weight.shape)
    # Cubic resampling overshoots at edges. What was within [0,1] stays there; wider ranges keep theirs.
    pixels = pixels.clamp(min(0.0, float(restored.min())), max(1.0, float(restored.max())))
    rows, columns = slice(top, top + weight.shape[0]), slice(left, left + weight.shape[1])
    return _Patch(rows, columns, pixels.movedim(0, -1), weight)


def _starting_at(matrix: Affine, left: int, top: int) -> Affine:
    """`matrix` for points that are counted from (left, top)."""
    return compose(matrix, ((1.0, 0.0, left), (0.0, 1.0, top)))


def _shape(to_unit: Affine, height: int, width: int, mask_type: str, feather: float, device: torch.device) -> Tensor:
    """The mask (height,width) of a crop. to_unit takes a pixel's place to the crop as the unit square."""
    (a, b, c), (d, e, f) = to_unit
    across = torch.arange(width, dtype=torch.float64) + 0.5
    down = (torch.arange(height, dtype=torch.float64) + 0.5)[:, None]
    u = ((a * across + c).float() + (b * down).float()).to(device)
    v = ((d * across + f).float() + (e * down).float()).to(device)
    # An edge narrower than a pixel would be a staircase.
    edge = max(feather, reach(to_unit))
    if mask_type == "box":
        return _ramp(torch.minimum(u, 1 - u) / edge) * _ramp(torch.minimum(v, 1 - v) / edge)
    (x, y), (x_radius, y_radius) = ELLIPSE_CENTRE, ELLIPSE_RADII
    distance = torch.hypot((u - x) / x_radius, (v - y) / y_radius)
    return _ramp((1 - distance) * (x_radius / edge))


def _ramp(x: Tensor) -> Tensor:
    """0 to 1 with level ends (smoothstep)."""
    x = x.clamp(0, 1)
    return x * x * (3 - 2 * x)


def _blend(image: Tensor, out: Tensor, mask: Tensor, total: Tensor, patches: list[_Patch]) -> None:
    """Writes the patches of one picture (H,W,C) into `out` and their joint weight into `mask`; `total` is scratch space (H,W).

    Where faces overlap, their pixels are averaged by weight, and the average has the weight that pasting one after the other gives.
    """
    total.zero_()
    for patch in patches:
        place = patch.rows, patch.columns
        total[place] += patch.weight
        mask[place] += patch.weight - mask[place] * patch.weight
    for patch in patches:
        place = patch.rows, patch.columns
        share = (mask[place] * (patch.weight / total[place].clamp_min(torch.finfo(torch.float32).tiny)))[..., None]
        picture = image[place]
        channels = 3 if picture.shape[-1] >= 3 else 1
        pixels = patch.pixels if channels == 3 else (patch.pixels * patch.pixels.new_tensor(LUMA)).sum(-1, keepdim=True)
        before = out[place][..., :channels]
        after = before.float() + share * (pixels - picture[..., :channels].float())
        before.copy_(torch.where(share > 0, after.to(out.dtype), before))
