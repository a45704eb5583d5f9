"""The command line on what people bring: kinds of pictures, several in a file, animations, large
scans, long names, aligned crops.
"""

from __future__ import annotations

import io
import struct
import threading
import tracemalloc
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin, features

pytest.importorskip("diffusers", reason="no diffusers: pip install -r requirements-dev.txt")
pytest.importorskip("av", reason="no PyAV: pip install -r requirements-dev.txt")
pytest.importorskip("imagecodecs", reason="no imagecodecs: pip install -r requirements-dev.txt")
pytest.importorskip("tifffile", reason="no tifffile: pip install -r requirements-dev.txt")

import tifffile

from osdface_core import cli
from osdface_core.cli import animations, job, pictures, tiff
from osdface_core.cli.options import parser
from osdface_core.cli.restorer import resolve
from osdface_core.errors import OSDFaceError
from tests.test_cli import entries

pytestmark = pytest.mark.usefixtures("away_from_home")
Run = Callable[..., int]
KINDS = {
    **({"avif": ("RGB", "RGBA")} if features.check("avif") else {}),
    "jp2": ("L", "RGB", "RGBA"),
    "j2k": ("RGB",),
    "tga": ("L", "RGB", "RGBA"),
    "ppm": ("RGB",),
    "pgm": ("L",),
    "gif": ("P",),
    "pcx": ("L", "RGB"),
    "sgi": ("L", "RGB", "RGBA"),
    "qoi": ("RGB", "RGBA"),
    "dds": ("RGB", "RGBA"),
    "im": ("L", "RGB", "CMYK"),
    "ico": ("RGBA",),
    "dib": ("RGB",),
    "png": ("P", "LA"),
    "tif": ("YCbCr", "F", "I"),
}
# Those that lose something of every picture.
LOSSY = ("avif",)


@pytest.fixture
def run() -> Run:
    """`restore` by the built-in model."""
    options = ["--model", "builtin", "--device", "cpu"]
    return lambda *arguments: cli.main(["restore", *map(str, arguments), *options])


@pytest.fixture(scope="session")
def face(photographs: Path) -> Image.Image:
    """224 x 208 px with one face in it."""
    whole = Image.open(photographs / "astronaut.png").convert("RGB")
    return whole.crop((112, 20, 336, 228))


@pytest.fixture(scope="session")
def nobody(photographs: Path) -> Image.Image:
    return Image.open(photographs / "astronaut.png").convert("RGB").crop((380, 400, 508, 496))


def rgba(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGBA")).astype(int)


def chosen(report: Path, name: str) -> list[int]:
    faces = entries(report)[name]["faces"]
    return [one["frame"] for one in faces if one["verdict"] == "chosen"]


# Kinds


@pytest.mark.parametrize(
    ("kind", "mode"), [(kind, mode) for kind, modes in KINDS.items() for mode in modes]
)
def test_every_kind_that_pillow_reads_and_writes_is_done(
    kind: str, mode: str, face: Image.Image, run: Run, tmp_path: Path
) -> None:
    image = face.convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size).point(lambda v: 255 * (v > 60)))
    if kind == "ico":
        image = image.crop((0, 0, 208, 208))
    image = image if mode == "RGBA" else image.convert("RGB").convert("L" if mode == "F" else mode)
    image = image.convert(mode) if mode in ("F", "I") else image
    source, target = tmp_path / f"in.{kind}", tmp_path / f"out.{kind}"
    image.save(source, **({"quality": 95} if kind == "avif" else {}))
    assert run(source, target, "--report", tmp_path / "r.json") == 0
    assert chosen(tmp_path / "r.json", source.name) == [0]
    with Image.open(source) as before, Image.open(target) as after:
        assert after.format == before.format
        assert after.size == before.size
        if mode in ("F", "I"):
            assert after.mode == before.mode
    difference = np.abs(rgba(source) - rgba(target)).max(-1)
    assert difference.max() > 24
    if kind not in LOSSY:
        assert 0.02 < (difference > 0).mean() < 0.9
        assert not difference[-8:].any(), "what is no face has changed"


