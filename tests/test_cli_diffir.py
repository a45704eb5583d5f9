"""`python -m osdface_core deblur`, `inpaint` and `upscale --method diffir`: pictures and videos."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

pytest.importorskip("diffusers", reason="no diffusers: pip install -r requirements-dev.txt")
pytest.importorskip("av", reason="no PyAV: pip install -r requirements-dev.txt")
pytest.importorskip("imagecodecs", reason="no imagecodecs: pip install -r requirements-dev.txt")
pytest.importorskip("tifffile", reason="no tifffile: pip install -r requirements-dev.txt")

import av

from osdface_core import cli
from tests.test_diffir import small

FILES = {
    "DiffIRS2-deblur": "deblur",
    "DiffIRS2-celeba": "inpaint",
    "DiffIRS2-GANx2-V2": "x2",
}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A models folder with small networks of random weights."""
    folder = tmp_path / "models"
    (folder / "diffir").mkdir(parents=True)
    for name, kind in FILES.items():
        save_file(small(kind).state_dict(), folder / "diffir" / f"{name}.safetensors")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures, a video and a mask beside them."""
    folder = tmp_path / "in"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        pixels = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    with av.open(str(folder / "film.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    mask = np.zeros((48, 64), np.uint8)
    mask[10:20, 30:50] = 3
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return folder


def run(models: Path, *arguments: Any) -> int:
    return cli.main([*map(str, arguments), "--models-dir", str(models), "--device", "cpu"])


def array(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize(
    ("command", "scale"),
    [(("deblur",), 1), (("upscale", "--method", "diffir", "--scale", "2"), 2)],
)
def test_a_folder_of_pictures_and_videos_is_done(
    command: tuple[str, ...], scale: int, models: Path, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run(models, *command, folder, out) == cli.OK
    for name in ("a.png", "b.png"):
        found, given = array(out / name), array(folder / name)
        assert found.shape == (48 * scale, 64 * scale, 3)
        assert not np.array_equal(found, np.kron(given, np.ones((scale, scale, 1), int)))
    with av.open(str(out / "film.mp4")) as container:
        frames = [(frame.width, frame.height) for frame in container.decode(video=0)]
    assert frames == [(64 * scale, 48 * scale)] * 3


def test_only_the_hole_is_filled(models: Path, folder: Path, tmp_path: Path) -> None:
    out, mask = tmp_path / "out", tmp_path / "mask.png"
    assert run(models, "inpaint", folder, out, "--mask", mask) == cli.OK
    hole = array(mask) > 0
    for name in ("a.png", "b.png"):
        found, given = array(out / name), array(folder / name)
        assert np.array_equal(found[~hole], given[~hole])
        assert not np.array_equal(found[hole], given[hole])
    assert (out / "film.mp4").is_file()


@pytest.fixture
def masks(folder: Path, tmp_path: Path) -> Path:
    """A folder with a mask for each file, one below as its picture is, in either spelling."""
    below = tmp_path / "masks" / "more"
    below.mkdir(parents=True)
    (folder / "more").mkdir()
    shutil.copy(folder / "b.png", folder / "more" / "c.png")
    for i, name in enumerate(("a.png", "b_mask.png", "film_mask001.png", "more/c_mask.png")):
        mask = np.zeros((48, 64), np.uint8)
        mask[10 : 20 + 5 * i, 30:50] = 255
        Image.fromarray(mask).save(tmp_path / "masks" / name)
    return tmp_path / "masks"


def holes(mask: Path) -> np.ndarray[Any, Any]:
    return array(mask) > 0


PAIRS = {"a.png": "a.png", "b.png": "b_mask.png", "more/c.png": "more/c_mask.png"}


def test_each_file_is_filled_by_its_own_mask(
    models: Path, folder: Path, masks: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run(models, "inpaint", folder, out, "--mask", masks) == cli.OK
    for name, mask in PAIRS.items():
        changed = (array(out / name) != array(folder / name)).any(-1)
        assert not changed[~holes(masks / mask)].any()
        assert changed[holes(masks / mask)].mean() > 0.9
    assert (out / "film.mp4").is_file()
    alone = tmp_path / "alone.png"
    assert run(models, "inpaint", folder / "b.png", alone, "--mask", masks) == cli.OK
    assert np.array_equal(array(alone), array(out / "b.png"))


def test_masks_beside_their_pictures_are_no_pictures(
    models: Path, folder: Path, masks: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As the released code has it; and what has none, or two, is told."""
    shutil.move(masks / "b_mask.png", folder)
    for number in (1, 2):
        shutil.copy(masks / "film_mask001.png", folder / f"film_mask{number}.png")
    out = tmp_path / "out"
    code = run(models, "inpaint", folder, out, "--mask", folder)
    assert code == cli.SOME_FAILED
    made = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert made == {"b.png"}
    assert f"{folder / 'a.png'} has no mask: put one into {folder}, called a.png or" in caplog.text
    assert f"{folder / 'more' / 'c.png'} has no mask" in caplog.text
    assert f"film.mp4 has 2 masks in {folder} (film_mask1.png, film_mask2.png)" in caplog.text


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("upscale", "--method", "diffir"), "DiffIRS2-GANx4-V2.safetensors is missing: download"),
        (("upscale", "--method", "diffir", "--scale", "2", "--faces"), "--faces goes with"),
        (("deblur", "--tile", "100"), "`tile` is 100; 128 or more"),
        (("deblur", "--diffir", "nowhere.pth"), "--diffir is nowhere.pth, which does not exist"),
        (("inpaint", "--mask", "nowhere.png"), "--mask is nowhere.png, which does not exist"),
    ],
)
def test_wrong_options_are_told(
    command: tuple[str, ...],
    says: str,
    models: Path,
    folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert run(models, *command, folder, tmp_path / "out") == cli.UNUSABLE
    assert says in caplog.text
    assert not (tmp_path / "out").exists()


def test_a_file_of_another_job_is_told(
    models: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = models / "diffir" / "DiffIRS2-celeba.safetensors"
    assert run(models, "deblur", folder, tmp_path / "out", "--diffir", file) == cli.UNUSABLE
    assert "which is of DiffIR's networks to inpaint; one to deblur is wanted" in caplog.text


def test_the_seed_is_the_draw(models: Path, folder: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        out = tmp_path / f"{name}.png"
        assert run(models, "deblur", folder / "a.png", out, "--seed", seed) == cli.OK
    one, two, three = (array(tmp_path / f"{name}.png") for name in ("one", "two", "three"))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, three)
    assert torch.is_grad_enabled()
