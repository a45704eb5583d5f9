"""Checks that a face detector works, by faces drawn here.

A RetinaFace file trained with other anchors has the same names and shapes, loads strictly, and
finds many faces where one is.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor, nn

from ..errors import OSDFaceError
from ..layers import Operations
from .detect import DetectOptions, detect
from .retinaface import RetinaFace, build_retinaface

PICTURE = 256
FACES = (48, 60, 80, 100, 120)  # widths of the drawn heads in pixels
CONFIDENCE = 0.5
# A detector need not take a drawing for a face, but it must not find several in most of them.
MOST_DOUBLED = len(FACES) // 2
_OVERSAMPLED = 4


def drawn_face(width: int, picture: int = PICTURE) -> Tensor:
    """A frontal head `width` px wide before a plain ground: (picture,picture,3) in [0,1].

    Drawn in a dozen shapes.
    """
    side = picture * _OVERSAMPLED
    middle, unit = side / 2, width * _OVERSAMPLED / 2
    image = Image.new("RGB", (side, side), (90, 110, 130))
    draw = ImageDraw.Draw(image)

    def box(x: float, y: float, rx: float, ry: float) -> tuple[float, float, float, float]:
        return tuple(middle + unit * v for v in (x - rx, y - ry, x + rx, y + ry))  # type: ignore[return-value]

    hair, skin, shade, dark = (50, 35, 28), (222, 178, 150), (190, 145, 120), (60, 40, 30)
    draw.ellipse(box(0, -0.15, 0.95, 1.2), hair)
    draw.rectangle(box(0, 1.1, 0.35, 0.5), shade)
    draw.ellipse(box(0, 2.2, 1.6, 0.9), (60, 70, 100))
    draw.ellipse(box(0, 0, 0.76, 1.02), skin)
    for x in (-0.32, 0.32):
        draw.ellipse(box(x, -0.2, 0.17, 0.10), shade)
        draw.ellipse(box(x, -0.18, 0.13, 0.065), (245, 240, 235))
        draw.ellipse(box(x, -0.18, 0.06, 0.062), dark)
        draw.rectangle(box(x, -0.35, 0.17, 0.025), dark)
        draw.ellipse(box(x * 0.28, 0.2, 0.045, 0.03), shade)
    draw.ellipse(box(0, 0.5, 0.25, 0.07), (180, 80, 80))
    draw.rectangle(box(0, 0.5, 0.24, 0.01), (120, 50, 50))
    image = image.filter(ImageFilter.GaussianBlur(0.03 * unit)).resize(
        (picture, picture), Image.Resampling.BOX
    )
    return torch.from_numpy(np.asarray(image).copy()).float() / 255


def check_detector(network: RetinaFace, source: str = "The face detector's file") -> None:
    """Raises OSDFaceError for a detector that finds several faces where most pictures show one."""
    found = detect(
        torch.stack([drawn_face(width) for width in FACES]),
        network,
        DetectOptions(confidence=CONFIDENCE),
    )
    doubled = [len(faces) for faces in found if len(faces) > 1]
    if len(doubled) > MOST_DOUBLED:
        raise OSDFaceError(
            f"{source} is refused: shown a single drawn face it finds up to {max(doubled)}, as a "
            "detector trained with other anchors does; "
            "use detection_Resnet50_Final.pth or detection_mobilenet0.25_Final.pth of facexlib, "
            "which `python install.py` fetches."
        )


def build_detector(tensors: dict[str, Tensor], operations: Operations = nn) -> RetinaFace:
    """A checked RetinaFace. Raises OSDFaceError as `build_retinaface` and `check_detector` do."""
    network = build_retinaface(tensors, operations)
    check_detector(network)
    return network
