"""Weight files in ComfyUI's model folders: menus, finding, downloads, and a cache of networks."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import comfy.model_management as mm
import comfy.utils
import folder_paths
from comfy.cli_args import args

from ...osdface_core.catalogue import CATALOGUE
from ...osdface_core.diffir.files import BUILTIN_INPAINTER, missing
from ...osdface_core.diffir.files import FOLDER as DIFFIR
from ...osdface_core.errors import OSDFaceError
from ...osdface_core.faces.files import BUILTIN_DETECTOR, BUILTIN_PARSER, PARSER
from ...osdface_core.faces.files import FOLDER as FACES
from ...osdface_core.osdface import builtin
from ...osdface_core.osdface.files import FOLDER as OSDFACE
from ...osdface_core.osdface.files import LORAS, VRE, VRE_CHECKPOINT
from ...osdface_core.osdface.vre import embedder_files
from ...osdface_core.osediff.files import FOLDER as OSEDIFF
from ...osdface_core.weights.catalogue import BUILTIN, NONE
from ...osdface_core.weights.store import Store

T = TypeVar("T")

# OSDFace's LoRA may lie with its other files, a detector in newer hosts' folder for detectors.
SEARCHED = {
    **CATALOGUE.searched,
    LORAS: (OSDFACE, LORAS),
    FACES: (*CATALOGUE.searched[FACES], "detection"),
}
EXTENSIONS = {".safetensors", ".ckpt", ".pth", ".pkl"}
# Downloads are allowed by this setting in ComfyUI's settings file (web/osdface.js) or by this
# environment variable.
DOWNLOAD_SETTING, DOWNLOAD_VARIABLE = "OSDFace.download", "OSDFACE_DOWNLOAD"
BUILTIN_FILES = {
    OSDFACE: builtin.VRE,
    FACES: BUILTIN_DETECTOR,
    DIFFIR: BUILTIN_INPAINTER,
}


@contextmanager
def naming_input(given: str) -> Iterator[None]:
    """A context in which errors about a file name the input that named the file."""
    try:
        yield
    except OSDFaceError as error:
        raise OSDFaceError(f"`{given}`: {error}") from error


def register_folders() -> None:
    """Adds models/osdface, osediff, diffir and facedetection to ComfyUI's folders.

    Folders that extra_model_paths.yaml names for them stay.
    """
    for name in (OSDFACE, OSEDIFF, DIFFIR, FACES):
        folder_paths.add_model_folder_path(name, str(Path(folder_paths.models_dir) / name))
        paths, extensions = folder_paths.folder_names_and_paths[name]
        folder_paths.folder_names_and_paths[name] = (
            paths,
            set(extensions) | EXTENSIONS if extensions else EXTENSIONS,
        )


def menu(kind: str, *first: str) -> list[str]:
    """Names of the files of a folder, for a menu.

    `first` come first, whether they are there or not, because shared workflows hold them.
    """
    found = dict.fromkeys(first)
    for folder in SEARCHED[kind]:
        if folder in folder_paths.folder_names_and_paths:
            found |= dict.fromkeys(folder_paths.get_filename_list(folder))
    return list(found)


def find(name: str, kind: str) -> Path:
    """The file `name` in the folders that are searched for `kind`; "builtin" names our own.

    It is downloaded first if it is missing and the user has allowed that. Raises OSDFaceError that
    says how to get it.
    """
    if (path := _present(name, kind)) is not None:
        return path
    if kind == DIFFIR:
        # Nothing of it can be fetched.
        raise missing(name)
    folders = {
        folder: [Path(path) for path in folder_paths.get_folder_paths(folder)]
        for searched in SEARCHED.values()
        for folder in searched
        if folder in folder_paths.folder_names_and_paths
    }
    return Store(CATALOGUE, folders).ensure(
        name, allow_download=_downloads_allowed(), progress=_download_progress()
    )


def _present(name: str, kind: str) -> Path | None:
    """The file `name`; in place of a converted embedder, the released one with its projector."""
    if name == BUILTIN and kind in BUILTIN_FILES:
        return BUILTIN_FILES[kind]
    path = _in_folders(name, kind)
    below, _, file = name.replace("\\", "/").rpartition("/")
    if path is None and kind == OSDFACE and file == VRE.name:
        for released in dict.fromkeys((f"{below}/{VRE_CHECKPOINT.name}", VRE_CHECKPOINT.name)):
            found = _in_folders(released.lstrip("/"), kind)
            if found is not None and len(embedder_files(found)) > 1:
                return found
    return path


def _in_folders(name: str, kind: str) -> Path | None:
    # A workflow that was made on Windows has backslashes in its names. On Windows both do.
    for written in dict.fromkeys((name, name.replace("\\", "/"))):
        for folder in SEARCHED[kind]:
            if (path := folder_paths.get_full_path(folder, written)) is not None:
                return Path(path)
    return None


def find_parser() -> Path:
    """The face parser's file, downloaded first as `find` does; our own small one where it is
    missing and the user has not allowed that.
    """
    return find(PARSER.name, FACES) if any_available((PARSER.name,), FACES) else BUILTIN_PARSER


def first_present(names: Iterable[str], kind: str) -> str | None:
    """The first of the files that is there."""
    return next((name for name in names if _present(name, kind) is not None), None)


def any_available(names: Iterable[str], kind: str) -> bool:
    """Whether one of the files is there, or may be downloaded when it is needed."""
    return _downloads_allowed() or first_present(names, kind) is not None


def _downloads_allowed() -> bool:
    if os.environ.get(DOWNLOAD_VARIABLE, "").lower() in ("1", "true", "yes", "on"):
        return True
    users = Path(folder_paths.get_user_directory())
    # A graph does not say whose it is: among several users one who allows it is enough.
    names = [*users.glob("*/")] if args.multi_user else [users / "default"]
    return any(_allows_downloads(name / "comfy.settings.json") for name in names)


def _allows_downloads(settings: Path) -> bool:
    try:
        return json.loads(settings.read_text(encoding="utf-8")).get(DOWNLOAD_SETTING) is True
    except (OSError, ValueError, AttributeError):
        return False


def _download_progress() -> Callable[[int, int], None]:
    """A fetching.Progress that moves ComfyUI's bar."""
    bar = comfy.utils.ProgressBar(1)

    def report(done: int, total: int) -> None:
        mm.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, max(total, 1))

    return report


