"""From pictures to chosen, aligned faces: detect, follow, number, choose, cut."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..chunks import Progress
from ..errors import OSDFaceError
from ..pictures.resampling import apply, compose, cut_all, inverse, similarity
from .choose import CHOSEN, Choice, choose, numbered, report
from .detect import Detection, detect, is_out_of_memory
from .face import Affine, Face, Faces, check_pictures
from .retinaface import RetinaFace
from .track import follow, shots, steadied, thumbnails

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """faces: the chosen ones. everyone: all that were found, by frame, then number. verdicts: for
    each of them "chosen", or why not. report: the same as text.
    """

    faces: Faces
    everyone: tuple[Face, ...]
    verdicts: tuple[str, ...]
    report: str


def find_faces(
    images: Tensor,
    network: RetinaFace,
    *,
    confidence: float = 0.9,
    any_angle: bool = False,
    choice: Choice | None = None,
    crop_size: int = 512,
    smoothing: float = 0.0,
    out_of_memory: Callable[[BaseException], bool] = is_out_of_memory,
    progress: Progress | None = None,
) -> Found:
    """Finds the faces of a batch of pictures and cuts out the chosen ones.

    The batch is taken as a video: a face is followed from frame to frame and keeps its number until
    a cut. Unrelated pictures are so many cuts. images: (B,H,W,C) in [0,1]; B may be 0, C anything.
    smoothing: 0..1, see track.steadied. progress: called with 1 for each picture searched, with 0
    in between; what it raises ends the job. Raises OSDFaceError for an input that cannot be
    understood.
    """
    choice = choice or Choice()
    check_pictures(images)
    count, height, width = images.shape[:3]
    choose((), choice, width, height)
    found = detect(
        images,
        network,
        confidence=confidence,
        any_angle=any_angle,
        smallest=choice.min_size,
        out_of_memory=out_of_memory,
        progress=progress,
    )
    step = progress or (lambda done, picture=None: None)

    def one_by_one() -> Iterator[Tensor]:
        for image in images.split(1):
            step(0)
            yield image

    small = torch.cat([thumbnails(image) for image in one_by_one()])
    everyone, verdicts = chosen_faces(found, small, width, height, choice, crop_size, smoothing)
    chosen = tuple(
        face for face, verdict in zip(everyone, verdicts, strict=True) if verdict == CHOSEN
    )
    crops = torch.empty(len(chosen), crop_size, crop_size, 3, device=images.device)
    for i, face in enumerate(chosen):
        step(0)
        crops[i : i + 1] = cut_all(images, [face.frame], [face.matrix], crop_size)
    return Found(
        Faces(chosen, crops, count, height, width, crop_size),
        everyone,
        verdicts,
        report(everyone, verdicts, count),
    )


def chosen_faces(
    found: list[list[Detection]],
    small: Tensor,
    width: int,
    height: int,
    choice: Choice,
    crop_size: int,
    smoothing: float,
) -> tuple[tuple[Face, ...], tuple[str, ...]]:
    """What `find_faces` makes of its detections by frame: everyone, followed and numbered, and a
    verdict for each.

    Needs no pictures, so that a video of any length can be searched piece by piece. small: its
    track.thumbnails.
    """
    everyone = numbered(_followed(found, shots(small), crop_size, smoothing), choice.order)
    everyone.sort(key=lambda face: (face.frame, face.number))
    return tuple(everyone), tuple(choose(everyone, choice, width, height))


def _followed(
    found: list[list[Detection]], shot_numbers: list[int], crop_size: int, smoothing: float
) -> list[Face]:
    """A Face for each detection and each bridged miss, numbered by track, its matrix smoothed."""
    everyone = []
    for number, track in enumerate(follow(found, shot_numbers)):
        matrices: dict[int, Affine] = {}
        for frame, detection in track.detections.items():
            try:
                matrices[frame] = similarity(detection.landmarks, crop_size)
            except OSDFaceError as error:
                log.warning("Picture %d: %s", frame, error)
        for frame, matrix in steadied(matrices, track.bridged, crop_size, smoothing).items():
            detection = track.detections[frame]
            correction = compose(inverse(matrix), matrices[frame])
            landmarks = tuple(apply(correction, *point) for point in detection.landmarks)
            everyone.append(
                Face(
                    frame,
                    detection.box,
                    landmarks,
                    detection.score,
                    number,
                    matrix,
                    detection.angle,
                    track.shot,
                )
            )
    return everyone
