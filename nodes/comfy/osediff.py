"""ComfyUI's MODEL and VAE with OSEDiff's weights, as the core's Backbone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management as mm
from torch import Tensor, nn

from ...osdface_core.errors import OSDFaceError
from ...osdface_core.osediff.files import FOLDER
from ...osdface_core.osediff.upscale import TIMESTEP
from ...osdface_core.osediff.weights import FIRST, Weights, parse_weights
from ...osdface_core.weights.reading import read_tensors
from .backbone import HostBackbone
from .base_model import CHECKPOINT, is_builtin
from .files import cached, find, fingerprint, naming_input
from .lora import add_lora, kept_clone, merge_lora

SLOT = "osediff_clone"


class OSEDiffBackbone(HostBackbone):
    """HostBackbone with OSEDiff's weights on clones of the MODEL and of the VAE.

    The VAE's clone encodes, the user's own decodes.

    To be used as a context: then the VAE's weights are its own again, however the work ended.
    Raises OSDFaceError for a wrong base, autoencoder or file.

    model: the MODEL.
    vae: the VAE.
    options: as HostBackbone has them.
    osediff_name: of a file of models/osediff.
    """

    def __init__(
        self, model: Any, vae: Any, options: dict[str, Any] | None, osediff_name: str
    ) -> None:
        networks = getattr(model, "model", None), getattr(vae, "first_stage_model", None)
        if any(map(is_builtin, networks)):
            raise OSDFaceError(
                "`model` or `vae` is the small built-in one, for which OSEDiff has no weights: "
                f"{CHECKPOINT}"
            )
        super().__init__(model, vae, options, timestep=TIMESTEP)
        with naming_input("osediff_name"):
            self.path = find(osediff_name, FOLDER)
            self.weights: Weights = cached(
                "osediff",
                (self.path,),
                lambda: parse_weights(read_tensors(self.path), self.path.name),
            )
        self.model = with_weights(model, self.weights, self.path)
        self.encoder = with_encoder(vae, self.weights, self.path)

    def __enter__(self) -> OSEDiffBackbone:
        return self

    def __exit__(self, *_: object) -> None:
        patcher = self.encoder.patcher
        if getattr(patcher.model, "current_weight_patches_uuid", None) == patcher.patches_uuid:
            patcher.detach()

    def encode(self, pixels: Tensor) -> Tensor:
        self.vae, own = self.encoder, self.vae
        try:
            with interruptible(self.vae.first_stage_model):
                return super().encode(pixels)
        finally:
            self.vae = own

    def denoise(self, latents: Tensor, prompts: Tensor, timestep: int) -> Tensor:
        with interruptible(self.model.model):
            return super().denoise(latents, prompts, timestep)

    def decode(self, latents: Tensor) -> Tensor:
        with interruptible(self.vae.first_stage_model):
            return super().decode(latents)

    @contextmanager
    def fp32_fallback(self) -> Iterator[bool]:
        own = self.encoder
        with super().fp32_fallback() as was_half:
            if was_half:
                self.encoder = with_encoder(self.vae, self.weights, self.path)
            try:
                yield was_half
            finally:
                self.encoder = own


def with_weights(model: Any, weights: Weights, path: Path) -> Any:
    """A clone of MODEL with OSEDiff's LoRA on 258 layers of its UNet, and its first layer.

    path: the weights' file. Raises OSDFaceError if the model lacks one of them.
    """
    first = f"diffusion_model.{weights.unet[FIRST].ldm}"
    replaced = {f"{first}.weight": weights.first_weight, f"{first}.bias": weights.first_bias}

    def make() -> Any:
        return merge_lora(model, weights.unet, path.name, 1.0, replaced)

    return kept_clone(model, SLOT, fingerprint(path), make)


def with_encoder(vae: Any, weights: Weights, path: Path) -> Any:
    """A VAE that shares the networks of `vae`, with OSEDiff's LoRA on 32 layers of the encoder.

    path: the weights' file. Raises OSDFaceError if the autoencoder lacks one of them.
    """

    def make() -> Any:
        clone = vae.patcher.clone()
        targets = {name: f"{adapter.ldm}.weight" for name, adapter in weights.encoder.items()}
        refusal = f"`vae` has no weight for {{}} of {path.name}"
        add_lora(clone, weights.encoder, targets, 1.0, refusal)
        return clone

    patcher = kept_clone(vae.patcher, SLOT, fingerprint(path), make)
    known = vae.__dict__.get(SLOT)
    if known is None or known.patcher is not patcher:
        known = copy.copy(vae)
        known.__dict__.pop(SLOT, None)
        known.patcher = patcher
        setattr(vae, SLOT, known)
    return known


@contextmanager
def interruptible(network: nn.Module) -> Iterator[None]:
    """A context in which a network stops at its next convolution when the user asks for it."""
    modules = list(network.modules())
    # A hook would make compiled code be compiled anew.
    is_compiled = any(hasattr(module, "_orig_mod") for module in modules)
    hooks = [
        module.register_forward_pre_hook(_stop_if_asked)
        for module in modules
        if isinstance(module, nn.Conv2d) and not is_compiled
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _stop_if_asked(*_: object) -> None:
    mm.throw_exception_if_processing_interrupted()
