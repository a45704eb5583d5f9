"""OSDFaceVRE: face crops -> visual prompts."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..osdface_core.chunks import in_chunks
from ..osdface_core.one_step import check_crops
from ..osdface_core.vre import TOKENS, WIDTH
from ..osdface_core.weights.catalogue import OSDFACE, VRE, VRE_CHECKPOINT
from . import host


class OSDFaceVRE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OSDFaceVRE",
            display_name="OSDFace Visual Prompts",
            category="OSDFace",
            description="Describes each face crop by visual prompts, which take the place of the text prompt in OSDFace One Step.",
            inputs=[
                io.Image.Input("crops", tooltip="Aligned face crops, from Face Detect & Align."),
                io.Combo.Input(
                    "vre_name",
                    options=host.names(OSDFACE, VRE.name, VRE_CHECKPOINT.name),
                    default=VRE.name,
                    tooltip="The embedder's weights, from models/osdface.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning", tooltip="77 visual prompts for each crop. Only OSDFace One Step understands them."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, vre_name: str | None = None, **_: Any) -> str:
        return host.state_of(vre_name, OSDFACE)

    @classmethod
    def execute(cls, crops: torch.Tensor, vre_name: str) -> io.NodeOutput:
        check_crops(crops)
        prompts = torch.zeros(len(crops), TOKENS, WIDTH)
        report = host.progress(len(crops))
        pixels = crops.movedim(-1, 1)

        def work(part: slice) -> None:
            network = host.embedder(vre_name, part.stop - part.start)
            device = host.mm.get_torch_device()
            prompts[part] = network(pixels[part].to(device)).to(prompts)
            report(part.stop - part.start)

        if len(crops):
            in_chunks(len(crops), host.embedder_faces_that_fit(), work, host.out_of_memory)
        return io.NodeOutput([[prompts, {}]])
