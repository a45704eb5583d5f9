"""A detector whose file merely fits is refused; the ones that work pass, whoever trained them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from osdface_core.errors import OSDFaceError
from osdface_core.faces.detect import DetectOptions, detect
from osdface_core.faces.detector_check import FACES, PICTURE, build_detector, drawn_face
from osdface_core.faces.retinaface import build_retinaface
from osdface_core.weights.reading import read_tensors


def test_the_wrong_anchors_detector_fits_finds_many_faces_and_is_refused(
    data: Path, load_picture: Callable[[Path], torch.Tensor]
) -> None:
    tensors = read_tensors(data / "weights" / "wrong_anchors_mobilenet0.25_Final.pth")
    found = detect(
        load_picture(data / "images" / "astronaut.png"),
        build_retinaface(tensors),
        DetectOptions(confidence=0.5),
    )[0]
    assert len(found) >= 8, "the file is no longer the negative case that it is kept for"
    with pytest.raises(OSDFaceError, match="other anchors"):
        build_detector(tensors)


def test_the_real_detector_finds_each_drawn_face_where_it_is(data: Path) -> None:
    network = build_detector(read_tensors(data / "weights" / "detection_mobilenet0.25_Final.pth"))
    for width in FACES:
        (found,) = detect(drawn_face(width)[None], network, DetectOptions(confidence=0.5))[0]
        x1, y1, x2, y2 = found.box
        assert (
            abs((x1 + x2) / 2 - PICTURE / 2) < 0.1 * width
            and abs((y1 + y2) / 2 - PICTURE / 2) < 0.25 * width
        )
        assert 0.5 * width < x2 - x1 < 1.1 * width


def test_a_detector_that_sees_no_face_in_a_drawing_is_let_pass(data: Path) -> None:
    tensors = read_tensors(data / "weights" / "detection_mobilenet0.25_Final.pth")
    for name in tensors:
        if name.startswith("ClassHead") and name.endswith("bias"):
            tensors[name] = tensors[name] + torch.tensor([20.0, -20.0]).repeat(2)
    build_detector(tensors)
