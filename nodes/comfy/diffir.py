"""DiffIR's networks in ComfyUI's memory management."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ...osdface_core.diffir.enhance import Enhanced
from ...osdface_core.diffir.files import FOLDER
from ...osdface_core.diffir.network import DiffIR, build_network
from ...osdface_core.diffir.weights import read_weights
from ...osdface_core.errors import OSDFaceError
from . import networks
from .files import find, naming_input
from .progress import show_text


def load_diffir(name: str, memory: int) -> tuple[DiffIR, torch.device]:
    """The network of a file of models/diffir, and the device that it computes on.

    Memory is made free for so many bytes of activations.
    """
    with naming_input("diffir_name"):
        network = networks.load_network(find(name, FOLDER), build_network, memory, read_weights)
    assert isinstance(network, DiffIR)
    return network, networks.device()


def output(result: Enhanced, left: str) -> io.NodeOutput:
    """The node's output, which tells of pictures that came out as NaN.

    Raises OSDFaceError where all did. left: what became of them.
    """
    which = ", ".join(map(str, result.failed))
    remedy = "choose another file in `diffir_name`, or start ComfyUI without --fast."
    if result.failed and len(result.failed) == len(result.pictures):
        raise OSDFaceError(f"Every picture (number {which}) came out as NaN: {remedy}")
    note = f"Pictures {which} came out as NaN {left}: {remedy}"
    return io.NodeOutput(result.pictures, ui=show_text(note) if which else None)
