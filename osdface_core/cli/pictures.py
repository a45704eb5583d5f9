"""Reads and writes pictures, keeping everything but what was restored.

Whatever Pillow reads and writes is done, HEIC where pillow-heif is installed. Pillow cannot hold
16-bit colour, which imagecodecs (libpng) and tifffile do.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageCms, PngImagePlugin
from torch import Tensor

from ..errors import OSDFaceError
from ..pictures.color import LUMA
from . import frames, jpeg, tiff

try:
    pillow_heif: Any = importlib.import_module("pillow_heif")
    pillow_heif.register_heif_opener()
except ImportError:
    pillow_heif = None

Image.init()
JPEG, TIFF = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), (".tif", ".tiff")
HEIF, CODESTREAM = (".heic", ".heif", ".hif", ".heics"), (".j2k", ".j2c", ".jpc")
# Handlers that Pillow names but does not bring.
_NO_HANDLERS = ("BUFR", "GRIB", "HDF5", "WMF")
# The format of each extension, as Pillow names it; it writes some of them only.
FORMATS = {
    **{
        extension: name
        for extension, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in _NO_HANDLERS
    },
    ".mpo": "JPEG",
    **dict.fromkeys(HEIF, "HEIF"),
}
WRITTEN = tuple(
    extension for extension, name in FORMATS.items() if name in Image.SAVE or name == "HEIF"
)
EXTENSIONS = tuple(FORMATS)
WITH_ALPHA = {
    *("PNG", "TIFF", "WEBP", "AVIF", "HEIF", "GIF", "JPEG2000", "DDS", "ICNS", "ICO", "IM"),
    *("QOI", "SGI", "TGA", "BLP"),
}
# Modes in which Pillow may write a picture where its own is not known to a format.
_OTHER_MODES = {
    "L": ("RGB", "P", "F", "1"),
    "LA": ("RGBA", "PA", "P"),
    "RGB": ("RGBA", "P", "L", "F", "1"),
    "RGBA": ("PA", "P"),
    "CMYK": ("RGB",),
}
# Bytes that a pixel takes while a picture is searched and restored, measured at 180 megapixels.
BYTES_A_PIXEL = 50

ORIENTATION, X_RESOLUTION, XMP_TAG, ICC_TAG = 274, 282, 700, 34675
# A TIFF's photometric interpretations, and its value for channels stored apart.
MIN_IS_WHITE, MIN_IS_BLACK, RGB, SEPARATE = 0, 1, 2, 2
# EXIF's orientations 1..8: quarter turns counterclockwise that set it upright, then whether to
# mirror.
_UPRIGHT = {
    1: (0, False),
    2: (0, True),
    3: (2, False),
    4: (2, True),
    5: (3, True),
    6: (3, False),
    7: (1, True),
    8: (1, False),
}
_XMP_ORIENTATION = re.compile(rb'(tiff:Orientation(?:="|>))[2-8]')
_EXIF_HEADER = b"Exif\0\0"
# A PNG's chunks that stay true when the pixels change.
PNG_KEPT = (
    b"iCCP",
    b"sRGB",
    b"gAMA",
    b"cHRM",
    b"cICP",
    b"mDCV",
    b"cLLI",
    b"pHYs",
    b"eXIf",
    b"tEXt",
    b"zTXt",
    b"iTXt",
    b"tIME",
)
# A TIFF's tags that do not depend on how its pixels are stored: description, maker, model,
# software, date, artist, host, XMP, IPTC, copyright, the names of document and page, Photoshop's.
_TIFF_KEPT = (269, 270, 271, 272, 285, 305, 306, 315, 316, XMP_TAG, 33723, 33432, 34377)
_TIFF_BLOCKS = (34665, 34853)  # pointers to the blocks of EXIF and GPS


@dataclass(frozen=True)
class Picture:
    """A picture, upright.

    path: the file.
    pixels: (H,W,C) fp32 in [0,1]; C is 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha).
    depth: bits a channel of the file, 8 or 16.
    icc, exif, xmp: as in the file, but for the orientation, which is 1.
    dpi: across and down.
    cmyk: the ink (H,W,4) of a CMYK picture.
    chunks: of a PNG, those kept beside its pixels.
    tags: of a 16-bit TIFF, likewise.
    format: the file's, as Pillow names it.
    beside: of a JPEG, its notes and what stands behind it.
    page: of a TIFF, which page of several it is.
    values: (H,W) of a grey picture in other units than 8 or 16 bits, those that are 0 and 1 in
        `pixels` in `span`.
    span: see `values`.
    info: what a format says of itself and its writer asks for.
    """

    path: Path
    pixels: Tensor
    depth: int = 8
    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    cmyk: np.ndarray | None = None
    chunks: tuple[tuple[bytes, bytes], ...] = ()
    tags: tuple[tuple[int, object, int, object, bool], ...] = ()
    format: str = ""
    beside: jpeg.Beside | None = None
    page: int | None = None
    values: np.ndarray | None = None
    span: tuple[float, float] = (0.0, 1.0)
    info: tuple[tuple[str, object], ...] = ()

    @property
    def has_alpha(self) -> bool:
        return self.pixels.shape[2] in (2, 4)


def read(path: Path) -> Picture:
    """Reads a picture; of several in a file the main one, of an animation the first.

    Raises OSDFaceError for a file that is damaged, too large, or of an unusable kind.
    """
    try:
        with path.open("rb") as file:
            start = file.read(25)
        _check_heif(path, start)
        deep = _read_tiff(path) if start.startswith((b"II", b"MM")) else None
        if deep is not None:
            return deep
        with opened(path) as image:
            page = _main_page(image)
            check_size(path, image.size)
            return _read(path, image, page, start[24:] == b"\x10" and image.format == "PNG")
    except OSDFaceError:
        raise
    except MemoryError as error:
        raise OSDFaceError(f"{path} is too large for this machine's memory: shrink it.") from error
    except (
        Exception
    ) as error:  # each of Pillow's readers, libpng and tifffile raises its own errors
        says = " ".join(str(error).split()) or type(error).__name__
        raise OSDFaceError(
            f"{path} cannot be read as a picture ({says}): it is damaged or of another kind."
        ) from error


class _Limits:
    """Pillow's limits and Python's warnings, one for all threads: off while any has a file open."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.before: tuple[int | None, int] = (None, 0)
        self.quiet = warnings.catch_warnings()

    def lift(self) -> None:
        with self.lock:
            if not self.users:
                self.before = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK
                Image.MAX_IMAGE_PIXELS = None
                PngImagePlugin.MAX_TEXT_CHUNK = 64 * self.before[1]
                self.quiet = warnings.catch_warnings()
                self.quiet.__enter__()
                # What is odd in a file but can be read is no news to its owner.
                warnings.simplefilter("ignore")
            self.users += 1

    def back(self) -> None:
        """The last one that had a file open leaves them as the first one found them."""
        with self.lock:
            self.users -= 1
            if not self.users:
                self.quiet.__exit__(None, None, None)
                Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = self.before


