"""Finds faces and their five landmarks in pictures of one size, with a RetinaFace network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms

from ..chunks import Progress, in_chunks
from ..cpu import faster
from ..errors import OSDFaceError
from ..pictures.resampling import (
    apply,
    colour,
    compose,
    inverse,
    reach,
    sampled,
    scaling,
    similarity,
)
from ..pictures.resampling import moved as shifted
from .face import Affine, Box, Points
from .retinaface import MEAN_BGR, RetinaFace

# The longest side that the network sees. Up to it a picture is looked at as it is, pixel for pixel.
LONGEST_SIDE = 1920
# Anchors end at 512 px: a face far larger than that is only found in a smaller copy of the picture.
COARSE_SIDE = 640
# Anchors end at 512 px. From about there on, a face is also taken for several or seen where none
# is, so a face this large must show in the small copy too, at a fraction of the confidence; and
# from TOO_LARGE on only the small copy is believed.
NEEDS_SUPPORT, SUPPORT = 450, 0.5
TOO_LARGE = 640
# Anchors begin at 16 px; a face this large is found nearly always.
EASILY_SEEN = 20
# The window of the second look, and how large a face is in it: between 150 and 400 px landmarks are
# equally precise, below they get worse (docs/detection.md).
WINDOW, BEST_SIZE, MOST_ENLARGED = 288, 144, 2.0
WINDOWS_AT_ONCE = 32
# A box that lies inside another by more than this is the same face; seen by two passes, also the
# same way up if so few degrees apart.
SAME, SAME_TURN = 0.6, 25
# Boxes that overlap by more than this are one face (facexlib's value).
OVERLAP = 0.4
# Pixels that go through the network at once, and what each costs in the ResNet50's activations.
PIXELS_AT_ONCE = 8 * 1024**2
# On a CPU more at once is slower, not faster.
PIXELS_AT_ONCE_CPU = 2 * 1024**2
BYTES_PER_PIXEL = 300


@dataclass(frozen=True)
class Detection:
    """A face in pixels of the picture. box: x1, y1, x2, y2. landmarks: as in types.Face. score:
    0..1. angle: as in types.Face.
    """

    box: Box
    landmarks: Points
    score: float
    angle: int = 0


@dataclass(frozen=True)
class Candidates:
    """What a pass found, on the CPU: frame (n,), box (n,4), score (n,), landmarks (n,5,2), angle
    (n,).
    """

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


def finite(values: Tensor) -> Tensor:
    """fp32 in [0,1], whatever the picture held."""
    return values.float().nan_to_num(0.0, 1.0, 0.0).clamp(0, 1)


def look(network: RetinaFace, pixels: Tensor, confidence: float) -> Candidates:
    """One pass over (B,3,H,W) in [0,1]: the faces above `confidence`, overlaps removed, in pixels
    of these pictures.
    """
    mean = pixels.new_tensor(MEAN_BGR).view(3, 1, 1)
    with faster(pixels.device):
        boxes, scores, landmarks = network(pixels.flip(1) * 255 - mean)
    frame, anchor = torch.nonzero(scores > confidence, as_tuple=True)
    boxes, scores = boxes[frame, anchor], scores[frame, anchor]
    # facexlib's landmarks have the first pixel's centre at 0; ours have it at 0.5.
    landmarks = landmarks[frame, anchor] + 0.5
    usable = boxes.isfinite().all(1) & landmarks.isfinite().flatten(1).all(1)
    found = Candidates(frame, boxes, scores, landmarks, torch.zeros_like(frame))[usable]
    kept = found[batched_nms(found.box, found.score, found.frame, OVERLAP)]
    return Candidates(*(column.cpu() for column in kept.columns()))


def shrunk(pixels: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """The pictures, their longest side at most `longest`, and the factors (x,y) that lead back."""
    height, width = pixels.shape[2:]
    scale = longest / max(height, width)
    if scale >= 1:
        return pixels, torch.ones(2)
    size = max(1, round(height * scale)), max(1, round(width * scale))
    small = F.interpolate(pixels, size, mode="bilinear", antialias=True)
    return small, torch.tensor([width / size[1], height / size[0]])


def resized(found: Candidates, back: Tensor) -> Candidates:
    """The same in pixels that are smaller by the factors `back` (x,y)."""
    return replace(found, box=found.box * back.repeat(2), landmarks=found.landmarks * back)


def moved(found: Candidates, x: float, y: float) -> Candidates:
    step = torch.tensor([x, y], dtype=torch.float32)
    return replace(found, box=found.box + step.repeat(2), landmarks=found.landmarks + step)


def look_shrunk(network: RetinaFace, pixels: Tensor, confidence: float, longest: int) -> Candidates:
    small, back = shrunk(pixels, longest)
    return resized(look(network, small, confidence), back)


def overlaps(one: Candidates, other: Candidates) -> tuple[Tensor, Tensor]:
    """For each pair (n,m) in the same picture: intersection over union, and intersection over the
    smaller box.
    """
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
    return (found.box[:, 2:] - found.box[:, :2]).amax(1)


def with_new(known: Candidates, more: Candidates) -> Candidates:
    """`known`, and of `more` those that no known face overlaps or holds."""
    held = overlaps(known, more)[1] > SAME
    return Candidates.join([known, more[~held.any(0)]])


def look_at_all_sizes(
    network: RetinaFace, pixels: Tensor, confidence: float, smallest: float, report: Progress
) -> Candidates:
    """Faces from `smallest` pixels to the whole picture, in pictures (B,3,H,W) of any size."""
    longest = max(pixels.shape[2:])
    scale = min(1.0, LONGEST_SIDE / longest)
    found = look_shrunk(network, pixels, confidence, LONGEST_SIDE)
    if longest > COARSE_SIDE:
        report(0)
        coarse = look_shrunk(network, pixels, confidence * SUPPORT, COARSE_SIDE)
        unsupported = (overlaps(found, coarse)[0] < OVERLAP).all(1) & (
            longer_side(found) * scale > NEEDS_SUPPORT
        )
        found = found[~unsupported]
        coarse = coarse[coarse.score > confidence]
        huge = longer_side(coarse) * scale > TOO_LARGE
        found = found[~(overlaps(found, coarse[huge])[1] > SAME).any(1)]
        found = with_new(found, coarse)
    wanted = min(1.0, EASILY_SEEN / max(smallest, 1.0))
    if wanted > 1.3 * scale:
        found = with_new(found, look_at_tiles(network, pixels, confidence, wanted, scale, report))
    return found


def look_at_tiles(
    network: RetinaFace,
    pixels: Tensor,
    confidence: float,
    wanted: float,
    scale: float,
    report: Progress,
) -> Candidates:
    """The faces that are too small to be seen at `scale`, looked for in overlapping parts of the
    picture at the scale `wanted`.
    """
    large, back = shrunk(pixels, round(wanted * max(pixels.shape[2:])))
    limit = 2 * EASILY_SEEN * wanted / scale
    parts = []
    for y1, y2 in spans(large.shape[2], LONGEST_SIDE, round(1.5 * limit)):
        for x1, x2 in spans(large.shape[3], LONGEST_SIDE, round(1.5 * limit)):
            report(0)
            found = look(network, large[:, :, y1:y2, x1:x2], confidence)
            # A face that a tile's edge cuts is whole in the next one.
            inside = torch.ones(len(found), dtype=torch.bool)
            for column, edge, picture_edge in ((0, 0, x1 == 0), (1, 0, y1 == 0)):
                inside &= (found.box[:, column] > edge) | picture_edge
            for column, edge, picture_edge in (
                (2, x2 - x1, x2 == large.shape[3]),
                (3, y2 - y1, y2 == large.shape[2]),
            ):
                inside &= (found.box[:, column] < edge) | picture_edge
            parts.append(moved(found[inside & (longer_side(found) < limit)], x1, y1))
    found = Candidates.join(parts)
    return resized(found[batched_nms(found.box, found.score, found.frame, OVERLAP)], back)


def spans(length: int, tile: int, shared: int) -> list[tuple[int, int]]:
    """Evenly spread parts of range(length), each at most `tile` long, overlapping by `shared`."""
    if length <= tile:
        return [(0, length)]
    count = math.ceil((length - shared) / (tile - shared))
    starts = [round(i * (length - tile) / (count - 1)) for i in range(count)]
    return [(start, start + tile) for start in starts]


def turned_back(found: Candidates, turns: int, width: int, height: int) -> Candidates:
    """From a picture of width x height turned counterclockwise by so many quarters to the picture
    itself.
    """
    points = torch.cat([found.box.view(-1, 2, 2), found.landmarks], 1)
    for turn in range(turns, 0, -1):
        points = torch.stack([(width if turn % 2 else height) - points[..., 1], points[..., 0]], -1)
    box = torch.cat([points[:, :2].amin(1), points[:, :2].amax(1)], 1)
    return replace(found, box=box, landmarks=points[:, 2:], angle=found.angle + 90 * turns)


def window(picture: Tensor, matrix: Affine) -> Tensor:
    """(3,H,W) -> (3,288,288) through `matrix`. Means of a few samples a pixel: a detector wants no
    more.
    """
    back = inverse(matrix)
    fine = min(4, math.ceil(reach(back)))
    samples = sampled(
        picture,
        compose(back, scaling(1 / fine, 1 / fine)),
        WINDOW * fine,
        WINDOW * fine,
        "bilinear",
    )
    return F.avg_pool2d(samples, fine)


def look_closer(
    network: RetinaFace, pixels: Tensor, found: Candidates, confidence: float, report: Progress
) -> tuple[Candidates, Tensor]:
    """The same faces with landmarks and confidence from a second look at each, upright and at the
    size where landmarks are best.

    The second value (n,) says for which faces that look found an upright face in the middle of the
    window; the others are as given.
    """
    seen = torch.zeros(len(found), dtype=torch.bool)
    scores, landmarks = found.score.clone(), found.landmarks.clone()
    windows: list[tuple[int, Affine]] = []
    sides = longer_side(found).tolist()
    for i, points in enumerate(found.landmarks.tolist()):
        try:
            upright = similarity(tuple(map(tuple, points)), WINDOW)
        except OSDFaceError:
            continue
        x, y = ((found.box[i, :2] + found.box[i, 2:]) / 2).tolist()
        zoom = min(BEST_SIZE / max(sides[i], 1.0), MOST_ENLARGED) / reach(upright)
        (a, b, _), (c, d, _) = upright
        to_window = ((a * zoom, b * zoom, 0.0), (c * zoom, d * zoom, 0.0))
        centre = apply(to_window, x, y)
        windows.append((i, shifted(to_window, WINDOW / 2 - centre[0], WINDOW / 2 - centre[1])))
    for start in range(0, len(windows), WINDOWS_AT_ONCE):
        report(0)
        part = windows[start : start + WINDOWS_AT_ONCE]
        cuts = torch.stack([window(pixels[int(found.frame[i])], matrix) for i, matrix in part])
        closer = look(network, cuts, confidence)
        middle = (closer.box[:, :2] + closer.box[:, 2:]) / 2 - WINDOW / 2
        eyes = closer.landmarks[:, 1] - closer.landmarks[:, 0]
        growth = longer_side(closer) / BEST_SIZE
        good = (
            (middle.norm(dim=1) < BEST_SIZE / 2)
            & (eyes[:, 1].abs() < eyes[:, 0])
            & (growth > 0.5)
            & (growth < 2)
        )
        for k, (i, matrix) in enumerate(part):
            here = torch.nonzero(good & (closer.frame == k))[:, 0]
            if len(here):
                best = here[closer.score[here].argmax()]
                back = inverse(matrix)
                landmarks[i] = torch.tensor(
                    [apply(back, *point) for point in closer.landmarks[best].tolist()]
                )
                scores[i], seen[i] = closer.score[best], True
    return replace(found, score=scores, landmarks=landmarks), seen


def look_from_all_sides(
    network: RetinaFace, pixels: Tensor, confidence: float, smallest: float, report: Progress
) -> Candidates:
    """Faces turned by any angle. Whichever of four turned passes gave them, each is confirmed in an
    upright window, where its confidence is taken; of the ways up that passes disagree on, the one
    where the detector is surest.
    """
    height, width = pixels.shape[2:]
    passes = []
    for turns in range(4):
        report(0)
        found = look_at_all_sizes(
            network, pixels.rot90(turns, (2, 3)), confidence * SUPPORT, smallest, report
        )
        passes.append(turned_back(found, turns, width, height))
    everything = Candidates.join(passes)
    turn = clockwise(everything)
    alike = torch.cos(turn[:, None] - turn[None]) > math.cos(math.radians(SAME_TURN))
    views = everything[
        surest(everything.score, (overlaps(everything, everything)[0] > OVERLAP) & alike)
    ]
    found, seen = look_closer(network, pixels, views, confidence, report)
    found = found[seen]
    found = found[surest(found.score, overlaps(found, found)[1] > SAME)]
    # The box is best seen by the pass in which the face was nearest to upright.
    quarter = (clockwise(found) / (math.pi / 2)).round().long() % 4 * 90
    fitting = overlaps(found, everything)[0] * (everything.angle[None] == quarter[:, None])
    box = found.box.clone()
    for i, shared in enumerate(fitting):
        if shared.max() > OVERLAP:
            box[i] = everything.box[shared.argmax()]
    return replace(found, box=box, angle=quarter)


def clockwise(found: Candidates) -> Tensor:
    """How far each face is turned clockwise, in radians: the way from the eyes to the mouth against
    straight down.
    """
    down = found.landmarks[:, 3:].mean(1) - found.landmarks[:, :2].mean(1)
    return torch.atan2(-down[:, 0], down[:, 1])


def surest(scores: Tensor, same: Tensor) -> Tensor:
    """Of those that are the `same` (n,n), the most confident: indices, in order of confidence."""
    left = torch.ones(len(scores), dtype=torch.bool)
    kept = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if left[i]:
            kept.append(i)
            left &= ~same[i]
    return torch.tensor(kept, dtype=torch.long)


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError)


def pixels_seen(height: int, width: int) -> int:
    """The most pixels of a picture that the network sees at once, shrunk or in a tile."""
    return min(height, LONGEST_SIDE) * min(width, LONGEST_SIDE)


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
    smallest: float = 24,
    out_of_memory: Callable[[BaseException], bool] = is_out_of_memory,
    progress: Progress | None = None,
) -> list[list[Detection]]:
    """The faces of each picture, most confident first.

    images: (B,H,W,C), colours in [0,1]; B may be 0, C anything. confidence: 0..1. any_angle: also
    faces that lie or stand on their head, at six to twenty times the cost. smallest: pixels of the
    smallest faces that matter; the less, the more parts of a large picture are searched. progress:
    called with 1 for each picture done.
    """
    count, height, width = images.shape[:3]
    found: list[list[Detection]] = [[] for _ in range(count)]
    report = progress or (lambda done, picture=None: None)

    def work(part: slice) -> None:
        report(0)
        pixels = finite(colour(images[part].to(network.home)).movedim(-1, 1))
        if any_angle:
            faces = look_from_all_sides(network, pixels, confidence, smallest, report)
        else:
            faces = look_at_all_sizes(network, pixels, confidence, smallest, report)
            # Which landmarks want a second look: all of a detector that needs it, else those of
            # faces that were seen small.
            coarse = longer_side(faces) * scale < (
                math.inf if network.looks_twice else BEST_SIZE / 2 if scale < 1 else 0
            )
            closer, _ = look_closer(network, pixels, faces[coarse], confidence, report)
            faces = Candidates.join([faces[~coarse], replace(closer, score=faces.score[coarse])])
        faces = faces[faces.score.argsort(descending=True, stable=True)]
        for frame, box, score, landmarks, angle in zip(
            *(column.tolist() for column in faces.columns()), strict=True
        ):
            found[part.start + frame].append(
                Detection(tuple(box), tuple(map(tuple, landmarks)), score, int(angle))
            )
        for _ in range(part.stop - part.start):
            report(1)

    scale = min(1.0, LONGEST_SIDE / max(height, width, 1))
    most = PIXELS_AT_ONCE_CPU if network.home.type == "cpu" else PIXELS_AT_ONCE
    at_once = max(1, most // max(1, pixels_seen(height, width)))
    if height and width:
        with torch.inference_mode():
            in_chunks(count, at_once, work, out_of_memory)
    return found
