"""Reads the embedder's weights, strictly, from the released files or from one safetensors file."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from ...errors import OSDFaceError
from ...layers import Operations, load_network
from ...weights.reading import read_tensors
from ..files import ENCODER_PREFIXES, LQ_PREFIX, PROJECTOR, PROJECTOR_PREFIX
from .embedder import VisualEmbedder
from .encoder import FULL, NORM_GROUPS, Shape

BARE_PREFIXES = (*ENCODER_PREFIXES, PROJECTOR_PREFIX)
# Names of the projector's own file: on the hub, and in the released code.
PROJECTOR_FILES = (PROJECTOR.name, "embedding_change.pth")


def embedder_files(path: Path) -> tuple[Path, ...]:
    """The files that `read_embedder` reads: `path`, and a checkpoint's projector file beside it."""
    beside = (path.with_name(name) for name in PROJECTOR_FILES)
    return (
        path,
        *([] if path.suffix == ".safetensors" else [file for file in beside if file.is_file()][:1]),
    )


def read_parts(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of encoder and code book, and those of the projector, by the embedder's names.

    The latter are none where neither the file nor one beside it holds a projector.
    """
    tensors = read_tensors(path, (LQ_PREFIX, *BARE_PREFIXES))
    state = {name.removeprefix(LQ_PREFIX): t for name, t in tensors.items()}
    encoder = {name: t for name, t in state.items() if name.startswith(BARE_PREFIXES)}
    projector = {n: encoder.pop(n) for n in list(encoder) if n.startswith(PROJECTOR_PREFIX)}
    if not projector:
        for beside in embedder_files(path)[1:]:
            projector = {PROJECTOR_PREFIX + name: t for name, t in read_tensors(beside).items()}
    return encoder, projector


def read_embedder(path: Path) -> dict[str, Tensor]:
    """The embedder's tensors by its own names.

    Raises OSDFaceError if a file cannot be read or the projector is missing.

    path: one safetensors file that holds both parts, or `associate_2.ckpt` with the projector's
        file beside it.
    """
    encoder, projector = read_parts(path)
    if not projector:
        raise OSDFaceError(
            f"{path.name} holds no projector: put {PROJECTOR_FILES[0]} beside it in {path.parent}, "
            "or run `python install.py`."
        )
    return encoder | projector


def shape_of(state: dict[str, Tensor]) -> Shape:
    """The widths of the networks that these tensors belong to; OSDFace's where they cannot tell."""
    levels = 1 + max(
        (int(name.split(".")[2]) for name in state if name.startswith("encoder.down.")), default=-1
    )
    names = ("encoder.down.0.block.0.norm1", "quant_conv", "quantize.embedding", "projector.conv1")
    found = [
        state.get(f"{name}.weight")
        for name in (*names, *(f"encoder.down.{i}.block.1.conv2" for i in range(levels)))
    ]
    sizes = [tensor.shape[0] for tensor in found if tensor is not None and tensor.ndim]
    if (
        not levels
        or len(sizes) < len(found)
        or not all(sizes)
        or any(width % NORM_GROUPS for width in (sizes[0], *sizes[4:]))
    ):
        return FULL
    channels, features, codes, hidden, *widths = sizes
    return Shape(channels, tuple(width // channels for width in widths), features, codes, hidden)


def build_embedder(
    state: dict[str, Tensor], operations: Operations = nn, source: str = "The file"
) -> VisualEmbedder:
    """A VisualEmbedder in fp32, ready to run; tensors without a place in it are ignored.

    Raises OSDFaceError that names what does not fit. source: names the file in it.
    """
    return load_network(
        lambda: VisualEmbedder(operations, shape_of(state)),
        state,
        f"{source} does not fit OSDFace's visual embedder",
        "load osdface_vre.safetensors or associate_2.ckpt.",
        spare=True,
    )
