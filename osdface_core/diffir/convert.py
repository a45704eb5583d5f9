"""Rewrites DiffIR's released files as safetensors: half the bytes or fewer, and nothing to run."""

from __future__ import annotations

from pathlib import Path

from ..errors import OSDFaceError
from ..weights.fetching import sha256_of, write_whole
from .files import released_name
from .network import build_network, read_shape
from .weights import is_diffir, read_weights

SOURCE = "sha256 of "


def convert(source: Path, target: Path) -> Path:
    """Writes `target` with the network of `source`, which stays.

    The digest of `source` is in the metadata. Raises OSDFaceError for a file that does not hold a
    network of DiffIR's second stage.
    """
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in read_weights(source).items()}
    shape = build_network(dict(tensors), source=source.name).shape
    metadata = {
        "format": "pt",
        "diffir": f"{shape.job} x{shape.scale}",
        f"{SOURCE}{source.name}": sha256_of(source),
    }

    def write(fresh: Path) -> str:
        save_file(tensors, fresh, metadata)
        return sha256_of(fresh)

    return write_whole(target, write)


def is_made_from(target: Path, source: Path) -> bool:
    """Whether `target` is there, and is `source` or was made from it."""
    from safetensors import safe_open

    if not target.is_file():
        return False
    if target.samefile(source):
        return True
    with safe_open(target, framework="np") as file:
        held = file.metadata() or {}
    digests = [value for name, value in held.items() if name.startswith(SOURCE)]
    return sha256_of(source) in digests


def recognise_all(folder: Path) -> dict[str, Path]:
    """The files in or under `folder` that hold DiffIR's networks, by their names when converted.

    They are recognised by content. Raises OSDFaceError where two files would get one name.
    """
    found: dict[str, Path] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if not is_diffir(path):
            continue
        job = read_shape(read_weights(path), path.name).job
        name = f"{released_name(path, job)}.safetensors"
        known = found.setdefault(name, path)
        if known != path and sha256_of(known) != sha256_of(path):
            raise OSDFaceError(
                f"{path} and {known} would both become {name}: keep each in a folder of the name "
                "that it was released in, such as DiffIRS2-celeba."
            )
    return found
