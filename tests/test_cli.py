"""The command line: what goes in comes out with only its faces changed, whatever the file, the
failure or the number of workers.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from safetensors.torch import save_file

pytest.importorskip("diffusers", reason="no diffusers: pip install -r requirements-dev.txt")
pytest.importorskip("av", reason="no PyAV: pip install -r requirements-dev.txt")
pytest.importorskip("imagecodecs", reason="no imagecodecs: pip install -r requirements-dev.txt")
pytest.importorskip("tifffile", reason="no tifffile: pip install -r requirements-dev.txt")

import av
import imagecodecs
import tifffile

from osdface_core import cli
from osdface_core.cli import frames, job, pictures
from osdface_core.cli.options import parser
from osdface_core.cli.restorer import resolve
from osdface_core.diffusers.backbone import DiffusersBackbone
from osdface_core.errors import OSDFaceError
from osdface_core.osdface.lora import adapted_layers
from tests.photographs import write_detector
from tests.widgets import UPSCALE

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("away_from_home")
Run = Callable[..., int]


@pytest.fixture(scope="session")
def weights(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options for small random networks and a real face detector."""
    models = tmp_path_factory.mktemp("models")
    (models / "facedetection").mkdir()
    write_detector(models / "facedetection")
    vre = str(small_model / "vre.safetensors")
    return [
        "--model",
        str(small_model),
        "--lora",
        "none",
        "--vre",
        vre,
        "--models-dir",
        str(models),
        "--dtype",
        "fp32",
        "--device",
        "cpu",
    ]


@pytest.fixture
def run(weights: list[str]) -> Run:
    return lambda *arguments: cli.main(["restore", *weights, *map(str, arguments)])


@pytest.fixture(scope="session")
def face(photographs: Path) -> np.ndarray:
    """(256,256,3) uint8 with one face in it."""
    return np.asarray(Image.open(photographs / "astronaut.png").convert("RGB"))[:256, 100:356]


@pytest.fixture(scope="session")
def nobody(photographs: Path) -> np.ndarray:
    """(96,128,3) uint8 without a face."""
    return np.asarray(Image.open(photographs / "astronaut.png").convert("RGB"))[400:496, 380:508]


def entries(report: Path) -> dict[str, dict[str, Any]]:
    return {Path(entry["input"]).name: entry for entry in json.loads(report.read_text())["files"]}


