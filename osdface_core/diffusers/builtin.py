"""The small built-in model as a Backbone, with diffusers' UNet."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..layers import load_network
from ..osdface import builtin
from ..osdface.builtin.autoencoder import Autoencoder
from .backbone import DiffusersBackbone
from .loading import UNet


class DiffusersAutoencoder(Autoencoder):
    """The built-in autoencoder with the interface of diffusers' AutoencoderTiny."""

    config = SimpleNamespace(
        scaling_factor=builtin.SCALING,
        latent_channels=builtin.CHANNELS,
        block_out_channels=(1, 1, 1, 1),
        shift_factor=None,
    )

    def encode(self, pixels: Tensor) -> Any:
        return SimpleNamespace(latents=super().encode(pixels))

    def decode(self, latents: Tensor) -> Any:
        return SimpleNamespace(sample=super().decode(latents))


def load_unet() -> UNet:
    """The built-in UNet, a UNet2DConditionModel in fp32."""
    from diffusers import UNet2DConditionModel

    network: Any = UNet2DConditionModel
    return load_network(
        lambda: network(**builtin.UNET_CONFIG),
        load_file(builtin.UNET),
        builtin.misfit(builtin.UNET),
        builtin.REMEDY,
    )


def load_vae() -> DiffusersAutoencoder:
    """The built-in autoencoder in fp32."""
    return load_network(
        DiffusersAutoencoder,
        load_file(builtin.AUTOENCODER),
        builtin.misfit(builtin.AUTOENCODER),
        builtin.REMEDY,
    )


def load_backbone(
    device: torch.device | None = None, dtype: torch.dtype | None = None
) -> DiffusersBackbone:
    """The built-in model, on the best device and in the best type where None is given."""
    return DiffusersBackbone(
        load_unet(), load_vae(), device=device, dtype=dtype, channels=builtin.CHANNELS
    )
