"""Fetches OSDFace's weights: `python install.py`, run with the Python of ComfyUI or of the WebUI.

A host's own installer runs the same file, ComfyUI-Manager once and a WebUI at every launch. Such a
run downloads nothing, prints one line, takes a moment and never fails. It is recognised by having
no arguments, and one of these:
- ComfyUI-Manager sets COMFYUI_PATH and COMFYUI_FOLDERS_BASE_PATH (a user may well set the first
  alone), or
- a WebUI puts its own root, where launch.py lies, on PYTHONPATH, or
- one of the two variables is set and no terminal is attached.
Any option makes it a run by hand.

Exit codes: 0 all is there, 1 something is missing or wrong, 2 nothing could be fetched.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from osdface_core.catalogue import CATALOGUE
from osdface_core.diffir.files import FOLDER as DIFFIR
from osdface_core.diffir.files import LICENCE
from osdface_core.errors import OSDFaceError
from osdface_core.faces.files import FOLDER as DETECTION
from osdface_core.osdface.files import FOLDER as OSDFACE
from osdface_core.osdface.files import KOHYA_LORA, LORAS
from osdface_core.osediff.files import FACES, PICTURES
from osdface_core.sd21.files import BASE
from osdface_core.sd21.files import FOLDER as CHECKPOINTS
from osdface_core.weights.catalogue import WeightFile
from osdface_core.weights.fetching import UnreachableError, recorded_sha256
from osdface_core.weights.store import Store, command

# Links are kept: a pack linked into custom_nodes or extensions belongs to the host of the link.
SCRIPT = Path(__file__).absolute()
ROOT = SCRIPT.resolve().parent
MANAGER_VARIABLES = ("COMFYUI_FOLDERS_BASE_PATH", "COMFYUI_PATH")
OK, INCOMPLETE, UNREACHABLE = 0, 1, 2
INTERRUPTED = 130


def run_by_host(arguments: list[str]) -> bool:
    """Whether a host's installer runs this, as the module's docstring tells."""
    if arguments:
        return False
    variables = sum(variable in os.environ for variable in MANAGER_VARIABLES)
    webui = any(
        folder and (Path(folder) / "launch.py").is_file()
        for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep)
    )
    return (
        variables == len(MANAGER_VARIABLES) or webui or (variables > 0 and not sys.stdin.isatty())
    )


def hosts() -> Iterator[Path]:
    """Folders that may hold a host's `models`, nearest first.

    A WebUI that this file lies in, what the variables name, a ComfyUI that this file lies in.
    """
    places = [start.parent for start in (SCRIPT.parent, ROOT)]
    yield from (place.parent for place in places if place.name == "extensions")
    yield from (
        Path(os.environ[variable]) for variable in MANAGER_VARIABLES if os.environ.get(variable)
    )
    yield from (place.parent for place in places if place.name == "custom_nodes")


def is_webui(models: Path) -> bool:
    """Whether a models folder is a Stable-Diffusion-WebUI's."""
    return (models / "Stable-diffusion").is_dir() or (models.parent / "launch.py").is_file()


def webui_folders(models: Path) -> dict[str, list[Path]]:
    """The model folders by name in a WebUI, which has folders for some kinds of its own.

    What a WebUI knows lies in the WebUI's, all else in models/osdface.
    """
    own = models / OSDFACE
    folders = {name: [own, models / name] for name in CATALOGUE.folders}
    return folders | {
        OSDFACE: [own, models / "Lora"],
        LORAS: [models / "Lora"],
        CHECKPOINTS: [models / "Stable-diffusion", own],
        # facexlib's files, where the host's own restorers put them.
        DETECTION: [own, models / DETECTION, models / "GFPGAN", models / "Codeformer"],
    }


def models_folder(given: Path | None) -> Path:
    """The host's models folder: the given one, or that of the nearest host.

    Raises OSDFaceError if no host is found.
    """
    if given is not None:
        return given
    found = (host / "models" for host in hosts() if (host / "models").is_dir())
    models = next(found, None)
    if models is None:
        raise OSDFaceError(
            f"No models folder is found from {ROOT}: name the host's with --models-dir, or move "
            "this folder into ComfyUI's custom_nodes or a WebUI's extensions."
        )
    return models


