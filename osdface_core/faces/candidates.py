"""Detections as columns of tensors: one pass of the network, overlaps, NMS, maps of coordinates.

The maps lead from a shrunk, cut or turned picture back to the whole one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..cpu import optimized
from ..pictures.resampling import antialiased
from .retinaface import MEAN_BGR, RetinaFace

# Intersection over union above which two boxes are one face (facexlib's value).
OVERLAP = 0.4
# Intersection over the smaller box above which boxes of two passes are one face.
SAME = 0.6
# Cells of a grid to either side of 0 in which boxes are looked up.
REACH = 2**20


@dataclass(frozen=True)
class Candidates:
    """n detections on the CPU: frame (n,), box (n,4), score (n,), landmarks (n,5,2), angle (n,)."""

    frame: Tensor
    box: Tensor
    score: Tensor
    landmarks: Tensor
    angle: Tensor

    def columns(self) -> tuple[Tensor, ...]:
        return self.frame, self.box, self.score, self.landmarks, self.angle

    def __getitem__(self, index: Tensor) -> Candidates:
        return Candidates(*(column[index] for column in self.columns()))

    def __len__(self) -> int:
        return len(self.frame)

    @staticmethod
    def join(parts: Iterable[Candidates]) -> Candidates:
        return Candidates(*map(torch.cat, zip(*(part.columns() for part in parts), strict=True)))


def detect_once(network: RetinaFace, pixels: Tensor, confidence: float) -> Candidates:
    """One pass over pictures (B,3,H,W) in [0,1]: faces above `confidence` after NMS, in pixels."""
    mean = pixels.new_tensor(MEAN_BGR).view(3, 1, 1)
    with optimized(pixels.device):
        boxes, scores, landmarks = network(pixels.flip(1) * 255 - mean)
    frame, anchor = torch.nonzero(scores > confidence, as_tuple=True)
    columns = frame[:, None], boxes[frame, anchor], scores[frame, anchor, None]
    # One copy: what follows is many small steps.
    table = torch.cat([*columns, landmarks[frame, anchor].flatten(1)], 1).float().cpu()
    table = table[table.isfinite().all(1)]
    numbers = table[:, 0].long()
    # facexlib's landmarks have the first pixel's centre at 0; ours have it at 0.5.
    points = table[:, 6:].unflatten(1, (5, 2)) + 0.5
    found = Candidates(numbers, table[:, 1:5], table[:, 5], points, torch.zeros_like(numbers))
    return suppressed(found)


def shrink(pixels: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Pictures (B,3,H,W) with their longest side at most `longest`, and the factors (x,y) back."""
    height, width = pixels.shape[2:]
    scale = longest / max(height, width)
    if scale >= 1:
        return pixels, torch.ones(2)
    size = max(1, round(height * scale)), max(1, round(width * scale))
    small = antialiased(pixels, size, "bilinear")
    return small, torch.tensor([width / size[1], height / size[0]])


def scale_candidates(found: Candidates, back: Tensor) -> Candidates:
    """Coordinates multiplied by the factors `back` (x,y)."""
    return replace(found, box=found.box * back.repeat(2), landmarks=found.landmarks * back)


def translate_candidates(found: Candidates, x: float, y: float) -> Candidates:
    """Coordinates moved by (x, y) pixels."""
    step = torch.tensor([x, y], dtype=torch.float32)
    return replace(found, box=found.box + step.repeat(2), landmarks=found.landmarks + step)


def detect_shrunk(
    network: RetinaFace, pixels: Tensor, confidence: float, longest: int
) -> Candidates:
    """`detect_once` on pictures shrunk to `longest` px, in pixels of the pictures given."""
    small, back = shrink(pixels, longest)
    return scale_candidates(detect_once(network, small, confidence), back)


@dataclass(frozen=True)
class Overlaps:
    """The p pairs of two lists of boxes that may share a part of a picture; all others do not.

    one: (p,) the place in the first list, in order.
    other: (p,) the place in the second list, in order for each of the first.
    union: (p,) intersection over union.
    smaller: (p,) intersection over the smaller box.
    """

    one: Tensor
    other: Tensor
    union: Tensor
    smaller: Tensor

    def __getitem__(self, index: Tensor) -> Overlaps:
        return Overlaps(self.one[index], self.other[index], self.union[index], self.smaller[index])