def test_a_kind_is_told_by_what_a_file_holds_where_its_name_does_not(
    face: Image.Image, nobody: Image.Image, run: Run, tmp_path: Path
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    face.save(source / "no_ending", "JPEG", quality=95)
    nobody.save(source / "photo.bak", "PNG")
    face.convert("RGBA").save(source / "transparent.jpg", "PNG")
    (source / "notes.txt").write_text("no picture")
    assert run(source, tmp_path / "out", "--report", tmp_path / "r.json") == 0
    said = entries(tmp_path / "r.json")
    assert said["notes.txt"]["status"] == "skipped"
    kinds = {"no_ending": "JPEG", "photo.bak": "PNG", "transparent.jpg": "PNG"}
    for name, kind in kinds.items():
        assert said[name]["status"] == "done"
        with Image.open(tmp_path / "out" / name) as image:
            assert image.format == kind


def test_a_kind_that_is_only_read_is_copied_or_named(
    face: Image.Image, nobody: Image.Image, run: Run, tmp_path: Path
) -> None:
    def xpm(image: Image.Image) -> str:
        small = image.quantize(64)
        colors = np.asarray(small.getpalette()).reshape(-1, 3)[:64]
        lines = [f'"{i:02d} c #{r:02x}{g:02x}{b:02x}",' for i, (r, g, b) in enumerate(colors)]
        rows = ['"' + "".join(f"{i:02d}" for i in row) + '",' for row in np.asarray(small)]
        head = f'/* XPM */\nstatic char *x[] = {{\n"{image.width} {image.height} {len(lines)} 2",'
        return "\n".join([head, *lines, *rows, "};\n"])

    source = tmp_path / "in"
    source.mkdir()
    (source / "face.xpm").write_text(xpm(face))
    (source / "nobody.xpm").write_text(xpm(nobody))
    assert run(source, tmp_path / "out", "--report", tmp_path / "r.json") == 1
    said = entries(tmp_path / "r.json")
    assert (
        "face.xpm cannot be written, for .xpm is a kind that is only" in said["face.xpm"]["error"]
    )
    assert (tmp_path / "out" / "nobody.xpm").read_bytes() == (source / "nobody.xpm").read_bytes()
    assert run(source / "face.xpm", tmp_path / "face.png") == 0


def test_heic_is_read_where_pillow_heif_is_and_named_where_it_is_not(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "pillow_heif", None)
    start = struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic"
    for name in ("phone.heic", "phone.jpg"):
        (tmp_path / name).write_bytes(start + bytes(100))
        assert run(tmp_path / name, f"{tmp_path}/out/") == 1
        assert f"{name} is a HEIC picture" in caplog.text
    assert "pip install pillow-heif" in caplog.text


@pytest.mark.parametrize(("mode", "ending"), [("RGB", "heic"), ("RGBA", "heif"), ("L", "heic")])
def test_heic_stays_heic_with_its_other_pictures_and_notes(
    mode: str, ending: str, face: Image.Image, nobody: Image.Image, run: Run, tmp_path: Path
) -> None:
    """As phones write it: turned by a note, and with a second picture."""
    pytest.importorskip("pillow_heif", reason="no pillow-heif: pip install -r requirements-dev.txt")
    source, target = tmp_path / f"in.{ending}", tmp_path / f"out.{ending}"
    image = face.convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size).point(lambda v: 255 * (v > 60)))
    image = image if mode == "RGBA" else face.convert(mode)
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    notes: dict[str, Any] = {"exif": exif.tobytes(), "quality": 90}
    image.save(source, "HEIF", save_all=True, append_images=[nobody], **notes)
    assert run(source, target, "--report", tmp_path / "r.json") == 0
    assert chosen(tmp_path / "r.json", source.name) == [0]
    assert target.read_bytes()[4:8] == b"ftyp"
    with Image.open(source) as before, Image.open(target) as after:
        assert after.format == before.format == "HEIF"
        assert after.size == before.size
        assert after.getexif()[0x010F] == "Maker"
        assert after.n_frames == before.n_frames == 2
        assert ("A" in after.mode) is ("A" in before.mode)
        main, restored = (np.asarray(one.convert("RGBA")).astype(int) for one in (before, after))
        before.seek(1)
        after.seek(1)
        others = [np.asarray(one.convert("RGB")).astype(int) for one in (before, after)]
    # HEIC loses something of every picture.
    difference = np.abs(main - restored).max(-1)
    assert difference.max() > 24
    assert difference[-8:].mean() < 4
    assert np.abs(others[0] - others[1]).mean() < 4
    assert run(source, tmp_path / "out.png") == 0
    assert run(tmp_path / "out.png", tmp_path / f"back.{ending}") == 0
    with Image.open(tmp_path / f"back.{ending}") as back:
        assert back.format == "HEIF"
        assert back.size == face.size


