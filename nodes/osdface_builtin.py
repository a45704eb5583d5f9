"""OSDFaceBuiltinModel: the small model that needs no file, as ComfyUI's MODEL and VAE."""

from __future__ import annotations

from comfy_api.latest import io

from ..osdface_core.osdface import builtin
from .comfy import files
from .comfy.builtin import make_model, make_vae
from .comfy.progress import show_text
from .comfy.schema import with_newer_features


class OSDFaceBuiltinModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = io.Schema(
            node_id="OSDFaceBuiltinModel",
            display_name="OSDFace Built-in Model (small)",
            category="OSDFace",
            description="A small model that comes with this pack, to try it with nothing "
            "downloaded. It restores far less well than "
            "OSDFace's own weights. Choose builtin as vre_name and none as lora_name with it.",
            inputs=[],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="For OSDFace One Step, with vre_name builtin and lora_name none.",
                ),
                io.Vae.Output(display_name="vae", tooltip="For OSDFace One Step."),
            ],
        )
        return with_newer_features(schema, search=("OSDFace", "built-in", "no download"))

    @classmethod
    def execute(cls) -> io.NodeOutput:
        model = files.cached("builtin model", (builtin.UNET,), make_model)
        vae = files.cached("builtin vae", (builtin.AUTOENCODER,), make_vae)
        return io.NodeOutput(model, vae, ui=show_text(builtin.ANNOUNCEMENT))