def changed(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    return (before != after).any(-1)


# Options


def test_every_option_of_the_nodes_has_the_nodes_name_and_default() -> None:
    nodes = json.loads((ROOT / "tests" / "interfaces.json").read_text())
    graph = json.loads((ROOT / "tests" / "osdface_basic_api.json").read_text())
    others = (
        *("FaceSelect", "FaceMaskToCrops"),
        *("OSEDiffUpscale", "DiffIREnhance", "DiffIRInpaint"),
    )
    inputs = {name for node, (inputs, _) in nodes.items() if node not in others for name in inputs}
    elsewhere = {
        "image",
        "faces",
        "restored",
        "crops",
        "conditioning",
        "vae",
        "vre_name",
        "lora_name",
    }
    options = vars(parser().parse_args(["restore", "in", "out"]))
    assert inputs - elsewhere <= options.keys()
    told = {
        name: value
        for node in graph.values()
        for name, value in node["inputs"].items()
        if not isinstance(value, list)
    }
    for name in (
        "confidence",
        "select",
        "order",
        "indices",
        "max_faces",
        "min_size",
        "max_size",
        "any_angle",
        "crop_size",
        "smoothing",
        "lora_strength",
        "timestep",
        "faces_per_batch",
        "strength",
        "feather",
        "color_match",
        "keep_detail",
    ):
        assert options[name] == told[name], name


def test_upscale_has_its_node_s_names_and_defaults() -> None:
    options = vars(parser().parse_args(["upscale", "in", "out"]))
    assert options["scale"] == UPSCALE["upscale"]
    for name in ("tile", "overlap", "color_match"):
        assert options[name] == UPSCALE[name]
    # With --faces they are restored as `restore` does it.
    restore = vars(parser().parse_args(["restore", "in", "out"]))
    assert {name: options[name] for name in restore if name not in ("command", "color_match")} == {
        name: value for name, value in restore.items() if name not in ("command", "color_match")
    }


def test_diffirs_commands_have_its_nodes_names_and_defaults() -> None:
    from osdface_core.diffir import enhance, inpaint

    deblur = vars(parser().parse_args(["deblur", "in", "out"]))
    assert (deblur["tile"], deblur["overlap"]) == (enhance.DEFAULT.tile, enhance.DEFAULT.overlap)
    filling = vars(parser().parse_args(["inpaint", "in", "out", "--mask", "m.png"]))
    assert filling["working_size"] == inpaint.DEFAULT.side
    assert filling["feather"] == inpaint.DEFAULT.feather
    assert deblur["seed"] == filling["seed"] == 0


@pytest.mark.parametrize(
    "wrong",
    [["--confidence", "2"], ["--select", "tallest"], ["--crop-size", "64"], ["--timestep", "1000"]],
)
def test_a_wrong_option_is_a_wrong_usage(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["restore", "in", "out", *wrong])
    assert stopped.value.code == 2


# Folders


def test_a_folder_is_done_file_by_file_and_goes_on_where_it_stopped(
    run: Run,
    face: np.ndarray,
    nobody: np.ndarray,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    given, out, report = tmp_path / "in", tmp_path / "out", tmp_path / "report.json"
    (given / "deep" / "er").mkdir(parents=True)
    Image.fromarray(face).save(given / "a.png")
    Image.fromarray(nobody).save(given / "deep" / "er" / "b.jpg", quality=80)
    (given / "broken.png").write_bytes((given / "a.png").read_bytes()[:5000])
    (given / "notes.txt").write_text("not a picture")

    assert run(given, out, "--report", report) == 1
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == [
        "a.png",
        "deep/er/b.jpg",
    ]
    said = entries(report)
    assert {name: entry["status"] for name, entry in said.items()} == {
        "a.png": "done",
        "b.jpg": "done",
        "broken.png": "failed",
        "notes.txt": "skipped",
    }
    (found,) = said["a.png"]["faces"]
    assert found["verdict"] == "chosen"
    assert found["confidence"] > 0.9
    assert 80 < found["size"] < 140
    assert "broken.png" in said["broken.png"]["error"]
    assert "broken.png" in caplog.text
    assert "notes.txt" in caplog.text
    assert said["b.jpg"]["faces"] == []
    assert (out / "deep" / "er" / "b.jpg").read_bytes() == (
        given / "deep" / "er" / "b.jpg"
    ).read_bytes(), "no face: the very file"
    assert changed(face, np.asarray(Image.open(out / "a.png"))).any()
    assert "1 of the files done have no face" in caplog.text
    assert "2 done, 1 skipped, 1 failed" in capsys.readouterr().out

    (given / "broken.png").unlink()
    (out / "a.png").unlink()
    untouched = (out / "deep" / "er" / "b.jpg").stat().st_mtime_ns
    assert run(given, out, "--report", report) == 0
    statuses = {name: entry["status"] for name, entry in entries(report).items()}
    assert statuses == {"a.png": "done", "b.jpg": "skipped", "notes.txt": "skipped"}
    assert (out / "deep" / "er" / "b.jpg").stat().st_mtime_ns == untouched


def test_stopping_leaves_whole_files_only_and_a_report(
    run: Run, nobody: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, out, report = tmp_path / "in", tmp_path / "out", tmp_path / "report.json"
    given.mkdir()
    for name in "abc":
        Image.fromarray(nobody).save(given / f"{name}.png")
    copy, calls = shutil.copyfile, []

    def interrupted(source: Path, fresh: Path) -> None:
        calls.append(source)
        Path(fresh).write_bytes(b"half")
        if len(calls) == 2:
            raise KeyboardInterrupt
        copy(source, fresh)

    monkeypatch.setattr(shutil, "copyfile", interrupted)
    assert run(given, out, "--report", report) == 130
    assert [path.name for path in out.iterdir()] == ["a.png"]
    assert [entry["status"] for entry in entries(report).values()] == ["done"]
    monkeypatch.undo()
    assert run(given, out) == 0
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "b.png", "c.png"]


def test_an_input_is_never_written_over(nobody: np.ndarray, tmp_path: Path, run: Run) -> None:
    given = tmp_path / "in"
    given.mkdir()
    Image.fromarray(nobody).save(given / "a.png")
    before = (given / "a.png").read_bytes()
    (tmp_path / "soft.png").symlink_to(given / "a.png")
    os.link(given / "a.png", tmp_path / "hard.png")
    (tmp_path / "linked").symlink_to(given)
    for name in ("in/a.png", "in", "soft.png", "hard.png", "linked", "linked/a.png"):
        target = tmp_path / name
        assert run(given / "a.png", target, "--overwrite") == 2, target
    for target in (given, tmp_path / "linked", given / "a.png"):
        assert run(given, target, "--overwrite") == 2, target
    assert run(given, tmp_path / "out", "--report", given / "a.png") == 2
    assert (given / "a.png").read_bytes() == before
    # One output of many is a link to an input: that one fails, the rest is done.
    Image.fromarray(nobody).save(given / "b.png")
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "b.png").unlink(missing_ok=True)
    os.link(given / "a.png", tmp_path / "out" / "b.png")
    assert run(given, tmp_path / "out", "--overwrite") == 1
    assert (given / "a.png").read_bytes() == before


def test_outputs_within_the_input_folder_are_not_inputs(nobody: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(nobody).save(tmp_path / "a.png")
    (tmp_path / "out").mkdir()
    Image.fromarray(nobody).save(tmp_path / "out" / "old.png")
    Image.fromarray(nobody).save(tmp_path / ".b.partial.png")
    assert [item.source.name for item in job.plan(tmp_path, str(tmp_path / "out"), False)] == [
        "a.png"
    ]


def test_a_link_is_named_where_it_is_not_followed(
    run: Run, nobody: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given, out = tmp_path / "in", tmp_path / "out"
    (tmp_path / "elsewhere").mkdir()
    given.mkdir()
    Image.fromarray(nobody).save(tmp_path / "elsewhere" / "a.png")
    (given / "folder").symlink_to(tmp_path / "elsewhere")
    (given / "file.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    (given / "gone.png").symlink_to(tmp_path / "gone.png")
    assert run(given, out, "--report", tmp_path / "r.json") == 0
    assert [path.name for path in out.iterdir()] == ["file.png"]
    statuses = {name: entry["status"] for name, entry in entries(tmp_path / "r.json").items()}
    assert statuses == {"file.png": "done", "folder": "skipped", "gone.png": "skipped"}
    assert f"{given / 'folder'} is skipped: a link to a folder" in caplog.text


def test_a_slash_at_the_end_names_a_folder_that_is_not_there_yet(
    run: Run, nobody: np.ndarray, tmp_path: Path
) -> None:
    Image.fromarray(nobody).save(tmp_path / "photo.png")
    assert run(tmp_path / "photo.png", f"{tmp_path}/restored/") == 0
    assert [path.name for path in (tmp_path / "restored").iterdir()] == ["photo.png"]


@pytest.mark.parametrize(
    ("given", "out"),
    [("a.png", "restored"), ("a.png", "a.mp4"), ("a.png", "a.psd"), ("a.mp4", "out.png")],
)
def test_an_output_of_another_kind_is_refused_before_a_network_is_read(
    given: str,
    out: str,
    run: Run,
    nobody: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    Image.fromarray(nobody).save(tmp_path / given, "PNG")
    monkeypatch.setattr(job, "run", lambda *_: pytest.fail("the networks are read"))
    assert run(tmp_path / given, tmp_path / out) == 2
    assert f"OUT is {tmp_path / out}, whose extension is none of" in caplog.text


@pytest.mark.parametrize(
    "report",
    [
        "in/a.png",
        "out/a.png",
        "out",
        "hard.png",
        "keep.png",
        "vre.bin",
        "lora.bin",
        "model/unet/config.json",
    ],
)
def test_the_report_takes_no_file_s_place(
    report: str, nobody: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "model" / "unet").mkdir(parents=True)
    Image.fromarray(nobody).save(tmp_path / "in" / "a.png")
    os.link(tmp_path / "in" / "a.png", tmp_path / "hard.png")
    for name in ("keep.png", "vre.bin", "lora.bin", "model/unet/config.json"):
        (tmp_path / name).write_text(name)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    options = [
        "--keep",
        "keep.png",
        "--model",
        "model",
        "--lora",
        "lora.bin",
        "--vre",
        "vre.bin",
        "--report",
        report,
    ]
    paths = [option if option.startswith("--") else str(tmp_path / option) for option in options]
    assert cli.main(["restore", str(tmp_path / "in"), str(tmp_path / "out"), *paths]) == 2
    assert "which this run reads or makes itself" in caplog.text
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_report_that_cannot_be_written_is_told_before_the_work(
    run: Run,
    nobody: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    Image.fromarray(nobody).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "folder").mkdir()
    for report in ("a.png/report.json", "notes.txt/report.json", "folder"):
        assert run(tmp_path / "a.png", tmp_path / "out.png", "--report", tmp_path / report) == 2, (
            report
        )
        assert not (tmp_path / "out.png").exists()
        assert f"--report is {tmp_path / report}, which cannot be written" in caplog.text
    # It could be written at first, and not at last: the work is done all the same.
    written, replace = tmp_path / "r.json", Path.replace

    def full(fresh: Path, path: Path) -> Path:
        if path == written and path.exists():
            raise OSError(28, "No space left on device")
        return replace(fresh, path)

    monkeypatch.setattr(Path, "replace", full)
    assert run(tmp_path / "a.png", tmp_path / "out.png", "--report", written) == 1
    assert (tmp_path / "out.png").exists()
    assert "No space left on device" in caplog.text


@pytest.mark.parametrize("what", ["missing", "empty", "notes.txt"])
def test_nothing_to_read_is_a_wrong_usage(what: str, tmp_path: Path, run: Run) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    assert run(tmp_path / what, tmp_path / "out") == 2


# Pictures


@cache  # it holds the time at which it was made
def with_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x8769] = (
        orientation,
        "Maker",
        {0x9003: "2020:01:02 03:04:05", 0x927C: b"notes\0of the maker"},
    )
    whole = Image.Exif()
    whole.load(exif.tobytes())
    return whole


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
def test_a_turned_picture_comes_out_upright_with_its_other_exif(
    kind: str, orientation: int, nobody: np.ndarray, tmp_path: Path
) -> None:
    from PIL import ImageOps

    source, target = tmp_path / f"in.{kind}", tmp_path / f"out.{kind}"
    lossless = {"lossless": True} if kind == "webp" else {"quality": 95} if kind == "jpg" else {}
    Image.fromarray(nobody).save(
        source, exif=exif_of(orientation), icc_profile=with_profile(), **lossless
    )
    upright = np.asarray(ImageOps.exif_transpose(Image.open(source)))
    given = pictures.read(source)
    assert np.array_equal((given.pixels * 255).round().numpy().astype(np.uint8), upright)
    pictures.write(given, given.pixels, torch.zeros(given.pixels.shape[:2]), target, f".{kind}")
    with Image.open(target) as image:
        assert image.getexif().get(0x0112, 1) == 1
        assert image.getexif()[0x010F] == "Maker"
        assert image.getexif().get_ifd(0x8769)[0x9003] == "2020:01:02 03:04:05"
        assert image.info["icc_profile"] == with_profile()
        assert np.abs(np.asarray(image).astype(int) - upright).max() <= (12 if kind == "jpg" else 0)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["png", "tif"])
def test_16_bits_stay_16_bits(kind: str, channels: int, tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 65536, (20, 30, channels), dtype=np.uint16)
    array = array[..., 0] if channels == 1 else array
    source, target = tmp_path / f"in.{kind}", tmp_path / f"out.{kind}"
    if kind == "png":
        source.write_bytes(imagecodecs.png_encode(array))
    else:
        alpha = ["unassalpha"] if channels in (2, 4) else None
        kind_of = "rgb" if channels > 2 else "minisblack"
        tifffile.imwrite(
            source,
            array,
            photometric=kind_of,
            extrasamples=alpha,
            iccprofile=b"profile" * 20,
            resolution=(300, 300),
        )
    given = pictures.read(source)
    pictures.write(given, given.pixels, torch.zeros(20, 30), target, f".{kind}")
    after = (
        imagecodecs.png_decode(target.read_bytes()) if kind == "png" else tifffile.imread(target)
    )
    assert after.dtype == np.uint16
    assert np.array_equal(after, array)
    if kind == "tif":
        with tifffile.TiffFile(target) as file:
            assert file.pages.first.tags.valueof(34675) == b"profile" * 20
            assert file.pages.first.get_resolution("INCH") == (300, 300)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        (kind, mode)
        for kind in ("png", "tif", "webp", "bmp")
        for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")
        if (kind, mode) not in {("png", "CMYK"), ("bmp", "LA"), ("bmp", "CMYK")}  # no such files
    ],
)
def test_every_kind_of_8_bit_picture_keeps_its_values(kind: str, mode: str, tmp_path: Path) -> None:
    noise = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8), "RGBA"
    )
    source, target = tmp_path / f"in.{kind}", tmp_path / f"out.{kind}"
    image = noise if mode in ("LA", "RGBA") else noise.convert("RGB")
    image.convert(mode).save(source, **({"lossless": True} if kind == "webp" else {}))
    given = pictures.read(source)
    pictures.write(given, given.pixels, torch.zeros(20, 30), target, f".{kind}")
    with Image.open(source) as before, Image.open(target) as after:
        same = "CMYK" if before.mode == "CMYK" else "RGBA"
        assert np.array_equal(np.asarray(before.convert(same)), np.asarray(after.convert(same)))


