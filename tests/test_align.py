"""Alignment and resampling against closed-form geometry, OpenCV and facexlib's template."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from osdface_core.errors import OSDFaceError
from osdface_core.faces.align import crop_face, crop_faces, similarity
from osdface_core.pictures.geometry import Affine, Points, apply, compose, inverse, scale_of
from osdface_core.pictures.picture import rgb_of
from osdface_core.pictures.resampling import warp
from tests import photographs

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")

# facexlib's, pixel centres at whole numbers.
FACEXLIB_TEMPLATE = np.array(
    [
        [192.98138, 239.94708],
        [318.90277, 240.1936],
        [256.63416, 314.01935],
        [201.26117, 371.41043],
        [313.08905, 371.15118],
    ]
)
# What facexlib's RetinaFace (mobilenet0.25) finds in the portraits, pixel centres at whole numbers.
# In the first three one point is far off the template's shape, the next four are near the crop's
# size, the last two are large.
LANDMARKS = {
    "male_042": (
        (444.5, 478.63),
        (587.53, 473.64),
        (510.68, 567.07),
        (465.49, 640.49),
        (583.06, 635.28),
    ),
    "male_076": (
        (474.49, 198.76),
        (576.86, 195.04),
        (529.0, 257.11),
        (481.08, 292.36),
        (581.67, 289.03),
    ),
    "female_040": (
        (406.91, 394.15),
        (516.61, 367.94),
        (476.76, 444.83),
        (432.6, 485.41),
        (545.06, 463.33),
    ),
    "female_095": (
        (451.66, 290.34),
        (577.65, 292.85),
        (508.95, 357.59),
        (447.4, 401.53),
        (576.42, 403.76),
    ),
    "male_011": (
        (445.44, 326.16),
        (576.06, 318.49),
        (500.33, 391.38),
        (455.91, 454.73),
        (586.08, 448.39),
    ),
    "male_060": (
        (431.2, 326.89),
        (561.73, 330.15),
        (490.36, 407.41),
        (435.42, 465.83),
        (551.11, 468.55),
    ),
    "male_086": (
        (448.97, 296.46),
        (560.66, 291.15),
        (500.84, 362.4),
        (457.01, 411.28),
        (564.36, 407.0),
    ),
    "male_035": (
        (390.59, 425.9),
        (619.23, 444.04),
        (488.38, 580.26),
        (387.44, 671.1),
        (581.42, 685.25),
    ),
    "female_039": (
        (474.2, 430.34),
        (710.2, 453.19),
        (595.88, 563.39),
        (454.57, 658.54),
        (673.62, 676.2),
    ),
}


def ours(points: object) -> Points:
    return tuple((float(x) + 0.5, float(y) + 0.5) for x, y in np.asarray(points))


def from_opencv(matrix: np.ndarray) -> Affine:
    (a, b, c), (d, e, f) = matrix.tolist()
    return (a, b, c - 0.5 * a - 0.5 * b + 0.5), (d, e, f - 0.5 * d - 0.5 * e + 0.5)


def to_opencv(matrix: Affine) -> np.ndarray:
    (a, b, c), (d, e, f) = matrix
    return np.array([[a, b, c + 0.5 * a + 0.5 * b - 0.5], [d, e, f + 0.5 * d + 0.5 * e - 0.5]])


def turn(
    scale: float, degrees: float, centre: tuple[float, float], to: tuple[float, float]
) -> Affine:
    """The similarity that takes `centre` to `to`."""
    a, b = scale * math.cos(math.radians(degrees)), scale * math.sin(math.radians(degrees))
    (x, y), (u, v) = centre, to
    return (a, -b, u - a * x + b * y), (b, a, v - b * x - a * y)


def corners_apart(one: Affine, other: Affine, size: int) -> float:
    """The farthest that a crop's corners lie apart under the two, in pixels of the crop."""
    back = inverse(one)
    return max(
        math.dist(apply(other, *apply(back, x, y)), (x, y)) for x in (0, size) for y in (0, size)
    )


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(-10 * np.log10(max(np.mean((one.astype(np.float64) - other) ** 2), 1e-30)))


@pytest.fixture(scope="module")
def portrait() -> Tensor:
    return torch.from_numpy(photographs.pixels(photographs.portrait())).float() / 255


# The matrix


@pytest.mark.parametrize("size", [512, 768, 1024])
@pytest.mark.parametrize("name", LANDMARKS)
def test_crop_is_cut_where_facexlib_cuts_it(name: str, size: int) -> None:
    points = np.array(LANDMARKS[name])
    # facexlib multiplies its template by size / 512 and so moves it by up to half a pixel in a
    # larger crop; OSDFace works at 512.
    template = (FACEXLIB_TEMPLATE + 0.5) * size / 512 - 0.5
    theirs = cv2.estimateAffinePartial2D(points, template, method=cv2.LMEDS)[0]
    assert corners_apart(similarity(ours(points), size), from_opencv(theirs), size) < 0.05


