"""FaceSelect: faces -> the chosen ones and the rest."""

from __future__ import annotations

from comfy_api.latest import io

from ..osdface_core.faces.choose import Choice, split
from ..osdface_core.faces.face import Faces
from .comfy.schema import with_newer_features
from .inputs import FACES, choice_inputs


class FaceSelect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = io.Schema(
            node_id="FaceSelect",
            display_name="Face Select",
            category="OSDFace",
            description="Parts the faces of Face Detect & Align in two, for graphs that treat "
            "people differently. Numbers stay the same.",
            inputs=[
                FACES.Input("faces", tooltip="From Face Detect & Align."),
                *choice_inputs().values(),
            ],
            outputs=[
                FACES.Output(display_name="faces", tooltip="The chosen faces."),
                io.Image.Output(
                    display_name="crops",
                    tooltip="The chosen faces, upright; a batch of zero if there are none.",
                ),
                FACES.Output(display_name="rest", tooltip="The faces that were not chosen."),
                io.Image.Output(
                    display_name="rest_crops", tooltip="The faces that were not chosen, upright."
                ),
                io.String.Output(
                    display_name="report", tooltip="What was chosen, and why the rest was not."
                ),
            ],
        )
        return with_newer_features(
            schema,
            search=("choose faces", "filter faces", "pick face", "one face of a group"),
            advanced=("max_size",),
        )

    @classmethod
    def execute(
        cls,
        faces: Faces,
        select: str,
        order: str,
        indices: str,
        max_faces: int,
        min_size: int,
        max_size: int,
    ) -> io.NodeOutput:
        chosen, rest, report = split(
            faces, Choice(select, order, indices, max_faces, min_size, max_size)
        )
        return io.NodeOutput(chosen, chosen.crops, rest, rest.crops, report)
