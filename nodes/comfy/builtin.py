"""The small built-in model as ComfyUI's MODEL and VAE."""

from __future__ import annotations

from typing import Any, ClassVar

import comfy.latent_formats
import comfy.model_base
import comfy.model_management as mm
import comfy.sd
import comfy.supported_models
import comfy.taesd.taesd
import comfy.utils
import torch
from safetensors.torch import load_file
from torch import Tensor

from ...osdface_core.errors import OSDFaceError
from ...osdface_core.osdface import builtin
from ...osdface_core.sd21.backbone import LATENT_CHANNELS
from .base_model import BUILTIN_MARK
from .networks import Operations, make_patcher

# Bytes of activations per pixel of the picture, in the encoder and in the decoder.
ENCODER_BYTES, DECODER_BYTES = 60, 120


class Latents(comfy.latent_formats.LatentFormat):
    """The built-in autoencoder's latents, of about unit variance."""

    scale_factor = builtin.SCALING
    latent_channels = builtin.CHANNELS


class Config(comfy.supported_models.SD20):
    """Stable Diffusion 2's UNet in fewer and narrower levels."""

    unet_config: ClassVar[dict[str, Any]] = {}
    unet_extra_config = comfy.supported_models.SD20.unet_extra_config | {
        "num_head_channels": builtin.HEAD_WIDTH
    }
    latent_format = Latents
    supported_inference_dtypes: ClassVar[list[torch.dtype]] = [torch.float32]

    def model_type(self, state_dict: dict[str, Tensor], prefix: str = "") -> Any:
        return comfy.model_base.ModelType.EPS

    def inpaint_model(self) -> bool:
        # The host takes every UNet of more than four channels for one that is given a mask.
        return False


def unet_config() -> dict[str, Any]:
    """builtin.UNET_CONFIG in the terms of ComfyUI's UNet."""
    given = builtin.UNET_CONFIG
    widths, layers = given["block_out_channels"], given["layers_per_block"]
    attends = [int(kind.startswith("CrossAttn")) for kind in given["down_block_types"]]
    return {
        "image_size": given["sample_size"],
        "in_channels": builtin.CHANNELS,
        "out_channels": builtin.CHANNELS,
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": [layers] * len(widths),
        "transformer_depth": [depth for depth in attends for _ in range(layers)],
        "transformer_depth_output": [depth for depth in attends for _ in range(layers + 1)],
        "transformer_depth_middle": 1,
        "context_dim": given["cross_attention_dim"],
        "use_spatial_transformer": True,
        "use_linear_in_transformer": True,
        "adm_in_channels": None,
        "use_temporal_attention": False,
        "legacy": False,
    }


def make_model() -> Any:
    """The built-in UNet as a MODEL."""
    config = Config(unet_config())
    config.set_inference_dtype(torch.float32, None)
    config.custom_operations = Operations
    names = comfy.utils.unet_to_diffusers(config.unet_config)
    tensors = {names[name]: tensor.float() for name, tensor in load_file(builtin.UNET).items()}
    model = config.get_model({}, device=mm.unet_offload_device())
    if wrong := set(tensors) ^ set(model.diffusion_model.state_dict()):
        raise OSDFaceError(
            f"The built-in model does not fit this ComfyUI ({min(wrong)} and {len(wrong) - 1} "
            "more): update this pack."
        )
    model.diffusion_model.load_state_dict(tensors)
    setattr(model, BUILTIN_MARK, True)
    return make_patcher(model.eval(), mm.get_torch_device(), mm.unet_offload_device())


def make_vae() -> Any:
    """The built-in autoencoder as a VAE: ComfyUI's own for TAESD, with our network put in."""
    vae = comfy.sd.VAE(
        sd=comfy.taesd.taesd.TAESD(latent_channels=LATENT_CHANNELS).state_dict(),
        dtype=torch.float32,
    )
    network = builtin.autoencoder(Operations)
    setattr(network, BUILTIN_MARK, True)
    vae.first_stage_model = network
    vae.latent_channels = builtin.CHANNELS
    vae.patcher = make_patcher(network, vae.device, mm.vae_offload_device())
    vae.memory_used_encode = lambda shape, dtype: ENCODER_BYTES * shape[-2] * shape[-1]
    vae.memory_used_decode = lambda shape, dtype: DECODER_BYTES * shape[-2] * shape[-1] * 64
    return vae
