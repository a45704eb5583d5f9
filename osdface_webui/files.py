"""Weight files in a WebUI's folders and in ours."""

from __future__ import annotations

from pathlib import Path

from modules import paths_internal

from osdface_core.catalogue import CATALOGUE
from osdface_core.faces.files import BUILTIN_DETECTOR, BUILTIN_PARSER, DETECTORS, PARSER
from osdface_core.faces.files import FOLDER as FACES
from osdface_core.osdface.files import FOLDER as OSDFACE
from osdface_core.osdface.files import LORA, LORAS, VRE, VRE_CHECKPOINT
from osdface_core.osdface.vre import embedder_files
from osdface_core.osediff.files import FACES as FACE_PICTURES
from osdface_core.osediff.files import FACES_PICKLE as FACE_PICTURES_PICKLE
from osdface_core.osediff.files import PICTURES, PICTURES_PICKLE
from osdface_core.sd21.files import BASE
from osdface_core.sd21.files import FOLDER as CHECKPOINTS
from osdface_core.weights.catalogue import BUILTIN, WeightFile
from osdface_core.weights.store import Store

from . import host


def folders() -> dict[str, list[Path]]:
    """The folders that are searched for each folder of the catalogue, ours first.

    Ours are that of the settings, that of --osdface-models-path, and models/osdface.
    """
    models = host.models()
    named = (host.option("folder", ""), host.argument("osdface_models_path"))
    own = [Path(name).expanduser() for name in named if name] + [models / OSDFACE]
    loras = _given("lora_dir", models / "Lora")
    data = Path(paths_internal.data_path) / "models"
    return {
        **{name: [*own, models / name] for name in CATALOGUE.folders},
        CHECKPOINTS: [*_given("ckpt_dir", models / "Stable-diffusion"), *own],
        OSDFACE: [*own, *loras],
        LORAS: loras,
        FACES: [
            *own,
            models / FACES,
            *_given("gfpgan_models_path", models / "GFPGAN"),
            *_given("codeformer_models_path", models / "Codeformer"),
            # Where the hosts' own restorers put facexlib's files.
            models / "GFPGAN",
            data / "GFPGAN",
        ],
    }


def _given(argument: str, usual: Path) -> list[Path]:
    given = host.argument(argument)
    return [Path(given), usual] if given else [usual]


def store() -> Store:
    return Store(CATALOGUE, folders())


def find(entry: WeightFile) -> Path | None:
    """The file of the catalogue; None where it is missing."""
    return store().find(entry)


def ensure(entry: WeightFile) -> Path:
    """The file of the catalogue, downloaded first if it is missing and the settings allow it.

    Raises OSDFaceError that says how to get it.
    """
    allowed = bool(host.option("download", False))
    return store().ensure(entry.name, allow_download=allowed, progress=host.stop_if_asked)


def embedder() -> Path | None:
    """The visual embedder: converted, or as released with its projector beside it."""
    released = find(VRE_CHECKPOINT)
    if released is not None and len(embedder_files(released)) < 2:
        released = None
    return find(VRE) or released


def missing() -> list[WeightFile]:
    """What OSDFace needs beside Stable Diffusion and is not there."""
    there = ((LORA, find(LORA)), (VRE, embedder()))
    return [entry for entry, path in there if path is None]


def base() -> Path | None:
    """Stable Diffusion 2.1-base under its usual name; None where it is missing."""
    return find(BASE)


def osediff() -> dict[str, Path]:
    """OSEDiff's weights that are there, by the names that the upscalers have."""
    there = {
        "OSEDiff": find(PICTURES) or find(PICTURES_PICKLE),
        "OSEDiff (faces)": find(FACE_PICTURES) or find(FACE_PICTURES_PICKLE),
    }
    return {name: path for name, path in there.items() if path is not None}


def detector(name: str) -> Path:
    """The file of a detector of the menu; of `automatic`, the best that is there."""
    entries = {key: CATALOGUE.by_name.get(file) for key, file in DETECTORS.items()}
    if name == host.AUTOMATIC:
        found = (find(entry) for entry in entries.values() if entry is not None)
        best = next((path for path in found if path is not None), None)
        if best is not None or not host.option("download", False):
            return best or BUILTIN_DETECTOR
        name = next(iter(DETECTORS))
    if name == BUILTIN:
        return BUILTIN_DETECTOR
    entry = entries[name]
    assert entry is not None
    return ensure(entry)


def mask_type(name: str) -> str:
    """The mask of the menu; `automatic` is by the face parser, or an ellipse without its file."""
    if name != host.AUTOMATIC:
        return name
    return "parsing" if find(PARSER) or host.option("download", False) else "ellipse"


def parser() -> Path:
    """The face parser's file, downloaded first if it is missing and the settings allow it; our own
    small one if they do not.
    """
    allowed = bool(host.option("download", False))
    return ensure(PARSER) if allowed else find(PARSER) or BUILTIN_PARSER


def ensure_embedder() -> Path:
    """The visual embedder's file. Raises OSDFaceError that says how to get it."""
    return embedder() or ensure(VRE)
