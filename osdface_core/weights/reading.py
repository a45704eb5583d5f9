"""Reads the tensors of a weight file: safetensors, or a pickled checkpoint, which is never run."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import OSDFaceError
from .checkpoint import Checkpoint, StoredTensor

_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def read_tensors(path: Path, prefixes: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pth or .ckpt file by name, on the CPU.

    The content decides the format. A checkpoint's top-level "state_dict" is unwrapped. prefixes:
    keep only the names that start with one of them; the bytes of the others are not read. Tensors
    that share a storage in the file share it here. Raises OSDFaceError for a file that is missing,
    damaged, of another format, or made to run code.
    """
    if not path.is_file():
        raise OSDFaceError(
            f"There is no file {path}: run `python install.py` in the folder of this extension, "
            "or put the file there."
        )
    try:
        if is_safetensors(path):
            return _read_safetensors(path, prefixes)
        with Checkpoint(path, prefixes) as checkpoint:
            flat = {
                storage.key: torch.frombuffer(checkpoint.read(storage), dtype=_DTYPES[storage.kind])
                for storage in {tensor.storage for tensor in checkpoint.tensors.values()}
                if storage.size
            }
            return {name: _view(flat, tensor) for name, tensor in checkpoint.tensors.items()}
    except OSError as error:
        raise OSDFaceError(
            f"{path} cannot be read ({error.strerror or error}): check the disk and the file's "
            "permissions."
        ) from error


def _view(flat: dict[str, Tensor], tensor: StoredTensor) -> Tensor:
    if tensor.storage.key not in flat:
        return torch.empty(tensor.shape, dtype=_DTYPES[tensor.storage.kind])
    return flat[tensor.storage.key].as_strided(tensor.shape, tensor.strides, tensor.offset)


def is_safetensors(path: Path) -> bool:
    """Whether the file starts with the length of a header and the header's brace."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and not start.startswith((b"PK", b"\x80\x02"))


def _read_safetensors(path: Path, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = [name for name in file.keys() if name.startswith(prefixes or "")]  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise OSDFaceError(
            f"{path.name} is cut off or damaged ({error}): fetch the file again."
        ) from error
    if not tensors:
        wanted = f" whose names start with {' or '.join(prefixes)}" if prefixes else ""
        raise OSDFaceError(
            f"{path.name} holds no tensors{wanted}: it is another file than the one wanted, fetch "
            "that one."
        )
    return tensors
