"""What of the catalogue is on this machine, whether it is right, and how what is missing gets
there.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from ..errors import OSDFaceError
from .catalogue import (
    BY_NAME,
    CATALOGUE,
    DETECTOR,
    KOHYA_LORA,
    SEARCHED,
    SMALL_DETECTOR,
    VRE,
    WeightFile,
    sources,
)
from .fetching import RECORD, Progress, UnreachableError, fetch, place, recorded_sha256, sha256_of

# Paths of each of the host's model folders, by the folder's name; the first is where files are put.
Folders = Mapping[str, Sequence[Path]]


class State(Enum):
    """How a file stands. An accepted one is not the known file, but does its work."""

    VERIFIED = "verified"
    ACCEPTED = "accepted"
    MISSING = "missing"
    WRONG = "wrong"


@dataclass(frozen=True)
class Finding:
    """One file of the catalogue on this machine, and in words why it stands as it does."""

    entry: WeightFile
    state: State
    why: str
    path: Path | None = None

    @property
    def usable(self) -> bool:
        return self.state in (State.VERIFIED, State.ACCEPTED)


def find(entry: WeightFile, folders: Folders) -> Path | None:
    """The file in the folders that are searched for it, by its name."""
    for folder in SEARCHED[entry.folder]:
        for place_ in folders.get(folder, ()):
            if (place_ / entry.name).is_file():
                return place_ / entry.name
    return None


def target(entry: WeightFile, folders: Folders) -> Path:
    """Where the file is put."""
    return folders[entry.folder][0] / entry.name


def command(*options: str) -> str:
    """The line that brings weights, ready to be pasted."""
    script = Path(__file__).resolve().parents[2] / "install.py"
    return " ".join(
        f'"{part}"' if " " in part else part for part in (sys.executable, str(script), *options)
    )


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a file's tensors, which are not read. Raises OSDFaceError, or OSError."""
    from .checkpoint import Checkpoint
    from .reading import is_safetensors

    if is_safetensors(path):
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np") as file:
                names = file.keys()
                return {name: tuple(file.get_slice(name).get_shape()) for name in names}
        except SafetensorError as error:
            raise OSDFaceError(
                f"{path.name} is cut off or damaged ({error}): fetch the file again."
            ) from error
    with Checkpoint(path) as checkpoint:
        return {name: tensor.shape for name, tensor in checkpoint.tensors.items()}


