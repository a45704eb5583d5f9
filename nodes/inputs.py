"""Inputs that several nodes have, and how they are read."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..osdface_core.errors import OSDFaceError
from ..osdface_core.faces.choose import ORDER, SELECT

FACES = io.Custom("OSDFACE_FACES")


def choice_inputs() -> dict[str, Any]:
    """The inputs that choose faces, by their ids."""
    inputs = [
        io.Combo.Input(
            "select",
            options=list(SELECT),
            default=SELECT[0],
            tooltip="Which faces are meant, in each picture. If none is, nothing is restored.",
        ),
        io.Combo.Input(
            "order",
            options=list(ORDER),
            default=ORDER[0],
            tooltip="The order in which faces are numbered and max_faces counts them. Over a "
            "video a person keeps one number.",
        ),
        io.String.Input(
            "indices",
            default="0",
            tooltip='Numbers of the faces that are meant when select is "by index", as the '
            'preview shows them: "0", or "0,2-4".',
        ),
        io.Int.Input(
            "max_faces",
            default=0,
            min=0,
            max=1000,
            tooltip="At most so many faces in each picture; 0 is no limit.",
        ),
        io.Int.Input(
            "min_size",
            default=24,
            min=0,
            max=16384,
            tooltip="Faces smaller than this are left as they are: the shorter side of the face's "
            "box, in pixels of the picture.",
        ),
        io.Int.Input(
            "max_size",
            default=0,
            min=0,
            max=16384,
            tooltip="Faces larger than this are left as they are; 0 is no limit.",
        ),
    ]
    return {item.id: item for item in inputs}


def single_prompt(conditioning: list[Any], origin: str) -> tuple[Tensor, dict[str, Any]]:
    """The prompts of a CONDITIONING, and the sampler options that nodes in between added.

    Raises OSDFaceError for prompts that were combined. origin: the node that should be connected.
    """
    if len(conditioning) != 1:
        raise OSDFaceError(
            f"`conditioning` holds {len(conditioning)} prompts that were combined; exactly one is "
            f"wanted: connect the conditioning of {origin} directly."
        )
    prompts, options = conditioning[0]
    return prompts, options


def seed_input() -> Any:
    """The seed of DiffIR, which stays as it is from run to run."""
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=2**32 - 1,
        control_after_generate=False,
        tooltip="Of the vector that the networks start from, one for all pictures and tiles. The "
        "same seed gives the same picture; another changes little.",
    )
