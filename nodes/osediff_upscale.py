"""OSEDiffUpscale: a picture and a text -> the picture enlarged and restored."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..osdface_core.osediff import upscale as core
from ..osdface_core.osediff.files import FACES, FOLDER, PICTURES
from ..osdface_core.osediff.upscale import COLOR_MATCHES, DEFAULT, MAX_SCALE, UpscaleOptions
from .comfy import files
from .comfy.backbone import check_restored, nan_notes
from .comfy.osediff import OSEDiffBackbone
from .comfy.progress import progress_bar, show_text
from .comfy.schema import with_newer_features
from .inputs import single_prompt


class OSEDiffUpscale(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = io.Schema(
            node_id="OSEDiffUpscale",
            display_name="OSEDiff Upscale",
            category="OSDFace",
            description="Enlarges and restores a whole picture in one step of Stable Diffusion "
            "2.1-base, by OSEDiff's weights. The frames of a batch are done one by one.",
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="One picture of any size, or a batch. Alpha is enlarged and comes "
                    "along.",
                ),
                io.Model.Input(
                    "model",
                    tooltip="Stable Diffusion 2.1-base (512 px), from Load Checkpoint. It is not "
                    "changed.",
                ),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint. It is not changed."),
                io.Conditioning.Input(
                    "conditioning",
                    tooltip="From CLIP Text Encode with the CLIP of the same checkpoint. An empty "
                    "text is right; words that say what is seen make bolder detail.",
                ),
                io.Combo.Input(
                    "osediff_name",
                    options=files.menu(FOLDER, PICTURES.name, FACES.name),
                    default=PICTURES.name,
                    tooltip="OSEDiff's weights, from models/osediff. osediff_face.safetensors is "
                    "for crops of faces, with an upscale of 1.",
                ),
                io.Float.Input(
                    "upscale",
                    default=DEFAULT.scale,
                    min=1.0,
                    max=MAX_SCALE,
                    step=0.25,
                    tooltip="How many times as wide and high the result is. The weights were "
                    "trained at 4.",
                ),
                io.Int.Input(
                    "tile",
                    default=DEFAULT.tile,
                    min=0,
                    max=8192,
                    step=64,
                    tooltip="A large result is made in tiles of so many pixels a side, at least "
                    "256; 0 makes it whole. Smaller tiles need less memory.",
                ),
                io.Int.Input(
                    "overlap",
                    default=DEFAULT.overlap,
                    min=0,
                    max=4096,
                    step=64,
                    tooltip="Pixels of the result that neighbouring tiles share, at most half a "
                    "tile. More hides seams better and takes longer.",
                ),
                io.Combo.Input(
                    "color_match",
                    options=list(COLOR_MATCHES),
                    default=COLOR_MATCHES[0],
                    tooltip="Gives the result the picture's colours. adain: its overall colour and "
                    "contrast. wavelet: all but its detail, so that light and shadow stay too. "
                    "luminance: its colours stay, only light and dark are restored. "
                    "Black-and-white and sepia stay so with any of them.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The enlarged pictures.")],
        )
        return with_newer_features(
            schema,
            search=("OSEDiff", "upscale", "super resolution", "enlarge picture", "restore picture"),
            advanced=("overlap",),
            shows=True,
        )

    @classmethod
    def validate_inputs(cls, osediff_name: object = None) -> bool:
        """Lets a name that the menu lacks through, such as one with another system's slashes."""
        return True

    @classmethod
    def fingerprint_inputs(cls, osediff_name: str | None = None, **_: Any) -> str:
        return files.fingerprint_of(osediff_name, FOLDER)

    @classmethod
    def execute(
        cls,
        image: torch.Tensor,
        model: Any,
        vae: Any,
        conditioning: list[Any],
        osediff_name: str,
        upscale: float,
        tile: int,
        overlap: int,
        color_match: str,
    ) -> io.NodeOutput:
        prompts, options = single_prompt(conditioning, "CLIP Text Encode")
        wanted = UpscaleOptions(upscale, tile, overlap, color_match)
        # Before files are read or fetched.
        core.check(image, prompts, wanted)
        progress = progress_bar(len(image) * core.steps(image.shape[1], image.shape[2], wanted))
        with OSEDiffBackbone(model, vae, options, osediff_name) as host:
            result = core.upscale(image, prompts, host, wanted, progress=progress)
        check_restored(result, "picture", "number")
        notes = nan_notes(result, "Pictures", "and are only enlarged")
        return io.NodeOutput(result.pictures, ui=show_text(notes) if notes else None)
