"""The built-in face detector beside RetinaFace with real weights, on pictures that its training
never saw.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from osdface_core.faces.detect import Detection, DetectOptions, detect
from osdface_core.faces.detector_check import check_detector
from osdface_core.faces.files import BUILTIN_DETECTOR
from osdface_core.faces.retinaface import RetinaFace, build_retinaface
from osdface_core.weights.reading import read_tensors
from tests import photographs

CONFIDENCE = 0.7


@pytest.fixture(scope="module")
def network() -> RetinaFace:
    return build_retinaface(read_tensors(BUILTIN_DETECTOR))


@pytest.fixture(scope="module")
def real(data: Path) -> RetinaFace:
    return build_retinaface(read_tensors(data / "weights" / "detection_mobilenet0.25_Final.pth"))


@pytest.fixture(scope="module")
def portraits(data: Path, load_picture: Callable[[Path], torch.Tensor]) -> torch.Tensor:
    """Numbers that are multiples of six: held out."""
    names = ("female_000", "female_006", "female_018", "male_012", "male_024", "male_096")
    pictures = [load_picture(data / "images" / "portraits" / f"{name}.jpg") for name in names]
    return F.avg_pool2d(torch.cat(pictures).movedim(-1, 1), 2).movedim(1, -1)


def apart(one: Detection, other: Detection) -> float:
    """The mean distance of the landmarks, as a share of the face's height."""
    return sum(map(math.dist, one.landmarks, other.landmarks)) / 5 / (one.box[3] - one.box[1])


def test_it_has_a_few_hundred_thousand_weights(network: RetinaFace) -> None:
    assert 100_000 < sum(p.numel() for p in network.parameters()) < 500_000


def test_held_out_portraits_are_found_where_the_real_detector_finds_them(
    network: RetinaFace, real: RetinaFace, portraits: torch.Tensor
) -> None:
    known, found = (
        detect(portraits, n, DetectOptions(confidence=CONFIDENCE)) for n in (real, network)
    )
    errors = [
        min((apart(k[0], f) for f in faces), default=1.0)
        for k, faces in zip(known, found, strict=True)
    ]
    assert sum(error < 0.12 for error in errors) >= len(errors) - 1
    assert sorted(errors)[len(errors) // 2] < 0.08


def test_a_made_group_is_found(network: RetinaFace) -> None:
    picture = torch.from_numpy(photographs.pixels(photographs.group())).float()[None] / 255
    assert len(detect(picture, network)[0]) == 6


def test_small_groups_are_found(
    network: RetinaFace, real: RetinaFace, data: Path, load_picture: Callable[[Path], torch.Tensor]
) -> None:
    picture = load_picture(data / "images" / "cc0_mosaic_6faces_1080p.png")
    known, found = (
        detect(picture, n, DetectOptions(confidence=CONFIDENCE))[0] for n in (real, network)
    )
    assert len(known) == 6
    assert sum(min((apart(face, f) for f in found), default=1.0) < 0.15 for face in known) >= 5


def test_no_face_is_seen_where_none_is(network: RetinaFace) -> None:
    torch.manual_seed(0)
    noise = torch.rand(1, 300, 300, 3)
    ramp = torch.linspace(0, 1, 300).expand(300, 300)[None, :, :, None].expand(-1, -1, -1, 3)
    cloth = (
        F.interpolate(torch.rand(1, 3, 12, 12), (300, 300), mode="bicubic")
        .movedim(1, -1)
        .clamp(0, 1)
    )
    assert [
        len(faces)
        for faces in detect(
            torch.cat([noise, ramp, cloth]), network, DetectOptions(confidence=CONFIDENCE)
        )
    ] == [0, 0, 0]


def test_one_drawn_face_is_not_taken_for_several(network: RetinaFace) -> None:
    check_detector(network)


def test_a_face_on_its_side_is_found_with_any_angle(network: RetinaFace) -> None:
    picture = torch.from_numpy(photographs.pixels(photographs.astronaut())).float()[None] / 255
    turned = picture.rot90(1, (1, 2))
    found = detect(turned, network, DetectOptions(confidence=CONFIDENCE, any_angle=True))[0]
    assert found
    eyes, mouth = (
        torch.tensor(points).mean(0) for points in (found[0].landmarks[:2], found[0].landmarks[3:])
    )
    down = mouth - eyes
    assert abs(float(down[0])) > abs(float(down[1]))
