"""DiffIRInpaint: pictures and masks -> the pictures with their holes filled."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from comfy_api.latest import io

from ..osdface_core.diffir.files import FOLDER, INPAINTERS
from ..osdface_core.diffir.inpaint import SIDES, InpaintOptions, inpaint
from ..osdface_core.diffir.network import start_vector
from ..osdface_core.weights.catalogue import BUILTIN
from .comfy import files
from .comfy.diffir import load_diffir, output
from .comfy.networks import is_out_of_memory
from .comfy.progress import progress_bar
from .comfy.schema import with_newer_features
from .inputs import seed_input


def default_inpainter() -> str:
    """The first released file that is there; the built-in network where none is."""
    return files.first_present(INPAINTERS, FOLDER) or BUILTIN


class DiffIRInpaint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = io.Schema(
            node_id="DiffIRInpaint",
            display_name="DiffIR Inpaint",
            category="OSDFace",
            description="Fills scratches, tears and other holes by a small network of DiffIR, "
            "without a checkpoint or a text. Every pixel outside of the mask stays as it is.",
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="One picture of any size, or a batch. Alpha comes along unchanged.",
                ),
                io.Mask.Input(
                    "mask",
                    tooltip="The holes, of the picture's size: every pixel that is not black is "
                    "filled. One for all pictures, or one for each.",
                ),
                io.Combo.Input(
                    "diffir_name",
                    options=[*files.menu(FOLDER, *INPAINTERS), BUILTIN],
                    default=default_inpainter(),
                    tooltip="DiffIR's weights, from models/diffir. celeba is for upright faces, "
                    "place for everything else. builtin is small and needs no file.",
                ),
                io.Combo.Input(
                    "working_size",
                    options=list(SIDES),
                    default=SIDES[0],
                    tooltip="Pixels of the picture's shorter side while it is filled. 256 for "
                    "celeba, 512 for place; picture keeps its size, for thin scratches.",
                ),
                io.Int.Input(
                    "feather",
                    default=0,
                    min=0,
                    max=256,
                    tooltip="Pixels, inside of the mask's edge, over which the fill fades into the "
                    "picture.",
                ),
                seed_input(),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The filled pictures.")],
        )
        return with_newer_features(
            schema,
            search=("DiffIR", "inpaint", "fill hole", "remove scratches", "remove object"),
            advanced=("seed",),
            shows=True,
        )

    @classmethod
    def validate_inputs(cls, diffir_name: object = None) -> bool:
        """Lets a name that the menu lacks through, such as one with another system's slashes."""
        return True

    @classmethod
    def fingerprint_inputs(cls, diffir_name: str | None = None, **_: Any) -> str:
        return files.fingerprint_of(diffir_name, FOLDER)

    @classmethod
    def execute(
        cls,
        image: torch.Tensor,
        mask: torch.Tensor,
        diffir_name: str,
        working_size: str,
        feather: int,
        seed: int,
    ) -> io.NodeOutput:
        result = inpaint(
            image,
            mask,
            partial(load_diffir, diffir_name),
            InpaintOptions(working_size, feather),
            start=start_vector(seed),
            progress=progress_bar,
            out_of_memory=is_out_of_memory,
        )
        return output(result, "and are left as they were")
