"""OSDFaceVRE: face crops -> visual prompts."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..osdface_core.chunks import Progress
from ..osdface_core.osdface import builtin
from ..osdface_core.osdface.restore import check_crops
from ..osdface_core.osdface.vre import embed, embedder_files
from ..osdface_core.weights.catalogue import OSDFACE, VRE, VRE_CHECKPOINT
from .comfy import host


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
                    options=[*host.names(OSDFACE, VRE.name, VRE_CHECKPOINT.name), builtin.NAME],
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
        return host.with_extras(
            schema, search=("OSDFace", "visual representation embedder", "VRE", "encode face")
        )

    @classmethod
    def fingerprint_inputs(cls, vre_name: str | None = None, **_: Any) -> str:
        return host.state_of(vre_name, OSDFACE, embedder_files)

    @classmethod
    def execute(cls, crops: torch.Tensor, vre_name: str) -> io.NodeOutput:
        check_crops(crops)
        return io.NodeOutput(
            [[visual_prompts(crops, vre_name, host.progress(len(crops))), prompt_options(vre_name)]]
        )


def prompt_options(vre_name: str) -> dict[str, Any]:
    """What goes along with the prompts: which model they are for, if it is the built-in one."""
    return {host.BUILTIN_MARK: True} if vre_name == builtin.NAME else {}


def visual_prompts(crops: torch.Tensor, vre_name: str, progress: Progress) -> torch.Tensor:
    return embed(
        crops,
        lambda faces: host.embedder(vre_name, faces),
        at_once=host.faces_that_fit(host.EMBEDDER_MEMORY),
        out_of_memory=host.out_of_memory,
        progress=progress,
    )
