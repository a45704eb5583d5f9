"""Pictures of one tone keep it, and others are not taken for such."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from osdface_core.faces.align import crop_faces
from osdface_core.faces.face import Face, Faces
from osdface_core.faces.paste import PasteOptions, paste
from osdface_core.osediff.upscale import match_color as match_whole
from osdface_core.pictures.color import COLOR_MATCHES, as_given
from osdface_core.pictures.tone import tone_curve
from tests import photographs

# The colours of a photographic paper, by the light (0..1) that fell on it.
TONES: dict[str, Callable[[np.ndarray], tuple[np.ndarray, ...]]] = {
    "grey": lambda y: (y, y, y),
    "sepia": lambda y: (y**0.8, 0.93 * y**0.95, 0.76 * y**1.1),
    "cyanotype": lambda y: (y**1.8, y**1.1, 0.15 + 0.8 * y**0.6),
    "faint sepia": lambda y: (y, 0.98 * y, 0.94 * y),
}


def toned(picture: Image.Image, tone: str) -> np.ndarray:
    """(H,W,3) 8 bit."""
    light = np.asarray(picture.convert("L")) / 255
    return (np.stack(TONES[tone](light), -1) * 255).round().astype(np.uint8)


def as_jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    """What comes of it, with the colours at half the size as most programs write it."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=2)
    return np.asarray(Image.open(file).convert("RGB"))


def tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels.astype(np.float32) / 255)


def light_of(pixels: Tensor) -> Tensor:
    return pixels.double() @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)


def off_tone(pixels: Tensor, tone: str) -> Tensor:
    """How far the colours of pixels lie from those that the paper gives to their luminance."""
    steps = np.stack(TONES[tone](np.linspace(0, 1, 4097)), -1)
    light = steps @ [0.299, 0.587, 0.114]
    y = light_of(pixels).numpy()
    wanted = np.stack([np.interp(y, light, steps[:, k]) for k in range(3)], -1)
    return (pixels - torch.from_numpy(wanted)).abs().amax(-1)


def pasted(picture: Tensor, restored: Tensor, options: PasteOptions) -> tuple[Tensor, Tensor]:
    """The result, and where it is the crop alone, of a crop over the middle of (H,W,3)."""
    height, width = picture.shape[:2]
    side = min(height, width) * 0.6
    scale = restored.shape[1] / side
    matrix = (
        (scale, 0.0, -scale * (width - side) / 2),
        (0.0, scale, -scale * (height - side) / 2),
    )
    face = Face(0, (0, 0, 9, 9), ((0.0, 0.0),) * 5, 0.99, 0, matrix)
    crops = crop_faces(picture[None], [0], [matrix], restored.shape[1])
    faces = Faces((face,), crops, 1, height, width, restored.shape[1])
    after, mask = paste(picture[None], faces, restored[None], options)
    return after[0], mask[0] > 0.999


@pytest.fixture(scope="module")
def coloured() -> Tensor:
    """A crop (256,256,3) with the colours of a face, as a network may restore it."""
    return tensor(np.asarray(photographs.astronaut().convert("RGB"))[20:276, 100:356])


@pytest.mark.parametrize("color_match", COLOR_MATCHES)
@pytest.mark.parametrize("tone", TONES)
def test_a_face_restored_in_colour_takes_the_picture_s_tone(
    tone: str, color_match: str, coloured: Tensor
) -> None:
    picture = tensor(toned(photographs.astronaut(), tone))
    after, changed = pasted(picture, coloured, PasteOptions(1, "box", 0.1, color_match))
    assert changed.float().mean() > 0.2
    assert not torch.equal(after[changed], picture[changed])
    spread = after[changed].amax(-1) - after[changed].amin(-1)
    if tone == "grey":
        assert spread.max() < 1e-6
    off = off_tone(after[changed].clamp(0, 1), tone)
    assert off.quantile(0.99) < 3 / 255
    assert off.mean() < 0.6 / 255
    if color_match in ("none", "luminance"):
        whole, _ = pasted(light_of(picture).float()[..., None], coloured, PasteOptions(1, "box"))
        assert (light_of(after) - whole[..., 0])[changed].abs().mean() < 0.01


@pytest.mark.parametrize("quality", [90, 75, 50])
@pytest.mark.parametrize("tone", TONES)
@pytest.mark.parametrize("side", [512, 200])
def test_one_tone_is_seen_through_jpeg(tone: str, quality: int, side: int) -> None:
    picture = photographs.astronaut().resize((side, side))
    curve = tone_curve(tensor(as_jpeg(toned(picture, tone), quality)))
    assert curve is not None
    light = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    assert off_tone(curve.at(light), tone).max() < (1e-6 if tone == "grey" else 0.03)


