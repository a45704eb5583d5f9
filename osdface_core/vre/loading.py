"""Reads the embedder's weights from the released files or from one safetensors file, strictly."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import OSDFaceError
from ..weights.reading import read_tensors
from .embedder import VisualEmbedder
from .encoder import Operations

LQ_PREFIX = "vqvae_LQ."
BARE_PREFIXES = ("encoder.", "quant_conv.", "quantize.embedding.", "projector.")
PROJECTOR_FILES = ("embedding_change_weights.pth", "embedding_change.pth")


def embedder_files(path: Path) -> tuple[Path, ...]:
    """The files that `read_embedder` reads: `path`, and the projector's file beside a checkpoint that does not hold it."""
    beside = (path.with_name(name) for name in PROJECTOR_FILES)
    return (path, *([] if path.suffix == ".safetensors" else [file for file in beside if file.is_file()][:1]))


def read_embedder(path: Path) -> dict[str, Tensor]:
    """The embedder's tensors under their own names, from `path`.

    path: one safetensors file that holds both parts, or `associate_2.ckpt` with the projector's file beside it.
    Raises OSDFaceError if a file cannot be read, or its projector is not there.
    """
    tensors = read_tensors(path, (LQ_PREFIX, *BARE_PREFIXES))
    state = {name.removeprefix(LQ_PREFIX): t for name, t in tensors.items()}
    state = {name: t for name, t in state.items() if name.startswith(BARE_PREFIXES)}
    if not any(name.startswith("projector.") for name in state):
        _, *projector = embedder_files(path)
        if not projector:
            raise OSDFaceError(
                f"{path.name} holds no projector: put {PROJECTOR_FILES[0]} beside it in {path.parent}, or run `python install.py`."
            )
        state |= {f"projector.{name}": t for name, t in read_tensors(projector[0]).items()}
    return state


def build_embedder(state: dict[str, Tensor], operations: Operations = nn, source: str = "the file") -> VisualEmbedder:
    """A network in fp32, ready to run.

    Raises OSDFaceError that names each tensor that is missing, misshapen or not finite; others are left aside.
    """
    with torch.device("meta"):
        network = VisualEmbedder(operations)
    wanted = network.state_dict()
    wrong = [f"{name} is {fault}" for name, w in wanted.items() if (fault := _fault(state.get(name), w.shape))]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise OSDFaceError(
            f"{source} is not OSDFace's visual embedder ({'; '.join(wrong[:3])}{more}): load osdface_vre.safetensors or associate_2.ckpt."
        )
    network.load_state_dict({name: state[name] for name in wanted}, assign=True)
    return network.float().eval().requires_grad_(False)


def _fault(tensor: Tensor | None, shape: torch.Size) -> str:
    if tensor is None:
        return "missing"
    if tensor.shape != shape:
        return f"{tuple(tensor.shape)} instead of {tuple(shape)}"
    return "" if bool(tensor.isfinite().all()) else "not finite"
