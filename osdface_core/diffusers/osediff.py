"""Stable Diffusion 2.1-base with OSEDiff's weights, as a Backbone of diffusers."""

from __future__ import annotations

from pathlib import Path

import torch

from ..osediff.weights import FIRST, Weights
from .backbone import DiffusersBackbone
from .loading import load
from .lora import merge_lora


def load_osediff(
    model: Path,
    weights: Weights,
    source: str = "OSEDiff's weights",
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> DiffusersBackbone:
    """The backbone of a folder or a checkpoint, as `load` reads it, with OSEDiff's weights.

    The decoder is the model's own. Raises OSDFaceError as `load` and `merge_lora` do.

    model: the folder or file.
    weights: merged into the UNet and the encoder.
    source: the weights' name, for errors.
    device: the best there is, if None.
    dtype: the best for the device, if None.
    """
    unet, vae = load(model)
    first = unet.get_submodule(FIRST)
    with torch.no_grad():
        first.weight.copy_(weights.first_weight)
        first.bias.copy_(weights.first_bias)
    merge_lora(unet, weights.unet, 1.0, source)
    merge_lora(vae, weights.encoder, 1.0, source)
    return DiffusersBackbone(unet, vae, device=device, dtype=dtype)
