"""Following and steadying, against motion that is known because the tests made it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from osdface_core.faces.choose import Choice
from osdface_core.faces.detect import Detection, DetectOptions
from osdface_core.faces.face import Face
from osdface_core.faces.find import Found, find_faces
from osdface_core.faces.retinaface import RetinaFace, build_retinaface
from osdface_core.faces.smooth import smooth, whittaker
from osdface_core.faces.stream import REMEMBERED, FaceStream
from osdface_core.faces.track import follow, shots, thumbnails
from osdface_core.pictures.geometry import Affine, apply, compose, inverse
from osdface_core.pictures.resampling import warp

Load = Callable[[Path], Tensor]
CORNERS = ((0.0, 0.0), (512.0, 0.0), (0.0, 512.0), (512.0, 512.0))
SIDE = 400


@pytest.fixture(scope="module")
def network(data: Path) -> RetinaFace:
    return build_retinaface(
        torch.load(
            data / "weights/detection_mobilenet0.25_Final.pth",
            map_location="cpu",
            weights_only=True,
        )
    )


def portrait(data: Path, number: int) -> Path:
    return sorted((data / "images" / "portraits").glob("*.jpg"))[number]


def motion(t: float) -> Affine:
    """Pan, zoom and roll of a 1024 px portrait in a frame of 400 px."""
    scale = 0.39 * (1 + 0.15 * math.sin(t / 17))
    angle = math.radians(8 * math.sin(t / 13))
    a, b = scale * math.cos(angle), scale * math.sin(angle)
    x, y = 200 + 20 * math.sin(t / 11), 200 + 8 * math.cos(t / 9)
    return (a, -b, x - a * 512 + b * 420), (b, a, y - b * 512 - a * 420)


def film(image: Tensor, frames: int) -> Tensor:
    """A noisy 8-bit video (frames,400,400,3) of a picture (1,H,W,3) moved by `motion`."""
    pixels = torch.stack(
        [warp(image[0].movedim(-1, 0), motion(t), SIDE, SIDE).movedim(0, -1) for t in range(frames)]
    )
    pixels = pixels + torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0)) * 0.03
    return (pixels.clamp(0, 1) * 255).round() / 255


def corners(matrix: Affine) -> np.ndarray:
    back = inverse(matrix)
    return np.array([apply(back, x, y) for x, y in CORNERS])


def jitter_and_lag(matrices: list[Affine]) -> tuple[float, float]:
    """Of a crop's corners against the place fixed to the moving picture: mean change of the error
    from frame to frame in pixels, and how many frames it trails (regression of the error on the
    velocity).
    """
    own = np.mean([corners(compose(m, motion(t))) for t, m in enumerate(matrices)], axis=0)
    true = np.array([[apply(motion(t), x, y) for x, y in own] for t in range(len(matrices))])
    error = np.array([corners(m) for m in matrices]) - true
    velocity = (true[2:] - true[:-2]) / 2
    return float(np.linalg.norm(np.diff(error, axis=0), axis=-1).mean()), float(
        -(error[1:-1] * velocity).sum() / (velocity**2).sum()
    )


def seen(x: float, y: float, size: float = 100) -> Detection:
    landmarks = tuple(
        (x + size * u, y + size * v)
        for u, v in ((-0.2, -0.1), (0.2, -0.1), (0, 0.1), (-0.15, 0.3), (0.15, 0.3))
    )
    return Detection((x - size / 2, y - size / 2, x + size / 2, y + size / 2), landmarks, 0.9)


def test_two_people_keep_their_tracks_in_whatever_order_they_are_found() -> None:
    found = [
        [seen(100 + 5 * t, 200), seen(500 - 3 * t, 210)][:: 1 if t % 2 else -1] for t in range(20)
    ]
    tracks = follow(found, [0] * 20)
    assert len(tracks) == 2
    for track in tracks:
        xs = [d.box[0] for d in track.detections.values()]
        assert list(track.detections) == list(range(20)) and not track.bridged
        assert max(abs(b - a) for a, b in itertools.pairwise(xs)) <= 5.001


def test_a_face_faster_than_its_own_width_is_followed_by_where_it_was_going() -> None:
    found = [[seen(100 + 10 * t * (t + 1) / 2, 200)] for t in range(12)]
    assert len(follow(found, [0] * 12)) == 1


@pytest.mark.parametrize("missed", [(5,), (5, 6)])
def test_a_short_miss_is_bridged_in_place(missed: tuple[int, ...]) -> None:
    found = [[] if t in missed else [seen(100 + 6 * t, 200 + t, 100 + t)] for t in range(12)]
    (track,) = follow(found, [0] * 12)
    assert track.bridged == set(missed) and list(track.detections) == list(range(12))
    for t in missed:
        assert track.detections[t].box == pytest.approx(seen(100 + 6 * t, 200 + t, 100 + t).box)
        assert np.array(track.detections[t].landmarks) == pytest.approx(
            np.array(seen(100 + 6 * t, 200 + t, 100 + t).landmarks)
        )


def test_a_long_miss_is_not_bridged_but_the_number_stays() -> None:
    found = [[] if 5 <= t < 10 else [seen(100, 200)] for t in range(15)]
    (track,) = follow(found, [0] * 15)
    assert list(track.detections) == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]
    assert (
        smooth(
            {t: ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)) for t in track.detections}, set(), 512, 1.0
        ).keys()
        == track.detections.keys()
    )


def test_nobody_takes_the_place_of_a_face_that_was_missed() -> None:
    found = [[seen(100, 200), seen(160, 210)] if t != 5 else [seen(160, 210)] for t in range(10)]
    tracks = follow(found, [0] * 10)
    assert len(tracks) == 2 and sorted(t.detections[5].box[0] for t in tracks) == [50, 110]
    # Someone far larger at the same place is someone else.
    assert len(follow([[seen(200, 200, 60)], [seen(200, 200, 130)]], [0, 0])) == 2


def test_a_track_ends_at_a_cut() -> None:
    tracks = follow([[seen(100, 200)]] * 10, [0] * 5 + [1] * 5)
    assert [list(t.detections) for t in tracks] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_a_blank_frame_is_passed_over_and_stays_empty() -> None:
    found = [[seen(100 + t, 200)] if t != 4 else [] for t in range(9)]
    (track,) = follow(found, [0, 0, 0, 0, 1, 0, 0, 0, 0])
    assert 4 not in track.detections and len(track.detections) == 8


def test_cuts_are_found_and_motion_and_light_are_none(data: Path, load_picture: Load) -> None:
    faces = [
        F.avg_pool2d(load_picture(portrait(data, n)).movedim(-1, 1), 2).movedim(1, -1)
        for n in (3, 40, 77, 120, 160)
    ]
    assert shots(thumbnails(torch.cat([f for f in faces for _ in range(2)]))) == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
        4,
        4,
    ]
    moving = film(load_picture(portrait(data, 40)), 12)
    assert shots(thumbnails(moving)) == [0] * 12
    assert (
        shots(thumbnails(moving[::3] * torch.tensor([1, 0.8, 0.6, 0.8]).view(4, 1, 1, 1)))
        == [0] * 4
    )
    flash = moving.clone()
    flash[5], flash[8:10] = 0.0, 1.0
    numbers = shots(thumbnails(flash))
    assert [n == 0 for n in numbers] == [t not in (5, 8, 9) for t in range(12)]
    assert (
        shots(thumbnails(torch.zeros(3, 9, 9, 3))) == [0, 0, 0]
        and shots(thumbnails(torch.zeros(0, 9, 9, 3))) == []
    )


@given(st.floats(-5, 5), st.floats(-100, 100), st.integers(3, 40), st.floats(0.1, 1e4))
@settings(deadline=None)
def test_even_motion_passes_unchanged(
    speed: float, start: float, count: int, strength: float
) -> None:
    line = start + speed * np.arange(count)
    np.testing.assert_allclose(whittaker(line, np.ones(count), strength), line, atol=1e-3)


def test_the_smoother_is_the_least_squares_solution() -> None:
    values = np.random.default_rng(0).normal(size=30)
    second = np.diff(np.eye(30), 2, axis=0)
    wanted = np.linalg.solve(np.eye(30) + 5 * second.T @ second, values)
    # Noise alone is neither outlier nor drift for most of the line.
    assert np.corrcoef(whittaker(values, np.ones(30), 5.0), wanted)[0, 1] > 0.98


def test_a_gap_is_filled_and_a_wrong_frame_is_not_followed() -> None:
    t = np.arange(60.0)
    truth = 20 * np.sin(t / 12)
    noisy = truth + np.random.default_rng(0).normal(scale=0.3, size=60)
    noisy[30] += 25
    weights = np.ones(60)
    weights[40:42] = 0
    noisy[40:42] = 500
    assert np.abs(whittaker(noisy, weights, 10.0) - truth).max() < 1.0


def test_a_sudden_start_is_followed_without_delay() -> None:
    truth = np.where(np.arange(80) < 40, 0.0, (np.arange(80) - 40) * 6.0)
    noisy = truth + np.random.default_rng(1).normal(scale=1.0, size=80)
    assert np.sqrt(np.mean((whittaker(noisy, np.ones(80), 32.0) - truth) ** 2)) < 1.0


def test_no_smoothing_changes_nothing_and_a_turn_through_180_degrees_is_smooth() -> None:
    def pose(t: int) -> Affine:
        angle = math.radians(170 + t)
        return (math.cos(angle), -math.sin(angle), 5.0 * t), (math.sin(angle), math.cos(angle), 3.0)

    matrices = {t: pose(t) for t in range(20)}
    assert smooth(matrices, set(), 512, 0.0) == matrices
    for t, matrix in smooth(matrices, set(), 512, 0.5).items():
        assert np.abs(corners(matrix) - corners(matrices[t])).max() < 12


def test_a_steadied_crop_jitters_a_third_as_much_and_does_not_trail(
    data: Path, network: RetinaFace, load_picture: Load
) -> None:
    images = film(load_picture(portrait(data, 5)), 40)
    measured = {}
    for smoothing in (0.0, 0.5):
        found = find_faces(images, network, DetectOptions(smoothing=smoothing))
        assert [face.frame for face in found.faces.faces] == list(range(40)) and {
            face.number for face in found.faces.faces
        } == {0}
        measured[smoothing] = jitter_and_lag([face.matrix for face in found.faces.faces])
    assert measured[0.0][0] > 3 * measured[0.5][0]
    assert abs(measured[0.5][1]) < 1


def streamed(images: Tensor, network: RetinaFace, options: DetectOptions) -> list[Found]:
    """The faces of each frame, found as the frames come."""
    stream = FaceStream(options)
    return [stream.find(image[None], network) for image in images]


def test_frames_that_come_one_by_one_are_steadied_by_what_was_before(
    data: Path, network: RetinaFace, load_picture: Load
) -> None:
    images = film(load_picture(portrait(data, 5)), 60)
    measured = {}
    for smoothing in (0.0, 0.5):
        found = streamed(images, network, DetectOptions(smoothing=smoothing))
        faces = [face for frame in found for face in frame.faces.faces]
        assert [(face.frame, face.number) for face in faces] == [(0, 0)] * 60
        assert all(frame.faces.crops.shape == (1, 512, 512, 3) for frame in found)
        measured[smoothing] = jitter_and_lag([face.matrix for face in faces])
    assert measured[0.0][0] > 1.5 * measured[0.5][0]
    assert abs(measured[0.5][1]) < 1


def test_in_frames_that_come_one_by_one_a_number_is_one_person_s_until_a_cut(
    data: Path, network: RetinaFace, load_picture: Load
) -> None:
    first, second = (film(load_picture(portrait(data, n)), REMEMBERED + 8) for n in (5, 120))
    # Somebody small comes at the left, and both stay for longer than is remembered.
    both = first.clone()
    small = F.interpolate(second.movedim(-1, 1), size=(100, 100), mode="area").movedim(1, -1)
    both[3:, :100, :100] = small[3:]
    after = second[:3].clone()
    after[:, :100, :100] = small[:3]
    flash = torch.ones_like(both[:1])
    images = torch.cat([both[:6], flash, both[7:], after])
    options = DetectOptions(choice=Choice(order="left to right"))
    numbers = [
        [face.number for face in sorted(frame.everyone, key=lambda face: face.box[0])]
        for frame in streamed(images, network, options)
    ]
    wanted = [[0]] * 3 + [[1, 0]] * 3 + [[]] + [[1, 0]] * (len(both) - 7) + [[0, 1]] * 3
    assert numbers == wanted


def test_a_cut_is_never_crossed_and_a_blank_frame_has_no_face(
    data: Path, network: RetinaFace, load_picture: Load
) -> None:
    first, second = (film(load_picture(portrait(data, n)), 12) for n in (5, 120))
    images = torch.cat([first, second])
    images[6] = 0.0
    options = DetectOptions(smoothing=0.8, choice=Choice("by index", indices="0"))
    whole = find_faces(images, network, options).faces.faces
    assert sorted(face.frame for face in whole) == [t for t in range(24) if t != 6]
    alone = [find_faces(part, network, options).faces.faces for part in (images[:12], images[12:])]
    for part, faces in ((0, alone[0]), (12, alone[1])):
        by_frame: dict[int, Face] = {face.frame: face for face in whole}
        for face in faces:
            np.testing.assert_allclose(
                corners(by_frame[face.frame + part].matrix), corners(face.matrix), atol=0.05
            )


def test_a_steadied_faces_landmarks_give_its_matrix(
    data: Path, network: RetinaFace, load_picture: Load
) -> None:
    from osdface_core.faces.align import similarity

    for face in find_faces(
        film(load_picture(portrait(data, 60)), 6), network, DetectOptions(smoothing=0.7)
    ).everyone:
        np.testing.assert_allclose(
            corners(similarity(face.landmarks, 512)), corners(face.matrix), atol=0.01
        )
