"""Colour matching against OpenCV's Lab and StableSR's wavelet, restated with OpenCV's filters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from osdface_core.pictures.color import match_color, to_lab, to_rgb

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")


def picture(seed: int, low: float = 0.2, high: float = 0.8) -> Tensor:
    coarse = (
        torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * (high - low) + low
    )
    return (
        torch.nn.functional.interpolate(coarse, (96, 96), mode="bicubic")[0]
        .movedim(0, -1)
        .contiguous()
    )


def lab(rgb: Tensor) -> np.ndarray:
    return cv2.cvtColor(np.ascontiguousarray(rgb.numpy()), cv2.COLOR_RGB2LAB)


def test_lab_is_opencvs() -> None:
    colours = torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(0))
    # OpenCV interpolates its tables.
    error = np.abs(to_lab(colours).numpy() - lab(colours))
    assert error.max() < 0.7 and error.mean() < 0.1


@settings(deadline=None)
@given(st.lists(st.floats(-0.5, 4, width=32), min_size=3, max_size=3))
def test_lab_goes_there_and_back_beyond_the_range_of_screens(colour: list[float]) -> None:
    rgb = torch.tensor(colour, dtype=torch.float64)
    torch.testing.assert_close(to_rgb(to_lab(rgb)), rgb, atol=1e-6, rtol=1e-6)


def test_mean_std_gives_the_face_the_originals_statistics_and_looks_nowhere_else() -> None:
    original, restored = picture(1), picture(2) * 0.5 + 0.3
    weight = torch.zeros(96, 96)
    weight[20:70, 30:80] = 1
    inside = weight > 0
    result = match_color(restored, original, weight, "mean-std")
    wanted, given_ = lab(original)[inside.numpy()], lab(result)[inside.numpy()]
    np.testing.assert_allclose(given_.mean(0), wanted.mean(0), atol=0.3)
    np.testing.assert_allclose(given_.std(0), wanted.std(0), atol=0.3)
    changed = original.clone()
    changed[~inside] = 0
    assert torch.equal(match_color(restored, changed, weight, "mean-std"), result)


def stablesr(restored: np.ndarray, original: np.ndarray) -> np.ndarray:
    """Five levels of a 3 x 3 binomial filter with growing gaps; the restored detail on the
    original's coarse rest.
    """

    def coarse(image: np.ndarray) -> np.ndarray:
        for level in range(5):
            kernel = np.zeros(2 * 2**level + 1, np.float32)
            kernel[:: 2**level] = 0.25, 0.5, 0.25
            image = cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)
        return image

    return restored - coarse(restored) + coarse(original)


def test_wavelet_on_the_whole_crop_is_stablesrs() -> None:
    original, restored = picture(3), picture(4)
    result = match_color(restored, original, torch.ones(96, 96), "wavelet")
    np.testing.assert_allclose(
        result.numpy(), stablesr(restored.numpy(), original.numpy()).clip(0, 1), atol=1e-5
    )


@pytest.mark.parametrize("method", ["mean-std", "wavelet"])
def test_a_tint_is_taken_back_and_detail_stays(method: str) -> None:
    original = picture(5)
    detail = (torch.rand(96, 96, 1, generator=torch.Generator().manual_seed(6)) - 0.5) * 0.05
    weight = torch.zeros(96, 96)
    weight[10:86, 10:86] = 1
    inside = weight > 0
    result = match_color(
        original + detail + torch.tensor([0.1, 0.0, -0.1]), original, weight, method
    )
    left = (result - original)[inside].mean(0)
    assert left.abs().max() < 0.02
    fine = (result - original)[inside][:, 1]
    assert torch.corrcoef(torch.stack([fine, detail[inside][:, 0]]))[0, 1] > 0.8


@pytest.mark.parametrize("method", ["none", "mean-std", "wavelet"])
def test_what_needs_no_match_stays(method: str) -> None:
    original = picture(7)
    torch.testing.assert_close(
        match_color(original, original, torch.ones(96, 96), method), original, atol=1e-4, rtol=0
    )
    assert torch.equal(match_color(original, picture(8), torch.zeros(96, 96), method), original)
    flat = torch.full((5, 7, 3), 0.5)
    assert match_color(flat, torch.rand(5, 7, 3), torch.ones(5, 7), method).isfinite().all()
    bright = original * 4
    assert match_color(bright, bright, torch.ones(96, 96), method).max() == pytest.approx(
        float(bright.max()), abs=1e-3
    )
