"""ComfyUI nodes: a schema and a short execute each. The work is in osdface_core."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .face_detect_align import FaceDetectAlign
from .face_paste_back import FacePasteBack
from .face_select import FaceSelect
from .guard import checked
from .osdface_builtin import OSDFaceBuiltinModel
from .osdface_one_step import OSDFaceOneStep
from .osdface_restore import OSDFaceRestore
from .osdface_vre import OSDFaceVRE


class OSDFaceExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        nodes = OSDFaceRestore, FaceDetectAlign, FaceSelect, OSDFaceVRE, OSDFaceOneStep, FacePasteBack, OSDFaceBuiltinModel
        return [checked(node) for node in nodes]
