"""Finds faces and their five landmarks in pictures of one size, with a RetinaFace network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms

from .chunks import Progress, in_chunks
from .retinaface import MEAN_BGR, RetinaFace
from .types import Box, Points

# The longest side that the network sees. Up to it a picture is looked at as it is, pixel for pixel.
LONGEST_SIDE = 1920
# Anchors end at 512 px: a face far larger than that is only found in a smaller copy of the picture.
COARSE_SIDE = 640
# Boxes that overlap by more than this are one face (facexlib's value).
OVERLAP = 0.4
# Pixels that go through the network at once, and what each costs in the ResNet50's activations.
PIXELS_AT_ONCE = 8 * 1024**2
BYTES_PER_PIXEL = 400


@dataclass(frozen=True)
class Detection:
    """A face in pixels of the picture. box: x1, y1, x2, y2. landmarks: as in types.Face. score: 0..1. angle: degrees clockwise."""

    box: Box
    landmarks: Points
    score: float
    angle: int = 0


@dataclass
class Candidates:
    """What a pass found, on the CPU: frame (n,), box (n,4), score (n,), landmarks (n,5,2), angle (n,)."""

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


def colours(images: Tensor) -> Tensor:
    """(B,H,W,C) -> (B,3,H,W) in [0,1], finite: alpha left out, one channel shown as grey."""
    pixels = images[..., :3] if images.shape[-1] >= 3 else images[..., :1].expand(*images.shape[:-1], 3)
    return pixels.movedim(-1, 1).float().nan_to_num(0.0, 1.0, 0.0).clamp(0, 1)


def look(network: RetinaFace, pixels: Tensor, confidence: float) -> Candidates:
    """One pass over (B,3,H,W) in [0,1]: the faces above `confidence`, overlaps removed, in pixels of these pictures."""
    mean = pixels.new_tensor(MEAN_BGR).view(3, 1, 1)
    boxes, scores, landmarks = network(pixels.flip(1) * 255 - mean)
    frame, anchor = torch.nonzero(scores > confidence, as_tuple=True)
    boxes, scores = boxes[frame, anchor], scores[frame, anchor]
    # facexlib's landmarks have the first pixel's centre at 0; ours have it at 0.5.
    landmarks = landmarks[frame, anchor] + 0.5
    kept = batched_nms(boxes, scores, frame, OVERLAP)
    found = Candidates(frame[kept].cpu(), boxes[kept].cpu(), scores[kept].cpu(), landmarks[kept].cpu(), torch.zeros(len(kept)))
    return found[(found.box.isfinite().all(1) & found.landmarks.isfinite().flatten(1).all(1))]


def shrunk(pixels: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """The pictures with their longest side at most `longest`, and the factors (x,y) that lead back."""
    height, width = pixels.shape[2:]
    scale = longest / max(height, width)
    if scale >= 1:
        return pixels, torch.ones(2)
    size = max(1, round(height * scale)), max(1, round(width * scale))
    small = F.interpolate(pixels, size, mode="bilinear", antialias=True)
    return small, torch.tensor([width / size[1], height / size[0]])


def look_shrunk(network: RetinaFace, pixels: Tensor, confidence: float, longest: int) -> Candidates:
    small, back = shrunk(pixels, longest)
    found = look(network, small, confidence)
    return Candidates(found.frame, found.box * back.repeat(2), found.score, found.landmarks * back, found.angle)


def add_new(known: Candidates, more: Candidates) -> Candidates:
    """`known`, and of `more` those that no known face overlaps or holds."""
    corner = torch.maximum(known.box[:, None, :2], more.box[None, :, :2])
    extent = (torch.minimum(known.box[:, None, 2:], more.box[None, :, 2:]) - corner).clamp(min=0).prod(-1)
    areas = [(b[:, 2:] - b[:, :2]).prod(-1) for b in (known.box, more.box)]
    shared = extent / torch.minimum(areas[0][:, None], areas[1][None]).clamp(min=1e-6)
    same = (shared > 0.6) & (known.frame[:, None] == more.frame[None])
    return Candidates.join([known, more[~same.any(0)]])


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError)


def pixels_seen(height: int, width: int) -> float:
    """Pixels of a picture as the network sees it."""
    return height * width * min(1.0, LONGEST_SIDE / max(height, width, 1)) ** 2


def memory(count: int, height: int, width: int) -> float:
    """Bytes that the activations want for a batch of pictures."""
    seen = pixels_seen(height, width)
    return max(seen, min(count * seen, PIXELS_AT_ONCE)) * BYTES_PER_PIXEL


def detect(
    images: Tensor,
    network: RetinaFace,
    *,
    confidence: float = 0.9,
    any_angle: bool = False,
    out_of_memory: Callable[[BaseException], bool] = is_out_of_memory,
    progress: Progress | None = None,
) -> list[list[Detection]]:
    """The faces of each picture, most confident first.

    images: (B,H,W,C), colours in [0,1]; B may be 0, C anything. confidence: 0..1. progress: called with 1 for each picture done.
    """
    count, height, width = images.shape[:3]
    found: list[list[Detection]] = [[] for _ in range(count)]
    report = progress or (lambda done, picture=None: None)

    def work(part: slice) -> None:
        report(0)
        pixels = colours(images[part].to(network.device))
        faces = look_shrunk(network, pixels, confidence, LONGEST_SIDE)
        if max(height, width) > COARSE_SIDE:
            faces = add_new(faces, look_shrunk(network, pixels, confidence, COARSE_SIDE))
        faces = faces[faces.score.argsort(descending=True, stable=True)]
        for frame, box, score, landmarks, angle in zip(*(column.tolist() for column in faces.columns()), strict=True):
            found[part.start + frame].append(Detection(tuple(box), tuple(map(tuple, landmarks)), score, int(angle)))
        for _ in range(part.stop - part.start):
            report(1)

    at_once = max(1, int(PIXELS_AT_ONCE / max(1.0, pixels_seen(height, width))))
    if height and width:
        with torch.inference_mode():
            in_chunks(count, at_once, work, out_of_memory)
    return found
