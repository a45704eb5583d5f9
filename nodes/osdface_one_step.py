"""OSDFaceOneStep: face crops and their visual prompts -> restored crops."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..osdface_core.osdface.files import LORA, LORAS
from ..osdface_core.osdface.restore import TIMESTEP, restore
from ..osdface_core.sd21.schedule import TIMESTEPS
from ..osdface_core.weights.catalogue import NONE
from .comfy import backbone, files
from .comfy.backbone import check_restored, nan_notes
from .comfy.progress import progress_bar, show_text
from .comfy.schema import with_newer_features
from .inputs import single_prompt


class OSDFaceOneStep(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = io.Schema(
            node_id="OSDFaceOneStep",
            display_name="OSDFace One Step",
            category="OSDFace",
            description="Restores face crops in one step of Stable Diffusion 2.1-base with "
            "OSDFace's LoRA.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="Stable Diffusion 2.1-base (512 px), from Load Checkpoint. It is not "
                    "changed.",
                ),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
                io.Image.Input(
                    "crops", tooltip="The same crops that the visual prompts were made from."
                ),
                io.Conditioning.Input(
                    "conditioning",
                    tooltip="From OSDFace Visual Prompts; a text prompt does not do.",
                ),
                io.Combo.Input(
                    "lora_name",
                    options=[*files.menu(LORAS, LORA.name), NONE],
                    default=LORA.name,
                    tooltip="OSDFace's LoRA, from models/osdface or models/loras; none for a "
                    "model that already holds it.",
                ),
                io.Float.Input(
                    "lora_strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="1 is what the LoRA was trained for; less restores less.",
                ),
                io.Int.Input(
                    "timestep",
                    default=TIMESTEP,
                    min=0,
                    max=TIMESTEPS - 1,
                    tooltip="The diffusion step that is undone. The weights were trained at 399; "
                    "other values are an effect.",
                ),
                io.Int.Input(
                    "faces_per_batch",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip="Faces restored at once; 0 takes as many as the free memory holds.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="restored", tooltip="The restored crops, in the same order."
                )
            ],
        )
        return with_newer_features(
            schema,
            search=("OSDFace", "restore face crop", "one-step diffusion"),
            advanced=("timestep", "faces_per_batch"),
            shows=True,
        )

    @classmethod
    def validate_inputs(cls, lora_name: object = None) -> bool:
        """Lets a name that the menu lacks through, such as one with another system's slashes."""
        return True

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None = None, **_: Any) -> str:
        return files.fingerprint_of(lora_name, LORAS)

    @classmethod
    def execute(
        cls,
        model: Any,
        vae: Any,
        crops: torch.Tensor,
        conditioning: list[Any],
        lora_name: str,
        lora_strength: float,
        timestep: int,
        faces_per_batch: int,
    ) -> io.NodeOutput:
        prompts, options = single_prompt(conditioning, "OSDFace Visual Prompts")
        result = restore(
            crops,
            prompts,
            backbone.HostBackbone(model, vae, options, lora_name, lora_strength),
            timestep=timestep,
            faces_per_batch=faces_per_batch,
            progress=progress_bar(len(crops)),
        )
        check_restored(result)
        notes = nan_notes(result, "Crops", "and are left as they were")
        return io.NodeOutput(result.pictures, ui=show_text(notes) if notes else None)