# What a file holds beside its picture


def with_notes(image: Image.Image) -> bytes:
    """A JPEG with a comment, IPTC's caption and a segment that is nobody's."""
    whole = io.BytesIO()
    image.save(whole, "JPEG", quality=92, comment=b"scanned by aunt", dpi=(300, 300))
    caption = "Großmutter, 1943".encode()
    record = struct.pack(">BBBH", 0x1C, 2, 120, len(caption)) + caption
    block = (
        b"8BIM\x04\x04\0\0" + struct.pack(">I", len(record)) + record + b"\0" * (len(record) % 2)
    )
    said = b"Photoshop 3.0\0" + block
    segment = struct.pack(">BBH", 0xFF, 0xED, len(said) + 2) + said
    own = struct.pack(">BBH", 0xFF, 0xE7, 8) + b"scan 1"
    return whole.getvalue()[:2] + segment + own + whole.getvalue()[2:]


def test_a_jpeg_keeps_its_comment_iptc_and_what_stands_behind_it(
    face: Image.Image, run: Run, tmp_path: Path
) -> None:
    film = b"a film of a moment" * 9
    (tmp_path / "in.jpg").write_bytes(with_notes(face) + film)
    assert run(tmp_path / "in.jpg", tmp_path / "out.jpg") == 0
    data = (tmp_path / "out.jpg").read_bytes()
    assert data.endswith(b"\xff\xd9" + film)
    assert b"\xff\xe7\0\x08scan 1" in data
    with Image.open(tmp_path / "in.jpg") as before, Image.open(tmp_path / "out.jpg") as after:
        assert after.info["comment"] == b"scanned by aunt"
        assert after.info["photoshop"] == before.info["photoshop"]
        assert after.info["dpi"] == (300, 300)
        assert np.abs(np.asarray(before).astype(int) - np.asarray(after)).max() > 20