@pytest.mark.parametrize("saturation", [1.0, 0.5, 0.3, 0.15])
@pytest.mark.parametrize("quality", [95, 60])
@pytest.mark.parametrize("name", ["astronaut", "whole"])
def test_a_pale_picture_has_no_one_tone(saturation: float, quality: int, name: str) -> None:
    picture = photographs.astronaut()
    box = (100, 20, 356, 276) if name == "astronaut" else (0, 0, *picture.size)
    pixels = np.asarray(picture.crop(box).convert("RGB")).astype(np.float64)
    grey = (pixels @ [0.299, 0.587, 0.114])[..., None]
    pale = (grey + saturation * (pixels - grey)).round().clip(0, 255).astype(np.uint8)
    assert tone_curve(tensor(as_jpeg(pale, quality))) is None


def test_a_coloured_face_in_a_plain_page_stays_coloured(coloured: Tensor) -> None:
    """And a grey one on a coloured page stays grey: what counts is where the face is."""
    face = as_jpeg(np.asarray(photographs.astronaut().convert("RGB")), 90)
    page = np.full((3000, 3000, 3), (200, 190, 170), np.uint8)
    options = PasteOptions(1, "box")
    for inside in (face, toned(photographs.astronaut(), "grey")):
        page[1244:1756, 1244:1756] = inside
        curve = tone_curve(tensor(page), (1300, 1300, 1700, 1700))
        assert (curve is None) == (inside is face)
    after, changed = pasted(tensor(face), coloured, options)
    wanted, _ = pasted(tensor(face)[:, :, [0, 1, 2]], coloured, options)
    assert torch.equal(after, wanted)
    assert (after[changed].amax(-1) - after[changed].amin(-1)).max() > 0.3


def test_a_tiny_coloured_picture_has_no_one_tone() -> None:
    """Of a few blocks each may have a light of its own, so that any colours lie on some curve."""
    light = torch.linspace(0.1, 0.8, 16)[:, None, None]
    hue = torch.linspace(0, 12, 16)[:, None]
    colour = 0.1 * torch.stack([hue.sin(), hue.cos(), (hue + 1).sin()], -1)
    tiny = (light + colour).expand(16, 16, 3)
    assert tone_curve(tiny) is None
    assert tone_curve(light.expand(16, 16, 3)) is not None


@pytest.mark.parametrize("tone", ["grey", "sepia"])
def test_a_coloured_detail_in_a_picture_of_one_tone_keeps_its_colour(tone: str) -> None:
    """A stamp, a signature, lips that somebody painted red: in all else there is no colour."""
    pixels = toned(photographs.astronaut().resize((2400, 2400)), tone)
    stamp = slice(2000, 2030), slice(2000, 2030)
    pixels[stamp] = (200, 30, 40)
    given = tensor(as_jpeg(pixels, 90))
    assert tone_curve(given) is not None, "the detail is too large for this test"
    made = tensor(np.asarray(photographs.astronaut().resize((2400, 2400)).convert("RGB")))
    made[stamp] = given[stamp]
    after = as_given(made.movedim(-1, 0), given)
    inside = slice(2005, 2025), slice(2005, 2025)
    assert torch.equal(after[inside], made[inside])
    assert off_tone(after[:1980], tone).mean() < 0.01


def test_luminance_keeps_every_colour_of_a_coloured_picture(coloured: Tensor) -> None:
    picture = tensor(np.asarray(photographs.astronaut().convert("RGB")))
    restored = (coloured.flip(1) * 0.3 + 0.35)[..., [2, 1, 0]]
    smooth = torch.nn.functional.avg_pool2d(restored.movedim(-1, 0), 9, 1, 4).movedim(0, -1)
    given = coloured * 0.3 + 0.35
    found = match_whole(smooth.movedim(-1, 0), given.movedim(-1, 0), "luminance").movedim(0, -1)
    assert (light_of(found) - light_of(smooth)).abs().max() < 1e-5
    colours = [x - light_of(x)[..., None] for x in (found, given)]
    assert (colours[0] - colours[1]).abs().max() < 1e-5
    picture = picture * 0.3 + 0.35
    after, changed = pasted(picture, smooth, PasteOptions(1, "box", 0.1, "luminance"))
    colours = [x - light_of(x)[..., None] for x in (after, picture)]
    assert (colours[0] - colours[1])[changed].abs().mean() < 0.01
    assert (light_of(after) - light_of(picture))[changed].abs().mean() > 0.03


@pytest.mark.parametrize("tone", TONES)
def test_a_whole_picture_keeps_its_tone(tone: str) -> None:
    """However OSEDiff or DiffIR made it larger, from a JPEG."""
    made = tensor(np.asarray(photographs.astronaut().resize((1024, 1024)).convert("RGB")))
    given = tensor(as_jpeg(toned(photographs.astronaut(), tone), 80))
    found = as_given(made.movedim(-1, 0), given)
    assert off_tone(found, tone).mean() < (1e-6 if tone == "grey" else 0.01)
    assert found.min() >= 0
    assert found.max() <= 1
    as_it_is = as_given(made.movedim(-1, 0), made)
    assert torch.equal(as_it_is, made)
