"""Stable Diffusion 2.1-base with OSEDiff's weights as a Backbone, without diffusers."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..osediff.weights import FIRST, Weights
from ..sd21.modules import unet_layers
from .backbone import LdmBackbone
from .loading import SD21, Shapes, add_lora, load, read


def load_osediff(
    model: Path,
    weights: Weights,
    source: str = "OSEDiff's weights",
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    shapes: Shapes = SD21,
) -> LdmBackbone:
    """The backbone of a checkpoint or a folder in diffusers' layout, with OSEDiff's weights.

    The decoder is the model's own. Raises OSDFaceError as LdmBackbone.from_file does.

    model: the file or folder.
    weights: merged into the UNet and the encoder.
    source: the weights' name, for errors.
    device: the best there is, if None.
    dtype: the best for the device, if None.
    shapes: of the networks.
    """
    unet, autoencoder = load(*read(model, shapes), model.name, shapes)
    first = unet.get_submodule(unet_layers()[FIRST].ldm)
    first.weight = nn.Parameter(weights.first_weight.clone(), requires_grad=False)
    first.bias = nn.Parameter(weights.first_bias.clone(), requires_grad=False)
    add_lora(unet, weights.unet, 1.0, source, merge=True)
    add_lora(autoencoder, weights.encoder, 1.0, source, merge=True)
    return LdmBackbone(unet, autoencoder, device=device, dtype=dtype)
