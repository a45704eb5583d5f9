"""OSDFace for ComfyUI: faces found, aligned, restored in one diffusion step, and put back without a trace."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .nodes import host
from .nodes.face_detect_align import FaceDetectAlign
from .nodes.face_paste_back import FacePasteBack
from .nodes.osdface_one_step import OSDFaceOneStep
from .nodes.osdface_vre import OSDFaceVRE

WEB_DIRECTORY = "./web"

host.register_folders()


class OSDFaceExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [FaceDetectAlign, OSDFaceVRE, OSDFaceOneStep, FacePasteBack]


async def comfy_entrypoint() -> OSDFaceExtension:
    return OSDFaceExtension()
