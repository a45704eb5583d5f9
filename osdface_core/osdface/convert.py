"""Rewrites OSDFace's released files as safetensors.

The visual embedder loses its pickle, the LoRA gets kohya's names.
"""

from __future__ import annotations

import math
from pathlib import Path

from ..errors import OSDFaceError
from ..weights.checkpoint import Checkpoint
from ..weights.fetching import sha256_of, write_whole
from .files import ENCODER_PREFIXES, LQ_PREFIX, PROJECTOR_PREFIX

# Values of the encoder, quant_conv and code book, and of the projector: none may be missing or left
# over.
VRE_VALUES = 29_172_416 + 394_496
KOHYA_PREFIX = "lora_unet_"

_NUMPY_TYPES = {"FloatStorage": "<f4", "HalfStorage": "<f2", "DoubleStorage": "<f8"}


def convert_vre(checkpoint: Path, projector: Path, target: Path) -> Path:
    """Writes `target` (117 MB) from associate_2.ckpt (1.8 GB) and embedding_change_weights.pth.

    Both sources stay. Tensors: `encoder.*`, `quant_conv.*`, `quantize.embedding.weight` and
    `projector.*`, in the type they had. Only their bytes are read, and torch is not needed. The
    metadata names the SHA-256 of both sources. Raises OSDFaceError for other files.
    """
    import numpy as np
    from safetensors.numpy import save_file

    arrays: dict[str, np.ndarray] = {}
    for path, prefixes, strip, prefix in (
        (checkpoint, tuple(LQ_PREFIX + part for part in ENCODER_PREFIXES), LQ_PREFIX, ""),
        (projector, (), "", PROJECTOR_PREFIX),
    ):
        with Checkpoint(path, prefixes) as opened:
            for name, tensor in opened.tensors.items():
                if tensor.storage.kind not in _NUMPY_TYPES:
                    raise OSDFaceError(
                        f"{path.name} holds {name} as {tensor.storage.kind}: OSDFace's is fp32, "
                        "fetch the released file."
                    )
                flat = np.frombuffer(opened.read(tensor.storage), _NUMPY_TYPES[tensor.storage.kind])
                view = np.lib.stride_tricks.as_strided(
                    flat[tensor.offset :],
                    tensor.shape,
                    tuple(stride * flat.itemsize for stride in tensor.strides),
                    writeable=False,
                )
                arrays[prefix + name.removeprefix(strip)] = np.ascontiguousarray(view)
    values = sum(math.prod(array.shape) for array in arrays.values())
    if values != VRE_VALUES:
        raise OSDFaceError(
            f"{checkpoint.name} and {projector.name} are not OSDFace's: the visual embedder has "
            f"{VRE_VALUES:,} values and they hold "
            f"{values:,}; give the released associate_2.ckpt and embedding_change_weights.pth."
        )
    metadata = {
        "format": "pt",
        **{f"sha256 of {path.name}": sha256_of(path) for path in (checkpoint, projector)},
    }

    def write(fresh: Path) -> str:
        save_file(arrays, fresh, metadata)
        return sha256_of(fresh)

    return write_whole(target, write)


def convert_lora(source: Path, target: Path) -> Path:
    """Writes the LoRA of `source`, in any spelling, to `target` under kohya's names.

    ComfyUI's Load LoRA node knows all of these names. Raises OSDFaceError unless `source` holds
    exactly OSDFace's 278 modules.
    """
    from safetensors.torch import save_file

    from ..sd21.adapters import kohya_tensors
    from ..weights.reading import read_tensors
    from .lora import parse_lora

    lora = parse_lora(read_tensors(source), source.name)
    tensors = kohya_tensors(lora, lambda name: KOHYA_PREFIX + name.replace(".", "_"))
    metadata = {"format": "pt", f"sha256 of {source.name}": sha256_of(source)}

    def write(fresh: Path) -> str:
        save_file(tensors, fresh, metadata)
        return sha256_of(fresh)

    return write_whole(target, write)
