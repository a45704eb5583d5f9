"""Refines detections by a second pass over each face.

The face is looked at in an upright window, at the size at which landmarks are most precise.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chunks import Progress
from ..errors import OSDFaceError
from ..pictures.geometry import Affine, apply, compose, inverse, scale_of, scaling, translated
from ..pictures.resampling import sample_affine
from .align import similarity
from .candidates import Candidates, detect_once, longer_side
from .retinaface import RetinaFace

# Pixels a side of the window and of a face in it. Landmarks are equally precise from 150 to 400 px
# and less precise below (docs/detection.md). A face is enlarged by MAX_ZOOM at most.
WINDOW, BEST_SIZE, MAX_ZOOM = 288, 144, 2.0
WINDOWS_AT_ONCE = 32


def cut_window(picture: Tensor, matrix: Affine) -> Tensor:
    """(3,H,W) -> (3,288,288) through `matrix`, each pixel the mean of up to 4 x 4 samples."""
    back = inverse(matrix)
    fine = min(4, math.ceil(scale_of(back)))
    samples = sample_affine(
        picture,
        compose(back, scaling(1 / fine, 1 / fine)),
        WINDOW * fine,
        WINDOW * fine,
        "bilinear",
    )
    return F.avg_pool2d(samples, fine)


def refine(
    network: RetinaFace,
    pixels: Tensor,
    found: Candidates,
    confidence: float,
    report: Progress,
) -> tuple[Candidates, Tensor]:
    """The n faces with landmarks and scores of a second pass, and which of them (n,) it confirmed.

    A face is confirmed by an upright face of about its size in the middle of its window; others are
    returned as given.

    network: the detector.
    pixels: (B,3,H,W) in [0,1].
    found: detections in these pictures.
    confidence: least score of the second pass.
    report: called with 0 before each batch of windows.
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
        zoom = min(BEST_SIZE / max(sides[i], 1.0), MAX_ZOOM) / scale_of(upright)
        (a, b, _), (c, d, _) = upright
        to_window = ((a * zoom, b * zoom, 0.0), (c * zoom, d * zoom, 0.0))
        centre = apply(to_window, x, y)
        windows.append((i, translated(to_window, WINDOW / 2 - centre[0], WINDOW / 2 - centre[1])))
    for start in range(0, len(windows), WINDOWS_AT_ONCE):
        report(0)
        part = windows[start : start + WINDOWS_AT_ONCE]
        cuts = torch.stack([cut_window(pixels[int(found.frame[i])], matrix) for i, matrix in part])
        closer = detect_once(network, cuts, confidence)
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
