"""Writes animated pictures: GIF, WebP, APNG and AVIF, each frame by itself and with its own time.

Pillow's own writers join frames that are alike and give a GIF one palette for all, so the files are
put together here, from single pictures that Pillow and libpng encode.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# A frame (H,W,4) uint8, and where it was changed (H,W).
Frame = tuple[np.ndarray, np.ndarray]

# Most pixels and most frames of a window.
WINDOW, MAX_FRAMES = 24 * 1024**2, 64
MAX_COLORS, CLEAR, KEEP = 256, 2, 1
PNG_HEADER = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Around:
    """What an animation has beside its frames.

    times: how long each frame is shown, in seconds.
    plays: how often it is shown; 0 is for ever.
    has_alpha: whether any of it may be transparent.
    still_first: of an APNG, whether the first frame is a picture for those who show no animation.
    icc, exif, xmp, comment: as in the file.
    chunks: of a PNG, those kept beside its pixels.
    """

    times: Sequence[Fraction]
    plays: int = 0
    has_alpha: bool = True
    still_first: bool = False
    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    comment: bytes | None = None
    chunks: tuple[tuple[bytes, bytes], ...] = ()


def windows(frames: Iterable[Any], size: Callable[[Any], int]) -> Iterator[list[Any]]:
    """Frames by as many as are held at once: MAX_FRAMES at most, or WINDOW pixels.

    size: how many pixels a frame has.
    """
    window: list[Any] = []
    for frame in frames:
        window.append(frame)
        if len(window) >= MAX_FRAMES or len(window) * size(frame) >= WINDOW:
            yield window
            window = []
    if window:
        yield window


# GIF


def write_gif(path: Path, frames: Iterator[Frame], around: Around) -> None:
    """Writes a GIF. What was not changed keeps its colours where a frame brings at most 256 new.

    A frame draws what differs from the one before it.
    """
    with path.open("wb") as file:
        current = next(frames, None)
        state = None
        for time in around.times:
            if current is None:
                break
            picture, changed = _visible(current[0]), current[1]
            height, width = picture.shape[:2]
            if state is None:
                state = np.zeros_like(picture)
                _gif_header(file.write, width, height, around)
            following = next(frames, None)
            # What becomes transparent can only be cleared away, all at once.
            clears = following is not None and bool(
                ((picture[..., 3] > 0) & (_visible(following[0])[..., 3] == 0)).any()
            )
            drawn = (picture != state).any(-1)
            rows, columns = (slice(0, height), slice(0, width)) if clears else _box(drawn)
            place = rows, columns
            encoded, clear = _gif_frame(picture[place], drawn[place], changed[place], clears)
            delay = min(65535, round(time * 100))
            flags = (CLEAR if clears else KEEP) << 2 | (clear is not None)
            file.write(struct.pack("<BBBBHBB", 0x21, 0xF9, 4, flags, delay, clear or 0, 0))
            size = columns.stop - columns.start, rows.stop - rows.start
            file.write(struct.pack("<BHHHH", 0x2C, columns.start, rows.start, *size) + encoded)
            state = np.zeros_like(picture) if clears else picture
            current = following
        file.write(b"\x3b")


def _gif_header(write: Callable[[bytes], object], width: int, height: int, around: Around) -> None:
    write(b"GIF89a" + struct.pack("<HHBBB", width, height, 0x70, 0, 0))
    if around.plays != 1:
        loop = max(0, min(65535, around.plays - 1))
        write(b"\x21\xff\x0bNETSCAPE2.0" + struct.pack("<BBHB", 3, 1, loop, 0))
    if around.comment:
        said = around.comment
        blocks = (said[start : start + 255] for start in range(0, len(said), 255))
        write(b"\x21\xfe" + b"".join(bytes([len(one)]) + one for one in blocks) + b"\0")


def _visible(picture: np.ndarray) -> np.ndarray:
    """The picture with pixels that are opaque or nothing at all."""
    seen = picture[..., 3:] >= 128
    return np.where(seen, picture | np.array([0, 0, 0, 255], np.uint8), 0).astype(np.uint8)


def _box(where: np.ndarray) -> tuple[slice, slice]:
    rows, columns = np.flatnonzero(where.any(1)), np.flatnonzero(where.any(0))
    if not len(rows):
        return slice(0, 1), slice(0, 1)
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _gif_frame(
    picture: np.ndarray, drawn: np.ndarray, changed: np.ndarray, clears: bool
) -> tuple[bytes, int | None]:
    """Flags, palette and indices of an image block, and the index that is transparent."""
    # Readers clear to the background's colour where a frame has no transparent index.
    is_whole = bool(drawn.all()) and not clears
    room = MAX_COLORS if is_whole else MAX_COLORS - 1
    packed = picture[..., :3].astype(np.int64) @ np.array([65536, 256, 1])
    exact = np.unique(packed[drawn & ~changed])
    free = drawn & changed
    if len(exact) > room:
        exact, free = exact[:0], drawn
    colors = [(int(one) >> 16, int(one) >> 8 & 255, int(one) & 255) for one in exact]
    if free.any() and len(colors) < room:
        shown = Image.fromarray(np.ascontiguousarray(picture[free][None, :, :3]))
        found = shown.quantize(room - len(colors)).getpalette() or []
        colors += list(zip(*(iter(found),) * 3, strict=False))[: room - len(colors)]
    colors = colors or [(0, 0, 0)]
    indices = np.searchsorted(exact, packed).clip(0, len(colors) - 1)
    if free.any():
        palette = Image.new("P", (1, 1))
        # What is left of the palette repeats a colour of it.
        palette.putpalette([c for one in (colors + colors[:1] * 256)[:256] for c in one])
        near = np.asarray(Image.fromarray(picture[..., :3].copy()).quantize(palette=palette))
        indices[free] = near[free]
    clear = None if is_whole else len(colors)
    if clear is not None:
        indices[~drawn] = clear
    bits = max(1, (len(colors) - is_whole).bit_length())
    table = b"".join(bytes(one) for one in colors).ljust(3 << bits, b"\0")
    return bytes([0x80 | bits - 1]) + table + _lzw(indices.astype(np.uint8)), clear


def _lzw(indices: np.ndarray) -> bytes:
    """The indices as a GIF's image data, with the size of its codes before."""
    image = Image.frombytes("P", indices.shape[::-1], indices.tobytes())
    image.putpalette(bytes(range(256)) * 3)
    whole = io.BytesIO()
    image.save(whole, "GIF", optimize=False, interlace=0, palette=bytes(range(256)) * 3)
    data = whole.getvalue()
    position = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    while data[position] == 0x21:
        position += 2
        while data[position]:
            position += 1 + data[position]
        position += 1
    table = 3 << (data[position + 9] & 7) + 1 if data[position + 9] & 0x80 else 0
    return data[position + 10 + table : data.rindex(b"\x3b")]


