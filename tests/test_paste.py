"""Pasting against OpenCV's cubic warp there and back, and against what must not change."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import skimage.data
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from osdface_core.errors import OSDFaceError
from osdface_core.faces.align import crop_faces
from osdface_core.faces.face import Face, Faces
from osdface_core.faces.paste import PasteOptions, paste
from osdface_core.pictures.geometry import Affine, apply, compose, inverse, scaling
from tests import photographs

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")


def placed(side: float, degrees: float, centre: tuple[float, float]) -> Affine:
    """From a picture to a 512 px crop that shows a square of `side` px around `centre`, turned."""
    a, b = (
        512 / side * math.cos(math.radians(degrees)),
        512 / side * math.sin(math.radians(degrees)),
    )
    x, y = centre
    return (a, -b, 256 - a * x + b * y), (b, a, 256 - b * x - a * y)


def found(
    images: Tensor, matrices: list[Affine], frames: list[int] | None = None, crop: int = 512
) -> Faces:
    """Faces at matrices that lead to crops of 512 px, with crops of `crop` px."""
    frames = frames or [0] * len(matrices)
    matrices = [compose(scaling(crop / 512, crop / 512), matrix) for matrix in matrices]
    faces = tuple(
        Face(frame, (0, 0, 9, 9), ((0.0, 0.0),) * 5, 0.99, number, matrix)
        for number, (frame, matrix) in enumerate(zip(frames, matrices, strict=True))
    )
    crops = (
        crop_faces(images, frames, matrices, crop) if len(images) else torch.zeros(0, crop, crop, 3)
    )
    return Faces(faces, crops, len(images), images.shape[1], images.shape[2], crop)


def white(faces: Faces) -> Tensor:
    return torch.ones_like(faces.crops)


def to_opencv(matrix: Affine) -> np.ndarray:
    (a, b, c), (d, e, f) = matrix
    return np.array([[a, b, c + 0.5 * a + 0.5 * b - 0.5], [d, e, f + 0.5 * d + 0.5 * e - 0.5]])


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(-10 * np.log10(max(np.mean((one.astype(np.float64) - other) ** 2), 1e-30)))


def enlarged(name: str) -> Tensor:
    """(1,1024,1024,3) in [0,1]."""
    picture = getattr(photographs, name)().resize((1024, 1024), Image.Resampling.LANCZOS)
    return torch.from_numpy(photographs.pixels(picture)).float()[None] / 255


@pytest.fixture(scope="module")
def portrait() -> Tensor:
    return enlarged("eye")


@pytest.fixture(scope="module")
def noise() -> Tensor:
    return torch.rand(1, 200, 240, 3, generator=torch.Generator().manual_seed(0))


# There and back


def there_and_back(picture: np.ndarray, matrix: Affine, scale: float) -> tuple[float, float, float]:
    """PSNR of ours and of OpenCV's, and our shift in pixels, inside of the mask, pasting into the
    picture resized by `scale`.
    """
    height, width = picture.shape[:2]
    if scale == 1:
        truth = picture
    else:
        size = round(width * scale), round(height * scale)
        truth = cv2.resize(
            picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        )
    images = torch.from_numpy(picture)[None]
    faces = found(images, [matrix])
    target = torch.from_numpy(truth)[None]
    out, mask = paste(
        target, faces, faces.crops, PasteOptions(mask_type="box", feather=0), skip_unchanged=False
    )
    assert torch.equal(out[mask == 0], target[mask == 0])
    crop = cv2.warpAffine(
        picture,
        to_opencv(matrix),
        (512, 512),
        flags=cv2.INTER_CUBIC,
        borderMode=cv2.BORDER_REPLICATE,
    )
    (a, b, c), (d, e, f) = inverse(matrix)
    exact = to_opencv(((a * scale, b * scale, c * scale), (d * scale, e * scale, f * scale)))
    theirs = cv2.warpAffine(
        crop, exact, truth.shape[1::-1], flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
    )
    # A margin of 4 % of the crop: at its border neither has the picture beyond.
    inner = (
        paste(target, faces, white(faces), PasteOptions(mask_type="box", feather=0.04))[1][
            0
        ].numpy()
        == 1
    )
    ours = out[0].numpy()
    return (
        psnr(ours[inner], truth[inner]),
        psnr(theirs[inner], truth[inner]),
        shift_between(ours, truth, inner),
    )


def shift_between(one: np.ndarray, other: np.ndarray, inner: np.ndarray) -> float:
    """Pixels by which `one` is shifted, in the largest upright square of the mask: phase
    correlation, its plane of phases fitted by least squares over the low frequencies, which every
    crop holds (Stone et al. 2001).
    """
    rows, columns = np.flatnonzero(inner.any(1)), np.flatnonzero(inner.any(0))
    y, x, half = int(rows.mean()), int(columns.mean()), int(len(rows) * 0.24)
    window = np.hanning(2 * half)[:, None] * np.hanning(2 * half)
    first, second = (
        np.fft.fft2(window * (square - square.mean()))
        for square in (
            picture[y - half : y + half, x - half : x + half, 1].astype(np.float64)
            for picture in (one, other)
        )
    )
    cross = first * second.conj()
    v, u = np.meshgrid(np.fft.fftfreq(2 * half), np.fft.fftfreq(2 * half), indexing="ij")
    low = (np.abs(u) < 0.125) & (np.abs(v) < 0.125)
    weight = np.sqrt(np.abs(cross[low]))
    plane = np.stack([u[low], v[low]], 1) * (2 * np.pi * weight[:, None])
    return float(
        np.linalg.norm(np.linalg.lstsq(plane, np.angle(cross[low]) * weight, rcond=None)[0])
    )


def test_the_measure_of_shift_finds_one() -> None:
    grass = np.repeat(skimage.data.grass()[:400, :400, None], 3, 2).astype(np.float32) / 255
    picture = cv2.GaussianBlur(grass, (0, 0), 1)
    moved = cv2.warpAffine(
        picture, np.array([[1, 0, 0.5], [0, 1, 0]]), (400, 400), flags=cv2.INTER_CUBIC
    )
    assert shift_between(moved, picture, np.ones((400, 400), bool)) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("side", "degrees", "scale"),
    [
        *(
            (side, degrees, 1)
            for side in (128, 256, 400, 512, 700, 1000)
            for degrees in (0, 7, -50)
        ),
        *((side, 20, scale) for side in (128, 300, 900) for scale in (0.5, 1.5)),
        (512, 20, 0.5),
        (300, 170, 2),
        (128, -7, 4),
    ],
)
def test_identity_comes_back_no_worse_than_through_opencv(
    side: float, degrees: float, scale: float, portrait: Tensor
) -> None:
    ours, theirs, shift = there_and_back(
        portrait[0].numpy(), placed(side, degrees, (512.3, 511.9)), scale
    )
    assert ours > theirs - 0.01
    assert shift < 0.02


@pytest.mark.parametrize("degrees", [7, 20])
@pytest.mark.parametrize("side", [128, 320, 345, 360, 375, 420])
def test_a_smooth_face_comes_back_no_worse_than_through_opencv(side: float, degrees: float) -> None:
    """Turned little and enlarged 1.3 to 1.6 times, the waves that cubic interpolation leaves on
    smooth skin are aliased to ones that the picture may have.
    """
    ours, theirs, shift = there_and_back(
        enlarged("portrait")[0].numpy(), placed(side, degrees, (512.3, 511.9)), 1
    )
    assert ours > theirs - 0.01
    assert shift < 0.02


@pytest.mark.parametrize("side", [430, 475, 512, 590, 620])
def test_a_face_near_the_crops_size_comes_back_no_worse_than_through_opencv(
    side: float, portrait: Tensor
) -> None:
    ours, theirs, shift = there_and_back(portrait[0].numpy(), placed(side, 20, (512.3, 511.9)), 1)
    assert ours > theirs - 0.01
    assert shift < 0.02


def test_a_face_of_2000_px_comes_back_no_worse_than_through_opencv(portrait: Tensor) -> None:
    picture = cv2.resize(portrait[0].numpy(), (2200, 2200), interpolation=cv2.INTER_CUBIC)
    ours, theirs, shift = there_and_back(picture, placed(2000, 5, (1100, 1090)), 1)
    assert ours > theirs - 0.01
    assert shift < 0.02


@pytest.fixture(scope="module")
def coloured(portrait: Tensor) -> Tensor:
    """The picture with colours at every place that no one tone has: one tone is kept."""
    down, across = torch.meshgrid(torch.arange(1024.0), torch.arange(1024.0), indexing="ij")
    picture = portrait / 2 + 0.25
    picture[..., 0] += 0.2 * torch.sin(across / 60)
    picture[..., 2] += 0.2 * torch.sin(down / 60)
    return picture


@settings(deadline=None, max_examples=5)
@example(511.0, 0.0, 450.0, 450.75, 0.5)
@example(100.0, 0.0, 450.0, 450.0, 1)
@given(
    st.floats(100, 700),
    st.floats(-180, 180),
    st.floats(450, 570),
    st.floats(450, 570),
    st.sampled_from([0.5, 1, 1.5]),
)
def test_any_similarity_comes_back(
    coloured: Tensor,
    side: float,
    degrees: float,
    x: float,
    y: float,
    scale: float,
) -> None:
    ours, theirs, shift = there_and_back(coloured[0].numpy(), placed(side, degrees, (x, y)), scale)
    assert ours > theirs - 0.01
    # In the example, a picture shrunk to half, it is 0.022.
    assert shift < 0.025


def test_a_marker_in_a_crop_of_another_size_lands_on_its_place(noise: Tensor) -> None:
    faces = found(noise, [placed(150, 30, (120, 100))], crop=512)
    restored = torch.zeros(1, 768, 768, 3)
    restored[0, 300:420, 500:620] = 1
    out, _ = paste(
        torch.zeros_like(noise), faces, restored, PasteOptions(mask_type="box", feather=0)
    )
    lit = out[0, ..., 0].double()
    down, across = torch.meshgrid(torch.arange(200) + 0.5, torch.arange(240) + 0.5, indexing="ij")
    centre = float((lit * across).sum() / lit.sum()), float((lit * down).sum() / lit.sum())
    truth = apply(inverse(faces.faces[0].matrix), 560 * 512 / 768, 360 * 512 / 768)
    assert math.dist(centre, truth) < 0.02


# What must not change


def test_outside_of_the_mask_every_bit_stays_and_no_input_is_written_to() -> None:
    image = torch.randn(2, 90, 100, 5) * 10
    image[0, 0, :3] = torch.tensor([-0.0, math.nan, math.inf, -math.inf, 1e-40])
    faces = found(image, [placed(40, 10, (60, 50))], [0], crop=64)
    before = image.clone(), faces.crops.clone(), torch.rand(1, 64, 64, 3)
    restored = before[2].clone()
    out, mask = paste(image, faces, restored, PasteOptions(mask_type="ellipse"))
    for now, then in zip((image, faces.crops, restored), before, strict=True):
        assert torch.equal(now.view(torch.int32), then.view(torch.int32))
    outside = mask == 0
    assert outside.any() and not outside.all()
    assert torch.equal(out[outside].view(torch.int32), image[outside].view(torch.int32))
    assert torch.equal(out[..., 3:].view(torch.int32), image[..., 3:].view(torch.int32))
    assert (out[0, ..., :3] != image[0, ..., :3])[mask[0] > 0.01].any(-1).all()


def test_a_minus_zero_between_the_mask_and_its_bounding_box_stays_one(noise: Tensor) -> None:
    faces = found(noise, [placed(60, 20, (60, 60))], [0], crop=64)
    restored = torch.rand(1, 64, 64, 3)
    _, mask = paste(noise, faces, restored, PasteOptions(mask_type="ellipse"))
    rows, columns = (mask[0].amax(axis).nonzero() for axis in (1, 0))
    box = torch.zeros_like(mask, dtype=torch.bool)
    box[0, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    corners = box & (mask == 0)
    assert corners.any()
    image = noise.clone()
    image[corners] = -0.0
    out, _ = paste(image, faces, restored, PasteOptions(mask_type="ellipse"))
    assert torch.signbit(out[corners]).all()


def test_without_a_face_the_very_picture_comes_back(noise: Tensor) -> None:
    out, mask = paste(
        noise, Faces.empty(1, 200, 240), torch.zeros(0, 512, 512, 3), PasteOptions(mask_type="box")
    )
    assert out is noise
    assert mask.shape == (1, 200, 240) and not mask.any()


def test_a_crop_that_was_handed_back_as_it_was_leaves_the_picture_alone(noise: Tensor) -> None:
    faces = found(noise, [placed(60, 0, (60, 60)), placed(60, 0, (160, 120))], crop=64)
    restored = faces.crops.clone()
    assert paste(noise, faces, restored, PasteOptions(mask_type="box"))[0] is noise
    restored[1] = 1 - restored[1]
    out, _mask = paste(noise, faces, restored, PasteOptions(mask_type="box"))
    assert torch.equal(out[:, :90, :90], noise[:, :90, :90])
    assert (out[0, 120, 160] - noise[0, 120, 160]).abs().max() > 0.05


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_face_that_is_not_finite_is_left_and_named_and_the_others_are_pasted(
    broken: float, noise: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    faces = found(noise, [placed(60, 0, (60, 60)), placed(60, 0, (160, 120))], crop=64)
    restored = white(faces)
    restored[0, 5, 5, 1] = broken
    with caplog.at_level(logging.WARNING):
        out, _mask = paste(noise, faces, restored, PasteOptions(mask_type="box"))
    assert "Face 0 of picture 0" in caplog.text
    assert torch.equal(out[:, :90, :90], noise[:, :90, :90])
    assert out[0, 120, 160].allclose(torch.tensor(1.0))


def test_a_face_without_a_place_is_left_out(
    noise: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    faces = found(noise, [placed(60, 0, (60, 60))], crop=64)
    for matrix in (((0.0, 0.0, 5.0), (0.0, 0.0, 5.0)), ((math.nan, 0.0, 0.0), (0.0, 1.0, 0.0))):
        lost = replace(faces, faces=(replace(faces.faces[0], matrix=matrix),))
        assert paste(noise, lost, white(faces), PasteOptions(mask_type="box"))[0] is noise
        assert "left out" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_type_of_the_picture_stays(dtype: torch.dtype, noise: Tensor) -> None:
    image = noise.to(dtype)
    faces = found(image, [placed(60, 0, (60, 60))], crop=64)
    out, mask = paste(image, faces, white(faces), PasteOptions(mask_type="ellipse"))
    assert out.dtype == dtype
    assert torch.equal(out[mask == 0], image[mask == 0])
    assert out[0, 60, 60].float().allclose(torch.tensor(1.0))


# How it is blended


@pytest.mark.parametrize("mask_type", ["ellipse", "box", "parsing"])
@pytest.mark.parametrize("feather", [0.0, 0.1, 0.5])
def test_result_is_the_mask_s_mixture_and_fades_to_nothing_at_the_crops_border(
    mask_type: str, feather: float
) -> None:
    image = torch.full((1, 300, 300, 3), 0.25)
    faces = found(image, [placed(160, 25, (150, 140))], crop=256)
    out, mask = paste(
        image,
        faces,
        white(faces),
        PasteOptions(mask_type=mask_type, feather=feather),
        parser=lambda crops: torch.ones(len(crops), 64, 64),
    )
    torch.testing.assert_close(out, 0.25 + 0.75 * mask[..., None].expand_as(out), atol=1e-5, rtol=0)
    assert mask.max() == pytest.approx(1, abs=1e-4) if feather < 0.5 else mask.max() > 0.5
    (a, b, c), (d, e, f) = faces.faces[0].matrix
    down, across = torch.meshgrid(torch.arange(300) + 0.5, torch.arange(300) + 0.5, indexing="ij")
    u, v = (a * across + b * down + c) / 256, (d * across + e * down + f) / 256
    border = torch.stack([u, 1 - u, v, 1 - v]).amin(0)
    assert not mask[0][border < 0].any()
    if feather:
        # No step that an eye could see: from a pixel to the next the weight changes by no more than
        # a ramp of that width has.
        steps = torch.stack([mask[0].diff(dim=0)[:, :-1], mask[0].diff(dim=1)[:-1]]).abs().max()
        assert steps < 2.2 / (feather * 160)


def test_strength_is_the_share_of_the_restored_face(noise: Tensor) -> None:
    faces = found(noise, [placed(100, 0, (120, 100))], crop=128)
    whole, _ = paste(noise, faces, white(faces), PasteOptions(mask_type="box"))
    half, mask = paste(noise, faces, white(faces), PasteOptions(mask_type="box", strength=0.5))
    torch.testing.assert_close(half, (whole + noise) / 2, atol=1e-6, rtol=0)
    assert mask.max() == 0.5
    none, mask = paste(noise, faces, white(faces), PasteOptions(mask_type="box", strength=0))
    assert torch.equal(none, noise) and not mask.any()


def test_kept_pixels_stay_whatever_the_size_of_their_mask(noise: Tensor) -> None:
    faces = found(noise, [placed(100, 0, (120, 100))], crop=128)
    keep = torch.zeros(1, 200, 240)
    keep[:, :, 120:] = 1
    out, _mask = paste(noise, faces, white(faces), PasteOptions(mask_type="box"), keep=keep)
    assert torch.equal(out[:, :, 120:], noise[:, :, 120:])
    assert out[0, 100, 100].allclose(torch.tensor(1.0), atol=1e-5)
    halved, _ = paste(
        noise, faces, white(faces), PasteOptions(mask_type="box"), keep=keep[:, ::2, ::2]
    )
    assert torch.equal(halved[:, :, 122:], noise[:, :, 122:])
    torch.testing.assert_close(halved[:, :, :118], out[:, :, :118], atol=1e-5, rtol=0)
    blank, _ = paste(
        noise, faces, white(faces), PasteOptions(mask_type="box"), keep=torch.zeros(1, 64, 64)
    )
    assert torch.equal(blank, paste(noise, faces, white(faces), PasteOptions(mask_type="box"))[0])


def test_an_occluder_in_the_parsers_map_stays_as_it_was(noise: Tensor) -> None:
    faces = found(noise, [placed(128, 0, (120, 100))], crop=256)

    def parse(crops: Tensor) -> Tensor:
        face = torch.zeros(len(crops), 512, 512)
        face[:, 60:460, 60:460] = 1
        face[:, 200:300, 60:200] = 0
        return face

    out, _mask = paste(noise, faces, white(faces), PasteOptions(feather=0.05), parser=parse)
    # Four pixels of the parser to one of the picture; the crop begins at (56, 36).
    hand = np.s_[0, 36 + 51 : 36 + 74, 56 + 16 : 56 + 49]
    assert torch.equal(out[hand], noise[hand])
    assert out[0, 100, 130].allclose(torch.tensor(1.0), atol=1e-3)


def test_overlapping_faces_share_by_weight_in_any_order(noise: Tensor) -> None:
    matrices = [placed(90, 0, (100, 100)), placed(80, 40, (130, 110)), placed(70, -20, (115, 80))]
    shades = torch.tensor([0.0, 0.5, 1.0])
    results = []
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        faces = found(noise, [matrices[i] for i in order], crop=64)
        results.append(
            paste(
                noise,
                faces,
                shades[order][:, None, None, None].expand(3, 64, 64, 3),
                PasteOptions(mask_type="ellipse"),
            )
        )
    for out, mask in results[1:]:
        torch.testing.assert_close(out, results[0][0], atol=1e-6, rtol=0)
        torch.testing.assert_close(mask, results[0][1], atol=1e-6, rtol=0)
    twins = found(noise, matrices[:1] * 2, crop=64)
    halves, _ = paste(
        noise,
        twins,
        torch.stack([torch.zeros(64, 64, 3), torch.ones(64, 64, 3)]),
        PasteOptions(mask_type="box"),
    )
    assert halves[0, 100, 100].allclose(torch.tensor(0.5), atol=1e-6)


def test_frames_are_pasted_in_a_batch_as_they_are_alone() -> None:
    images = torch.rand(4, 80, 80, 3)
    matrices = [placed(40, 5, (40, 40)), placed(30, 0, (30, 50)), placed(44, -9, (45, 40))]
    faces = found(images, matrices, [3, 0, 3], crop=64)
    out, _mask = paste(images, faces, white(faces), PasteOptions(mask_type="ellipse"))
    assert torch.equal(out[1:3], images[1:3])
    alone = found(images[3:], [matrices[0], matrices[2]], crop=64)
    torch.testing.assert_close(
        out[3:],
        paste(images[3:], alone, white(alone), PasteOptions(mask_type="ellipse"))[0],
        atol=0,
        rtol=0,
    )


def test_grey_takes_the_brightness_and_alpha_stays() -> None:
    for channels in (1, 2):
        image = torch.rand(1, 80, 80, channels)
        faces = found(image, [placed(60, 0, (40, 40))], crop=64)
        restored = torch.tensor([1.0, 0.0, 0.0]).expand(1, 64, 64, 3)
        out, _ = paste(image, faces, restored, PasteOptions(mask_type="box"))
        assert out[0, 40, 40, 0] == pytest.approx(0.299, abs=1e-5)
        assert torch.equal(out[..., 1:], image[..., 1:])


def test_values_stay_in_the_range_of_their_picture() -> None:
    # Other draws can have no colour on average, and a picture of one tone keeps it.
    edges = (torch.rand(1, 120, 120, 3, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    faces = found(edges, [placed(90, 33, (60, 60))], crop=128)
    out, _ = paste(edges, faces, 1 - faces.crops.clamp(0, 1), PasteOptions(mask_type="box"))
    assert out.min() >= 0 and out.max() <= 1
    bright = edges * 9 - 4
    faces = found(bright, [placed(90, 0, (60, 60))], crop=512)
    out, _mask = paste(
        bright, faces, faces.crops, PasteOptions(mask_type="box"), skip_unchanged=False
    )
    assert (out - bright).abs().max() < 0.5


def test_detail_finer_than_the_crop_can_stay(portrait: Tensor) -> None:
    faces = found(portrait, [placed(1000, 0, (512, 512))], crop=256)
    lighter = faces.crops + 0.1
    blurred, _ = paste(portrait, faces, lighter, PasteOptions(mask_type="box"))
    detailed, mask = paste(portrait, faces, lighter, PasteOptions(mask_type="box", keep_detail=1))
    inside = mask[0] == 1
    wanted = (portrait + 0.1)[0][inside].numpy()
    assert psnr(detailed[0][inside].numpy(), wanted) > psnr(blurred[0][inside].numpy(), wanted) + 6


# Shapes


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(1, 5),
    st.floats(2, 300),
    st.floats(-180, 180),
    st.tuples(st.floats(-100, 200), st.floats(-100, 200)),
    st.sampled_from(["ellipse", "box", "parsing"]),
    st.sampled_from(["none", "mean-std", "wavelet"]),
    st.sampled_from([1.0, 0.5, 2.0, 3.3]),
)
def test_any_shape_is_pasted(
    height: int,
    width: int,
    channels: int,
    side: float,
    degrees: float,
    centre: tuple[float, float],
    mask_type: str,
    color_match: str,
    scale: float,
) -> None:
    small = torch.rand(1, height, width, channels)
    faces = found(small, [placed(side, degrees, centre)], crop=32)
    image = torch.rand(1, max(1, round(height * scale)), max(1, round(width * scale)), channels)
    out, mask = paste(
        image,
        faces,
        torch.rand(1, 40, 40, 3),
        PasteOptions(mask_type=mask_type, color_match=color_match, keep_detail=0.5),
        parser=lambda crops: torch.ones(len(crops), 16, 16),
    )
    assert out.shape == image.shape and mask.shape == image.shape[:3]
    assert out.isfinite().all() and mask.min() >= 0 and mask.max() <= 1
    assert torch.equal(out[mask == 0], image[mask == 0])


def test_no_pictures_at_all() -> None:
    images = torch.zeros(0, 20, 30, 3)
    out, mask = paste(
        images, Faces.empty(0, 20, 30), torch.zeros(0, 512, 512, 3), PasteOptions(mask_type="box")
    )
    assert out.shape == (0, 20, 30, 3) and mask.shape == (0, 20, 30)


def test_a_picture_8000_px_wide(portrait: Tensor) -> None:
    image = torch.rand(1, 700, 8000, 1).expand(-1, -1, -1, 3).clone()
    image[:, :, 7300:] = portrait[:, 160:860, 160:860]
    faces = found(image, [placed(300, 3, (7650, 350))])
    out, mask = paste(
        image, faces, faces.crops, PasteOptions(mask_type="box"), skip_unchanged=False
    )
    inside = mask[0] == 1
    assert torch.equal(out[mask == 0], image[mask == 0])
    assert psnr(out[0][inside].numpy(), image[0][inside].numpy()) > 50


# Inputs that do not fit together


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"images": torch.zeros(2, 200, 240, 3)},
            r"`image` holds 2 pictures and `faces` come from 1",
        ),
        ({"images": torch.zeros(1, 240, 200, 3)}, r"`image` is 200 x 240 px .* 240 x 200 px"),
        ({"images": torch.zeros(200, 240, 3)}, r"`image` has 3 dimensions"),
        (
            {"images": torch.zeros(1, 200, 240, 0)},
            r"`image` is \(1, 200, 240, 0\), which holds no colour channel",
        ),
        ({"restored": torch.zeros(2, 64, 64, 3)}, r"`restored` holds 2 crops and `faces` 1 faces"),
        ({"restored": torch.zeros(1, 64, 64, 4)}, r"`restored` is \(1, 64, 64, 4\)"),
        ({"mask_type": "round"}, r"`mask_type` is 'round'"),
        ({"mask_type": "parsing"}, r"no face parser"),
        ({"color_match": "hue"}, r"`color_match` is 'hue'"),
        ({"keep": torch.zeros(3, 200, 240)}, r"`keep` is \(3, 200, 240\) for 1 pictures"),
        ({"keep": torch.zeros(1, 0, 240)}, r"`keep` is \(1, 0, 240\) for 1 pictures"),
        (
            {"restored": torch.zeros(1, 0, 0, 3)},
            r"`restored` is \(1, 0, 0, 3\), which holds no pixel",
        ),
        ({"images": torch.zeros(1, 200, 0, 3)}, r"`image` is 0 x 200 px"),
    ],
)
def test_what_does_not_fit_is_said_in_one_sentence(
    changes: dict[str, object], sentence: str, noise: Tensor
) -> None:
    faces = found(noise, [placed(60, 0, (60, 60))], crop=64)
    arguments = {
        "images": noise,
        "faces": faces,
        "restored": white(faces),
        "mask_type": "box",
        **changes,
    }
    settings = {
        name: arguments.pop(name) for name in ("mask_type", "color_match") if name in arguments
    }
    with pytest.raises(OSDFaceError, match=sentence):
        paste(**arguments, options=PasteOptions(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (
            {"crops": torch.zeros(3, 64, 64, 3)},
            r"`faces` hold 1 faces and crops \(3, 64, 64, 3\); \(1, 64, 64, 3\) are wanted",
        ),
        ({"crop_size": 0, "crops": torch.zeros(1, 0, 0, 3)}, r"in crops of 0 px; no face does"),
        ({"frames": 0}, r"`faces` name picture 0 of a batch of 0"),
        ({"width": 0}, r"`faces` come from a picture of 0 x 200 px"),
    ],
)
def test_faces_that_are_not_whole_are_refused(
    harm: dict[str, object], sentence: str, noise: Tensor
) -> None:
    faces = replace(found(noise, [placed(60, 0, (60, 60))], crop=64), **harm)  # type: ignore[arg-type]
    with pytest.raises(OSDFaceError, match=sentence):
        paste(noise, faces, torch.zeros(1, 64, 64, 3), PasteOptions(mask_type="box"))


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e-4, 1e4, 1e9, 1e30, 1e200])
@pytest.mark.parametrize("color_match", ["none", "wavelet"])
def test_a_face_of_no_possible_size_takes_neither_time_nor_memory(
    scale: float, color_match: str, noise: Tensor
) -> None:
    faces = found(noise, [placed(60, 0, (60, 60))], crop=64)
    faces = replace(
        faces, faces=(replace(faces.faces[0], matrix=((scale, 0.0, 30.0), (0.0, scale, 40.0))),)
    )
    out, mask = paste(
        noise, faces, white(faces), PasteOptions(mask_type="box", color_match=color_match)
    )
    assert out is noise
    assert not mask.any()


def test_a_mask_to_keep_that_is_not_a_number_keeps(noise: Tensor) -> None:
    faces = found(noise, [placed(60, 0, (60, 60))], crop=64)
    keep = torch.zeros(1, 200, 240)
    keep[:, :60] = torch.nan
    out, mask = paste(noise, faces, white(faces), PasteOptions(mask_type="box"), keep=keep)
    assert torch.equal(out[:, :60], noise[:, :60])
    assert mask[:, 60:].any()
    assert bool(mask.isfinite().all())


@pytest.mark.parametrize("color_match", ["mean-std", "wavelet"])
def test_pixels_that_are_not_numbers_spoil_no_others(color_match: str, noise: Tensor) -> None:
    image = noise.clone()
    image[0, 50, 50], image[0, 70, 60] = torch.nan, torch.inf
    faces = found(noise, [placed(60, 0, (60, 60))], crop=64)
    out, mask = paste(
        image,
        faces,
        white(faces),
        PasteOptions(mask_type="box", color_match=color_match, keep_detail=0.5),
    )
    assert (out.isfinite() == image.isfinite()).all()
    assert bool(mask.isfinite().all())


def test_progress_counts_every_face_and_can_stop_the_job(noise: Tensor) -> None:
    faces = found(noise, [placed(60, 0, (60, 60)), placed(60, 0, (160, 120))], crop=64)
    restored = white(faces)
    restored[0] = faces.crops[0]
    done: list[int] = []
    paste(
        noise,
        faces,
        restored,
        PasteOptions(mask_type="box"),
        progress=lambda count, picture=None: done.append(count),
    )
    assert sum(done) == 2

    def stop(count: int, picture: Tensor | None = None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        paste(noise, faces, restored, PasteOptions(mask_type="box"), progress=stop)