def model_folders(models: Path) -> dict[str, list[Path]]:
    """The model folders by name; ComfyUI's with those of extra_model_paths.yaml.

    Raises OSDFaceError for a file of that name that cannot be read.
    """
    if is_webui(models):
        return webui_folders(models)
    folders = {name: [models / name] for name in CATALOGUE.folders}
    extra = [host / "extra_model_paths.yaml" for host in (models.parent, *hosts())]
    for path in dict.fromkeys(path.resolve() for path in extra if path.is_file()):
        for name, folder, first in extra_folders(path):
            if name in folders and folder not in folders[name]:
                folders[name].insert(0 if first else len(folders[name]), folder)
    return folders


def extra_folders(path: Path) -> Iterator[tuple[str, Path, bool]]:
    """The entries of an extra_model_paths.yaml, read as ComfyUI reads it.

    Gives the model folder's name, its path, and whether new files go there. Raises OSDFaceError for
    a file that cannot be read.
    """
    import yaml

    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise OSDFaceError(
            f"{path} cannot be read ({why}): mend it, or name the folder with --models-dir."
        ) from error
    for section in sections.values() if isinstance(sections, dict) else ():
        if not isinstance(section, dict):
            continue
        base = path.parent / os.path.expandvars(
            os.path.expanduser(str(section.pop("base_path", "") or ""))
        )
        first = bool(section.pop("is_default", False))
        for name, lines in section.items():
            for line in filter(None, str(lines or "").split("\n")):
                yield name, Path(os.path.normpath(base / line)), first


def greet_host() -> None:
    """Prints the one line of a run by a host."""
    store = Store(CATALOGUE, model_folders(models_folder(None)))
    missing = [
        entry.name
        for entry in CATALOGUE.files
        if entry.needed and entry is not KOHYA_LORA and store.find(entry) is None
    ]
    if missing:
        print(
            f"OSDFace: {len(missing)} weight files are missing ({', '.join(missing)}); to fetch "
            f"them run: {command('--fetch', script=SCRIPT)}"
        )
    else:
        print("OSDFace: all weights are there.")


def megabytes(size: int) -> str:
    """Bytes as text, in MB."""
    return f"{size / 1e6:,.0f} MB"


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a run by hand."""
    parser = argparse.ArgumentParser(
        description="Fetches, checks and converts OSDFace's weights. Running it again does nothing."
    )
    parser.add_argument(
        "--fetch",
        action="store_true",
        help="fetch what is missing, whoever runs this (a run in a terminal does anyway)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="report only; exit code 1 if something is missing or wrong",
    )
    parser.add_argument(
        "--from",
        dest="given",
        metavar="DIR",
        type=Path,
        help="take files downloaded by hand from DIR, under any names; DiffIR's, which are on "
        "Google Drive alone, are converted",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    parser.add_argument(
        "--only",
        metavar="NAME",
        action="append",
        choices=sorted(CATALOGUE.by_name),
        help="only this file; may be repeated",
    )
    parser.add_argument(
        "--checkpoint",
        action="store_true",
        help=f"also Stable Diffusion 2.1-base ({megabytes(BASE.expected_size)})",
    )
    parser.add_argument(
        "--osediff",
        action="store_true",
        help="also OSEDiff's weights, which enlarge whole pictures, and those for faces "
        f"({megabytes(PICTURES.expected_size + FACES.expected_size)})",
    )
    parser.add_argument(
        "--offline", action="store_true", help="no network: only --from and conversions"
    )
    parser.add_argument(
        "--trust-first-download",
        action="store_true",
        help="where nobody states a file's SHA-256, record that of what is fetched now, on your "
        "word; without this only the names and shapes of its tensors are checked",
    )
    parser.add_argument(
        "--keep-original",
        action="store_true",
        help="keep what was fetched only to be converted, such as the 1.8 GB checkpoint",
    )
    parser.add_argument(
        "--models-dir", metavar="DIR", type=Path, help="the models folder of the host"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Runs, and returns the exit code."""
    # A pipe on Windows takes the letters of one code page, and paths hold any.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if run_by_host(arguments):
        try:
            greet_host()
        except Exception as error:  # nothing that is wrong here may stop a host's start
            print(f"OSDFace: {' '.join(str(error).split())}")
        return OK
    options = parse(arguments)
    try:
        return run_by_hand(options)
    except OSDFaceError as error:
        print(error, file=sys.stderr)
        return UNREACHABLE
    except KeyboardInterrupt:
        print("\nStopped; run this again to go on from here.", file=sys.stderr)
        return INTERRUPTED


