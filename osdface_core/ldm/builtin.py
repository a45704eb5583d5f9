"""The small built-in model as a Backbone, without diffusers."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from ..osdface import builtin
from ..sd21.modules import UNetShape, ldm_names, unet_layers
from . import layers
from .backbone import LdmBackbone
from .loading import build, renamed
from .networks import UNet

UNET = UNetShape(
    widths=builtin.WIDTHS,
    heads=tuple(width // builtin.HEAD_WIDTH for width in builtin.WIDTHS),
    attends=builtin.ATTENDS,
    blocks=builtin.BLOCKS,
    channels=builtin.CHANNELS,
)


def load_unet() -> UNet:
    """The built-in UNet."""
    tensors = renamed(load_file(builtin.UNET), ldm_names(unet_layers(UNET)))
    return build(lambda: UNet(UNET), tensors, builtin.UNET.name, builtin.REMEDY).float()


def load_backbone(
    device: torch.device | None = None, dtype: torch.dtype | None = None
) -> LdmBackbone:
    """The built-in model, on the best device and in the best type where None is given."""
    autoencoder = builtin.autoencoder(layers)
    return LdmBackbone(
        load_unet(), autoencoder, device=device, dtype=dtype, scaling=builtin.SCALING
    )