_limits = _Limits()


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """A context with a file opened by Pillow, whatever its size: the user has named it."""
    _limits.lift()
    try:
        with Image.open(path) as image:
            yield image
    finally:
        _limits.back()


def is_picture(path: Path) -> bool:
    """Whether Pillow knows the file by what it holds, whatever its name."""
    try:
        with opened(path) as image:
            # Under an ending of its own a TIFF is a camera's raw file: Pillow sees a preview.
            is_raw = image.format == "TIFF" and path.suffix != ""
            return image.format not in _NO_HANDLERS and not is_raw
    except Exception:  # each of Pillow's readers raises its own errors
        return False


def _check_heif(path: Path, start: bytes) -> None:
    brand = start[8:12] if start[4:8] == b"ftyp" else b""
    if brand in (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1") and (
        pillow_heif is None and (brand[:1] == b"h" or path.suffix.lower() in HEIF)
    ):
        raise OSDFaceError(
            f"{path} is a HEIC picture, for which the package pillow-heif is missing: run pip "
            "install pillow-heif."
        )


def check_size(path: Path, size: tuple[int, int]) -> None:
    """Raises OSDFaceError for a picture that this machine cannot hold. size: width and height."""
    memory = _free_memory()
    needed = size[0] * size[1] * BYTES_A_PIXEL
    if memory is not None and needed > memory:
        raise OSDFaceError(
            f"{path} is too large: {size[0]} x {size[1]} px take about {needed / 2**30:,.1f} GiB "
            f"while they are searched, and {memory / 2**30:,.1f} are free here: shrink it."
        )


