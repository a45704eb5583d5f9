"""Our own networks in ComfyUI's memory management."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import torch
from torch import Tensor, nn

from ...osdface_core import chunks
from ...osdface_core.faces.detect import memory_for
from ...osdface_core.faces.detector_check import build_detector
from ...osdface_core.faces.face_parser import (
    BYTES_PER_FACE,
    ParseNet,
    SmallParser,
    build_parser,
    parse_faces,
)
from ...osdface_core.faces.files import BUILTIN_PARSER, BUILTIN_PARSER_USED, DETECTORS
from ...osdface_core.faces.files import FOLDER as FACES
from ...osdface_core.faces.retinaface import RetinaFace
from ...osdface_core.osdface.files import FOLDER as OSDFACE
from ...osdface_core.osdface.vre import (
    VisualEmbedder,
    build_embedder,
    embed,
    embedder_files,
    read_embedder,
)
from ...osdface_core.weights.reading import read_tensors
from .files import cached, find, find_parser, naming_input

log = logging.getLogger(__name__)

# Most faces in a chunk: progress is shown, and the UNet can be stopped, between two chunks.
MAX_BATCH = 16
# Peak of the embedder's activations for a 512 px crop in fp32, in bytes.
EMBEDDER_BYTES = 450 * 1024**2


def _with_weights(layer: type[nn.Module], plain: type[nn.Module]) -> Any:
    """ComfyUI's layer, with its weights made in `__init__`.

    Newer hosts' layers make them later, unless a subclass loads its weights itself.
    """
    methods = {
        "__init__": plain.__init__,
        "_load_from_state_dict": nn.Module._load_from_state_dict,
    }
    return type(layer.__name__, (layer,), methods)


class Operations(comfy.ops.manual_cast):
    """ComfyUI's layers, which cast weights to the input's type and which it can page."""

    Linear = _with_weights(comfy.ops.manual_cast.Linear, nn.Linear)
    Embedding = _with_weights(comfy.ops.manual_cast.Embedding, nn.Embedding)


def make_patcher(
    module: nn.Module, load_device: torch.device, offload_device: torch.device
) -> comfy.model_patcher.ModelPatcher:
    """The host's handle of a network; that of newer hosts pages weights in as they are used."""
    name = "CoreModelPatcher"
    kind = getattr(comfy.model_patcher, name, comfy.model_patcher.ModelPatcher)
    return kind(module, load_device=load_device, offload_device=offload_device)


def load_network(
    path: Path,
    build: Callable[[dict[str, Tensor], Any], nn.Module],
    memory: float = 0,
    read: Callable[[Path], dict[str, Tensor]] = read_tensors,
    files_of: Callable[[Path], tuple[Path, ...]] = lambda path: (path,),
) -> nn.Module:
    """The network of a weight file, on the device that ComfyUI computes on, ready to be called.

    It is read once for each state of its files, stays loaded between runs, and leaves the device
    when ComfyUI needs the room. Raises ComfyUI's own error when the user has asked to stop.

    path: the file.
    build: (tensors, operations) -> module.
    memory: bytes that its activations will take.
    read: reads the file.
    files_of: all files that `read` reads.
    """
    mm.throw_exception_if_processing_interrupted()

    def make() -> comfy.model_patcher.ModelPatcher:
        module = build(read(path), Operations)
        return make_patcher(module, mm.get_torch_device(), mm.unet_offload_device())

    patcher = cached(build.__module__ + "." + build.__qualname__, files_of(path), make)
    mm.load_models_gpu([patcher], memory_required=memory)
    _bring(patcher.model, patcher.load_device)
    return patcher.model


