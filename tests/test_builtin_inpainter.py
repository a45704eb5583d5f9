"""The built-in network for holes: small, no worse on a clear face than OpenCV's fill, and taken
where nothing was downloaded. docs/builtin.md has its figures on many faces, where it is below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor

# `small_server` needs it, and the fixture `host` takes this folder off sys.path.
import benchmarks.fuzz  # noqa: F401
from osdface_core import cli
from osdface_core.diffir.files import BUILTIN_INPAINTER
from osdface_core.diffir.inpaint import InpaintOptions, inpaint
from osdface_core.diffir.network import INPAINT, DiffIR, build_network
from osdface_core.diffir.weights import read_weights
from tests import photographs
from tests.test_diffir import small

cv2 = pytest.importorskip("cv2", reason="no OpenCV: pip install -r requirements-dev.txt")

MOST_BYTES = 6_000_000
SIDE = 256


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def network() -> DiffIR:
    return build_network(read_weights(BUILTIN_INPAINTER))


def filled(network: DiffIR, picture: Tensor, mask: Tensor, **options: Any) -> Tensor:
    load = lambda memory: (network, torch.device("cpu"))  # noqa: E731
    return inpaint(picture, mask, load, InpaintOptions(**options)).pictures


@pytest.fixture(scope="module")
def portrait() -> Tensor:
    """(1,256,256,3): a face that no training saw."""
    left, top = 116, 0
    part = photographs.astronaut().crop((left, top, left + 220, top + 220))
    pixels = part.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(pixels).copy()).float()[None] / 255


def mask_of(draw: Callable[[ImageDraw.ImageDraw], None]) -> Tensor:
    picture = Image.new("L", (SIDE, SIDE))
    draw(ImageDraw.Draw(picture))
    return (torch.from_numpy(np.asarray(picture).copy()) > 0).float()[None]


def scratches(draw: ImageDraw.ImageDraw) -> None:
    draw.line((40, 10, 120, 130, 150, 250), fill=255, width=3)
    draw.line((10, 190, 130, 150, 245, 60), fill=255, width=2)
    draw.line((70, 250, 90, 120, 200, 20), fill=255, width=4)


def stroke(draw: ImageDraw.ImageDraw) -> None:
    draw.line((60, 110, 110, 105, 160, 118), fill=255, width=16)
    draw.line((100, 190, 130, 165, 170, 170), fill=255, width=12)


def psnr(given: Tensor, right: Tensor, hole: Tensor) -> float:
    return float(-10 * (given - right)[hole > 0].square().mean().log10())


def by_telea(picture: Tensor, hole: Tensor) -> Tensor:
    pixels, holes = ((x[0] * 255).round().byte().numpy() for x in (picture, hole))
    return torch.from_numpy(cv2.inpaint(pixels, holes, 3, cv2.INPAINT_TELEA)).float()[None] / 255


def test_it_is_small_and_for_holes(network: DiffIR) -> None:
    assert BUILTIN_INPAINTER.stat().st_size < MOST_BYTES
    assert network.shape.job == INPAINT
    assert {t.dtype for t in read_weights(BUILTIN_INPAINTER).values()} == {torch.float16}


@pytest.mark.parametrize("holes", [scratches, stroke])
def test_a_clear_face_is_filled_better_than_by_telea(
    holes: Callable[[ImageDraw.ImageDraw], None], network: DiffIR, portrait: Tensor
) -> None:
    hole = mask_of(holes)
    found = filled(network, portrait, hole)
    ours, telea = (psnr(x, portrait, hole) for x in (found, by_telea(portrait, hole)))
    print(f"{ours:.2f} dB, Telea {telea:.2f}")  # noqa: T201
    assert ours > telea


def test_known_pixels_are_kept_and_grey_stays_grey(network: DiffIR, portrait: Tensor) -> None:
    hole = mask_of(scratches)
    grey = portrait.mean(-1, keepdim=True).expand(-1, -1, -1, 3).contiguous()
    for picture in (portrait, grey):
        found = filled(network, picture, hole)
        assert torch.equal(found[hole == 0], picture[hole == 0])
        assert not torch.equal(found, picture)
    assert torch.equal(found[..., 0], found[..., 2])


def test_a_bright_or_dark_picture_is_filled_as_bright_or_dark(
    network: DiffIR, portrait: Tensor
) -> None:
    hole = mask_of(stroke)
    for scale, shift in ((0.35, 0.0), (0.35, 0.6)):
        picture = portrait * scale + shift
        found = filled(network, picture, hole)
        apart = (found - picture)[hole > 0].mean().abs()
        assert apart < 0.06, (scale, shift)


def test_a_large_picture_is_filled_at_its_own_size(network: DiffIR, portrait: Tensor) -> None:
    large = F.interpolate(portrait.movedim(-1, 1), (512, 384), mode="bicubic", antialias=True)
    picture = large.clamp(0, 1).movedim(1, -1)
    hole = F.interpolate(mask_of(scratches)[None], (512, 384), mode="nearest")[0]
    found = filled(network, picture, hole, side="picture")
    assert psnr(found, picture, hole) > psnr(by_telea(picture, hole), picture, hole) - 1


# On the command line


def test_the_command_line_fills_with_nothing_downloaded_and_says_so(
    portrait: Tensor, network: DiffIR, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("imagecodecs", reason="no imagecodecs: pip install -r requirements-dev.txt")
    hole = mask_of(scratches)
    pixels = (portrait[0] * 255).round().byte().numpy()
    Image.fromarray(pixels).save(tmp_path / "in.png")
    Image.fromarray((hole[0] * 255).byte().numpy()).save(tmp_path / "mask.png")
    models = tmp_path / "models"
    (models / "diffir").mkdir(parents=True)

    def fill(out: str, *more: str) -> np.ndarray[Any, Any]:
        command = ["inpaint", str(tmp_path / "in.png"), str(tmp_path / out), *more]
        command += ["--mask", str(tmp_path / "mask.png"), "--models-dir", str(models)]
        assert cli.main([*command, "--device", "cpu"]) == cli.OK
        return np.asarray(Image.open(tmp_path / out))

    found = fill("unasked.png")
    assert "Filling by the small built-in network" in caplog.text
    assert "DiffIRS2-celeba.safetensors is missing: download it" in caplog.text
    wanted = filled(network, torch.from_numpy(pixels.copy())[None].float() / 255, hole)[0]
    assert np.abs(found - (wanted * 255).numpy()).max() <= 1
    caplog.clear()
    # Another file is taken once it is there; the built-in network still for those who ask for it.
    save_file(small("inpaint").state_dict(), models / "diffir" / "DiffIRS2-celeba.safetensors")
    assert not np.array_equal(fill("other.png"), found)
    assert np.array_equal(fill("asked.png", "--diffir", "builtin"), found)
    assert "built-in" not in caplog.text


# In ComfyUI


def menu_of(host: Any) -> tuple[list[str], str]:
    inputs = {item.id: item for item in host.nodes["DiffIRInpaint"].define_schema().inputs}
    return list(inputs["diffir_name"].options), inputs["diffir_name"].default


@pytest.mark.host
def test_the_menu_ends_with_it_and_presets_it_only_where_no_other_is(host: Any) -> None:
    from osdface_core.diffir.files import INPAINTERS

    options, default = menu_of(host)
    assert options[: len(INPAINTERS)] == list(INPAINTERS)
    assert options[-1] == default == "builtin"
    file = host.base / "models" / "diffir" / "DiffIRS2-place.safetensors"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"")
    try:
        host.folder_paths.filename_list_cache.clear()
        assert menu_of(host)[1] == "DiffIRS2-place.safetensors"
    finally:
        file.unlink()


@pytest.mark.host
def test_the_node_fills_as_the_core_does(host: Any, network: DiffIR, portrait: Tensor) -> None:
    hole = mask_of(stroke)
    node = host.nodes["DiffIRInpaint"]
    settings = {"working_size": "256", "feather": 0, "seed": 0}
    found = node.execute(image=portrait, mask=hole, diffir_name="builtin", **settings).args[0]
    assert (found - filled(network, portrait, hole)).abs().max() < 1e-5
    assert node.fingerprint_inputs(diffir_name="builtin")
