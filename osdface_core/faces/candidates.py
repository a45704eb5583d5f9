"""Detections as columns of tensors: one pass of the network, overlaps, NMS, maps of coordinates.

The maps lead from a shrunk, cut or turned picture back to the whole one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from ..cpu import optimized
from ..pictures.resampling import antialiased
from .retinaface import MEAN_BGR, RetinaFace

# Intersection over union above which two boxes are one face (facexlib's value).
OVERLAP = 0.4
# Intersection over the smaller box above which boxes of two passes are one face.
SAME = 0.6


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
    # One copy; and suppressed on the CPU, since a torchvision may know no other device.
    table = torch.cat([*columns, landmarks[frame, anchor].flatten(1)], 1).float().cpu()
    table = table[table.isfinite().all(1)]
    numbers = table[:, 0].long()
    # facexlib's landmarks have the first pixel's centre at 0; ours have it at 0.5.
    points = table[:, 6:].unflatten(1, (5, 2)) + 0.5
    found = Candidates(numbers, table[:, 1:5], table[:, 5], points, torch.zeros_like(numbers))
    return found[batched_nms(found.box, found.score, found.frame, OVERLAP)]


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


def overlaps(one: Candidates, other: Candidates) -> tuple[Tensor, Tensor]:
    """Intersection over union, and over the smaller box, of each pair (n,m); 0 across pictures."""
    corner = torch.maximum(one.box[:, None, :2], other.box[None, :, :2])
    shared = (
        (torch.minimum(one.box[:, None, 2:], other.box[None, :, 2:]) - corner).clamp(min=0).prod(-1)
    )
    shared = shared * (one.frame[:, None] == other.frame[None])
    area, other_area = ((c.box[:, 2:] - c.box[:, :2]).prod(-1) for c in (one, other))
    union = area[:, None] + other_area[None] - shared
    return shared / union.clamp(min=1e-6), shared / torch.minimum(
        area[:, None], other_area[None]
    ).clamp(min=1e-6)


def longer_side(found: Candidates) -> Tensor:
    """(n,) the longer side of each box in pixels."""
    return (found.box[:, 2:] - found.box[:, :2]).amax(1)


def merge(known: Candidates, more: Candidates) -> Candidates:
    """`known` and the faces of `more` that are not among them."""
    held = overlaps(known, more)[1] > SAME
    return Candidates.join([known, more[~held.any(0)]])


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


def nms(scores: Tensor, same: Tensor) -> Tensor:
    """Non-maximum suppression by a table `same` (n,n) of booleans: indices kept, best first."""
    left = torch.ones(len(scores), dtype=torch.bool)
    kept = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if left[i]:
            kept.append(i)
            left &= ~same[i]
    return torch.tensor(kept, dtype=torch.long)
