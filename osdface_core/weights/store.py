"""A catalogue's files on this machine: found, verified, copied, converted and downloaded."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from ..errors import OSDFaceError
from .catalogue import Catalogue, WeightFile
from .fetching import (
    RECORD,
    Progress,
    UnreachableError,
    fetch,
    recorded_sha256,
    sha256_of,
    write_whole,
)
from .signature import fits, shapes

# Paths of each of the host's model folders, by the folder's name; files are put into the first.
Folders = Mapping[str, Sequence[Path]]


class State(Enum):
    """The state of a file. An accepted one is not the known file, but does its work."""

    VERIFIED = "verified"
    ACCEPTED = "accepted"
    MISSING = "missing"
    WRONG = "wrong"


@dataclass(frozen=True)
class Finding:
    """The state of one file of the catalogue on this machine, and the reason in words."""

    entry: WeightFile
    state: State
    why: str
    path: Path | None = None

    @property
    def usable(self) -> bool:
        return self.state in (State.VERIFIED, State.ACCEPTED)


def command(*options: str, script: Path | None = None) -> str:
    """The command line that fetches weights, ready to be pasted.

    script: install.py, if it was started from another place than the one it lies in.
    """
    script = script or Path(__file__).resolve().parents[2] / "install.py"
    return " ".join(
        f'"{part}"' if " " in part else part for part in (sys.executable, str(script), *options)
    )


def judge(entry: WeightFile, path: Path) -> Finding:
    """The state of the file at `path`, taken for `entry`.

    Its content is compared with the known digest; without one, or where it differs, the file is
    accepted if it has the layout and does its work.
    """
    try:
        known, digest = entry.sha256 or recorded_sha256(path), sha256_of(path)
        # A digest that was recorded beside the file may be that of the rubbish it came as.
        if digest == known and (entry.sha256 is not None or fits(entry, shapes(path))):
            whose = "known one" if entry.sha256 else f"one recorded in {path.name}{RECORD}"
            return Finding(entry, State.VERIFIED, f"its SHA-256 is the {whose}", path)
        if not fits(entry, shapes(path)):
            return Finding(entry, State.WRONG, "it does not hold the tensors of that file", path)
        if entry.sha256 is None and known is not None:
            why = f"its SHA-256 is no longer the one recorded beside it in {path.name}{RECORD}"
            return Finding(entry, State.WRONG, why, path)
        if entry.sha256 is None:
            why = (
                "no SHA-256 is known for it, but the tensors that tell it have the right names and "
                "shapes"
            )
        else:
            why = "not the official file (another SHA-256), but it has the same layout"
        if entry.check is not None:
            why += f" and {entry.check(path)}"
    except OSDFaceError as error:
        return Finding(entry, State.WRONG, str(error), path)
    except OSError as error:
        return Finding(entry, State.WRONG, f"it cannot be read ({error.strerror or error})", path)
    return Finding(entry, State.ACCEPTED, why, path)


@dataclass(frozen=True)
class Store:
    """A catalogue's files in a host's model folders."""

    catalogue: Catalogue
    folders: Folders

    def find(self, entry: WeightFile) -> Path | None:
        """The file of that name in the folders that are searched for it; None if it is missing."""
        for name in self.catalogue.searched[entry.folder]:
            for folder in self.folders.get(name, ()):
                if (folder / entry.name).is_file():
                    return folder / entry.name
        return None

    def target(self, entry: WeightFile) -> Path:
        """The path at which the file is put."""
        return self.folders[entry.folder][0] / entry.name

    def inspect(self, entry: WeightFile) -> Finding:
        """The state of the file."""
        path = self.find(entry)
        if path is None:
            return Finding(entry, State.MISSING, f"wanted in {self.target(entry).parent}")
        return judge(entry, path)

    def recognise(self, path: Path) -> WeightFile | None:
        """The catalogue's entry for the content of `path`; None if there is none.

        Of entries with one layout, the name tells which it is.
        """
        try:
            held = shapes(path)
        except (OSDFaceError, OSError):
            return None
        found = [entry for entry in self.catalogue.files if fits(entry, held)]
        if len(found) > 1:
            found = [entry for entry in found if entry.name == path.name]
        return found[0] if found else None

    def recognise_all(self, folder: Path) -> dict[str, Path]:
        """Files of the catalogue in or under `folder`, under any name there, by catalogue name."""
        found: dict[str, Path] = {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            if (entry := self.recognise(path)) is not None:
                is_known = (
                    entry.sha256 is not None
                    and path.stat().st_size == entry.size
                    and sha256_of(path) == entry.sha256
                )
                if is_known or entry.name not in found:
                    found[entry.name] = path
        return found

    def obtain(
        self,
        entry: WeightFile,
        *,
        progress: Progress | None = None,
        given: Mapping[str, Path] | None = None,
        offline: bool = False,
        keep_original: bool = False,
        unreachable: set[str] | None = None,
        trust: bool = False,
    ) -> Path:
        """Puts the file in its place: copied, converted, or downloaded.

        What is downloaded only to be converted is removed afterwards. Raises OSDFaceError as
        `fetch` and the conversions do.

        entry: the file.
        progress: see fetching.Progress; what it raises stops the download.
        given: paths of files at hand, by the catalogue's names.
        offline: download nothing.
        keep_original: keep what was downloaded only to be converted.
        unreachable: hosts that did not answer; they are skipped, and further ones are added.
        trust: record the digest of what is fetched, where none is known, on the user's word.
        """
        given = given or {}
        into = self.target(entry)
        if entry.name in given:
            return _copy(entry, given[entry.name], into)
        if not entry.made_from:
            if offline:
                raise UnreachableError(
                    f"{entry.name} is missing and downloads are off: put it into {into.parent}.",
                    ["downloads are off"],
                )
            return fetch(entry, into.parent, progress, unreachable, trust)
        assert entry.convert is not None
        parts, fetched = [], set()
        for source in map(self.catalogue.by_name.__getitem__, entry.made_from):
            path = given.get(source.name) or self.find(source)
            if path is None:
                path = self.obtain(
                    source,
                    progress=progress,
                    offline=offline,
                    unreachable=unreachable,
                    trust=trust,
                )
                fetched.add(source.name)
            parts.append(path)
        entry.convert(*parts, into)
        for path, name in zip(parts, entry.made_from, strict=True):
            is_kept = self.catalogue.by_name[name].needed or keep_original or name in given
            # Of others only a downloaded file has a record: what a user put there stays.
            if not is_kept and (name in fetched or recorded_sha256(path)):
                path.unlink()
                path.with_name(path.name + RECORD).unlink(missing_ok=True)
        return into

    def ensure(
        self, name: str, *, allow_download: bool = False, progress: Progress | None = None
    ) -> Path:
        """The path of a file of the catalogue, obtained first if it is missing and that is allowed.

        Raises OSDFaceError that says how to get the file. name: in the catalogue. allow_download:
        whether it may be fetched. progress: see fetching.Progress; what it raises stops it.
        """
        entry = self.catalogue.by_name.get(name)
        if entry is None:
            raise OSDFaceError(
                f"{name} is in none of the model folders and is not a file that can be fetched: "
                "put it there."
            )
        path = self.find(entry)
        if path is not None:
            return path
        if not allow_download:
            parts = " and ".join(source.name for source in self.catalogue.sources(entry))
            origin = "" if parts == name else f", which is made from {parts}"
            raise OSDFaceError(
                f"{name} is missing ({entry.purpose}{origin}): run {command('--only', name)} in a "
                "terminal, or allow downloads in the settings (or by OSDFACE_DOWNLOAD=1)."
            )
        return self.obtain(entry, progress=progress)


def _copy(entry: WeightFile, source: Path, into: Path) -> Path:
    finding = judge(entry, source)
    if not finding.usable:
        raise OSDFaceError(f"{source} is not taken as {entry.name}: {finding.why}.")

    def write(fresh: Path) -> str | None:
        shutil.copyfile(source, fresh)
        return sha256_of(fresh) if finding.state is State.VERIFIED else None

    return into if into.exists() and into.samefile(source) else write_whole(into, write)