def overlaps(one: Candidates, other: Candidates) -> Overlaps:
    """How far the boxes of one list cover those of another, in the same picture.

    The boxes are looked up in grids whose cells are as large as the boxes, one for each power of
    two, so that a crowd takes as much time as its faces one by one, and memory for the pairs alone.
    """
    levels = [torch.frexp(longer_side(c).double())[1].clamp(min=0) for c in (one, other)]
    codes = [torch.empty(0, dtype=torch.long)]
    for level in torch.cat(levels).unique().tolist():
        # Each pair meets in the grid of the larger of the two.
        equal, lower = ([op(of, level) for of in levels] for op in (torch.eq, torch.lt))
        for of_one, of_other in ((equal[0], equal[1] | lower[1]), (lower[0], equal[1])):
            codes.append(_pairs_in_cells(one, of_one, other, of_other, level))
    code = torch.cat(codes).unique()
    i, j = code // max(1, len(other)), code % max(1, len(other))
    corner = torch.maximum(one.box[i, :2], other.box[j, :2])
    shared = (torch.minimum(one.box[i, 2:], other.box[j, 2:]) - corner).clamp(min=0).prod(-1)
    area, other_area = ((c.box[k, 2:] - c.box[k, :2]).prod(-1) for c, k in ((one, i), (other, j)))
    union = area + other_area - shared
    smaller = torch.minimum(area, other_area)
    return Overlaps(i, j, shared / union.clamp(min=1e-6), shared / smaller.clamp(min=1e-6))


def _pairs_in_cells(
    one: Candidates, of_one: Tensor, other: Candidates, of_other: Tensor, level: int
) -> Tensor:
    """Pairs that have a cell of 2 ** level px in common, each as i * len(other) + j, some twice.

    of_one, of_other: which boxes are looked at, none with a side of a cell or more.
    """
    (cells, i), (other_cells, j) = _cells(one, of_one, level), _cells(other, of_other, level)
    other_cells, order = other_cells.sort()
    first = torch.searchsorted(other_cells, cells)
    counts = torch.searchsorted(other_cells, cells, right=True) - first
    step = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    partner = j[order][first.repeat_interleave(counts) + step]
    return i.repeat_interleave(counts) * len(other) + partner


def _cells(found: Candidates, chosen: Tensor, level: int) -> tuple[Tensor, Tensor]:
    """The cells in which the corners of the chosen boxes lie, as numbers, and whose they are."""
    index = torch.nonzero(chosen)[:, 0]
    # Far out, many cells are one: a pair too many does no harm.
    cell = (found.box[index].double() / 2.0**level).floor().clamp(-REACH, REACH - 1).long() + REACH
    row = (found.frame[index, None] * 2 * REACH + cell[:, 1::2]) * 2 * REACH
    numbers = (row[:, :, None] + cell[:, None, ::2]).flatten()
    return numbers, index.repeat_interleave(4)


def any_pair(places: Tensor, count: int) -> Tensor:
    """(count,) whether a number is among `places`."""
    held = torch.zeros(count, dtype=torch.bool)
    held[places] = True
    return held


def longer_side(found: Candidates) -> Tensor:
    """(n,) the longer side of each box in pixels."""
    return (found.box[:, 2:] - found.box[:, :2]).amax(1)


def merge(known: Candidates, more: Candidates) -> Candidates:
    """`known` and the faces of `more` that are not among them."""
    pairs = overlaps(known, more)
    held = any_pair(pairs.other[pairs.smaller > SAME], len(more))
    return Candidates.join([known, more[~held]])


def rotate_back(found: Candidates, turns: int, width: int, height: int) -> Candidates:
    """Coordinates in the picture, of faces found after `turns` quarter turns counterclockwise.

    width, height: of the picture before turning, in pixels.
    """
    points = torch.cat([found.box.view(-1, 2, 2), found.landmarks], 1)
    for turn in range(turns, 0, -1):
        points = torch.stack([(width if turn % 2 else height) - points[..., 1], points[..., 0]], -1)
    box = torch.cat([points[:, :2].amin(1), points[:, :2].amax(1)], 1)
    return replace(found, box=box, landmarks=points[:, 2:], angle=found.angle + 90 * turns)


def roll_of(found: Candidates) -> Tensor:
    """Each face's clockwise turn in radians: from straight down to the line from eyes to mouth."""
    down = found.landmarks[:, 3:].mean(1) - found.landmarks[:, :2].mean(1)
    return torch.atan2(-down[:, 0], down[:, 1])


def nms(scores: Tensor, same: Overlaps) -> Tensor:
    """Non-maximum suppression by the pairs of a list with itself that are one: best first."""
    left = [True] * len(scores)
    starts = torch.searchsorted(same.one, torch.arange(len(scores) + 1)).tolist()
    others = same.other.tolist()
    kept = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if left[i]:
            kept.append(i)
            for j in others[starts[i] : starts[i + 1]]:
                left[j] = False
    return torch.tensor(kept, dtype=torch.long)


def suppressed(found: Candidates) -> Candidates:
    """Those left by non-maximum suppression in each picture, as torchvision's batched_nms has it.

    Best first. To import torchvision takes as long as torch itself.
    """
    pairs = overlaps(found, found)
    return found[nms(found.score, pairs[pairs.union.double() > OVERLAP])]
