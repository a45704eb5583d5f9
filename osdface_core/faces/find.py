"""Pictures -> chosen, aligned faces: detect, follow, number, choose, crop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..chunks import Progress, is_out_of_memory, no_progress, on_first
from ..errors import OSDFaceError
from ..pictures.geometry import Affine, apply, compose, inverse
from ..pictures.picture import check_pictures
from .align import crop_faces, similarity
from .choose import CHOSEN, choose, number_faces, report
from .detect import DEFAULT, Detection, DetectOptions, detect
from .face import Face, Faces
from .retinaface import RetinaFace
from .smooth import smooth
from .track import THUMBNAIL, follow, shots, shrunk

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """The faces of a batch of pictures.

    faces: the chosen ones.
    everyone: all that were found, by frame, then number.
    verdicts: for each of them "chosen", or why not.
    report: the same as text.
    """

    faces: Faces
    everyone: tuple[Face, ...]
    verdicts: tuple[str, ...]
    report: str


def find_faces(
    images: Tensor,
    network: RetinaFace,
    options: DetectOptions = DEFAULT,
    *,
    out_of_memory: Callable[[BaseException], bool] = is_out_of_memory,
    progress: Progress | None = None,
) -> Found:
    """Finds the faces of a batch of pictures and cuts out the chosen ones.

    The batch is taken as a video: a face is followed from frame to frame and keeps its number until
    a cut. Unrelated pictures are so many cuts. Raises OSDFaceError for an input that cannot be
    understood.

    images: (B,H,W,C) in [0,1]; B may be 0, C anything.
    network: the detector.
    options: how faces are found, chosen and cut out.
    out_of_memory: tells whether an error says that fewer pictures at once may work.
    progress: called with 1 for each picture searched, with 0 in between; what it raises ends the
        job.
    """
    check_pictures(images)
    count, height, width = images.shape[:3]
    choose((), options.choice, width, height)
    small = torch.zeros(count, 3, THUMBNAIL, THUMBNAIL)

    def look(part: slice, pixels: Tensor) -> None:
        small[part] = shrunk(pixels)

    found = detect(
        images,
        network,
        options,
        out_of_memory=out_of_memory,
        look=look,
        progress=progress,
        faint=count > 2,
    )
    everyone, verdicts = place_faces(found, small, width, height, options)
    return cut_out(
        images,
        everyone,
        verdicts,
        network,
        options,
        out_of_memory=out_of_memory,
        progress=progress,
    )


def cut_out(
    images: Tensor,
    everyone: tuple[Face, ...],
    verdicts: tuple[str, ...],
    network: RetinaFace,
    options: DetectOptions,
    *,
    out_of_memory: Callable[[BaseException], bool],
    progress: Progress | None,
) -> Found:
    """The chosen of all faces, cut out of pictures (B,H,W,C); the rest as in `find_faces`."""
    count, height, width = images.shape[:3]
    chosen = tuple(
        face for face, verdict in zip(everyone, verdicts, strict=True) if verdict == CHOSEN
    )
    size = options.crop_size
    crops = torch.empty(len(chosen), size, size, 3, device=images.device)
    for i, face in enumerate(chosen):
        (progress or no_progress)(0)
        cut = partial(crop_faces, images, [face.frame], [face.matrix], size)
        crops[i : i + 1] = on_first((network.home, images.device), cut, out_of_memory)
    return Found(
        Faces(chosen, crops, count, height, width, size),
        everyone,
        verdicts,
        report(everyone, verdicts, count),
    )


def place_faces(
    found: list[list[Detection]],
    small: Tensor,
    width: int,
    height: int,
    options: DetectOptions,
) -> tuple[tuple[Face, ...], tuple[str, ...]]:
    """All faces, followed and numbered, and for each "chosen" or why not.

    Needs no pictures, so that a video of any length can be searched piece by piece.

    found: the detections of each frame, the faint ones too.
    small: (B,3,24,24), the frames' track.thumbnails.
    width: of the pictures, in pixels.
    height: of the pictures, in pixels.
    options: how faces are chosen and cut out.
    """
    everyone = number_faces(follow_faces(found, shots(small), options), options.choice.order)
    everyone.sort(key=lambda face: (face.frame, face.number))
    return tuple(everyone), tuple(choose(everyone, options.choice, width, height))


def follow_faces(
    found: list[list[Detection]], shot_numbers: list[int], options: DetectOptions
) -> list[Face]:
    """A Face for each detection and each bridged miss, numbered by track, its matrix smoothed."""
    everyone = []
    size = options.crop_size
    strong, faint = (
        [[d for d in detections if d.faint == is_faint] for detections in found]
        for is_faint in (False, True)
    )
    for number, track in enumerate(follow(strong, shot_numbers, faint)):
        matrices: dict[int, Affine] = {}
        for frame, detection in track.detections.items():
            try:
                matrices[frame] = similarity(detection.landmarks, size)
            except OSDFaceError as error:
                log.warning("Picture %d: %s", frame, error)
        for frame, matrix in smooth(matrices, track.bridged, size, options.smoothing).items():
            detection = track.detections[frame]
            correction = compose(inverse(matrix), matrices[frame])
            landmarks = tuple(apply(correction, *point) for point in detection.landmarks)
            face = Face(
                frame=frame,
                box=detection.box,
                landmarks=landmarks,
                score=detection.score,
                number=number,
                matrix=matrix,
                angle=detection.angle,
                shot=track.shot,
                bridged=frame in track.bridged,
            )
            everyone.append(face)
    return everyone