def fingerprint_of(
    name: str | None, kind: str, files_of: Callable[[Path], tuple[Path, ...]] = lambda path: (path,)
) -> str:
    """A text that changes when the named file does; empty if there is none.

    name: of the file. kind: its folder. files_of: all files that are read with it.
    """
    path = None if name is None or name == NONE else _present(name, kind)
    return "" if path is None else str(fingerprint(*files_of(path)))


def fingerprint(*files: Path) -> tuple[tuple[str, int, int], ...]:
    """Path, size and time of change of each file."""
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)


_cache: dict[tuple[str, str], tuple[object, Any]] = {}


def cached(what: str, files: tuple[Path, ...], make: Callable[[], T]) -> T:
    """The result of `make`, made again only when one of the files has changed.

    Raises OSDFaceError for a file that the host does not allow: newer hosts may be told which files
    may be loaded.
    """
    key, state = (what, str(files[0])), fingerprint(*files)
    if key not in _cache or _cache[key][0] != state:
        _cache.pop(key, None)
        governance = sys.modules.get("app.governance")
        for path in files:
            if not getattr(governance, "model_allowed", lambda path: True)(str(path)):
                raise OSDFaceError(
                    f"{path.name} is not among the files that this ComfyUI may load: ask who "
                    "looks after it to allow it."
                )
        _cache[key] = state, make()
    return _cache[key][1]