# WebP


def write_webp(path: Path, frames: Iterator[Frame], around: Around) -> None:
    """Writes an animated WebP, lossless."""
    with path.open("wb") as file:
        file.write(b"RIFF\0\0\0\0WEBP")
        for i, (picture, _) in enumerate(frames):
            height, width = picture.shape[:2]
            if not i:
                has = {0x20: around.icc, 0x10: around.has_alpha, 8: around.exif, 4: around.xmp}
                flags = 2 | sum(flag for flag, there in has.items() if there)
                file.write(_riff(b"VP8X", bytes([flags, 0, 0, 0]) + _three(width - 1, height - 1)))
                file.write(_riff(b"ICCP", around.icc) if around.icc else b"")
                file.write(_riff(b"ANIM", struct.pack("<IH", 0, min(65535, around.plays))))
            shown = picture if around.has_alpha else picture[..., :3]
            whole = io.BytesIO()
            image = Image.fromarray(np.ascontiguousarray(shown))
            image.save(whole, "WEBP", lossless=True, exact=True)
            milliseconds = round(around.times[i] * 1000)
            # 2: drawn as it is, not blended with the frame before.
            head = _three(0, 0, width - 1, height - 1, min(milliseconds, 2**24 - 1)) + b"\2"
            file.write(_riff(b"ANMF", head + _pixels_of(whole.getvalue())))
        file.write(_riff(b"EXIF", around.exif) if around.exif else b"")
        file.write(_riff(b"XMP ", around.xmp) if around.xmp else b"")
        length = file.tell()
        file.seek(4)
        file.write(struct.pack("<I", length - 8))


def _three(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(3, "little") for number in numbers)


def _riff(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def _pixels_of(data: bytes) -> bytes:
    """The chunks of a single WebP that hold its pixels."""
    kept, position = b"", 12
    while position + 8 <= len(data):
        (length,) = struct.unpack_from("<I", data, position + 4)
        end = position + 8 + length + length % 2
        if data[position : position + 4] in (b"ALPH", b"VP8 ", b"VP8L"):
            kept += data[position:end]
        position = end
    return kept


# PNG


def write_apng(path: Path, frames: Iterator[Frame], around: Around) -> None:
    """Writes an animated PNG, lossless."""
    import imagecodecs

    sequence = 0
    with path.open("wb") as file:
        for i, (picture, _) in enumerate(frames):
            shown = np.ascontiguousarray(picture if around.has_alpha else picture[..., :3])
            chunks = list(png_chunks(bytes(imagecodecs.png_encode(shown))))
            if not i:
                count = len(around.times) - around.still_first
                file.write(PNG_HEADER + png_chunk(b"IHDR", dict(chunks)[b"IHDR"]))
                for kind, content in around.chunks:
                    file.write(png_chunk(kind, content))
                file.write(png_chunk(b"acTL", struct.pack(">II", count, around.plays)))
            if i or not around.still_first:
                time = around.times[i].limit_denominator(65535)
                if time.numerator > 65535:
                    time = Fraction(min(65535, round(time)))
                height, width = picture.shape[:2]
                parts = (sequence, width, height, 0, 0, time.numerator, time.denominator, 0, 0)
                file.write(png_chunk(b"fcTL", struct.pack(">IIIIIHHBB", *parts)))
                sequence += 1
            for kind, content in chunks:
                if kind == b"IDAT" and i:
                    file.write(png_chunk(b"fdAT", struct.pack(">I", sequence) + content))
                    sequence += 1
                elif kind == b"IDAT":
                    file.write(png_chunk(kind, content))
        file.write(png_chunk(b"IEND", b""))


def png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The chunks of a PNG, as kind and content."""
    position = len(PNG_HEADER)
    while position + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        yield data[position + 4 : position + 8], data[position + 8 : position + 8 + length]
        position += 12 + length


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk as a PNG holds it: its length, kind, content and checksum."""
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


# AVIF


def write_avif(path: Path, frames: Iterator[Frame], around: Around, quality: int) -> None:
    """Writes an animated AVIF."""
    images = [
        Image.fromarray(np.ascontiguousarray(picture if around.has_alpha else picture[..., :3]))
        for picture, _ in frames
    ]
    notes = {"icc_profile": around.icc, "exif": around.exif, "xmp": around.xmp}
    images[0].save(
        path,
        "AVIF",
        save_all=True,
        append_images=images[1:],
        duration=[round(time * 1000) for time in around.times],
        quality=quality,
        subsampling="4:4:4",
        **{name: value for name, value in notes.items() if value},
    )