def fits(entry: WeightFile, held: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the shapes are those by which `entry` is recognised."""
    held = {name.removeprefix("module."): shape for name, shape in held.items()}
    return all(held.get(name) == shape for name, shape in entry.signature.items())


def recognise(path: Path) -> WeightFile | None:
    """The file of the catalogue that `path` is, by its content; None for any other, readable or
    not.
    """
    try:
        held = shapes(path)
    except (OSDFaceError, OSError):
        return None
    return next((entry for entry in CATALOGUE if fits(entry, held)), None)


def recognise_all(folder: Path) -> dict[str, Path]:
    """Files of the catalogue that lie in or under `folder`, whatever they are called there, by
    their names in the catalogue.
    """
    found: dict[str, Path] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if (entry := recognise(path)) is not None:
            known = (
                entry.sha256 is not None
                and path.stat().st_size == entry.size
                and sha256_of(path) == entry.sha256
            )
            if known or entry.name not in found:
                found[entry.name] = path
    return found


def inspect(entry: WeightFile, folders: Folders) -> Finding:
    """How the file stands: its content against the known digest; without one, or where it differs,
    whether it does its work.
    """
    path = find(entry, folders)
    if path is None:
        return Finding(entry, State.MISSING, f"wanted in {target(entry, folders).parent}")
    return judge(entry, path)


def judge(entry: WeightFile, path: Path) -> Finding:
    """`inspect` for a file at any place."""
    try:
        known, digest = entry.sha256 or recorded_sha256(path), sha256_of(path)
        if digest == known:
            return Finding(entry, State.VERIFIED, "its SHA-256 is the known one", path)
        if not fits(entry, shapes(path)):
            return Finding(entry, State.WRONG, "it does not hold the tensors of that file", path)
        if entry.sha256 is None and known is not None:
            return Finding(
                entry,
                State.WRONG,
                f"its SHA-256 is no longer the one recorded beside it in {path.name}{RECORD}",
                path,
            )
        if entry in (DETECTOR, SMALL_DETECTOR):
            from ..faces.detector_check import build_detector
            from .reading import read_tensors

            build_detector(read_tensors(path))
            why = (
                "not the official file (another SHA-256), but it has the same layout and finds one "
                "face where one face is drawn"
            )
        elif entry.sha256 is not None:
            why = "not the official file (another SHA-256), but it has the same layout"
        else:
            why = "no SHA-256 is recorded for it, but it has the right layout"
    except OSDFaceError as error:
        return Finding(entry, State.WRONG, str(error), path)
    except OSError as error:
        return Finding(entry, State.WRONG, f"it cannot be read ({error.strerror or error})", path)
    return Finding(entry, State.ACCEPTED, why, path)


def obtain(
    entry: WeightFile,
    folders: Folders,
    *,
    progress: Progress | None = None,
    given: Mapping[str, Path] | None = None,
    offline: bool = False,
    keep_original: bool = False,
    unreachable: set[str] | None = None,
) -> Path:
    """Puts the file in its place: copied from `given` (paths by the catalogue's names), converted,
    or downloaded.

    What is downloaded only to be converted is removed afterwards unless `keep_original`. Raises
    OSDFaceError as `fetch` and the conversions do.
    """
    given = given or {}
    into = target(entry, folders)
    if entry.name in given:
        return _copy(entry, given[entry.name], into)
    if not entry.made_from:
        if offline:
            raise UnreachableError(
                f"{entry.name} is missing and downloads are off: put it into {into.parent}.",
                ["downloads are off"],
            )
        return fetch(entry, into.parent, progress, unreachable)
    parts = []
    for source in map(BY_NAME.__getitem__, entry.made_from):
        path = given.get(source.name) or find(source, folders)
        parts.append(
            path
            or obtain(source, folders, progress=progress, offline=offline, unreachable=unreachable)
        )
    from ..osdface import convert

    if entry is VRE:
        convert.convert_vre(parts[0], parts[1], into)
    elif entry is KOHYA_LORA:
        convert.convert_lora(parts[0], into)
    for path, name in zip(parts, entry.made_from, strict=True):
        # The record tells that it was downloaded here: what a user put there stays.
        if not (BY_NAME[name].needed or keep_original or name in given) and recorded_sha256(path):
            path.unlink()
            path.with_name(path.name + RECORD).unlink(missing_ok=True)
    return into


def _copy(entry: WeightFile, source: Path, into: Path) -> Path:
    finding = judge(entry, source)
    if not finding.usable:
        raise OSDFaceError(f"{source} is not taken as {entry.name}: {finding.why}.")

    def write(fresh: Path) -> str:
        shutil.copyfile(source, fresh)
        return sha256_of(fresh)

    return into if into.exists() and into.samefile(source) else place(into, write)


def ensure(
    name: str, folders: Folders, *, allow_download: bool = False, progress: Progress | None = None
) -> Path:
    """The path of a file of the catalogue, fetched (and converted) first if it is missing and that
    is allowed.

    progress: see fetching.Progress; what it raises stops the download. Raises OSDFaceError that
    says how to get the file.
    """
    entry = BY_NAME.get(name)
    if entry is None:
        raise OSDFaceError(
            f"{name} is in none of the model folders and is not a file that OSDFace knows where "
            f"to fetch: put it there."
        )
    path = find(entry, folders)
    if path is not None:
        return path
    if not allow_download:
        parts = " and ".join(source.name for source in sources(entry))
        origin = "" if parts == name else f", which is made from {parts}"
        raise OSDFaceError(
            f"{name} is missing ({entry.purpose}{origin}): run {command('--only', name)} in a "
            f"terminal, or allow downloads in the settings "
            "(or by OSDFACE_DOWNLOAD=1)."
        )
    return obtain(entry, folders, progress=progress)
