"""Files told apart by the names and shapes of their tensors, none of which is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..errors import OSDFaceError
from .catalogue import WeightFile


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a file's tensors, which are not read. Raises OSDFaceError or OSError."""
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
    """Whether `held`, names and shapes of tensors, contains the signature of `entry`."""
    held = {name.removeprefix("module."): shape for name, shape in held.items()}
    return all(held.get(name) == shape for name, shape in entry.signature.items())
