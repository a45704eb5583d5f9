"""OSDFaceVRE: face crops -> visual prompts."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..osdface_core.osdface.files import FOLDER, VRE, VRE_CHECKPOINT
from ..osdface_core.osdface.restore import check_crops
from ..osdface_core.osdface.vre import embedder_files
from ..osdface_core.weights.catalogue import BUILTIN
from .comfy import files, networks
from .comfy.base_model import prompt_options
from .comfy.progress import progress_bar
from .comfy.schema import with_newer_features


class OSDFaceVRE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = io.Schema(
            node_id="OSDFaceVRE",
            display_name="OSDFace Visual Prompts",
            category="OSDFace",
            description="Describes each face crop by visual prompts, which take the place of the "
            "text prompt in OSDFace One Step.",
            inputs=[
                io.Image.Input("crops", tooltip="Aligned face crops, from Face Detect & Align."),
                io.Combo.Input(
                    "vre_name",
                    options=[*files.menu(FOLDER, VRE.name, VRE_CHECKPOINT.name), BUILTIN],
                    default=VRE.name,
                    tooltip="The embedder's weights, from models/osdface; builtin goes with "
                    "OSDFace Built-in Model.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning",
                    tooltip="77 visual prompts for each crop. Only OSDFace One Step understands "
                    "them.",
                )
            ],
        )
        return with_newer_features(
            schema, search=("OSDFace", "visual representation embedder", "VRE", "encode face")
        )

    @classmethod
    def validate_inputs(cls, vre_name: object = None) -> bool:
        """Lets a name that the menu lacks through, such as one with another system's slashes."""
        return True

    @classmethod
    def fingerprint_inputs(cls, vre_name: str | None = None, **_: Any) -> str:
        return files.fingerprint_of(vre_name, FOLDER, embedder_files)

    @classmethod
    def execute(cls, crops: torch.Tensor, vre_name: str) -> io.NodeOutput:
        check_crops(crops)
        prompts = networks.embed_crops(crops, vre_name, progress_bar(len(crops)))
        return io.NodeOutput([[prompts, prompt_options(vre_name)]])
