"""Follows faces over the frames of a video, by place and never by identity."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pictures.geometry import Box
from ..pictures.picture import finite, rgb_of
from .detect import Detection

# Side in pixels of the small pictures by which frames are compared.
THUMBNAIL = 24
# How far structure (1 - correlation) and colours (share of pixels in another bin) of two thumbnails
# may differ within a shot.
CUT_STRUCTURE, CUT_COLOURS = 0.15, 0.12
# Up to this many unlike frames between like ones are a flash, not a cut.
LONGEST_FLASH = 2
# A face missed for up to BRIDGED frames is interpolated; after FORGOTTEN frames it is a new face.
BRIDGED, FORGOTTEN = 2, 24
# Least overlap of a face with itself one frame on, and the factor by which its size may change.
OVERLAP, GROWTH = 0.3, 1.6


# Shots


def thumbnails(images: Tensor) -> Tensor:
    """(B,H,W,C) in [0,1] -> (B,3,24,24), frame by frame, on the CPU."""
    if not images.numel():
        return torch.zeros(len(images), 3, THUMBNAIL, THUMBNAIL)
    return torch.cat([shrunk(finite(rgb_of(image).movedim(-1, 0))[None]) for image in images])


def shrunk(pixels: Tensor) -> Tensor:
    """(B,3,H,W) finite, of at least one pixel -> (B,3,24,24) on the CPU."""
    # One by one, so that a frame gives the same bits in any batch.
    return torch.stack([F.adaptive_avg_pool2d(frame, THUMBNAIL) for frame in pixels]).cpu()


def is_cut(one: Tensor, other: Tensor) -> bool:
    """Whether a cut lies between two thumbnails: neither their structure nor their colours agree.

    Motion changes where things are but not the colours; light changes the colours but not where
    things are.
    """
    a, b = (x - x.mean() for x in (one.mean(0), other.mean(0)))
    power = float(a.norm() * b.norm())
    flat = min(float(a.norm()), float(b.norm())) < 0.02 * THUMBNAIL
    structure = 0.0 if flat else 1 - float((a * b).sum()) / power
    # Colours take the most time, and where things are where they were they do not matter.
    if not flat and not structure > CUT_STRUCTURE:
        return False
    colours = float((_histogram(one) - _histogram(other)).abs().sum()) / 2
    return colours > (0.5 if flat else CUT_COLOURS)


def _histogram(thumbnail: Tensor) -> Tensor:
    """Shares of 4 x 4 x 4 colours (64,) in a thumbnail.

    Each pixel is spread over the neighbouring colours, so that a slight change of light moves
    little.
    """
    position = thumbnail.flatten(1) * 3
    low = position.floor().clamp(max=2)
    high_share = position - low
    shares = torch.zeros(64)
    for corner in range(8):
        bits = torch.tensor([corner >> k & 1 for k in range(3)])[:, None]
        weight = torch.where(bits == 1, high_share, 1 - high_share).prod(0)
        index = ((low + bits) * torch.tensor([16, 4, 1])[:, None]).sum(0).long()
        shares.index_add_(0, index, weight)
    return shares / shares.sum()


def shots(small: Tensor) -> list[int]:
    """The shot of each frame of a video, from its thumbnails.

    A flash or a blank frame is a shot of its own within another.
    """
    numbers: list[int] = []
    current, last, following = 0, 0, 0
    for frame in range(len(small)):
        if frame and frame > last + 1 and not is_cut(small[last], small[frame]):
            numbers.append(current)
            last = frame
        elif frame and is_cut(small[last], small[frame]):
            following += 1
            ahead = range(frame + 1, min(frame + LONGEST_FLASH, len(small) - 1) + 1)
            if frame - last > LONGEST_FLASH or all(is_cut(small[last], small[f]) for f in ahead):
                current, last = following, frame
            numbers.append(following)
        else:
            numbers.append(current)
            last = frame
    return numbers


# Tracks


@dataclass
class Track:
    """One face over the frames of a shot.

    shot: number of the shot.
    detections: by frame, in order of frames.
    bridged: frames whose detection is interpolated.
    """

    shot: int
    detections: dict[int, Detection] = field(default_factory=dict)
    bridged: set[int] = field(default_factory=set)


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def follow(
    found: Sequence[Sequence[Detection]],
    shot_numbers: Sequence[int],
    faint: Sequence[Sequence[Detection]] | None = None,
) -> list[Track]:
    """Joins the faces of each shot by their overlap from frame to frame; bridges short misses.

    found: the faces of each frame.
    shot_numbers: the shot of each frame.
    faint: signs of a face in each frame. A miss is bridged only where there is one at its place,
        for something may cover the face; everywhere, if None.
    """
    tracks: list[Track] = []
    # The tracks of each shot that a face may still join: a flash lies within another shot.
    alive_in: dict[int, list[Track]] = {}
    for frame, (detections, shot) in enumerate(zip(found, shot_numbers, strict=True)):
        alive = [
            t for t in alive_in.get(shot, ()) if frame - next(reversed(t.detections)) <= FORGOTTEN
        ]
        pairs = sorted(_pairs(alive, detections, frame), reverse=True)
        taken_tracks: set[int] = set()
        taken: set[int] = set()
        for _, i, j in pairs:
            if i not in taken_tracks and j not in taken:
                taken_tracks.add(i)
                taken.add(j)
                alive[-i].detections[frame] = detections[-j]
        fresh = [
            Track(shot, {frame: detection})
            for j, detection in enumerate(detections)
            if -j not in taken
        ]
        tracks += fresh
        alive_in[shot] = alive + fresh
    for track in tracks:
        _bridge(track, shot_numbers, faint)
    return tracks


def _pairs(
    alive: Sequence[Track], detections: Sequence[Detection], frame: int
) -> Iterator[tuple[float, int, int]]:
    """Overlap, and the negative positions, of each track and detection that may be one face.

    Only detections that begin where the expected box may reach are compared, so that a crowd takes
    little more time than its faces do one by one.
    """
    ordered = sorted(range(len(detections)), key=lambda j: detections[j].box[0])
    lefts = [detections[j].box[0] for j in ordered]
    widest = max((d.box[2] - d.box[0] for d in detections), default=0.0)
    for i, track in enumerate(alive):
        expected = _extrapolate(track, frame)
        first = bisect.bisect_left(lefts, expected[0] - widest)
        for j in ordered[first : bisect.bisect_right(lefts, expected[2])]:
            shared = overlap(expected, detections[j].box)
            if shared > OVERLAP and _is_similar_size(expected, detections[j].box):
                yield shared, -i, -j


def _extrapolate(track: Track, frame: int) -> Box:
    """The box of a face if it moves on as it did between its last two frames."""
    last, before = [*itertools.islice(reversed(track.detections), 2), None][:2]
    assert last is not None
    box = track.detections[last].box
    if before is None or last - before > BRIDGED + 1 or frame - last > BRIDGED + 1:
        return box
    steps = (frame - last) / (last - before)
    old = track.detections[before].box
    x, y = ((box[k] + box[k + 2] - old[k] - old[k + 2]) / 2 * steps for k in (0, 1))
    return box[0] + x, box[1] + y, box[2] + x, box[3] + y


def _is_similar_size(a: Box, b: Box) -> bool:
    ratio = math.sqrt(
        max((a[2] - a[0]) * (a[3] - a[1]), 1e-6) / max((b[2] - b[0]) * (b[3] - b[1]), 1e-6)
    )
    return 1 / GROWTH < ratio < GROWTH


def _bridge(
    track: Track, shot_numbers: Sequence[int], faint: Sequence[Sequence[Detection]] | None
) -> None:
    frames = list(track.detections)
    for before, after in itertools.pairwise(frames):
        if after - before - 1 > BRIDGED:
            continue
        first, last = track.detections[before], track.detections[after]
        for frame in range(before + 1, after):
            if shot_numbers[frame] != track.shot:
                continue
            between = _interpolate(first, last, (frame - before) / (after - before))
            if faint is not None:
                signs = [d.score for d in faint[frame] if overlap(between.box, d.box) > OVERLAP]
                if not signs:
                    continue
                between = replace(between, score=max(signs))
            track.detections[frame] = between
            track.bridged.add(frame)
    track.detections = dict(sorted(track.detections.items()))


def _interpolate(first: Detection, last: Detection, share: float) -> Detection:
    def mix(a: Sequence[float], b: Sequence[float]) -> tuple[float, ...]:
        return tuple(x + (y - x) * share for x, y in zip(a, b, strict=True))

    x1, y1, x2, y2 = mix(first.box, last.box)
    landmarks = tuple(
        (x, y) for x, y in (mix(a, b) for a, b in zip(first.landmarks, last.landmarks, strict=True))
    )
    return Detection((x1, y1, x2, y2), landmarks, min(first.score, last.score), first.angle)
