"""Puts a picture into a TIFF file in the place of one of its pages; the others stay as they are."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

SUB_PAGES, EXIF, GPS, INTEROPERABILITY = 330, 34665, 34853, 40965
_POINTERS = (SUB_PAGES, EXIF, GPS, INTEROPERABILITY)
# Where pixels lie, and how many bytes of them: of strips, tiles and the oldest JPEG.
_BLOBS = {273: 279, 324: 325, 513: 514}
# struct's letters for the types of TIFF 6.0 and BigTIFF; 1 for what has no order of bytes.
_LETTERS = {
    1: "B",
    2: "B",
    3: "H",
    4: "I",
    5: "II",
    6: "B",
    7: "B",
    8: "h",
    9: "i",
    10: "ii",
    11: "f",
    12: "d",
    13: "I",
    16: "Q",
    17: "q",
    18: "Q",
}


@dataclass
class _Page:
    """A directory of a TIFF: its values by tag, the pixels they point to, the pages below.

    values: type and numbers by tag, as they stand in the file where each is a byte.
    blobs: the bytes by the tag that says where they are.
    below: pages by tag.
    """

    values: dict[int, tuple[int, tuple[float, ...] | bytes]] = field(default_factory=dict)
    blobs: dict[int, list[bytes]] = field(default_factory=dict)
    below: dict[int, list[_Page]] = field(default_factory=dict)


class _Layout:
    """The order of bytes and the width of offsets. start: a file's first 4 bytes."""

    def __init__(self, start: bytes) -> None:
        self.order = "<" if start[:2] == b"II" else ">"
        self.big = struct.unpack_from(self.order + "H", start, 2)[0] == 43
        self.offset = self.order + ("Q" if self.big else "I")
        self.count = self.order + ("Q" if self.big else "H")
        self.entry = self.order + ("HHQ" if self.big else "HHI")
        self.inline = 8 if self.big else 4
        self.header = 16 if self.big else 8

    def first(self, data: bytes) -> int:
        return int(struct.unpack_from(self.offset, data, self.header - self.inline)[0])


def count_beside(data: bytes) -> int:
    """How many pages a TIFF holds beside the first, those below it included."""
    pages = _pages(data)
    return len(pages) - 1 + sum(len(page.below.get(SUB_PAGES, ())) for page in pages)


def replace_page(data: bytes, index: int, picture: bytes) -> bytes:
    """The TIFF file `data` with the only page of `picture` in the place of page `index`.

    Pages below that one, such as a preview, stay. Raises struct.error for a damaged file.
    """
    pages = _pages(data)
    (fresh,) = _pages(picture)
    if SUB_PAGES in pages[index].below:
        fresh.below[SUB_PAGES] = pages[index].below[SUB_PAGES]
    pages[index] = fresh
    layout = _Layout(data)
    out = bytearray(data[: layout.header])
    link = layout.header - layout.inline
    for page in pages:
        place, end = _write(out, page, layout)
        struct.pack_into(layout.offset, out, link, place)
        link = end
    return bytes(out)


def _pages(data: bytes) -> list[_Page]:
    layout = _Layout(data)
    place, pages, seen = layout.first(data), [], set()
    while place and place not in seen:
        seen.add(place)
        page, place = _read(data, place, layout)
        pages.append(page)
    return pages


def _read(data: bytes, place: int, layout: _Layout) -> tuple[_Page, int]:
    """The page at `place`, and the next one's place."""
    page = _Page()
    (count,) = struct.unpack_from(layout.count, data, place)
    place += struct.calcsize(layout.count)
    for _ in range(count):
        tag, kind, number = struct.unpack_from(layout.entry, data, place)
        letters = _LETTERS.get(kind)
        if letters:
            form = f"{layout.order}{number * len(letters)}{letters[0]}"
            at = place + struct.calcsize(layout.entry)
            if struct.calcsize(form) > layout.inline:
                (at,) = struct.unpack_from(layout.offset, data, at)
            if letters == "B":
                # Bytes stay bytes: a file's layers may be most of it.
                if at + number > len(data):
                    raise struct.error("a value goes beyond the file's end")
                page.values[tag] = kind, data[at : at + number]
            else:
                page.values[tag] = kind, struct.unpack_from(form, data, at)
        place += struct.calcsize(layout.entry) + layout.inline
    for where, length in _BLOBS.items():
        if where in page.values and length in page.values:
            pairs = zip(page.values[where][1], page.values[length][1], strict=False)
            page.blobs[where] = [data[int(at) : int(at) + int(size)] for at, size in pairs]
    for tag in _POINTERS:
        if tag in page.values:
            page.below[tag] = [_read(data, int(at), layout)[0] for at in page.values[tag][1]]
    return page, int(struct.unpack_from(layout.offset, data, place)[0])


def _write(out: bytearray, page: _Page, layout: _Layout) -> tuple[int, int]:
    """Writes a page to the end of `out`. Returns its place, and that of the link to the next."""
    wide = 16 if layout.big else 4
    values = dict(page.values)
    for tag, blobs in page.blobs.items():
        places = []
        for blob in blobs:
            places.append(len(out))
            out += blob + b"\0" * (len(blob) % 2)
        values[tag] = wide, tuple(places)
    for tag, below in page.below.items():
        values[tag] = wide, tuple(_write(out, one, layout)[0] for one in below)
    entries = []
    for tag, (kind, numbers) in sorted(values.items()):
        letters = _LETTERS[kind]
        form = f"{layout.order}{len(numbers)}{letters[0]}"
        content = numbers if isinstance(numbers, bytes) else struct.pack(form, *numbers)
        if len(content) > layout.inline:
            place = len(out)
            out += content + b"\0" * (len(content) % 2)
            content = struct.pack(layout.offset, place)
        number = len(numbers) // len(letters)
        start = struct.pack(layout.entry, tag, kind, number)
        entries.append(start + content.ljust(layout.inline, b"\0"))
    place = len(out)
    out += struct.pack(layout.count, len(entries)) + b"".join(entries)
    link = len(out)
    out += struct.pack(layout.offset, 0)
    return place, link
