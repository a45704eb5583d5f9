"""ComfyUI nodes: a schema and a short execute each. The work is in osdface_core."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .comfy.guard import with_input_checks
from .diffir_enhance import DiffIREnhance
from .diffir_inpaint import DiffIRInpaint
from .face_detect_align import FaceDetectAlign
from .face_mask_to_crops import FaceMaskToCrops
from .face_paste_back import FacePasteBack
from .face_select import FaceSelect
from .osdface_builtin import OSDFaceBuiltinModel
from .osdface_one_step import OSDFaceOneStep
from .osdface_restore import OSDFaceRestore
from .osdface_vre import OSDFaceVRE
from .osediff_upscale import OSEDiffUpscale

# The name and the literal form are for tools that read the source: those that look for the pack of
# a missing node, and comfy-test's coverage. ComfyUI itself looks for the name only in the root, and
# so takes comfy_entrypoint.
NODE_CLASS_MAPPINGS = {
    "OSDFaceRestore": OSDFaceRestore,
    "FaceDetectAlign": FaceDetectAlign,
    "FaceSelect": FaceSelect,
    "OSDFaceVRE": OSDFaceVRE,
    "OSDFaceOneStep": OSDFaceOneStep,
    "FaceMaskToCrops": FaceMaskToCrops,
    "FacePasteBack": FacePasteBack,
    "OSDFaceBuiltinModel": OSDFaceBuiltinModel,
    "OSEDiffUpscale": OSEDiffUpscale,
    "DiffIREnhance": DiffIREnhance,
    "DiffIRInpaint": DiffIRInpaint,
}


class OSDFaceExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [with_input_checks(node) for node in NODE_CLASS_MAPPINGS.values()]
