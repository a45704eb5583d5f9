"""OSDFace for ComfyUI: finds faces, restores them in one diffusion step, and pastes them back."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> ComfyExtension:
    """The extension, for ComfyUI.

    Its modules are imported only here, so that the package can also be imported without ComfyUI.
    """
    from .nodes import OSDFaceExtension
    from .nodes.comfy.files import register_folders

    register_folders()
    return OSDFaceExtension()