@given(
    st.floats(0.05, 20),
    st.floats(-180, 180),
    st.floats(-4000, 8000),
    st.floats(-4000, 8000),
    st.sampled_from([512, 640, 1024]),
)
def test_a_template_moved_turned_and_scaled_is_found_exactly(
    scale: float,
    degrees: float,
    x: float,
    y: float,
    size: int,
) -> None:
    truth = turn(scale, degrees, (256, 256), (x, y))
    landmarks = tuple(apply(truth, *point) for point in ours(FACEXLIB_TEMPLATE))
    found = similarity(landmarks, size)
    assert (
        corners_apart(
            found, compose(((size / 512, 0, 0), (0, size / 512, 0)), inverse(truth)), size
        )
        < 1e-5
    )


@pytest.mark.parametrize("astray", range(5))
def test_one_landmark_far_off_does_not_move_the_crop(astray: int) -> None:
    truth = turn(0.6, 12, (256, 256), (700, 400))
    landmarks = [apply(truth, *point) for point in ours(FACEXLIB_TEMPLATE)]
    x, y = landmarks[astray]
    landmarks[astray] = (x + 55, y - 40)
    assert corners_apart(similarity(tuple(landmarks), 512), inverse(truth), 512) < 1e-3


@pytest.mark.parametrize(
    "landmarks",
    [
        ((5.0, 5.0),) * 5,
        ((math.nan, 0.0), (9.0, 0.0), (5.0, 5.0), (1.0, 9.0), (8.0, 9.0)),
        ((0.0, 0.0), (9.0, 0.0)),
        (),
    ],
)
def test_landmarks_that_make_no_face_are_refused(landmarks: Points) -> None:
    with pytest.raises(OSDFaceError, match="detect the face again"):
        similarity(landmarks, 512)


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=5, max_size=5))
def test_any_landmarks_give_a_usable_matrix_or_a_refusal(points: list[tuple[int, int]]) -> None:
    try:
        matrix = similarity(tuple((float(x), float(y)) for x, y in points), 512)
    except OSDFaceError:
        return
    assert 0 < scale_of(matrix) < math.inf
    assert apply(compose(inverse(matrix), matrix), 3.0, 4.0) == pytest.approx((3.0, 4.0), abs=1e-6)


# Resampling


@settings(deadline=None, max_examples=40)
@given(st.floats(0.2, 5), st.floats(-180, 180), st.integers(30, 70), st.integers(30, 70))
def test_a_gradient_stays_the_same_gradient(scale: float, degrees: float, x: int, y: int) -> None:
    """Cubic interpolation with a = -0.75 is up to 0.06 px off on it between pixels, by turns to
    either side; on average, nothing.
    """
    down, across = torch.meshgrid(torch.arange(100) + 0.5, torch.arange(100) + 0.5, indexing="ij")
    matrix = turn(scale, degrees, (x, y), (16, 16))
    result = warp(torch.stack([across, down]), matrix, 32, 32)
    row, column = torch.meshgrid(torch.arange(32) + 0.5, torch.arange(32) + 0.5, indexing="ij")
    (a, b, c), (d, e, f) = inverse(matrix)
    truth = torch.stack([a * column + b * row + c, d * column + e * row + f])
    # Away from the source's edge, by as much as the filter reaches.
    inside = ((truth > 9 / min(scale, 1)) & (truth < 100 - 9 / min(scale, 1))).all(0)
    error = (result - truth)[:, inside]
    assert error.abs().max() < 0.06 * max(1, 1 / scale)


@pytest.mark.parametrize("degrees", [0, 7, 45, 160])
def test_enlarging_is_opencvs_cubic(degrees: float, portrait: Callable[[str], Tensor]) -> None:
    picture = portrait
    matrix = turn(1.9, degrees, (510.3, 420.8), (256, 256))
    theirs = cv2.warpAffine(picture.numpy(), to_opencv(matrix), (512, 512), flags=cv2.INTER_CUBIC)
    assert psnr(crop_face(picture, matrix, 512).numpy(), theirs) > 60


