"""A face that is missed for a frame is bridged only where something of it is seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import ImageDraw
from torch import Tensor

from osdface_core.faces.candidates import Candidates
from osdface_core.faces.detect import DetectOptions, detect, detect_in_tiles
from osdface_core.faces.files import BUILTIN_DETECTOR
from osdface_core.faces.find import find_faces
from osdface_core.faces.retinaface import RetinaFace, build_retinaface
from osdface_core.weights.reading import read_tensors
from tests import photographs

FRAMES, MISSED = 7, 3


@pytest.fixture(scope="module")
def network() -> RetinaFace:
    return build_retinaface(read_tensors(BUILTIN_DETECTOR))


def film(covered: bool) -> Tensor:
    """(7,360,400,3): a head that drifts by 2 px a frame, in one of them behind dark hair."""
    frames = []
    for i in range(FRAMES):
        frame = photographs.astronaut().crop((20 + 2 * i, 0, 420 + 2 * i, 360))
        if covered and i == MISSED:
            ImageDraw.Draw(frame).ellipse((125, 10, 275, 250), fill=(38, 28, 24))
        frames.append(np.asarray(frame.convert("RGB"), np.float32) / 255)
    return torch.from_numpy(np.stack(frames))


def test_nothing_is_restored_on_what_covers_a_face(network: RetinaFace) -> None:
    found = find_faces(film(covered=True), network)
    frames = [face.frame for face in found.everyone]
    assert frames == [i for i in range(FRAMES) if i != MISSED]
    assert len({face.number for face in found.everyone}) == 1
    assert f"no face in picture {MISSED}" in found.report
    assert "bridged" not in found.report


def test_a_face_that_is_seen_faintly_is_bridged_and_the_report_says_so(
    network: RetinaFace,
) -> None:
    """Fog lowers its score below the confidence, but not to that of hair."""
    pictures = film(covered=False)
    scores = [faces[0].score for faces in detect(pictures, network)]
    for fog in np.arange(0.5, 1.0, 0.02):
        pictures[MISSED] = film(covered=False)[MISSED] * (1 - fog) + fog * 0.7
        faint = detect(pictures[MISSED : MISSED + 1], network, DetectOptions(0.01))[0]
        score = faint[0].score if faint else 0.0
        if score < min(0.9, *scores):
            break
    assert 0.3 < score < 0.9, score
    found = find_faces(pictures, network)
    assert [face.frame for face in found.everyone] == list(range(FRAMES))
    assert [face.frame for face in found.everyone if face.bridged] == [MISSED]
    assert found.everyone[MISSED].score == pytest.approx(score, abs=1e-3)
    assert f"bridged in {MISSED}" in found.report


def turned(degrees: float) -> Tensor:
    """(360,400,3): the head turned to the side, as a cylinder of elliptic shape: of its back, which
    the photograph does not show, there is dark hair.
    """
    picture = np.asarray(photographs.astronaut().crop((20, 0, 420, 360)).convert("RGB"), np.float32)
    y, x = np.mgrid[:360, :400].astype(np.float32)
    half = 62 * np.sqrt(np.clip(1 - ((y - 120) / 95) ** 2, 0, 1))
    inside = np.abs(x - 202) < half
    angle = np.arcsin(np.clip((x - 202) / np.maximum(half, 1), -1, 1)) - np.radians(degrees)
    seen = np.cos(angle) > 0
    place = np.clip(202 + half * np.sin(angle), 0, 398.999)
    left, share = place.astype(int), (place % 1)[..., None]
    row = y.astype(int)
    skin = picture[row, left] * (1 - share) + picture[row, left + 1] * share
    head = np.where(seen[..., None], skin, np.array([38, 28, 24], np.float32))
    return torch.from_numpy(np.where(inside[..., None], head, picture) / 255)


@pytest.mark.parametrize(
    ("away", "bridged"),
    [
        ([60], True),
        *(([angle], False) for angle in (90, 105, 120, 180)),
        *(([105, 180], False), ([90, -90], False)),
    ],
)
def test_a_head_that_turns_away_is_bridged_as_long_as_its_face_is_seen(
    network: RetinaFace, away: list[int], bridged: bool
) -> None:
    """At 60 degrees one eye and the mouth are seen, at 90 cheek and hair, beyond it hair."""
    before, after = [0, 20, 45], [45, 20, 0]
    angles = [*before, *away, *after]
    found = find_faces(torch.stack([turned(angle) for angle in angles]), network)
    changed = [face.frame for face in found.everyone]
    seen = [i for i in range(len(angles)) if bridged or not 3 <= i < 3 + len(away)]
    assert changed == seen
    assert [face.frame for face in found.everyone if face.bridged] == ([3] if bridged else [])


@pytest.mark.parametrize("any_angle", [False, True])
def test_what_is_faint_changes_no_other_detection(network: RetinaFace, any_angle: bool) -> None:
    picture = torch.from_numpy(np.asarray(photographs.group(), np.float32) / 255)[None]
    options = DetectOptions(any_angle=any_angle)
    plain = detect(picture, network, options)[0]
    with_faint = detect(picture, network, options, faint=True)[0]
    assert [face for face in with_faint if not face.faint] == plain
    assert any(face.faint for face in with_faint)


def test_tiles_of_a_large_picture_leave_faint_signs_too(network: RetinaFace) -> None:
    head = photographs.astronaut().crop(photographs.HEAD).convert("RGB").resize((60, 51))
    picture = torch.full((1, 420, 2400, 3), 0.5)
    picture[0, 200:251, 1000:1060] = torch.from_numpy(np.asarray(head, np.float32) / 255)
    pixels, tiles = picture.movedim(-1, 1), (1.0, 0.5, lambda *_: None)
    face = detect_in_tiles(network, pixels, 0.3, *tiles)
    assert len(face) == 1
    faint: list[Candidates] = []
    above = float((1 + face.score) / 2)
    assert len(detect_in_tiles(network, pixels, above, *tiles, faint=faint, least=0.3)) == 0
    assert torch.equal(Candidates.join(faint).box, face.box)