def _free_memory() -> int | None:
    """Bytes that may be taken; None where the system does not tell."""
    try:
        told = Path("/proc/meminfo").read_text(encoding="ascii")
        return int(told.split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _main_page(image: Image.Image) -> int | None:
    """Goes to the largest page of a TIFF that holds several; its number, or None."""
    if image.format != "TIFF":
        return None
    sizes: list[int] = []
    # Pillow does not know every kind of page; those from the first such one on stay as they are.
    with suppress(EOFError, SyntaxError):
        while True:
            image.seek(len(sizes))
            sizes.append(image.size[0] * image.size[1])
    page = sizes.index(max(sizes))
    image.seek(page)
    return page


def _read(path: Path, image: Image.Image, page: int | None, deep: bool) -> Picture:
    image.load()  # Pillow turns a TIFF upright here
    exif = image.getexif()
    turn = _UPRIGHT.get(exif.get(ORIENTATION, 1), _UPRIGHT[1])
    cmyk = _upright(np.asarray(image), turn) if image.mode == "CMYK" else None
    values, span, depth = None, (0.0, 1.0), 8
    if deep:
        import imagecodecs

        array, depth = imagecodecs.png_decode(path.read_bytes()), 16
    elif image.mode in ("I", "F") or image.mode.startswith("I;"):
        values = _upright(np.asarray(image.convert(image.mode[:1])), turn)
        span, depth = _span(values, image.mode), 16
        finite = np.nan_to_num((values - span[0]) / (span[1] - span[0]), posinf=1, neginf=0)
        array = np.clip(finite, 0, 1).astype(np.float32)
        turn = _UPRIGHT[1]
    else:
        array = np.asarray(_to_rgb(image))
    raw = image.info.get("exif")
    if image.format == "TIFF":
        for tag in set(exif) - {*_TIFF_KEPT, *_TIFF_BLOCKS}:
            del exif[tag]
        raw = _classic(exif).tobytes()
    xmp = image.info.get("xmp")
    if isinstance(raw, str):
        raw = raw.encode("latin-1", "ignore")
    is_jpeg = image.format in ("JPEG", "MPO")
    return Picture(
        path,
        _tensor(array, turn),
        depth,
        image.info.get("icc_profile"),
        _upright_exif(raw) if raw else None,
        _upright_xmp(xmp.encode() if isinstance(xmp, str) else xmp) if xmp else None,
        _dpi(image.info.get("dpi")),
        cmyk,
        tuple(_upright_chunks(path.read_bytes())) if image.format == "PNG" else (),
        format="JPEG" if is_jpeg else image.format or "",
        beside=jpeg.beside(path.read_bytes(), _upright_exif, _upright_xmp) if is_jpeg else None,
        page=page,
        values=values,
        span=span,
        info=tuple(
            (name, image.info[name])
            for name in ("sizes", "compression", "comment")
            if name in image.info
        ),
    )


def _classic(exif: Image.Exif) -> Image.Exif:
    """The same; of a BigTIFF, whose blocks Pillow does not read again, as of a plain one."""
    if not exif.bigtiff:
        return exif
    plain = Image.Exif()
    for tag, value in exif.items():
        plain[tag] = dict(exif.get_ifd(tag)) if tag in _TIFF_BLOCKS else value
    return plain


def _dpi(given: object) -> tuple[float, float] | None:
    try:
        across, down = (float(one) for one in given)  # type: ignore[attr-defined]
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return (across, down) if 0 < across < 1e6 and 0 < down < 1e6 else None


def _span(values: np.ndarray, mode: str) -> tuple[float, float]:
    """The values that are black and white: of a known range, or the lowest and highest."""
    if mode.startswith("I;"):
        return 0.0, 65535.0
    known = values[np.isfinite(values)]
    lowest, highest = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    for top in (1.0, 255.0, 65535.0)[values.dtype.kind != "f" :]:
        if lowest >= 0 and highest <= top:
            return 0.0, top
    return lowest, highest if highest > lowest else lowest + 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """The picture as grey or RGB, with alpha where it has any."""
    if image.mode == "CMYK":
        return _cmyk_to_rgb(image, image.info.get("icc_profile"))
    if image.mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(
            image, lab, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )  # type: ignore[return-value]
    grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        return image.convert("LA" if grey else "RGBA")
    return image.convert("L" if grey else "RGB")


def _cmyk_to_rgb(image: Image.Image, icc: bytes | None) -> Image.Image:
    if icc:
        with suppress(ImageCms.PyCMSError):
            return ImageCms.profileToProfile(
                image, io.BytesIO(icc), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )  # type: ignore[return-value]
    return image.convert("RGB")


def _rgb_to_cmyk(image: Image.Image, icc: bytes | None) -> Image.Image:
    if icc:
        with suppress(ImageCms.PyCMSError):
            return ImageCms.profileToProfile(
                image, ImageCms.createProfile("sRGB"), io.BytesIO(icc), outputMode="CMYK"
            )  # type: ignore[return-value]
    return image.convert("CMYK")


def _read_tiff(path: Path) -> Picture | None:
    """A TIFF of 16 bits a channel, of which Pillow reads only grey; None for any other TIFF."""
    import tifffile

    try:
        file = tifffile.TiffFile(path)
        pages: list[Any] = list(file.pages)
        sizes = [one.imagewidth * one.imagelength for one in pages]
    except Exception:  # Pillow may yet read it
        return None
    with file:
        number = sizes.index(max(sizes))
        page = pages[number]
        known = (MIN_IS_WHITE, MIN_IS_BLACK, RGB)
        if page.bitspersample != 16 or page.photometric not in known:
            return None
        if page.dtype != np.uint16 or page.samplesperpixel not in (1, 2, 3, 4):
            return None
        check_size(path, (page.imagewidth, page.imagelength))
        array = page.asarray()
        if page.planarconfig == SEPARATE and array.ndim == 3:
            array = np.moveaxis(array, 0, -1)
        if page.photometric == MIN_IS_WHITE:
            array = 65535 - array
        tags = {code: page.tags[code] for code in _TIFF_KEPT if code in page.tags}
        turn = _UPRIGHT.get(page.tags.valueof(ORIENTATION, 1), _UPRIGHT[1])
        resolution = page.get_resolution("INCH") if X_RESOLUTION in page.tags else None
        return Picture(
            path,
            _tensor(array, turn),
            16,
            page.tags.valueof(ICC_TAG),
            dpi=resolution,
            tags=tuple(
                (
                    code,
                    tag.dtype,
                    tag.count,
                    _upright_xmp(tag.value) if code == XMP_TAG else tag.value,
                    True,
                )
                for code, tag in tags.items()
            ),
            format="TIFF",
            page=number,
        )


def _tensor(array: np.ndarray, turn: tuple[int, bool]) -> Tensor:
    array = _upright(array if array.ndim == 3 else array[..., None], turn)
    if array.dtype == np.float32:
        return torch.from_numpy(array)
    return torch.from_numpy(array.astype(np.float32)).div_(np.iinfo(array.dtype).max)


def _upright(array: np.ndarray, turn: tuple[int, bool]) -> np.ndarray:
    turns, mirrored = turn
    array = np.rot90(array, turns)
    return np.ascontiguousarray(array[:, ::-1] if mirrored else array)


def _upright_xmp(xmp: bytes) -> bytes:
    return _XMP_ORIENTATION.sub(rb"\g<1>1", xmp)


def _upright_exif(exif: bytes) -> bytes:
    """The same bytes, maker's notes, thumbnail and all, with an orientation of 1."""
    start = len(_EXIF_HEADER) if exif.startswith(_EXIF_HEADER) else 0
    patched = bytearray(exif)
    order = {b"II": "<", b"MM": ">"}.get(bytes(exif[start : start + 2]))
    if order:
        with suppress(struct.error):
            (first,) = struct.unpack_from(order + "I", exif, start + 4)
            (count,) = struct.unpack_from(order + "H", exif, start + first)
            for entry in range(start + first + 2, start + first + 2 + 12 * count, 12):
                if struct.unpack_from(order + "H", exif, entry) == (ORIENTATION,):
                    struct.pack_into(order + "HI", patched, entry + 2, 3, 1)
                    struct.pack_into(order + "HH", patched, entry + 8, 1, 0)
    return bytes(patched)


def _upright_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    for kind, content in frames.png_chunks(data):
        if kind in PNG_KEPT:
            yield kind, {b"eXIf": _upright_exif, b"iTXt": _upright_xmp}.get(kind, bytes)(content)


def read_mask(path: Path) -> Tensor:
    """A picture as a mask (1,H,W) in [0,1]; white is 1."""
    pixels = read(path).pixels
    return (
        pixels[..., :1]
        if pixels.shape[2] < 3
        else pixels[..., :3] @ pixels.new_tensor(LUMA)[:, None]
    )[None, ..., 0]


def _format(picture: Picture, kind: str) -> str | None:
    """The format in which a picture goes into a file with the extension `kind`; None for none.

    One that the extension does not tell, or that could not hold the picture, is the picture's own.
    """
    name = FORMATS.get(kind) if kind in WRITTEN else None
    fits = name is not None and (name in WITH_ALPHA or not picture.has_alpha)
    if not fits and kind == picture.path.suffix.lower() and picture.format in FORMATS.values():
        own = next((e for e, one in FORMATS.items() if one == picture.format), "")
        return picture.format if own in WRITTEN else name
    return name


def check_target(picture: Picture, path: Path) -> None:
    """Raises OSDFaceError if a file of that name cannot hold the picture."""
    kind = path.suffix.lower()
    name = _format(picture, kind)
    if name is None and (kind in FORMATS or kind == picture.path.suffix.lower()):
        raise OSDFaceError(
            f"{path.name} cannot be written, for {kind or picture.format} is a kind that is only "
            "read: name a .png, .tif or .jpg as the output."
        )
    if name is None:
        raise OSDFaceError(
            f"{path} has no extension of a picture; one of {', '.join(WRITTEN)} is wanted."
        )
    if name == "HEIF" and pillow_heif is None:
        raise OSDFaceError(
            f"{path.name} is HEIC, for which the package pillow-heif is missing: run pip install "
            "pillow-heif."
        )
    if picture.has_alpha and name not in WITH_ALPHA:
        raise OSDFaceError(
            f"{path.name} cannot hold the transparency of {picture.path.name}: name a .png, .webp "
            "or .tif as the output."
        )


def write(
    picture: Picture,
    pixels: Tensor,
    mask: Tensor,
    path: Path,
    kind: str,
    quality: int = 95,
) -> None:
    """Writes the restored picture to `path`, lossless but for JPEG, AVIF, HEIC and palettes.

    picture: as it was read.
    pixels: (H,W,C) in [0,1], as restored.
    mask: (H,W), 0 where nothing was changed.
    path: the file.
    kind: the extension that names the format.
    quality: of JPEG, AVIF and HEIC, 1..100.
    """
    name = _format(picture, kind)
    in_its_units = picture.values is not None and name == picture.format and name != "PNG"
    if in_its_units and _write_values(picture, pixels, mask, path, name or ""):
        return
    depth = picture.depth if name in ("PNG", "TIFF") else 8
    array = _whole_numbers(pixels, depth)
    array = array[..., 0] if array.shape[2] == 1 else array
    icc = picture.icc if picture.cmyk is None else None
    if name == "PNG":
        path.write_bytes(_png(array, picture, icc))
    elif depth == 16:
        _write_tiff(path, array, picture)
        _put_pages(path, picture)
    elif name == "GIF":
        _write_gif(path, picture, array, mask)
    else:
        image = Image.fromarray(array)
        # Of a picture that was enlarged no ink is left.
        is_ink = picture.cmyk is not None and picture.cmyk.shape[:2] == array.shape[:2]
        if picture.cmyk is not None and is_ink and name in ("JPEG", "TIFF"):
            ink = np.where(
                (mask > 0).numpy()[..., None],
                np.asarray(_rgb_to_cmyk(image, picture.icc)),
                picture.cmyk,
            )
            image, icc = Image.fromarray(ink, "CMYK"), picture.icc
        options: dict[str, object] = {
            "icc_profile": icc,
            "exif": picture.exif,
            "dpi": picture.dpi,
            "xmp": picture.xmp,
        }
        options = {name: value for name, value in options.items() if value}
        if name == "JPEG" and picture.beside:
            whole = io.BytesIO()
            dpi: dict[str, Any] = {"dpi": picture.dpi} if picture.dpi else {}
            image.save(whole, "JPEG", quality=quality, subsampling=0, optimize=True, **dpi)
            path.write_bytes(jpeg.put_beside(whole.getvalue(), picture.beside, bool(icc)))
        elif name == "JPEG":
            image.save(path, "JPEG", quality=quality, subsampling=0, optimize=True, **options)
        elif name == "WEBP":
            image.save(path, "WEBP", lossless=True, exact=True, **options)
        elif name == "BMP":
            image.save(path, "BMP", dpi=picture.dpi or (96, 96))
        elif name != "TIFF":
            _write_other(image, path, kind, name or "", picture, options, quality)
        else:
            options.pop("xmp", None)
            if picture.exif:
                options["exif"] = exif = Image.Exif()
                exif.load(picture.exif)
            # Pillow writes EXIF's blocks only into an uncompressed TIFF.
            plain = picture.exif and any(block in exif for block in _TIFF_BLOCKS)
            image.save(path, "TIFF", compression=None if plain else "tiff_lzw", **options)
            _put_pages(path, picture)


def _whole_numbers(pixels: Tensor, depth: int) -> np.ndarray:
    """Values in [0,1] as numbers of so many bits, by strips, for a scan's take much memory."""
    most = 2**depth - 1
    array = np.empty(pixels.shape, np.uint16 if depth == 16 else np.uint8)
    for start in range(0, len(array), 256):
        strip = (pixels[start : start + 256].numpy() * most).round().clip(0, most)
        array[start : start + 256] = strip
    return array


def _put_pages(path: Path, picture: Picture) -> None:
    """Puts the TIFF `path` among the pages of the TIFF that the picture was read from."""
    if picture.page is None or picture.format != "TIFF":
        return
    data = picture.path.read_bytes()
    try:
        if not tiff.count_beside(data):
            return
        whole = tiff.replace_page(data, picture.page, path.read_bytes())
    except (struct.error, IndexError, RecursionError) as error:
        raise OSDFaceError(
            f"{picture.path} holds further pages that cannot be kept ({error}): take it apart."
        ) from error
    path.write_bytes(whole)


def _write_values(picture: Picture, pixels: Tensor, mask: Tensor, path: Path, name: str) -> bool:
    """Writes a grey picture in its own units; whether that could be done."""
    values, (low, high) = picture.values, picture.span
    if values is None or pixels.shape[:2] != values.shape:
        return False
    fresh = pixels[..., 0].numpy().astype(np.float64) * (high - low) + low
    fresh = fresh.round() if values.dtype.kind != "f" else fresh
    changed = np.where((mask > 0).numpy(), fresh, values).astype(values.dtype)
    if name == "TIFF":
        _write_tiff(path, changed, picture)
        _put_pages(path, picture)
        return True
    for one in (changed, changed.clip(0, 65535).astype(np.uint16)):
        try:
            Image.fromarray(one).save(path, name)
            return True
        except (OSError, KeyError, ValueError):
            continue
    return False


def _write_other(
    image: Image.Image,
    path: Path,
    kind: str,
    name: str,
    picture: Picture,
    options: dict[str, Any],
    quality: int,
) -> None:
    """Writes by Pillow what has no way of its own, in the first mode that the format knows."""
    info = dict(picture.info)
    if name in ("AVIF", "HEIF"):
        finest = {"subsampling": "4:4:4"} if name == "AVIF" else {"chroma": 444}
        options = {**{k: v for k, v in options.items() if k != "dpi"}, "quality": quality, **finest}
        if name == picture.format == "HEIF":
            options |= {"save_all": True, "append_images": _other_pictures(picture.path)}
    elif name == "JPEG2000":
        options = {"no_jp2": kind in CODESTREAM}
    elif name == "TGA" and info.get("compression"):
        options = {"compression": info["compression"]}
    elif name in ("ICO", "ICNS"):
        options = {"sizes": info["sizes"]} if name == "ICO" and info.get("sizes") else {}
    else:
        options = {}
    why = ""
    for mode in (image.mode, *_OTHER_MODES.get(image.mode, ())):
        try:
            as_mode = image if mode == image.mode else _in_mode(image, mode)
            as_mode.save(path, name, **options)
        except (OSError, KeyError, ValueError) as error:
            why = why or str(error)
            continue
        if name == "JPEG2000" and picture.icc and not options["no_jp2"] and mode != "CMYK":
            path.write_bytes(_with_profile(path.read_bytes(), picture.icc))
        return
    raise OSDFaceError(
        f"{path.name} cannot be written as {name} ({why}): name a .png, .tif or .jpg as the output."
    )


def _other_pictures(path: Path) -> list[Image.Image]:
    """The pictures of a HEIC file beside the main one."""
    with opened(path) as image:
        main, others = image.tell(), []
        for number in range(getattr(image, "n_frames", 1)):
            if number != main:
                image.seek(number)
                others.append(image.copy())
    return others


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    if mode == "P":
        return image.quantize(256) if image.mode != "LA" else image.convert("RGBA").quantize(256)
    return image.convert(mode)


def _with_profile(data: bytes, icc: bytes) -> bytes:
    """A JP2 file with this colour profile in place of the name of a colour space."""
    start = data.find(b"colr")
    header = data.find(b"jp2h")
    if header < 4 or start < header:
        return data
    (length,) = struct.unpack_from(">I", data, start - 4)
    box = struct.pack(">I", 11 + len(icc)) + b"colr\x02\0\0" + icc
    (whole,) = struct.unpack_from(">I", data, header - 4)
    longer = struct.pack(">I", whole + len(box) - length)
    return data[: header - 4] + longer + data[header : start - 4] + box + data[start - 4 + length :]


def _write_gif(path: Path, picture: Picture, array: np.ndarray, mask: Tensor) -> None:
    image = Image.fromarray(array).convert("RGBA")
    comment = dict(picture.info).get("comment")
    around = frames.Around(
        [Fraction(0)], 1, comment=comment if isinstance(comment, bytes) else None
    )
    frames.write_gif(path, iter([(np.asarray(image), (mask > 0).numpy())]), around)


def _png(array: np.ndarray, picture: Picture, icc: bytes | None) -> bytes:
    import imagecodecs

    data = bytes(imagecodecs.png_encode(array))
    chunks = list(picture.chunks)
    if not chunks:
        if icc:
            chunks.append((b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc)))
        if picture.exif:
            chunks.append((b"eXIf", picture.exif.removeprefix(_EXIF_HEADER)))
        if picture.xmp:
            chunks.append((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + picture.xmp))
    added = b"".join(frames.png_chunk(kind, content) for kind, content in chunks)
    header = len(frames.PNG_HEADER) + 12 + 13
    return data[:header] + added + data[header:]


