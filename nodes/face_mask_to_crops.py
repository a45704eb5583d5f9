"""FaceMaskToCrops: a mask painted on the picture -> the same mask on each face's crop."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from ..osdface_core.faces.face import Faces
from ..osdface_core.faces.mask import mask_to_crops
from .comfy.schema import with_newer_features
from .inputs import FACES


class FaceMaskToCrops(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = io.Schema(
            node_id="FaceMaskToCrops",
            display_name="Face Mask to Crops",
            category="OSDFace",
            description="Carries a mask that was painted on the picture into the crops of its "
            "faces, so that a scratch can be filled on each upright face.",
            inputs=[
                FACES.Input("faces", tooltip="From Face Detect & Align or Face Select."),
                io.Mask.Input(
                    "mask",
                    tooltip="Painted on the picture that the faces were found in, or on the same "
                    "picture enlarged or shrunk. One for all pictures, or one for each.",
                ),
            ],
            outputs=[
                io.Mask.Output(
                    display_name="mask",
                    tooltip="One for each crop, in the same order: white wherever the crop shows "
                    "something of what was painted.",
                )
            ],
        )
        return with_newer_features(
            schema,
            search=("crop mask", "mask of faces", "scratch mask", "transfer mask"),
        )

    @classmethod
    def execute(cls, faces: Faces, mask: Tensor) -> io.NodeOutput:
        return io.NodeOutput(mask_to_crops(mask, faces))
