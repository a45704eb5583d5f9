"""DiffIREnhance: pictures -> the pictures enlarged or sharpened, as the chosen file does it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from comfy_api.latest import io

from ..osdface_core.diffir import enhance as core
from ..osdface_core.diffir.enhance import DEFAULT, EnhanceOptions
from ..osdface_core.diffir.files import ENHANCERS, FOLDER
from ..osdface_core.diffir.network import start_vector
from .comfy import files
from .comfy.diffir import load_diffir, output
from .comfy.networks import is_out_of_memory
from .comfy.progress import progress_bar
from .comfy.schema import with_newer_features
from .inputs import seed_input


class DiffIREnhance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = io.Schema(
            node_id="DiffIREnhance",
            display_name="DiffIR Enhance",
            category="OSDFace",
            description="Enlarges pictures, cleans them or takes motion blur away by a small "
            "network of DiffIR, without a checkpoint. What it does is in the file.",
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="One picture of any size, or a batch, such as the frames of a video. "
                    "Alpha comes along.",
                ),
                io.Combo.Input(
                    "diffir_name",
                    options=files.menu(FOLDER, *ENHANCERS),
                    default=next(iter(ENHANCERS)),
                    tooltip="DiffIR's weights, from models/diffir; the number after x is how many "
                    "times as wide and high the result is. Those named V2 clean more.",
                ),
                io.Int.Input(
                    "tile",
                    default=DEFAULT.tile,
                    min=0,
                    max=8192,
                    step=64,
                    tooltip="A large result is made in tiles of so many pixels a side, at least "
                    "128; 0 makes it whole. Smaller tiles need less memory.",
                ),
                io.Int.Input(
                    "overlap",
                    default=DEFAULT.overlap,
                    min=0,
                    max=4096,
                    step=32,
                    tooltip="Pixels of the result that neighbouring tiles share, at most half a "
                    "tile. More hides seams better and takes longer.",
                ),
                seed_input(),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The enhanced pictures.")],
        )
        return with_newer_features(
            schema,
            search=("DiffIR", "deblur", "motion blur", "upscale", "super resolution", "denoise"),
            advanced=("overlap", "seed"),
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
        cls, image: torch.Tensor, diffir_name: str, tile: int, overlap: int, seed: int
    ) -> io.NodeOutput:
        result = core.enhance(
            image,
            partial(load_diffir, diffir_name),
            EnhanceOptions(tile, overlap),
            start=start_vector(seed),
            progress=progress_bar,
            out_of_memory=is_out_of_memory,
        )
        return output(result, "and are only enlarged")
