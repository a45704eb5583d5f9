"""Finds faces and their five landmarks in pictures of one size, with a RetinaFace network."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..chunks import Progress, in_chunks, is_out_of_memory, no_progress
from ..pictures.geometry import Box, Points
from ..pictures.picture import finite, rgb_of
from ..pictures.tiles import tile_spans
from .candidates import (
    OVERLAP,
    SAME,
    Candidates,
    any_pair,
    detect_once,
    detect_shrunk,
    longer_side,
    merge,
    nms,
    overlaps,
    roll_of,
    rotate_back,
    scale_candidates,
    shrink,
    suppressed,
    translate_candidates,
)
from .choose import Choice
from .refine import BEST_SIZE, refine
from .retinaface import RetinaFace

# Longest side in pixels of the network's input. A larger picture is shrunk to it.
LONGEST_SIDE = 1920
# Longest side of the second, coarse pass: anchors end at 512 px, so far larger faces are found only
# in a small copy of the picture.
COARSE_SIDE = 640
# Near the size of the largest anchor, one face is found several times, or found where there is
# none. A face larger than NEEDS_SUPPORT px must be found in the coarse pass too, at SUPPORT times
# the confidence; one larger than TOO_LARGE px is taken from the coarse pass alone.
NEEDS_SUPPORT, SUPPORT = 450, 0.5
TOO_LARGE = 640
# Size in pixels of faces that are found nearly always; anchors begin at 16 px.
EASILY_SEEN = 20
# A face that is missed for a frame or two is scored at this part of the confidence at least where
# something of it is seen. Covered by hair it is at 0.04 of 1, turned away by 90 degrees at 0.33,
# missed beside a hand at 0.87 to 0.9 (docs/detection.md).
FAINT = 0.45
# Two passes that are turned differently see one face the same way up within so many degrees.
SAME_ROLL = 25
# Pixels through the network at once, on an accelerator and on a CPU, where more are slower; and the
# bytes that a pixel takes in the ResNet50's activations.
PIXELS_AT_ONCE = 8 * 1024**2
PIXELS_AT_ONCE_CPU = 2 * 1024**2
BYTES_PER_PIXEL = 300
# What a pixel of the picture itself takes beside them: as it is given, in RGB within [0,1] twice
# while that is made, and shrunk to less than its size.
BYTES_PER_PIXEL_GIVEN = 4 * (4 + 3 + 3 + 3)


@dataclass(frozen=True)
class DetectOptions:
    """How faces are found, chosen and cut out.

    confidence: least score of a detection, 0..1.
    any_angle: also faces that lie or are upside down, at six to twenty times the cost.
    choice: which of the faces are restored.
    crop_size: pixels a side of a crop.
    smoothing: strength of smoothing over the frames of a video, 0..1.
    """

    confidence: float = 0.9
    any_angle: bool = False
    choice: Choice = field(default_factory=Choice)
    crop_size: int = 512
    smoothing: float = 0.0


DEFAULT = DetectOptions()


@dataclass(frozen=True)
class Detection:
    """A face in pixels of its picture; box, landmarks, score and angle as in face.Face.

    faint: whether it is less than a face that is found: only a sign that something of one is there.
    """

    box: Box
    landmarks: Points
    score: float
    angle: int = 0
    faint: bool = False


def detect_all_sizes(
    network: RetinaFace,
    pixels: Tensor,
    confidence: float,
    smallest: float,
    report: Progress,
    faint: list[Candidates] | None = None,
    least: float = 0.0,
) -> Candidates:
    """Faces from `smallest` px to the picture's size, in pictures (B,3,H,W) in [0,1].

    network: the detector.
    pixels: (B,3,H,W) in [0,1].
    confidence: least score.
    smallest: size of the smallest faces looked for, in pixels.
    report: called with 0 before each further pass.
    faint: takes what the passes score lower, if given.
    least: score of what is faint.
    """
    longest = max(pixels.shape[2:])
    scale = min(1.0, LONGEST_SIDE / longest)

    def look(threshold: float, longest: int) -> Candidates:
        if faint is None:
            return detect_shrunk(network, pixels, threshold, longest)
        # What is faint suppresses nothing that is not: the rest is as without it.
        found = detect_shrunk(network, pixels, min(threshold, least), longest)
        faint.append(found[found.score <= confidence])
        return found[found.score > threshold]

    found = look(confidence, LONGEST_SIDE)
    if longest > COARSE_SIDE:
        report(0)
        coarse = look(confidence * SUPPORT, COARSE_SIDE)
        pairs = overlaps(found, coarse)
        supported = any_pair(pairs.one[pairs.union >= OVERLAP], len(found))
        found = found[supported | (longer_side(found) * scale <= NEEDS_SUPPORT)]
        coarse = coarse[coarse.score > confidence]
        huge = longer_side(coarse) * scale > TOO_LARGE
        pairs = overlaps(found, coarse[huge])
        found = found[~any_pair(pairs.one[pairs.smaller > SAME], len(found))]
        found = merge(found, coarse)
    wanted = min(1.0, EASILY_SEEN / max(smallest, 1.0))
    if wanted > 1.3 * scale:
        small = detect_in_tiles(
            network, pixels, confidence, wanted, scale, report, faint=faint, least=least
        )
        found = merge(found, small)
    return found


def detect_in_tiles(
    network: RetinaFace,
    pixels: Tensor,
    confidence: float,
    wanted: float,
    scale: float,
    report: Progress,
    faint: list[Candidates] | None = None,
    least: float = 0.0,
) -> Candidates:
    """Faces too small for the pass over the whole picture, from overlapping tiles.

    network: the detector.
    pixels: (B,3,H,W) in [0,1].
    confidence: least score.
    wanted: scale at which the tiles are cut, as a share of the picture's.
    scale: the scale of the pass over the whole picture.
    report: called with 0 before each tile.
    faint: takes what is scored lower, if given.
    least: score of what is faint.
    """
    large, back = shrink(pixels, round(wanted * max(pixels.shape[2:])))
    limit = 2 * EASILY_SEEN * wanted / scale
    threshold = confidence if faint is None else min(confidence, least)
    parts = []
    for y1, y2 in tile_spans(large.shape[2], LONGEST_SIDE, round(1.5 * limit)):
        for x1, x2 in tile_spans(large.shape[3], LONGEST_SIDE, round(1.5 * limit)):
            report(0)
            found = detect_once(network, large[:, :, y1:y2, x1:x2], threshold)
            # A face that a tile's edge cuts is whole in the next one.
            inside = torch.ones(len(found), dtype=torch.bool)
            for column, edge, picture_edge in ((0, 0, x1 == 0), (1, 0, y1 == 0)):
                inside &= (found.box[:, column] > edge) | picture_edge
            for column, edge, picture_edge in (
                (2, x2 - x1, x2 == large.shape[3]),
                (3, y2 - y1, y2 == large.shape[2]),
            ):
                inside &= (found.box[:, column] < edge) | picture_edge
            parts.append(translate_candidates(found[inside & (longer_side(found) < limit)], x1, y1))
    found = scale_candidates(suppressed(Candidates.join(parts)), back)
    if faint is not None:
        faint.append(found[found.score <= confidence])
    return found[found.score > confidence]


def detect_all_angles(
    network: RetinaFace,
    pixels: Tensor,
    confidence: float,
    smallest: float,
    report: Progress,
    faint: list[Candidates] | None = None,
    least: float = 0.0,
) -> Candidates:
    """Faces of any roll, from four passes over the picture turned by quarters.

    Each is confirmed and scored in an upright window; of views of one face with different roll the
    one with the highest score is kept.

    network: the detector.
    pixels: (B,3,H,W) in [0,1].
    confidence: least score.
    smallest: size of the smallest faces looked for, in pixels.
    report: called with 0 before each pass.
    faint: as in `detect_all_sizes`; what a pass finds and an upright window does not is faint too.
    least: score of what is faint.
    """
    height, width = pixels.shape[2:]
    passes = []
    for turns in range(4):
        report(0)
        lower: list[Candidates] = []
        found = detect_all_sizes(
            network,
            pixels.rot90(turns, (2, 3)),
            confidence * SUPPORT,
            smallest,
            report,
            None if faint is None else lower,
            least,
        )
        passes.append(rotate_back(found, turns, width, height))
        if faint is not None:
            faint += [rotate_back(part, turns, width, height) for part in lower] + passes[-1:]
    everything = Candidates.join(passes)
    turn = roll_of(everything)
    pairs = overlaps(everything, everything)
    alike = torch.cos(turn[pairs.one] - turn[pairs.other]) > math.cos(math.radians(SAME_ROLL))
    views = everything[nms(everything.score, pairs[(pairs.union > OVERLAP) & alike])]
    found, seen = refine(network, pixels, views, confidence, report)
    found = found[seen]
    pairs = overlaps(found, found)
    found = found[nms(found.score, pairs[pairs.smaller > SAME])]
    # The box is most precise in the pass in which the face was nearest to upright.
    quarter = (roll_of(found) / (math.pi / 2)).round().long() % 4 * 90
    pairs = overlaps(found, everything)
    fitting = (everything.angle[pairs.other] == quarter[pairs.one]) & (pairs.union > OVERLAP)
    box = found.box.clone()
    best = [0.0] * len(found)
    for i, j, shared in zip(
        *(column[fitting].tolist() for column in (pairs.one, pairs.other, pairs.union)), strict=True
    ):
        if shared > best[i]:
            best[i], box[i] = shared, everything.box[j]
    return replace(found, box=box, angle=quarter)


def max_pixels_seen(height: int, width: int) -> int:
    """Most pixels that the network takes at once of a picture of this size."""
    return min(height, LONGEST_SIDE) * min(width, LONGEST_SIDE)


def memory_for(count: int, height: int, width: int) -> float:
    """Bytes that a batch of `count` pictures of height x width px takes, activations included."""
    seen = max_pixels_seen(height, width)
    at_once = min(max(count, 1), max(1, PIXELS_AT_ONCE // max(1, seen)))
    given = at_once * height * width * BYTES_PER_PIXEL_GIVEN
    return max(seen, min(count * seen, PIXELS_AT_ONCE)) * BYTES_PER_PIXEL + given


def detect(
    images: Tensor,
    network: RetinaFace,
    options: DetectOptions = DEFAULT,
    *,
    out_of_memory: Callable[[BaseException], bool] = is_out_of_memory,
    look: Callable[[slice, Tensor], None] | None = None,
    progress: Progress | None = None,
    faint: bool = False,
) -> list[list[Detection]]:
    """The faces of each picture, highest score first.

    images: (B,H,W,C), colours in [0,1]; B may be 0, C anything.
    network: the detector.
    options: `choice.min_size` is the size of the smallest faces looked for; the smaller, the more
        tiles of a large picture are searched.
    out_of_memory: tells whether an error says that fewer pictures at once may work.
    look: called with a slice of the batch and its pixels (n,3,H,W) in [0,1], finite, on the
        network's device, for whoever needs them there too.
    progress: called with 1 for each picture done, with 0 in between.
    faint: whether signs of a face, of FAINT times the confidence or more, follow the faces of each
        picture.
    """
    count, height, width = images.shape[:3]
    confidence, smallest = options.confidence, options.choice.min_size
    found: list[list[Detection]] = [[] for _ in range(count)]
    report = progress or no_progress
    scale = min(1.0, LONGEST_SIDE / max(height, width, 1))

    def work(part: slice) -> None:
        report(0)
        pixels = finite(rgb_of(images[part].to(network.home)).movedim(-1, 1))
        if look is not None:
            look(part, pixels)
        signs: list[Candidates] | None = [] if faint else None
        lower = signs, confidence * FAINT
        if options.any_angle:
            faces = detect_all_angles(network, pixels, confidence, smallest, report, *lower)
        else:
            faces = detect_all_sizes(network, pixels, confidence, smallest, report, *lower)
            # A detector with poor landmarks needs all faces refined, others only faces that were
            # small in a shrunk picture.
            least = math.inf if network.needs_refinement else BEST_SIZE / 2 if scale < 1 else 0
            coarse = longer_side(faces) * scale < least
            refined, _ = refine(network, pixels, faces[coarse], confidence, report)
            faces = Candidates.join([faces[~coarse], replace(refined, score=faces.score[coarse])])
        faces = faces[faces.score.argsort(descending=True, stable=True)]
        for those, is_faint in ((faces, False), *((sign, True) for sign in signs or ())):
            for frame, box, score, landmarks, angle in zip(
                *(column.tolist() for column in those.columns()), strict=True
            ):
                points = tuple(map(tuple, landmarks))
                detection = Detection(tuple(box), points, score, int(angle), is_faint)
                found[part.start + frame].append(detection)
        for _ in range(part.stop - part.start):
            report(1)

    most = PIXELS_AT_ONCE_CPU if network.home.type == "cpu" else PIXELS_AT_ONCE
    at_once = max(1, most // max(1, max_pixels_seen(height, width)))
    if height and width:
        with torch.inference_mode():
            in_chunks(count, at_once, work, out_of_memory)
    return found
