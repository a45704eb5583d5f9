"""What a JPEG file holds beside its picture: notes of all kinds, and pictures behind the first.

Phones and stereo cameras write further pictures behind the main one, found by offsets in its MPF
segment (CIPA DC-007), and some a film or a gain map. Everything but the main picture is kept.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

SOI, EOI, SOS, COMMENT, APP0, APP1, APP2, APP14, APP15 = (
    0xD8,
    0xD9,
    0xDA,
    0xFE,
    0xE0,
    0xE1,
    0xE2,
    0xEE,
    0xEF,
)
_EXIF, _XMP = b"Exif\0", b"http://ns.adobe.com/x"
_ICC, _MPF = b"ICC_PROFILE\0", b"MPF\0"


@dataclass(frozen=True)
class Beside:
    """What a JPEG file holds beside its picture.

    segments: marker and content of each note.
    behind: everything after the main picture's end.
    length: bytes of the main picture.
    mpf: where in the file the offsets of the MPF segment count from; 0 without one.
    """

    segments: tuple[tuple[int, bytes], ...] = ()
    behind: bytes = b""
    length: int = 0
    mpf: int = 0


def beside(data: bytes, exif: Callable[[bytes], bytes], xmp: Callable[[bytes], bytes]) -> Beside:
    """What the JPEG file `data` holds beside its picture, changed by `exif` and `xmp`."""
    segments, mpf = [], 0
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # a filling byte
            position += 1
            continue
        if marker == SOS:
            break
        (length,) = struct.unpack_from(">H", data, position + 2)
        content = data[position + 4 : position + 2 + length]
        if marker == COMMENT or (APP1 <= marker <= APP15 and marker != APP14):
            if marker == APP1 and content.startswith(_EXIF):
                content = exif(content)
            elif marker == APP1 and content.startswith(_XMP):
                content = xmp(content)
            elif marker == APP2 and content.startswith(_MPF):
                mpf = position + 4 + len(_MPF)
            segments.append((marker, content))
        position += 2 + length
    end = _end(data, position)
    return Beside(tuple(segments), data[end:], end, mpf)


def _end(data: bytes, position: int) -> int:
    """The end of the picture whose scan begins at `position`."""
    while (position := data.find(b"\xff", position)) >= 0 and position + 1 < len(data):
        marker = data[position + 1]
        if marker == EOI:
            return position + 2
        if marker in (0x00, 0xFF) or 0xD0 <= marker <= 0xD7:
            position += 1 if marker == 0xFF else 2
        else:
            position += 2
            if position + 2 <= len(data):
                position += struct.unpack_from(">H", data, position)[0]
    return len(data)


def put_beside(picture: bytes, kept: Beside, with_profile: bool) -> bytes:
    """The JPEG file `picture`, which has no notes, with those of another one.

    with_profile: whether the colour profile is among them.
    """
    start = 2
    if picture[2:4] == b"\xff\xe0":
        start += 2 + struct.unpack_from(">H", picture, 4)[0]
    notes, mpf = bytearray(), 0
    for marker, content in kept.segments:
        if marker == APP2 and content.startswith(_ICC) and not with_profile:
            continue
        if marker == APP2 and content.startswith(_MPF):
            mpf = start + len(notes) + 4 + len(_MPF)
        notes += struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content
    whole = bytearray(picture[:start] + notes + picture[start:])
    length = len(whole)
    if mpf:
        _move(whole, mpf, length, kept)
    return bytes(whole + kept.behind)


def _move(whole: bytearray, mpf: int, length: int, kept: Beside) -> None:
    """Makes the MPF segment's offsets true, which count from `mpf`, for a picture of `length`."""
    order = "<" if whole[mpf : mpf + 2] == b"II" else ">"
    try:
        (first,) = struct.unpack_from(order + "I", whole, mpf + 4)
        (count,) = struct.unpack_from(order + "H", whole, mpf + first)
        for i in range(count):
            tag, _, size, place = struct.unpack_from(
                order + "HHII", whole, mpf + first + 2 + 12 * i
            )
            for entry in range(mpf + place, mpf + place + size, 16) if tag == 0xB002 else ():
                (offset,) = struct.unpack_from(order + "I", whole, entry + 8)
                if offset == 0:
                    struct.pack_into(order + "I", whole, entry + 4, length)
                else:
                    moved = kept.mpf + offset - kept.length + length - mpf
                    struct.pack_into(order + "I", whole, entry + 8, moved)
    except struct.error:
        return
