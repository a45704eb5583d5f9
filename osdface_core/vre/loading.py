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


def read_embedder(path: Path) -> dict[str, Tensor]:
    """The embedder's tensors under their own names, from `path`.

    path: one safetensors file that holds both parts, or `associate_2.ckpt` with the projector's file beside it.
    Raises OSDFaceError if a file cannot be read, or its projector is not there.
    """
    tensors = read_tensors(path, (LQ_PREFIX, *BARE_PREFIXES))
    state = {name.removeprefix(LQ_PREFIX): t for name, t in tensors.items()}
    state = {name: t for name, t in state.items() if name.startswith(BARE_PREFIXES)}
    if not any(name.startswith("projector.") for name in state):
        beside = next((path.with_name(n) for n in PROJECTOR_FILES if path.with_name(n).is_file()), None)
        if beside is None:
            raise OSDFaceError(
                f"{path.name} holds no projector: put {PROJECTOR_FILES[0]} beside it in {path.parent}, or run `python install.py`."
            )
        state |= {f"projector.{name}": t for name, t in read_tensors(beside).items()}
    return state


def build_embedder(state: dict[str, Tensor], operations: Operations = nn, source: str = "the file") -> VisualEmbedder:
    """A network ready to run, its parameters the very tensors of `state`.

    Raises OSDFaceError that names each tensor that is missing or misshapen; others are left aside.
    """
    with torch.device("meta"):
        network = VisualEmbedder(operations)
    wanted = network.state_dict()
    wrong = [
        f"{name} is {'missing' if name not in state else f'{tuple(state[name].shape)} instead of {tuple(w.shape)}'}"
        for name, w in wanted.items()
        if name not in state or state[name].shape != w.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise OSDFaceError(
            f"{source} is not OSDFace's visual embedder ({'; '.join(wrong[:3])}{more}): load osdface_vre.safetensors or associate_2.ckpt."
        )
    network.load_state_dict({name: state[name] for name in wanted}, assign=True)
    return network.eval().requires_grad_(False)
