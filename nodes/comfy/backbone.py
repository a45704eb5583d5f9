"""ComfyUI's MODEL and VAE as the core's Backbone."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management as mm
import comfy.samplers
import comfy.sd
import torch
from comfy.cli_args import args
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor

from ...osdface_core.cpu import exact, optimized
from ...osdface_core.errors import OSDFaceError
from ...osdface_core.osdface.files import LORAS
from ...osdface_core.osdface.restore import TIMESTEP
from ...osdface_core.sd21.backbone import STRIDE
from ...osdface_core.sd21.one_step import Restored
from ...osdface_core.weights.catalogue import NONE
from .base_model import BUILTIN_MARK, check_model, check_together, check_vae
from .files import find, naming_input
from .lora import with_lora
from .networks import clamp_batch, free_memory, is_out_of_memory

# Crops whose latents are cached with a VAE (64 KB each at 512 px, 256 KB at 1024), and the bytes
# that all of them may take: tiles of a large picture are larger.
MAX_LATENTS, MAX_LATENT_BYTES = 128, 32 * 1024**2
NAN_REMEDY = "start ComfyUI with --fp32-vae, or with --force-fp32."
STARVED = (
    "memory was too short to compute it again in fp32: restore fewer or smaller pictures at once, "
    f"or {NAN_REMEDY}"
)
RECOMPUTED = (
    "in half precision and were computed again in fp32; --fp32-vae as an option of ComfyUI's start "
    "spares that time."
)


def _with_fused_attention(model: Any, model_options: dict[str, Any]) -> dict[str, Any]:
    """The sampler's options, with torch's fused attention where ComfyUI takes a slower one.

    That is on a CPU. An attention that the user or a node has chosen stays.
    """
    given = model_options.get("transformer_options", {})
    chosen = (
        mm.pytorch_attention_enabled()
        or args.use_split_cross_attention
        or args.use_quad_cross_attention
    )
    if chosen or not mm.is_device_cpu(model.load_device) or "optimized_attention_override" in given:
        return model_options

    def fused(usual: Callable[..., Tensor], *inputs: Any, **options: Any) -> Tensor:
        return attention_pytorch(*inputs, **options)

    return model_options | {"transformer_options": given | {"optimized_attention_override": fused}}


class HostBackbone:
    """ComfyUI's MODEL and VAE as the core's Backbone.

    Raises OSDFaceError for a wrong base, autoencoder or LoRA.

    model: the MODEL.
    vae: the VAE.
    options: what nodes have added to the conditioning (hooks and the like), passed to the sampler.
    lora_name: of a file of models/osdface or models/loras, or "none".
    lora_strength: factor of the LoRA.
    timestep: the method's own, at which the MODEL's schedule is compared.
    """

    def __init__(
        self,
        model: Any,
        vae: Any,
        options: dict[str, Any] | None = None,
        lora_name: str = NONE,
        lora_strength: float = 1.0,
        timestep: int = TIMESTEP,
    ) -> None:
        check_model(model, timestep)
        check_vae(vae)
        self.options = dict(options or {})
        has_lora = lora_name != NONE and lora_strength != 0
        check_together(model, vae, self.options.pop(BUILTIN_MARK, False), has_lora)
        self.model = model
        if has_lora:
            with naming_input("lora_name"):
                path = find(lora_name, LORAS)
            self.model = with_lora(model, path, lora_strength)
        self.vae = vae
        self.latent_format = model.get_model_object("latent_format")

    def encode(self, pixels: Tensor) -> Tensor:
        pictures = pixels.movedim(1, -1)
        with optimized(self.vae.device, self.vae.first_stage_model):
            if mm.is_device_cpu(self.vae.device):
                encoded = _one_by_one(self._encode_cached, pictures)
            else:
                encoded = _at_once(self.vae.encode, pictures).float()
        return self.latent_format.process_in(encoded)

    def _encode_cached(self, pixels: Tensor) -> Tensor:
        """The latents of one crop (1,H,W,3), cached with the VAE.

        The same crops come again when the strength or the timestep is changed. On a CPU alone: an
        accelerator encodes a crop in the time that its digest takes.
        """
        cache = self.vae.__dict__.setdefault("osdface_latents", OrderedDict())
        digest = hashlib.blake2b(pixels.contiguous().numpy(force=True).data).digest()
        network = id(self.vae.first_stage_model), self.vae.patcher.patches_uuid
        key = digest, tuple(pixels.shape), network
        latents = cache.pop(key, None)
        if latents is None:
            # Newer hosts may return half precision.
            latents = self.vae.encode(pixels).float()
        cache[key] = latents
        while len(cache) > MAX_LATENTS or sum(x.nbytes for x in cache.values()) > MAX_LATENT_BYTES:
            cache.popitem(last=False)
        return latents

    @exact()
    def denoise(self, latents: Tensor, prompts: Tensor, timestep: int) -> Tensor:
        if len(latents) > 1 and mm.is_device_cpu(self.model.load_device):
            # On a CPU several at once take no less time, and one alone gives the same bits
            # whichever other faces are restored with it.
            faces = zip(latents.split(1), prompts.split(1), strict=True)
            return torch.cat([self.denoise(latent, prompt, timestep) for latent, prompt in faces])
        sigma = self.model.get_model_object("model_sampling").sigmas[timestep]
        guider = comfy.samplers.CFGGuider(self.model)
        guider.model_options = _with_fused_attention(self.model, guider.model_options)
        guider.inner_set_conds({"positive": [[prompts, dict(self.options)]]})
        x0 = guider.sample(
            torch.zeros_like(latents),
            self.latent_format.process_out(latents),
            comfy.samplers.KSAMPLER(_one_step),
            torch.stack([sigma, torch.zeros_like(sigma)]),
            disable_pbar=True,
        )
        return self.latent_format.process_in(x0.to(mm.intermediate_device()))

    def decode(self, latents: Tensor) -> Tensor:
        given = self.latent_format.process_out(latents)
        with optimized(self.vae.device, self.vae.first_stage_model):
            if mm.is_device_cpu(self.vae.device):
                return _one_by_one(self.vae.decode, given).movedim(-1, 1)
            return _at_once(self.vae.decode, given).movedim(-1, 1)

    def max_batch(self, height: int, width: int) -> int:
        device = self.model.load_device
        if mm.is_device_cpu(device):
            return 1
        channels = self.latent_format.latent_channels
        one, two = (
            self.model.memory_required((n, channels, height // STRIDE, width // STRIDE))
            for n in (1, 2)
        )
        # The difference of two sizes, because newer hosts add a constant that they keep free.
        return clamp_batch(1 + (free_memory(device, self.model) - one) / (two - one))

    @contextmanager
    def fp32_fallback(self) -> Iterator[bool]:
        """A context in which the VAE's weights are fp32. Gives whether they were not before.

        The VAE's activations are the ones that leave the range of fp16.
        """
        vae = self.vae
        if vae.vae_dtype == torch.float32:
            yield False
            return
        self.vae = comfy.sd.VAE(sd=vae.get_sd(), device=vae.device, dtype=torch.float32)
        try:
            yield True
        finally:
            self.vae = vae

    def out_of_memory(self, error: BaseException) -> bool:
        return is_out_of_memory(error)


def check_restored(result: Restored, each: str = "face", several: str = "crops") -> None:
    """Raises OSDFaceError where everything came out as NaN, whatever memory there was."""
    if not result.starved and result.failed and len(result.failed) == len(result.pictures):
        which = ", ".join(map(str, result.failed))
        raise OSDFaceError(f"Every {each} ({several} {which}) came out as NaN: {NAN_REMEDY}")


def without_starved(result: Restored) -> tuple[int, ...]:
    """Those that came out as NaN in fp32 too, or were in fp32 from the beginning."""
    return tuple(i for i in result.failed if i not in result.starved)


def nan_notes(result: Restored, several: str, left: str) -> str:
    """What to tell of those that came out as NaN; empty if none did.

    several: what they are. left: what became of those that fp32 has no numbers for either.
    """
    fates = (
        (result.recomputed, RECOMPUTED),
        (result.starved, f"{left}, as {STARVED}"),
        (without_starved(result), f"{left}: {NAN_REMEDY}"),
    )
    return "\n".join(
        f"{several} {', '.join(map(str, which))} came out as NaN {fate}"
        for which, fate in fates
        if which
    )


def _at_once(work: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """A batch through the VAE, which takes as many at once as its memory's estimate allows."""
    mm.throw_exception_if_processing_interrupted()
    return work(batch)


def _one_by_one(work: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """A batch through the VAE face by face, so that a run can be stopped in between.

    On a CPU, where several at once take no less time, and the VAE takes the most of it.
    """
    done = []
    for face in batch.split(1):
        mm.throw_exception_if_processing_interrupted()
        done.append(work(face))
    return torch.cat(done)


def _one_step(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Any = None,
    callback: Any = None,
    disable: Any = None,
) -> Tensor:
    """A sampler that calls the model once.

    No noise was added to the latent, and the UNet must see it unscaled: ComfyUI divides its input
    by sqrt(sigma^2 + 1), which the factor here undoes. The signature is that of ComfyUI's samplers.
    """
    sigma = sigmas[0]
    return model(x * (1 + sigma**2) ** 0.5, sigma * x.new_ones(len(x)), **(extra_args or {}))