def _write_tiff(path: Path, array: np.ndarray, picture: Picture) -> None:
    import tifffile

    channels = 1 if array.ndim == 2 else array.shape[2]
    # Among the pages of another file its order of bytes holds.
    order: Literal["<", ">"] = "<"
    if picture.page is not None and picture.path.read_bytes()[:2] == b"MM":
        order = ">"
    with tifffile.TiffWriter(path, byteorder=order) as file:
        file.write(
            array,
            photometric="rgb" if channels > 2 else "minisblack",
            planarconfig="contig" if channels > 1 else None,
            extrasamples=["unassalpha"] if channels in (2, 4) else None,
            compression="zlib",
            predictor=True,
            iccprofile=picture.icc,
            resolution=picture.dpi,
            resolutionunit="INCH" if picture.dpi else None,
            extratags=picture.tags,
            metadata=None,
            software=False,
        )


def replace_file(path: Path, fill: Callable[[Path], None]) -> None:
    """Makes the file `path`, whole or not at all, by `fill`, which writes a temporary file.

    Its name is short, for a file's own may be as long as the system allows.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    short = hashlib.blake2b(os.fsencode(path.name), digest_size=6).hexdigest()
    suffix = path.suffix if len(os.fsencode(path.suffix)) <= 16 else ""
    fresh = path.with_name(f".{short}.partial{suffix}")
    try:
        fill(fresh)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
