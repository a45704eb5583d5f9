"""From pictures to chosen, aligned faces: detect, follow, number, choose, cut."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .align import cut_all, similarity
from .chunks import Progress
from .detect import Detection, detect, is_out_of_memory
from .errors import OSDFaceError
from .retinaface import RetinaFace
from .select import CHOSEN, Choice, choose, numbered, report
from .types import Face, Faces

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """faces: the chosen ones. everyone: all that were found, by frame, then number. verdicts: for each of them "chosen", or why not.
    report: the same as text."""

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

    images: (B,H,W,C) in [0,1]; B may be 0, C anything. progress: called with 1 for each picture that is searched, with 0 in between;
    what it raises ends the job. Raises OSDFaceError for an input that cannot be understood.
    """
    choice = choice or Choice()
    if images.ndim != 4:
        raise OSDFaceError(f"`image` has {images.ndim} dimensions {tuple(images.shape)}; a batch (B,H,W,C) is wanted: connect an IMAGE.")
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
    everyone = [
        face
        for frame, detections in enumerate(found)
        for number, detection in enumerate(detections)
        if (face := _face(frame, number, detection, crop_size)) is not None
    ]
    everyone = sorted(numbered(everyone, choice.order), key=lambda face: (face.frame, face.number))
    verdicts = choose(everyone, choice, width, height)
    chosen = tuple(face for face, verdict in zip(everyone, verdicts, strict=True) if verdict == CHOSEN)
    crops = cut_all(images, [face.frame for face in chosen], [face.matrix for face in chosen], crop_size)
    return Found(
        Faces(chosen, crops, count, height, width, crop_size), tuple(everyone), tuple(verdicts), report(everyone, verdicts, count)
    )


def _face(frame: int, number: int, found: Detection, crop_size: int) -> Face | None:
    try:
        matrix = similarity(found.landmarks, crop_size)
    except OSDFaceError as error:
        log.warning("Picture %d: %s", frame, error)
        return None
    return Face(frame, found.box, found.landmarks, found.score, number, matrix, found.angle, shot=frame)
