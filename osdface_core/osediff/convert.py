"""Rewrites OSEDiff's released pickle as safetensors."""

from __future__ import annotations

from pathlib import Path

from ..weights.fetching import sha256_of, write_whole


def convert(source: Path, target: Path) -> Path:
    """Writes `target` from osediff.pkl or osediff_face.pkl, which stays.

    The adapters get plain names and their alpha, from which their scale follows. Raises
    OSDFaceError for a file that is not complete, or holds anything else.
    """
    from safetensors.torch import save_file

    from ..weights.reading import read_tensors
    from .weights import as_tensors, parse_weights

    tensors = as_tensors(parse_weights(read_tensors(source), source.name))
    metadata = {"format": "pt", f"sha256 of {source.name}": sha256_of(source)}

    def write(fresh: Path) -> str:
        save_file(tensors, fresh, metadata)
        return sha256_of(fresh)

    return write_whole(target, write)