def test_a_png_keeps_what_it_says_beside_its_pixels(nobody: np.ndarray, tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    told = PngInfo()
    told.add_text("Title", "A title")
    told.add_itxt("parameters", "steps: 20, Zürich")
    Image.fromarray(nobody).save(tmp_path / "in.png", pnginfo=told, dpi=(300, 300))
    given = pictures.read(tmp_path / "in.png")
    pictures.write(
        given, given.pixels, torch.zeros(given.pixels.shape[:2]), tmp_path / "out.png", ".png"
    )
    with Image.open(tmp_path / "out.png") as image:
        assert (image.info["Title"], image.info["parameters"]) == ("A title", "steps: 20, Zürich")
        assert image.info["dpi"][0] == pytest.approx(300, abs=0.01)


@pytest.mark.parametrize("kind", ["cut.jpg", "cut16.png", "text.png"])
def test_a_picture_that_cannot_be_done_is_named_in_a_sentence(
    kind: str, nobody: np.ndarray, tmp_path: Path
) -> None:
    path, image = tmp_path / kind, Image.fromarray(nobody)
    if kind == "cut16.png":
        path.write_bytes(imagecodecs.png_encode(nobody.astype(np.uint16) * 257)[:4000])
    elif kind == "text.png":
        path.write_text("a picture of words")
    else:
        whole = io.BytesIO()
        image.save(whole, "JPEG")
        path.write_bytes(whole.getvalue()[:2000])
    with pytest.raises(OSDFaceError, match=kind):
        pictures.read(path)


def test_transparency_is_not_lost_in_a_jpeg(nobody: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(nobody).convert("RGBA").save(tmp_path / "in.png")
    with pytest.raises(OSDFaceError, match=r"out\.jpg cannot hold the transparency of in\.png"):
        pictures.check_target(pictures.read(tmp_path / "in.png"), tmp_path / "out.jpg")


def test_only_the_face_of_a_turned_16_bit_picture_changes(
    run: Run, face: np.ndarray, tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    upright = np.concatenate(
        [
            face.astype(np.uint16) * 257 - rng.integers(0, 2, face.shape, dtype=np.uint16),
            rng.integers(0, 65536, (256, 256, 1), dtype=np.uint16),
        ],
        -1,
    )
    data = imagecodecs.png_encode(np.ascontiguousarray(np.rot90(upright)))
    given = pictures.Picture(
        tmp_path / "x.png", torch.zeros(1, 1, 3), 16, exif=exif_of(6).tobytes(), icc=with_profile()
    )
    chunks = pictures._png(np.zeros((1, 1, 3), np.uint16), given, given.icc)
    start, stop = 33, chunks.index(b"IDAT") - 4
    (tmp_path / "in.png").write_bytes(data[:33] + chunks[start:stop] + data[33:])
    keep = np.zeros((256, 256), np.uint8)
    keep[:, :120] = 255
    Image.fromarray(keep).save(tmp_path / "keep.png")
    assert (
        run(
            tmp_path / "in.png",
            tmp_path / "out.png",
            "--keep",
            tmp_path / "keep.png",
            "--report",
            tmp_path / "r.json",
        )
        == 0
    )
    after = imagecodecs.png_decode((tmp_path / "out.png").read_bytes())
    assert after.dtype == np.uint16
    assert np.array_equal(after[..., 3], upright[..., 3])
    x1, y1, x2, y2 = entries(tmp_path / "r.json")["in.png"]["faces"][0]["box"]
    rows, columns = np.nonzero(changed(after, upright))
    assert len(rows) > 2000
    assert columns.min() >= 120, "keep was not kept"
    middle, side = ((x1 + x2) / 2, (y1 + y2) / 2), max(x2 - x1, y2 - y1)
    assert np.abs(columns - middle[0]).max() < side
    assert np.abs(rows - middle[1]).max() < side
    with Image.open(tmp_path / "out.png") as image:
        assert image.getexif()[0x0112] == 1
        assert image.getexif()[0x010F] == "Maker"
        assert image.info["icc_profile"] == with_profile()


def test_only_the_face_of_a_picture_made_of_ink_changes(
    run: Run, face: np.ndarray, tmp_path: Path
) -> None:
    ink = np.asarray(Image.fromarray(face).convert("CMYK")).copy()
    ink[..., 3] = np.random.default_rng(2).integers(0, 20, ink.shape[:2])
    Image.fromarray(ink, "CMYK").save(tmp_path / "in.tif")
    assert run(tmp_path / "in.tif", tmp_path / "out.tif", "--mask-type", "box") == 0
    with Image.open(tmp_path / "out.tif") as image:
        assert image.mode == "CMYK"
        different = changed(np.asarray(image), ink)
    assert 1000 < different.sum() < 0.9 * different.size
    assert not different[:10].all()


# What goes wrong


def test_nan_in_half_precision_is_computed_again_in_fp32(
    run: Run, face: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(face).save(tmp_path / "in.png")
    decode, seen = DiffusersBackbone.decode, []

    def overflowing(self: DiffusersBackbone, latents: torch.Tensor) -> torch.Tensor:
        seen.append(self.dtype)
        return decode(self, latents) * (torch.nan if self.dtype == torch.float16 else 1)

    monkeypatch.setattr(DiffusersBackbone, "decode", overflowing)
    assert (
        run(
            tmp_path / "in.png",
            tmp_path / "out.png",
            "--report",
            tmp_path / "r.json",
            "--dtype",
            "fp16",
        )
        == 0
    )
    assert seen == [torch.float16, torch.float32]
    assert entries(tmp_path / "r.json")["in.png"]["faces"][0]["note"] == "computed again in fp32"
    assert changed(face, np.asarray(Image.open(tmp_path / "out.png"))).any()


def test_a_lora_of_no_strength_is_not_read_and_another_is_named(
    run: Run, face: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Image.fromarray(face).save(tmp_path / "in.png")
    # Complete, and of full size: it has no place in the small UNet.
    tensors = {}
    for name, layer in adapted_layers().items():
        out, *into = layer.shape
        tensors[f"unet.{name}.lora_A.weight"] = torch.zeros(1, *into)
        tensors[f"unet.{name}.lora_B.weight"] = torch.zeros(out, 1, *(1 for _ in into[1:]))
    save_file(tensors, lora := tmp_path / "another.safetensors")
    given = ["--lora", lora, "--lora-strength"]
    assert run(tmp_path / "in.png", tmp_path / "out.png", *given, "0") == 0
    assert run(tmp_path / "in.png", tmp_path / "again.png", *given, "1") == 2
    assert "278 layers of another.safetensors" in caplog.text


def test_weights_that_are_missing_or_wrong_stop_the_run_with_a_sentence(
    face: np.ndarray, small_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Image.fromarray(face).save(tmp_path / "in.png")
    models = tmp_path / "models"
    (models / "osdface").mkdir(parents=True)
    (models / "osdface" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    wrong = tmp_path / "wrong"
    shutil.copytree(small_model, wrong)
    config = wrong / "scheduler" / "scheduler_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"prediction_type": "v_prediction"})
    )
    for options, says in (
        (["--models-dir", models], "v2-1_512-ema-pruned.safetensors"),
        (["--models-dir", models, "--model", small_model], "osdface_vre.safetensors"),
        (["--model", tmp_path / "nowhere"], "does not exist"),
        (
            [
                "--model",
                wrong,
                "--lora",
                "none",
                "--vre",
                small_model / "vre.safetensors",
                "--detector",
                "builtin",
            ],
            "wrong is a model that predicts v, as",
        ),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["--select", "by-index", "--indices", "one"], '`indices` is "one"'),
    ):
        caplog.clear()
        assert (
            cli.main(
                ["restore", str(tmp_path / "in.png"), str(tmp_path / "out.png"), *map(str, options)]
            )
            == 2
        ), options
        assert says in caplog.text
    assert not (tmp_path / "out.png").exists()


def test_without_weights_the_built_in_model_is_taken_and_announced(
    face: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from osdface_core.osdface import builtin

    Image.fromarray(face).save(tmp_path / "in.png")
    assert (
        cli.main(
            [
                "restore",
                str(tmp_path / "in.png"),
                str(tmp_path / "out.png"),
                "--report",
                str(tmp_path / "r.json"),
            ]
        )
        == 0
    )
    assert builtin.ANNOUNCEMENT in caplog.text
    settings = json.loads((tmp_path / "r.json").read_text())["settings"]
    assert (settings["model"], settings["detector"], settings["mask_type"]) == (
        "builtin",
        "builtin",
        "ellipse",
    )
    assert (tmp_path / "out.png").is_file()


def test_the_small_parser_is_announced_where_parsenet_is_missing(
    run: Run, face: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Image.fromarray(face).save(tmp_path / "in.png")
    pair = (tmp_path / "in.png", tmp_path / "out.png")
    assert run(*pair, "--mask-type", "parsing") == 0
    assert "by the small built-in parser" in caplog.text
    caplog.clear()
    assert run(*pair, "--overwrite") == 0
    assert "Pasting by an ellipse" in caplog.text


# Videos


def made_video(
    path: Path,
    frames: Sequence[np.ndarray],
    times: Sequence[int],
    codec: str,
    pix_fmt: str,
    sound: bool,
) -> None:
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=25)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        track = out.add_stream("aac", rate=44100) if sound else None
        for picture, time in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        for i in range(20 if track else 0):
            wave = np.sin(np.arange(1024) / (20 + i)).astype(np.float32)
            samples = av.AudioFrame.from_ndarray(
                np.stack([wave, wave]), format="fltp", layout="stereo"
            )
            samples.sample_rate, samples.pts, samples.time_base = (
                44100,
                1024 * i,
                Fraction(1, 44100),
            )
            out.mux(track.encode(samples))
        if track:
            out.mux(track.encode(None))


def seen_frames(path: Path, form: str) -> tuple[list[np.ndarray], list[float]]:
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return [frame.to_ndarray(format=form) for frame in frames], [
        float(frame.pts * frame.time_base) for frame in frames
    ]


def sounds(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(audio=0) if packet.size]


@pytest.fixture(scope="session")
def clip(face: np.ndarray, nobody: np.ndarray) -> list[np.ndarray]:
    """Frames of 160 x 192: a face that moves, and, after a cut, none."""
    moving = [face[40:200, x : x + 192] for x in (10, 13, 16, 19)]
    return [*moving, *(np.tile(nobody, (2, 2, 1))[:160, x : x + 192] for x in (0, 2))]


def test_a_video_keeps_its_times_its_sound_and_all_but_its_faces(
    run: Run, clip: list[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = [0, 40, 100, 120, 160, 290]
    made_video(tmp_path / "in.mkv", clip, times, "ffv1", "yuv420p", sound=True)
    reports = []
    for name, window in (("whole", frames.WINDOW), ("pieces", 2 * 160 * 192)):
        monkeypatch.setattr(frames, "WINDOW", window)
        options = ("--report", tmp_path / "r.json", "--smoothing", "0.5")
        assert run(tmp_path / "in.mkv", tmp_path / f"{name}.mkv", *options) == 0
        reports.append(entries(tmp_path / "r.json")["in.mkv"])
    before, when = seen_frames(tmp_path / "in.mkv", "yuv420p")
    after, when_after = seen_frames(tmp_path / "whole.mkv", "yuv420p")
    pieces, _ = seen_frames(tmp_path / "pieces.mkv", "yuv420p")
    assert when_after == pytest.approx(when)
    assert when == pytest.approx([time / 1000 for time in times])
    assert sounds(tmp_path / "whole.mkv") == sounds(tmp_path / "in.mkv")
    assert reports[0]["faces"] == reports[1]["faces"], "a window's border parted a track"
    assert {(f["frame"], f["number"]) for f in reports[0]["faces"] if f["verdict"] == "chosen"} == {
        (i, 0) for i in range(4)
    }
    assert all(np.array_equal(a, b) for a, b in zip(after, pieces, strict=True))
    assert [bool((a != b).any()) for a, b in zip(before, after, strict=True)] == [True] * 4 + [
        False
    ] * 2
    corner = np.s_[:30, :10]
    assert all(np.array_equal(a[corner], b[corner]) for a, b in zip(before, after, strict=True)), (
        "values outside of the face changed"
    )


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "name"),
    [("libx264", "yuv420p", "a.mp4"), ("libvpx-vp9", "yuv420p", "a.webm")],
)
def test_a_video_keeps_its_codec_and_looks(
    codec: str,
    pix_fmt: str,
    name: str,
    run: Run,
    clip: list[np.ndarray],
    tmp_path: Path,
) -> None:
    made_video(tmp_path / name, clip[3:], [0, 40, 80], codec, pix_fmt, sound=False)
    assert run(tmp_path / name, tmp_path / f"out_{name}") == 0
    with av.open(str(tmp_path / name)) as before, av.open(str(tmp_path / f"out_{name}")) as after:
        assert (
            before.streams.video[0].codec_context.codec.canonical_name
            == after.streams.video[0].codec_context.codec.canonical_name
        )
    old, when = seen_frames(tmp_path / name, "rgb24")
    new, when_after = seen_frames(tmp_path / f"out_{name}", "rgb24")
    assert when_after == pytest.approx(when, abs=1e-3)
    error = np.mean((old[-1].astype(float) - new[-1]) ** 2)
    assert 10 * np.log10(255**2 / error) > 35


def test_a_video_shown_turned_stays_turned(
    run: Run, clip: list[np.ndarray], tmp_path: Path
) -> None:
    with av.open(str(tmp_path / "in.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 192, 160, "yuv420p"
        if not hasattr(stream, "set_display_rotation"):
            pytest.skip("this PyAV cannot turn a video")
        stream.set_display_rotation(90)
        for picture in clip[:3]:
            out.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(
                        np.ascontiguousarray(np.rot90(picture, -1)), format="rgb24"
                    )
                )
            )
        out.mux(stream.encode(None))
    assert run(tmp_path / "in.mp4", tmp_path / "out.mp4", "--report", tmp_path / "r.json") == 0
    assert [
        f["frame"]
        for f in entries(tmp_path / "r.json")["in.mp4"]["faces"]
        if f["verdict"] == "chosen"
    ] == [0, 1, 2]
    with av.open(str(tmp_path / "out.mp4")) as container:
        frame = next(container.decode(video=0))
        assert (frame.width, frame.height, frame.rotation % 360) == (160, 192, 90)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_single_video_has_one_bar_by_frames(
    run: Run, clip: list[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_video(tmp_path / "in.mp4", clip[3:], [0, 40, 80], "libx264", "yuv420p", sound=False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert run(tmp_path / "in.mp4", tmp_path / "out.mp4") == 0
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "in.mp4" in shown
    assert "3.0/3.0" in shown.rsplit("\r", 1)[-1], "the bar is not full in the end"
    assert "file" not in shown, "a second bar, by files"


# Workers


def with_workers(
    monkeypatch: pytest.MonkeyPatch, stops_after: int, why: str = ""
) -> tuple[dict[str, Any], Callable[..., list[dict[str, Any]]]]:
    """Ray's place taken by one that does so many files and breaks: what `map` was told, and a run
    of job.run.
    """
    told: dict[str, Any] = {}

    class RayError(Exception):
        pass

    class Rows(list[Any]):
        def map(self, worker: object, **options: Any) -> Rows:
            told.update(options)
            return self

        def iter_rows(self) -> Iterator[dict[str, str]]:
            for row in self[:stops_after]:
                yield {
                    "entry": json.dumps(
                        {"input": row["source"], "output": row["target"], "status": "done"}
                    )
                }
            if stops_after < len(self):
                raise RayError(why)

    data = types.ModuleType("ray.data")
    ray = types.ModuleType("ray")
    vars(data).update(
        DataContext=types.SimpleNamespace(get_current=types.SimpleNamespace),
        ActorPoolStrategy=lambda size: size,
        from_items=lambda rows, **_: Rows(rows),
    )
    nothing = lambda **_: None  # noqa: E731
    vars(ray).update(
        data=data,
        init=nothing,
        shutdown=nothing,
        exceptions=types.SimpleNamespace(RayError=RayError),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", data)

    def run(items: list[job.Item], device: str = "cpu") -> list[dict[str, Any]]:
        return list(job.run(items, argparse.Namespace(workers=2, ray_address=None, device=device)))

    return told, run


@pytest.mark.parametrize(
    ("device", "gpus"), [("cuda", 1), ("xpu", 1), ("mps", None), ("cpu", None)]
)
def test_only_what_ray_counts_as_a_gpu_is_asked_of_it(
    device: str, gpus: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, run = with_workers(monkeypatch, 1)
    run([job.Item(Path("a.png"), Path("out.png"))], device)
    assert (told["num_gpus"], told["num_cpus"]) == (gpus, None if gpus else 1)


def test_one_device_for_many_workers_is_refused(
    run: Run, nobody: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Image.fromarray(nobody).save(tmp_path / "a.png")
    for workers in (["--workers", "2"], ["--ray-address", "auto"]):
        caplog.clear()
        assert run(tmp_path / "a.png", tmp_path / "out.png", "--device", "cuda:1", *workers) == 2
        assert (
            caplog.text.count(
                "--device is cuda:1, but workers are given a device each: name cuda alone."
            )
            == 1
        )


def test_what_workers_have_done_counts_when_they_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [job.Item(Path(f"{name}.png"), Path("out") / f"{name}.png") for name in "abc"]
    _, run = with_workers(monkeypatch, 1, "a machine went away\n  File ...")
    done, *undone = run(items)
    assert (Path(done["input"]).name, done["status"]) == ("a.png", "done")
    assert [(entry["input"], entry["status"]) for entry in undone] == [
        ("b.png", "failed"),
        ("c.png", "failed"),
    ]
    assert all(entry["error"] == "The workers stopped: a machine went away" for entry in undone)
    _, run = with_workers(
        monkeypatch,
        0,
        "The actor died\n  File ...\nosdface_core.errors.OSDFaceError: the file is damaged.\n",
    )
    with pytest.raises(OSDFaceError, match=r"^the file is damaged\.$"):
        run(items)


def test_weights_and_keep_are_found_from_any_folder(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(small_model, tmp_path / "model")
    (tmp_path / "models" / "facedetection").mkdir(parents=True)
    (tmp_path / "models" / "facedetection" / "detection_mobilenet0.25_Final.pth").write_bytes(b"")
    (tmp_path / "lora.bin").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    names = {
        "model": "model",
        "lora": "lora.bin",
        "vre": "model/vre.safetensors",
        "models_dir": "models",
        "keep": "keep.png",
    }
    arguments = [
        text for name, path in names.items() for text in (f"--{name.replace('_', '-')}", path)
    ]
    options = resolve(parser().parse_args(["restore", "in", "out", "--device", "cpu", *arguments]))
    for name, path in names.items():
        assert Path(getattr(options, name)) == tmp_path / path, name
    assert (
        Path(options.detector_file)
        == tmp_path / "models" / "facedetection" / "detection_mobilenet0.25_Final.pth"
    )


@pytest.mark.full
def test_two_workers_do_what_one_does(
    run: Run, face: np.ndarray, nobody: np.ndarray, tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason='no Ray: pip install "ray[data]"')
    given = tmp_path / "in"
    given.mkdir()
    Image.fromarray(face).save(given / "a.png")
    Image.fromarray(face[:, ::-1]).save(given / "b.png")
    Image.fromarray(nobody).save(given / "c.png")
    (given / "d.png").write_bytes(b"broken")
    threads = torch.get_num_threads()
    # With other threads torch adds up in another order. Each of two workers has half of them.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    try:
        assert run(given, tmp_path / "one", "--report", tmp_path / "one.json") == 1
    finally:
        torch.set_num_threads(threads)
    assert run(given, tmp_path / "two", "--workers", "2", "--report", tmp_path / "two.json") == 1
    for name in ("a.png", "b.png", "c.png"):
        one, two = (np.asarray(Image.open(tmp_path / which / name)) for which in ("one", "two"))
        assert np.array_equal(one, two), name
    one_said, two_said = (entries(tmp_path / f"{which}.json") for which in ("one", "two"))
    assert one_said.keys() == two_said.keys()
    assert all(one_said[name].get("faces") == two_said[name].get("faces") for name in one_said)
    assert two_said["d.png"]["status"] == "failed"


def test_it_runs_as_a_module_from_anywhere(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "osdface_core", "restore", "nothing", "out"]
    done = subprocess.run(
        command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "which does not exist" in done.stderr


def test_a_face_takes_nothing_of_the_packages_that_are_slow_to_import(
    face: np.ndarray, tmp_path: Path
) -> None:
    """Each of them takes as much of the processor as several faces, or as torch itself."""
    Image.fromarray(face).save(tmp_path / "face.png")
    code = (
        "import json, sys; from osdface_core.cli import main\n"
        "assert main(['restore', 'face.png', 'out.png', '--report', 'report.json']) == 0\n"
        "slow = {'diffusers', 'peft', 'transformers', 'torchvision', 'scipy', 'torch._dynamo'}\n"
        "print(slow & set(sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.stdout.splitlines() == ["1 done", "set()"]
    assert len(entries(tmp_path / "report.json")["face.png"]["faces"]) == 1


@pytest.mark.parametrize("asked", [None, "ACTIVE"])
def test_threads_that_wait_leave_the_processor_to_others(asked: str | None) -> None:
    """Unless the user has said otherwise. GNU's OpenMP tells how often a waiting thread looks."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_DISPLAY_ENV": "VERBOSE"}
    environment |= {"OMP_WAIT_POLICY": asked} if asked else {}
    done = subprocess.run(
        [sys.executable, "-m", "osdface_core", "--help"],
        check=True,
        env=environment,
        capture_output=True,
        text=True,
    )
    looks = re.findall(r"GOMP_SPINCOUNT\s*=\s*'(\d+)'", done.stderr)
    assert looks or sys.platform != "linux"
    assert all((int(number) > 0) == (asked == "ACTIVE") for number in looks)
