"""Reads and writes pictures, keeping everything but what was restored.

Pillow reads and writes what has 8 bits a channel. It cannot hold 16-bit colour, which imagecodecs
(libpng) and tifffile do.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms
from torch import Tensor

from ..errors import OSDFaceError
from ..pictures.color import LUMA

EXTENSIONS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".tif", ".tiff", ".bmp")
JPEG, TIFF = (".jpg", ".jpeg", ".jpe", ".jfif"), (".tif", ".tiff")

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
_PNG_HEADER = b"\x89PNG\r\n\x1a\n"
# A PNG's chunks that stay true when the pixels change.
_PNG_KEPT = (
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
# software, date, artist, host, XMP, IPTC, copyright.
_TIFF_KEPT = (270, 271, 272, 305, 306, 315, 316, XMP_TAG, 33723, 33432)
_TIFF_BLOCKS = (34665, 34853)  # pointers to the blocks of EXIF and GPS


@dataclass(frozen=True)
class Picture:
    """A picture, upright.

    path: the file.
    pixels: (H,W,C) fp32 in [0,1]; C is 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha).
    depth: bits a channel of the file, 8 or 16.
    turned: whether the file's orientation is not upright.
    icc, exif, xmp: as in the file, but for the orientation, which is 1.
    dpi: across and down.
    cmyk: the ink (H,W,4) of a CMYK picture.
    chunks: of a PNG, those kept beside its pixels.
    tags: of a 16-bit TIFF, likewise.
    """

    path: Path
    pixels: Tensor
    depth: int = 8
    turned: bool = False
    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    cmyk: np.ndarray | None = None
    chunks: tuple[tuple[bytes, bytes], ...] = ()
    tags: tuple[tuple[int, object, int, object, bool], ...] = ()

    @property
    def has_alpha(self) -> bool:
        return self.pixels.shape[2] in (2, 4)


def read(path: Path) -> Picture:
    """Reads a picture. Raises OSDFaceError for a file that is damaged or of an unusable kind."""
    try:
        with path.open("rb") as file:
            start = file.read(25)
        deep = _read_tiff(path) if start.startswith((b"II", b"MM")) else None
        if deep is not None:
            return deep
        with Image.open(path) as image:
            return _read(path, image, start[24:] == b"\x10" and image.format == "PNG")
    except OSDFaceError:
        raise
    except (
        Exception
    ) as error:  # each of Pillow's readers, libpng and tifffile raises its own errors
        says = " ".join(str(error).split()) or type(error).__name__
        raise OSDFaceError(
            f"{path} cannot be read as a picture ({says}): it is damaged or of another kind."
        ) from error


def _read(path: Path, image: Image.Image, deep: bool) -> Picture:
    _check_single(path, getattr(image, "n_frames", 1))
    given = image.getexif().get(ORIENTATION, 1)
    image.load()  # Pillow turns a TIFF upright here
    exif = image.getexif()
    turn = _UPRIGHT.get(exif.get(ORIENTATION, 1), _UPRIGHT[1])
    cmyk = _upright(np.asarray(image), turn) if image.mode == "CMYK" else None
    if deep:
        import imagecodecs

        array = imagecodecs.png_decode(path.read_bytes())
    elif image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise OSDFaceError(
            f"{path} has values of {image.mode!r}; 8 or 16 bits a channel are wanted, and 16 in "
            "PNG or TIFF: convert it."
        )
    else:
        array = np.asarray(_to_rgb(image))
    raw = image.info.get("exif")
    if image.format == "TIFF":
        for tag in set(exif) - {*_TIFF_KEPT, *_TIFF_BLOCKS}:
            del exif[tag]
        raw = exif.tobytes()
    xmp = image.info.get("xmp")
    return Picture(
        path,
        _tensor(array, turn),
        16 if deep else 8,
        given in _UPRIGHT and given != 1,
        image.info.get("icc_profile"),
        _upright_exif(raw) if raw else None,
        _upright_xmp(xmp.encode() if isinstance(xmp, str) else xmp) if xmp else None,
        image.info.get("dpi"),
        cmyk,
        tuple(_upright_chunks(path.read_bytes())) if image.format == "PNG" else (),
    )


def _check_single(path: Path, count: int) -> None:
    if count > 1:
        raise OSDFaceError(
            f"{path} holds {count} pictures; single pictures and videos are wanted: take it apart."
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    """The picture as grey or RGB, with alpha where it has any."""
    if image.mode == "CMYK":
        return _cmyk_to_rgb(image, image.info.get("icc_profile"))
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

    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        if page.bitspersample != 16:
            return None
        _check_single(path, len(file.pages))
        array = page.asarray()
        if array.dtype != np.uint16 or page.photometric not in (MIN_IS_WHITE, MIN_IS_BLACK, RGB):
            raise OSDFaceError(
                f"{path} has 16 bits a channel but is not plain grey or RGB; that is wanted: "
                "convert it."
            )
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
            turn != _UPRIGHT[1],
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
        )


def _tensor(array: np.ndarray, turn: tuple[int, bool]) -> Tensor:
    array = _upright(array if array.ndim == 3 else array[..., None], turn)
    return torch.from_numpy(array.astype(np.float32) / np.iinfo(array.dtype).max)


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
    position = len(_PNG_HEADER)
    while position + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        kind, content = (
            data[position + 4 : position + 8],
            data[position + 8 : position + 8 + length],
        )
        if kind in _PNG_KEPT:
            yield kind, {b"eXIf": _upright_exif, b"iTXt": _upright_xmp}.get(kind, bytes)(content)
        position += 12 + length


def read_mask(path: Path) -> Tensor:
    """A picture as a mask (1,H,W) in [0,1]; white is 1."""
    pixels = read(path).pixels
    return (
        pixels[..., :1]
        if pixels.shape[2] < 3
        else pixels[..., :3] @ pixels.new_tensor(LUMA)[:, None]
    )[None, ..., 0]


def check_target(picture: Picture, path: Path) -> None:
    """Raises OSDFaceError if a file of that name cannot hold the picture."""
    if path.suffix.lower() not in EXTENSIONS:
        raise OSDFaceError(
            f"{path} has no extension of a picture; one of {', '.join(EXTENSIONS)} is wanted."
        )
    if picture.has_alpha and path.suffix.lower() in (*JPEG, ".bmp"):
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
    """Writes the restored picture to `path`. All formats but JPEG are lossless.

    picture: as it was read.
    pixels: (H,W,C) in [0,1], as restored.
    mask: (H,W), 0 where nothing was changed.
    path: the file.
    kind: the extension that names the format.
    quality: of JPEG, 1..100.
    """
    depth = picture.depth if kind in (".png", *TIFF) else 8
    array = (
        (pixels.numpy() * (2**depth - 1))
        .round()
        .clip(0, 2**depth - 1)
        .astype(np.uint16 if depth == 16 else np.uint8)
    )
    array = array[..., 0] if array.shape[2] == 1 else array
    icc = picture.icc if picture.cmyk is None else None
    if kind == ".png":
        path.write_bytes(_png(array, picture, icc))
    elif depth == 16:
        _write_tiff(path, array, picture)
    else:
        image = Image.fromarray(array)
        # Of a picture that was enlarged no ink is left.
        is_ink = picture.cmyk is not None and picture.cmyk.shape[:2] == array.shape[:2]
        if picture.cmyk is not None and is_ink and kind in (*JPEG, *TIFF):
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
        if kind in JPEG:
            image.save(path, "JPEG", quality=quality, subsampling=0, optimize=True, **options)
        elif kind == ".webp":
            image.save(path, "WEBP", lossless=True, exact=True, **options)
        elif kind == ".bmp":
            image.save(path, "BMP", dpi=picture.dpi or (96, 96))
        else:
            options.pop("xmp", None)
            if picture.exif:
                options["exif"] = exif = Image.Exif()
                exif.load(picture.exif)
            # Pillow writes EXIF's blocks only into an uncompressed TIFF.
            plain = picture.exif and any(block in exif for block in _TIFF_BLOCKS)
            image.save(path, "TIFF", compression=None if plain else "tiff_lzw", **options)


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
    added = b"".join(
        struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c))
        for kind, c in chunks
    )
    header = len(_PNG_HEADER) + 12 + 13
    return data[:header] + added + data[header:]


def _write_tiff(path: Path, array: np.ndarray, picture: Picture) -> None:
    import tifffile

    channels = 1 if array.ndim == 2 else array.shape[2]
    with tifffile.TiffWriter(path) as file:
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
    """Makes the file `path`, whole or not at all, by `fill`, which writes a temporary file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        fill(fresh)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