@pytest.mark.parametrize("turned", [False, True])
def test_a_picture_without_a_chosen_face_is_copied_byte_for_byte(
    turned: bool, nobody: Image.Image, run: Run, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    nobody.save(tmp_path / "in.jpg", exif=exif, quality=60)
    assert run(tmp_path / "in.jpg", tmp_path / "out.jpg") == 0
    assert (tmp_path / "out.jpg").read_bytes() == (tmp_path / "in.jpg").read_bytes()


@pytest.mark.parametrize("more", [1, 2])
def test_the_other_pictures_of_an_mpo_stay(
    more: int, face: Image.Image, nobody: Image.Image, run: Run, tmp_path: Path
) -> None:
    others = [nobody, face.resize((80, 80))][:more]
    source, target = tmp_path / "in.jpg", tmp_path / "out.jpg"
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    face.save(source, "MPO", save_all=True, append_images=others, quality=90, exif=exif)
    assert run(source, target, "--report", tmp_path / "r.json") == 0
    with Image.open(source) as before, Image.open(target) as after:
        assert after.format == "MPO"
        assert after.n_frames == 1 + more
        assert after.getexif()[0x010F] == "Maker"
        assert np.abs(np.asarray(before).astype(int) - np.asarray(after)).max() > 20
        for i in range(1, 1 + more):
            before.seek(i)
            after.seek(i)
            assert np.array_equal(np.asarray(before), np.asarray(after))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("where", ["after", "before", "below"])
def test_the_other_pages_of_a_tiff_stay(
    where: str, deep: bool, order: str, face: Image.Image, run: Run, tmp_path: Path
) -> None:
    source, target = tmp_path / "in.tif", tmp_path / "out.tif"
    picture = np.asarray(face).astype(np.uint16) * 257 if deep else np.asarray(face)
    preview = np.random.default_rng(0).integers(0, 60000, (31, 40), dtype=np.uint16)
    with tifffile.TiffWriter(source, byteorder=order) as file:
        if where == "before":
            file.write(preview, subfiletype=1, description="small", metadata=None)
        below = 1 if where == "below" else 0
        file.write(picture, photometric="rgb", subifds=below, metadata=None, description="main")
        if where != "before":
            file.write(preview, subfiletype=1, description="small", metadata=None)
    assert run(source, target, "--report", tmp_path / "r.json") == 0
    assert len(chosen(tmp_path / "r.json", "in.tif")) == 1
    with tifffile.TiffFile(target) as file:
        pages: list[Any] = list(file.pages)
        main, other = (pages[1], pages[0]) if where == "before" else (pages[0], pages[-1])
        other = main.pages[0] if where == "below" else other
        assert np.array_equal(other.asarray(), preview)
        assert other.description == "small"
        assert main.description == "main"
        after = main.asarray()
    assert after.dtype == picture.dtype
    different = (after != picture).any(-1)
    assert 0.02 < different.mean() < 0.9
    assert not different[-8:].any()


def test_pages_of_other_kinds_stay_in_a_tiff(
    face: Image.Image, nobody: Image.Image, run: Run, tmp_path: Path
) -> None:
    others = [nobody.convert("1"), nobody.convert("CMYK"), nobody.convert("L")]
    face.save(tmp_path / "in.tif", save_all=True, append_images=others, compression="tiff_lzw")
    assert run(tmp_path / "in.tif", tmp_path / "out.tif") == 0
    with Image.open(tmp_path / "in.tif") as before, Image.open(tmp_path / "out.tif") as after:
        assert after.n_frames == 4
        for i in range(1, 4):
            before.seek(i)
            after.seek(i)
            assert before.mode == after.mode
            assert np.array_equal(np.asarray(before), np.asarray(after))


def test_pages_that_pillow_does_not_know_stay_in_a_tiff(
    face: Image.Image, run: Run, tmp_path: Path
) -> None:
    """A table of fp64 between the picture and its preview."""
    numbers = np.random.default_rng(0).random((30, 20))
    with tifffile.TiffWriter(tmp_path / "in.tif") as file:
        file.write(np.asarray(face), photometric="rgb", metadata=None)
        file.write(numbers, metadata=None)
        file.write(np.asarray(face.resize((40, 31))), photometric="rgb", metadata=None)
    assert run(tmp_path / "in.tif", tmp_path / "out.tif", "--report", tmp_path / "r.json") == 0
    assert chosen(tmp_path / "r.json", "in.tif") == [0]
    with tifffile.TiffFile(tmp_path / "out.tif") as file:
        pages = [page.asarray() for page in file.pages]
    assert (pages[0] != np.asarray(face)).any()
    assert np.array_equal(pages[1], numbers)
    assert np.array_equal(pages[2], np.asarray(face.resize((40, 31))))


def test_a_layered_tiff_takes_memory_for_its_bytes_and_little_more(
    face: Image.Image, tmp_path: Path
) -> None:
    """Photoshop keeps the layers in one value of the page, which may be most of the file."""
    layers = bytes(2_000_000)
    with tifffile.TiffWriter(tmp_path / "in.tif") as file:
        tags = [(37724, 7, len(layers), layers, True)]
        file.write(np.asarray(face), photometric="rgb", metadata=None, extratags=tags)
        file.write(np.asarray(face.resize((40, 31))), photometric="rgb", metadata=None)
    with tifffile.TiffWriter(tmp_path / "new.tif") as file:
        file.write(np.asarray(face), photometric="rgb", metadata=None)
    data, picture = ((tmp_path / f"{name}.tif").read_bytes() for name in ("in", "new"))
    tracemalloc.start()
    whole = tiff.replace_page(data, 1, picture)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    (tmp_path / "whole.tif").write_bytes(whole)
    with tifffile.TiffFile(tmp_path / "whole.tif") as file:
        assert file.pages[0].tags[37724].value == layers
    assert held < 16 * len(data), f"{held / len(data):.0f} times the file's size"


# Animations


def moving(face: Image.Image, count: int = 4) -> list[Image.Image]:
    """Frames with a face that moves; the last is the one before once more."""
    frames = [face.crop((2 * i, 0, 2 * i + 200, 200)) for i in range(count - 1)]
    return [*frames, frames[-1]]


def shown(path: Path) -> tuple[list[np.ndarray], list[float]]:
    with Image.open(path) as image:
        frames, times = [], []
        for i in range(image.n_frames):
            image.seek(i)
            frames.append(np.asarray(image.convert("RGBA")).astype(int))
            times.append(image.info.get("duration"))
    return frames, times


@pytest.mark.parametrize(
    ("kind", "loop"),
    [
        ("gif", None),
        *((kind, loop) for kind in ("gif", "webp", "png") for loop in (0, 3)),
        *([("avif", None)] if features.check("avif") else []),
    ],
)
def test_an_animation_keeps_its_frames_times_and_loop(
    kind: str, loop: int | None, face: Image.Image, run: Run, tmp_path: Path
) -> None:
    times = [80, 120, 40, 200]
    source, target = tmp_path / f"in.{kind}", tmp_path / f"out.{kind}"
    frames = moving(face)
    # The same picture twice would be one frame to Pillow.
    corner = Image.new("RGB", (4, 4))
    frames[3] = frames[3].copy()
    frames[3].paste(corner)
    options: dict[str, Any] = {} if loop is None else {"loop": loop}
    options |= {"lossless": True} if kind == "webp" else {}
    frames[0].save(source, save_all=True, append_images=frames[1:], duration=times, **options)
    assert run(source, target, "--report", tmp_path / "r.json") == 0
    before, when = shown(source)
    after, when_after = shown(target)
    assert when == when_after
    assert len(after) == 4
    assert chosen(tmp_path / "r.json", source.name) == [0, 1, 2, 3]
    with Image.open(source) as old, Image.open(target) as new:
        assert old.info.get("loop") == new.info.get("loop")
        assert old.format == new.format
    for old, new in zip(before, after, strict=True):
        difference = np.abs(old - new).max(-1)
        assert difference.max() > 24
        if kind != "avif":
            assert 0.02 < (difference > 0).mean() < 0.9
            assert not difference[-8:].any()


def test_frames_that_are_alike_stay_frames(face: Image.Image, tmp_path: Path, run: Run) -> None:
    """Pillow's writers join them; the file here is made by hand."""
    from fractions import Fraction

    from osdface_core.cli.frames import Around, write_apng, write_gif, write_webp

    one = np.asarray(face.quantize(200).convert("RGBA"))
    nothing = np.zeros(one.shape[:2], bool)
    around = Around([Fraction(n, 100) for n in (10, 10, 30)], 0)
    for kind, write in (("gif", write_gif), ("webp", write_webp), ("png", write_apng)):
        source, target = tmp_path / f"in.{kind}", tmp_path / f"out.{kind}"
        write(source, iter([(one, nothing)] * 3), around)
        assert run(source, target) == 0
        frames, times = shown(target)
        assert times == [100, 100, 300]
        assert all((frame != one).any() for frame in frames)


def test_a_gif_keeps_its_transparency_and_clearing(
    face: Image.Image, run: Run, tmp_path: Path
) -> None:
    """Each frame is cleared away before the next, with a hole that moves."""
    frames = []
    for i, one in enumerate(moving(face)):
        see_through = one.convert("RGBA")
        see_through.paste((0, 0, 0, 0), (10 * i, 150, 10 * i + 30, 200))
        frames.append(see_through)
    source, target = tmp_path / "in.gif", tmp_path / "out.gif"
    frames[0].save(source, save_all=True, append_images=frames[1:], duration=50, disposal=2, loop=0)
    assert run(source, target) == 0
    for before, after in zip(shown(source)[0], shown(target)[0], strict=True):
        assert np.array_equal(before[..., 3], after[..., 3])
        assert 0 in before[..., 3]
        different = (before != after).any(-1)
        assert 0.02 < different.mean() < 0.9
        assert not different[-8:].any()


def test_a_gif_that_becomes_transparent_after_a_whole_frame_shows_what_is_behind(
    face: Image.Image, run: Run, tmp_path: Path
) -> None:
    """The whole frame is cleared away to nothing, and not to the first colour of its palette.
    Pillow makes no such GIF of these frames; the file here is made by hand.
    """
    from fractions import Fraction

    from osdface_core.cli.frames import Around, write_gif

    whole, pierced, again = (face.crop((x, 0, x + 200, 200)).convert("RGBA") for x in (0, 2, 4))
    pierced.paste((0, 0, 0, 0), (20, 150, 60, 200))
    source, target = tmp_path / "in.gif", tmp_path / "out.gif"
    given = [(np.asarray(one), np.ones((200, 200), bool)) for one in (whole, pierced, again)]
    write_gif(source, iter(given), Around([Fraction(1, 20)] * 3, 0))
    assert run(source, target) == 0
    frames = shown(target)[0]
    assert (frames[0][..., 3] == 255).all()
    assert (frames[1][150:200, 20:60, 3] == 0).all()
    for before, after in zip(shown(source)[0], frames, strict=True):
        assert np.array_equal(before[..., 3], after[..., 3])


def test_an_animation_of_nobody_is_copied_and_a_still_kind_named(
    nobody: Image.Image, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nobody.save(tmp_path / "in.gif", save_all=True, append_images=[nobody.rotate(180)])
    assert run(tmp_path / "in.gif", tmp_path / "out.gif") == 0
    assert (tmp_path / "out.gif").read_bytes() == (tmp_path / "in.gif").read_bytes()
    assert run(tmp_path / "in.gif", tmp_path / "out.jpg") == 1
    assert "holds 2 frames, which .jpg cannot" in caplog.text
    assert run(tmp_path / "in.gif", tmp_path / "out.png") == 0
    assert len(shown(tmp_path / "out.png")[0]) == 2


def test_an_apng_keeps_fractions_of_time_and_its_still(
    face: Image.Image, run: Run, tmp_path: Path
) -> None:
    frames = moving(face)
    frames[0].save(
        tmp_path / "in.png",
        save_all=True,
        append_images=frames[1:3],
        default_image=True,
        duration=100,
    )
    data = bytearray((tmp_path / "in.png").read_bytes())
    import zlib

    place = data.index(b"fcTL")
    struct.pack_into(">HH", data, place + 24, 1001, 30000)
    struct.pack_into(">I", data, place + 30, zlib.crc32(data[place : place + 30]))
    (tmp_path / "in.png").write_bytes(data)
    assert run(tmp_path / "in.png", tmp_path / "out.png") == 0
    after = (tmp_path / "out.png").read_bytes()
    place = after.index(b"fcTL")
    assert struct.unpack_from(">HH", after, place + 24) == (1001, 30000)
    with Image.open(tmp_path / "out.png") as image:
        assert image.info["default_image"]
        assert image.n_frames == 3


# Names and sizes


@pytest.mark.parametrize("name", ["n" * 251 + ".png", "ü" * 125 + ".jpg", "n" * 247 + ".png"])
def test_a_name_as_long_as_names_may_be(
    name: str, nobody: Image.Image, face: Image.Image, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    face.save(tmp_path / "in" / name)
    assert run(tmp_path / "in", tmp_path / "out") == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


def test_pillow_s_limits_come_back_when_the_last_of_several_threads_is_done(
    nobody: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody.save(tmp_path / "scan.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    text, filters = PngImagePlugin.MAX_TEXT_CHUNK, list(warnings.filters)
    first_is_in, first_is_out = threading.Event(), threading.Event()

    def first() -> None:
        with pictures.opened(tmp_path / "scan.png"):
            first_is_in.set()
            assert second_is_in.wait(60)
        first_is_out.set()

    second_is_in = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(first)
        assert first_is_in.wait(60)
        with pictures.opened(tmp_path / "scan.png"):
            second_is_in.set()
            assert first_is_out.wait(60)
            # Still without a limit here.
            assert Image.open(tmp_path / "scan.png").size == (128, 96)
        done.result()
    assert Image.MAX_IMAGE_PIXELS == 1000
    assert text == PngImagePlugin.MAX_TEXT_CHUNK
    assert warnings.filters == filters


def test_a_scan_beyond_pillow_s_limit_is_read_and_one_beyond_memory_named(
    nobody: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody.save(tmp_path / "scan.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert pictures.read(tmp_path / "scan.png").pixels.shape == (96, 128, 3)
    assert Image.MAX_IMAGE_PIXELS == 1000
    monkeypatch.setattr(pictures, "_free_memory", lambda: 100_000)
    with pytest.raises(OSDFaceError, match=r"scan\.png is too large: 128 x 96 px"):
        pictures.read(tmp_path / "scan.png")
    nobody.save(tmp_path / "moving.gif", save_all=True, append_images=[nobody.rotate(180)])
    animation = animations.look(tmp_path / "moving.gif")
    assert animation is not None
    with pytest.raises(OSDFaceError, match="is too large"):
        next(animation.frames())


# Crops


@pytest.mark.parametrize("size", [(512, 512), (250, 250), (128, 128), (89, 109)])
def test_an_aligned_crop_is_restored_whole(
    size: tuple[int, int], face: Image.Image, run: Run, tmp_path: Path
) -> None:
    crop = face.resize(size)
    crop.save(tmp_path / "in.png")
    # So small that no detector finds it.
    options = ("--aligned", "--report", tmp_path / "r.json")
    assert run(tmp_path / "in.png", tmp_path / "out.png", *options) == 0
    assert chosen(tmp_path / "r.json", "in.png") == [0]
    after = np.asarray(Image.open(tmp_path / "out.png"))
    assert after.shape == (size[1], size[0], 3)
    different = (after != np.asarray(crop)).any(-1)
    assert different.mean() > 0.6
    for edge in (different[0], different[-1], different[:, 0], different[:, -1]):
        assert edge.mean() > 0.3, "the edge was left"
    error = np.abs(after.astype(int) - np.asarray(crop)).mean()
    assert error < 20, "it is another picture"


def test_an_aligned_crop_of_512_px_is_what_the_core_makes_of_it(
    face: Image.Image, run: Run, tmp_path: Path
) -> None:
    crop = face.resize((512, 512))
    crop.save(tmp_path / "in.png")
    assert run(tmp_path / "in.png", tmp_path / "out.png", "--aligned") == 0
    given = ["restore", "in", "out", "--model", "builtin", "--device", "cpu"]
    networks = job.networks(resolve(parser().parse_args(given)))
    pixels = torch.from_numpy(np.asarray(crop).copy()).float()[None] / 255
    with torch.inference_mode():
        truth = networks._restored(pixels, None).pictures[0]
    after = np.asarray(Image.open(tmp_path / "out.png")).astype(float) / 255
    assert np.abs(after - truth.numpy()).max() <= 0.5 / 255 + 1e-6


def test_aligned_takes_strength_keep_alpha_grey_and_animations(
    face: Image.Image, run: Run, tmp_path: Path
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    small = face.resize((96, 96))
    see_through = small.convert("RGBA")
    see_through.putalpha(77)
    see_through.save(source / "alpha.png")
    small.convert("L").save(source / "grey.png")
    small.save(source / "moving.gif", save_all=True, append_images=[small.rotate(3)], duration=90)
    keep = Image.new("L", (96, 96))
    keep.paste(255, (0, 0, 96, 30))
    keep.save(tmp_path / "keep.png")
    options = ("--aligned", "--keep", tmp_path / "keep.png", "--report", tmp_path / "r.json")
    assert run(source, tmp_path / "out", *options) == 0
    assert chosen(tmp_path / "r.json", "moving.gif") == [0, 1]
    before, after = rgba(source / "alpha.png"), rgba(tmp_path / "out" / "alpha.png")
    assert (after[..., 3] == 77).all()
    assert np.array_equal(after[:29], before[:29])
    assert (after[40:] != before[40:]).any(-1).mean() > 0.5
    with Image.open(tmp_path / "out" / "grey.png") as image:
        assert image.mode == "L"
    options = ("--aligned", "--strength", "0")
    assert run(source / "grey.png", tmp_path / "same.png", *options) == 0
    assert (tmp_path / "same.png").read_bytes() == (source / "grey.png").read_bytes()


def test_a_name_that_no_disk_takes_is_told(
    face: Image.Image, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    face.save(tmp_path / "a.png")
    assert run(tmp_path / "a.png", tmp_path / f"{'n' * 300}.png") == cli.UNUSABLE
    assert "name another" in caplog.text


def test_a_torn_animation_is_told_and_not_taken_for_a_picture(
    face: Image.Image, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    frames = [face, face.transpose(Image.Transpose.FLIP_LEFT_RIGHT), face.rotate(5)]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    assert run(tmp_path / "a.png", tmp_path / "out.png") == 1
    assert "cannot be read as an animation" in caplog.text
    assert not (tmp_path / "out.png").exists()


def test_a_camera_s_raw_file_is_skipped_and_not_taken_for_its_preview(
    face: Image.Image, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    face.save(tmp_path / "in" / "a.png")
    face.save(tmp_path / "in" / "raw.dng", "TIFF")
    assert run(tmp_path / "in", tmp_path / "out") == cli.OK
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.png"]


def test_transparency_of_an_animated_png_in_rgb_stays(
    nobody: Image.Image, run: Run, tmp_path: Path
) -> None:
    frames = []
    for shade in (10, 20):
        frame = nobody.copy()
        frame.paste((0, 0, 0), (0, 0, 20, 20))
        frame.paste((shade, 0, 0), (30, 30, 40, 40))
        frames.append(frame)
    frames[0].save(
        tmp_path / "a.png", save_all=True, append_images=frames[1:], transparency=(0, 0, 0)
    )
    assert run(tmp_path / "a.png", tmp_path / "out.webp") == cli.OK
    with Image.open(tmp_path / "out.webp") as image:
        assert image.n_frames == 2
        assert image.convert("RGBA").getpixel((5, 5))[3] == 0