def run_by_hand(options: argparse.Namespace) -> int:
    """Does what the options say and returns the exit code. Raises OSDFaceError."""
    if options.given is not None and not options.given.is_dir():
        raise OSDFaceError(
            f"--from wants a folder that holds the downloaded files, and {options.given} is none."
        )
    models = models_folder(options.models_dir)
    store = Store(CATALOGUE, model_folders(models))
    wanted = (
        [CATALOGUE.by_name[name] for name in dict.fromkeys(options.only)]
        if options.only
        else [entry for entry in CATALOGUE.files if entry.needed]
    )
    if is_webui(models) and not options.only:
        wanted.remove(KOHYA_LORA)  # for a node of ComfyUI's alone
    if options.checkpoint and BASE not in wanted:
        wanted.append(BASE)
    if options.osediff:
        wanted += [entry for entry in (PICTURES, FACES) if entry not in wanted]
    given = store.recognise_all(options.given) if options.given else {}
    for name, path in given.items():
        print(f"{path} is {name}")
    print(f"Models folder: {store.folders['osdface'][0].parent}")

    failures: list[OSDFaceError] = []
    if options.given and not options.only:
        failures += convert_diffir(options, store.folders[DIFFIR][0])
    left = []
    unreachable: set[str] = set()
    for entry in wanted:
        finding = store.inspect(entry)
        print(f"{finding.state.value:>8}  {entry.name}  ({entry.purpose}): {finding.why}")
        if finding.usable:
            continue
        if options.check:
            left.append(entry)
        elif options.dry_run:
            describe(entry, store, given)
        elif finding.path is not None and finding.path != store.target(entry):
            left.append(entry)
            print(
                f"          remove {finding.path}, then run this again: it would hide "
                f"{store.target(entry)}"
            )
        else:
            try:
                path = store.obtain(
                    entry,
                    given=given,
                    offline=options.offline,
                    keep_original=options.keep_original,
                    unreachable=unreachable,
                    trust=options.trust_first_download,
                )
                print(f"   ready  {path}")
                if entry.sha256 is None and recorded_sha256(path) is None:
                    print(
                        "          no SHA-256 is known for it: the names and shapes of its tensors "
                        "were checked"
                    )
            except OSDFaceError as error:
                failures.append(error)
                left.append(entry)
                print(f"  failed  {entry.name}")
    return conclude(left, failures, store)


def convert_diffir(options: argparse.Namespace, folder: Path) -> list[OSDFaceError]:
    """Converts what DIR holds of DiffIR into `folder`, and returns what went wrong."""
    from osdface_core.diffir.convert import convert, is_made_from, recognise_all

    failures: list[OSDFaceError] = []
    try:
        found = recognise_all(options.given)
    except OSDFaceError as error:
        return [error]
    for name, path in found.items():
        print(f"{path} is DiffIR's {name}")
        try:
            if is_made_from(folder / name, path):
                print(f"   ready  {folder / name}")
            elif options.check or options.dry_run:
                print(f"          would write {folder / name}")
            else:
                print(f"   ready  {convert(path, folder / name)}")
        except OSDFaceError as error:
            failures.append(error)
            print(f"  failed  {name}")
    if found:
        print(f"          DiffIR: {LICENCE}.")
    return failures


def describe(entry: WeightFile, store: Store, given: dict[str, Path]) -> None:
    """Prints what would be done for a file that is missing or wrong."""
    if entry.name in given:
        print(f"          would be copied from {given[entry.name]}")
        return
    for source in CATALOGUE.sources(entry):
        if source.name in given or store.find(source):
            print(f"          would use {given.get(source.name) or store.find(source)}")
        else:
            print(
                f"          would fetch {source.addresses[0]} ({megabytes(source.expected_size)})"
            )
    print(f"          would write {store.target(entry)}")


def conclude(left: list[WeightFile], failures: list[OSDFaceError], store: Store) -> int:
    """Prints what is left to do by hand, and returns the exit code."""
    if not left and not failures:
        return OK
    for failure in failures:
        if not isinstance(failure, UnreachableError):
            print(failure, file=sys.stderr)
    unreached = [failure for failure in failures if isinstance(failure, UnreachableError)]
    if not unreached:
        return INCOMPLETE
    parts = {
        source.name: source
        for entry in left
        for source in CATALOGUE.sources(entry)
        if store.find(source) is None
    }
    lines = "; ".join(
        f"{source.name} from {source.by_hand} into {store.target(source).parent}"
        for source in parts.values()
    )
    reasons = "; ".join(why for failure in unreached for why in failure.why)
    print(
        f"\nNot everything could be fetched ({reasons}). Download by hand: {lines}. Then run this "
        "again; or keep the files in any folder "
        "and run this with --from FOLDER.",
        file=sys.stderr,
    )
    return UNREACHABLE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