@pytest.mark.parametrize("degrees", [-12.0, 0.0, 4.0, 13.0])
def test_crops_near_the_crops_size_agree_with_facexlibs(degrees: float, portrait: Tensor) -> None:
    """facexlib interpolates linearly, which alone costs a sharp portrait 44 dB against OpenCV's
    cubic. A face in need of restoration is softer: here by a blur of 0.7 px.
    """
    picture = cv2.GaussianBlur((portrait.numpy() * 255).astype(np.uint8), (0, 0), 0.7)
    truth = turn(1.05, degrees, (256, 256), (510.3, 550.8))
    points = np.array([apply(truth, x, y) for x, y in FACEXLIB_TEMPLATE])
    theirs = cv2.warpAffine(
        picture,
        cv2.estimateAffinePartial2D(points, FACEXLIB_TEMPLATE, method=cv2.LMEDS)[0],
        (512, 512),
    )
    crop = crop_face(torch.from_numpy(picture).float() / 255, similarity(ours(points), 512), 512)
    inside = np.s_[80:-80, 80:-80]
    assert psnr(crop.numpy()[inside], theirs[inside] / 255) > 45


@pytest.mark.parametrize("times", [4, 8])
@pytest.mark.parametrize("degrees", [0, 30])
def test_shrinking_does_not_alias_and_does_not_blur(degrees: float, times: int) -> None:
    """Gratings as the crop would see them: with 0.75 px to a period, too fine for it, gone; with 4
    px, there.
    """
    matrix = turn(1 / times, degrees, (512, 512), (64, 64))
    across = torch.arange(1024).expand(1024, 1024) + 0.5

    def contrast(period: float) -> float:
        crop = crop_face(
            (torch.sin(across * (2 * math.pi / period)) * 0.5 + 0.5)[..., None], matrix, 128
        )[20:-20, 20:-20]
        return float(crop.std() / (0.5 / math.sqrt(2)))

    assert contrast(0.75 * times) < 0.03
    assert 0.95 < contrast(4 * times) < 1.1


def test_beyond_the_edge_the_picture_goes_on() -> None:
    picture = torch.rand(40, 30, 3)
    inside = crop_face(picture, turn(1, 0, (0, 0), (20, 20)), 40)
    torch.testing.assert_close(inside[20:, 20:], picture[:20, :20], atol=1e-5, rtol=0)
    assert inside[:18, :18].allclose(picture[0, 0], atol=1e-5)
    away = crop_face(picture, turn(2, 10, (-500, 900), (20, 20)), 40)
    assert away.allclose(picture[-1, 0], atol=1e-4)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(1, 5),
    st.floats(0.01, 30),
    st.floats(-180, 180),
    st.integers(1, 65),
)
def test_any_shape_is_cut(
    height: int,
    width: int,
    channels: int,
    scale: float,
    degrees: float,
    size: int,
) -> None:
    picture = torch.full((height, width, channels), 3.5)
    crop = crop_face(
        picture, turn(scale, degrees, (width / 3, height / 2), (size / 2, size / 2)), size
    )
    assert crop.shape == (size, size, channels)
    assert crop.allclose(torch.tensor(3.5), atol=1e-4)


def test_far_from_the_origin_of_a_large_picture_nothing_is_lost() -> None:
    across = (torch.arange(8000, dtype=torch.float64) + 0.5).expand(300, 8000)
    crop = crop_face((across / 8000).float()[..., None], turn(1, 0, (7800, 150), (128, 128)), 256)[
        ..., 0
    ]
    truth = (7800 + (torch.arange(256) + 0.5 - 128)) / 8000
    assert (crop - truth).abs().max() * 8000 < 0.02


def test_strips_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = torch.rand(3, 90, 90)
    matrices = turn(0.4, 20, (45, 45), (20, 20)), turn(3, 20, (45, 45), (20, 20))
    whole = [warp(picture, matrix, 40, 40) for matrix in matrices]
    monkeypatch.setattr("osdface_core.pictures.resampling.SAMPLES_AT_ONCE", 5000)
    for matrix, result in zip(matrices, whole, strict=True):
        torch.testing.assert_close(warp(picture, matrix, 40, 40), result, atol=1e-5, rtol=0)


def test_crops_of_grey_alpha_and_no_faces() -> None:
    grey = torch.rand(2, 20, 20, 1)
    matrix = turn(1, 0, (10, 10), (10, 10))
    crops = crop_faces(grey, [1, 0], [matrix, matrix], 20)
    torch.testing.assert_close(crops, grey.flip(0).expand(2, 20, 20, 3), atol=1e-5, rtol=0)
    alpha = torch.rand(1, 20, 20, 4)
    torch.testing.assert_close(
        crop_faces(alpha, [0], [matrix], 20), alpha[..., :3], atol=1e-5, rtol=0
    )
    assert rgb_of(torch.rand(5, 5, 2)).shape == (5, 5, 3)
    assert crop_faces(torch.zeros(0, 9, 9, 3), [], [], 64).shape == (0, 64, 64, 3)