def _bring(network: nn.Module, device: torch.device) -> None:
    """Moves to `device` those layers that the host does not cast there as they are used.

    With --novram, or where room is short, it leaves all weights where they are. Batch norms would
    stay on the CPU, and where they are the network computes. When the network is unloaded, the host
    takes them back with the rest.
    """
    for module in network.modules():
        if not hasattr(module, "comfy_cast_weights"):
            for name, weight in module._parameters.items():
                if weight is not None and weight.device != device:
                    module._parameters[name] = nn.Parameter(weight.to(device), False)
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device != device:
                    module._buffers[name] = buffer.to(device)


def load_detector(name: str, image: Tensor) -> RetinaFace:
    """The face detector of this name, with memory made free for pictures (B,H,W,C)."""
    with naming_input("detector"):
        path = find(DETECTORS[name], FACES)
        network = load_network(path, build_detector, memory_for(*image.shape[:3]))
    assert isinstance(network, RetinaFace)
    return network


def load_embedder(vre_name: str, faces: int) -> tuple[VisualEmbedder, torch.device]:
    """The visual embedder of a file of models/osdface, and the device that it computes on.

    Memory is made free for so many faces at once.
    """
    with naming_input("vre_name"):
        path = find(vre_name, OSDFACE)
        memory = faces * EMBEDDER_BYTES
        network = load_network(path, build_embedder, memory, read_embedder, embedder_files)
    assert isinstance(network, VisualEmbedder)
    return network, mm.get_torch_device()


def embed_crops(crops: Tensor, vre_name: str, progress: chunks.Progress) -> Tensor:
    """The prompts (N,77,1024) of crops (N,H,W,3) in [0,1], by an embedder's file."""
    return embed(
        crops,
        partial(load_embedder, vre_name),
        at_once=max_batch(EMBEDDER_BYTES),
        out_of_memory=is_out_of_memory,
        progress=progress,
    )


def parse_crops(crops: Tensor) -> Tensor:
    """The face maps (N,512,512) in [0,1] of crops (N,S,S,3) in [0,1].

    The parser's file is needed only here, so not in a graph without faces. Where it is missing, the
    small built-in parser takes its place.
    """
    maps = []
    for part in crops.split(max_batch(BYTES_PER_FACE)):
        with naming_input("mask_type"):
            path = find_parser()
            build = _build_small_parser if path == BUILTIN_PARSER else build_parser
            network = load_network(path, build, len(part) * BYTES_PER_FACE)
        assert isinstance(network, ParseNet | SmallParser)
        maps.append(parse_faces(part, network, is_out_of_memory))
    return torch.cat(maps)


def _build_small_parser(tensors: dict[str, Tensor], operations: Any) -> nn.Module:
    log.warning("%s: `python install.py` in this pack's folder fetches it.", BUILTIN_PARSER_USED)
    return build_parser(tensors, operations)


def device() -> torch.device:
    """The device that ComfyUI computes on."""
    found: torch.device = mm.get_torch_device()
    return found


def max_batch(memory: float) -> int:
    """Faces that a network of ours takes at once, if it needs `memory` bytes for each.

    One on a CPU, so that a run can be stopped in between.
    """
    device = mm.get_torch_device()
    return 1 if mm.is_device_cpu(device) else clamp_batch(free_memory(device) / memory)


def clamp_batch(faces: float) -> int:
    """The number of faces, rounded down to 1..MAX_BATCH."""
    return max(1, min(MAX_BATCH, int(faces)))


def free_memory(device: torch.device, *staying: comfy.model_patcher.ModelPatcher) -> float:
    """Bytes for activations on `device` once every loaded model but `staying` has left it."""
    loaded = sum(
        patcher.loaded_size()
        for patcher in mm.loaded_models()
        if patcher and patcher.load_device == device
    )
    kept = sum(patcher.model_size() for patcher in staying) + mm.extra_reserved_memory()
    return mm.get_free_memory(device) + loaded - kept


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, according to torch or to what newer hosts recognise beside it."""
    name = "is_oom"
    of_host: Callable[[BaseException], bool] = getattr(mm, name, lambda error: False)
    return chunks.is_out_of_memory(error) or of_host(error)
