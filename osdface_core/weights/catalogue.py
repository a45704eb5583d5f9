"""What is known of weight files: name, place, addresses, and how each is recognised.

Each method lists its own files (osdface/files.py, faces/files.py, sd21/files.py); here is the form
of such a list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

HUB = "hub:"
RELEASES = "https://github.com/"

# What menus offer beside files: the network that comes with this project, and none.
BUILTIN, NONE = "builtin", "none"


@dataclass(frozen=True)
class WeightFile:
    """One weight file.

    name: under which it is looked for and written.
    purpose: what it is, in a few words.
    folder: of the host's models folder that it is put into.
    licence: as far as its authors state one.
    by_hand: where a person finds it when every address is gone.
    signature: names and shapes of a few tensors that no other file has, by which it is recognised
        under any name.
    addresses: in the order in which they are tried; `hub:OWNER/REPOSITORY/FILE` on the Hugging Face
        hub, or a URL.
    size: bytes, where known exactly.
    about: bytes, roughly, where not.
    sha256: None where only the hub's own metadata tells it.
    made_from: names of the files that it is converted from, for one that cannot be downloaded.
    convert: makes it from those files, at the path given last.
    check: raises OSDFaceError for a file with the right layout that does not do its work, else says
        what it was seen to do.
    needed: False for a file that is fetched only when asked, or only to be converted.
    """

    name: str
    purpose: str
    folder: str
    licence: str
    by_hand: str
    signature: Mapping[str, tuple[int, ...]] = field(repr=False)
    addresses: tuple[str, ...] = ()
    size: int | None = None
    about: int = 0
    sha256: str | None = None
    made_from: tuple[str, ...] = ()
    convert: Callable[..., Path] | None = field(default=None, repr=False)
    check: Callable[[Path], str] | None = field(default=None, repr=False)
    needed: bool = True

    @property
    def expected_size(self) -> int:
        """Bytes, exact or rough."""
        return self.size or self.about


@dataclass(frozen=True)
class Catalogue:
    """All files that a host may want.

    files: in the order in which they are reported.
    searched: for each folder of the host's models folder, the folders that are searched for its
        files; files are put into the first.
    """

    files: tuple[WeightFile, ...]
    searched: Mapping[str, tuple[str, ...]]

    @cached_property
    def by_name(self) -> dict[str, WeightFile]:
        return {entry.name: entry for entry in self.files}

    @property
    def folders(self) -> list[str]:
        """Every folder that is searched."""
        return list(dict.fromkeys(name for names in self.searched.values() for name in names))

    def sources(self, entry: WeightFile) -> Iterator[WeightFile]:
        """The files to download for `entry`: itself, or what it is made from."""
        if entry.made_from:
            for name in entry.made_from:
                yield from self.sources(self.by_name[name])
        else:
            yield entry
