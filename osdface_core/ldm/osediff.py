"""Stable Diffusion 2.1-base with OSEDiff's weights as a Backbone, without diffusers."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..osediff.weights import FIRST, Weights
from ..sd21.base_model import REMEDY
from ..sd21.modules import unet_layers
from .backbone import LdmBackbone
from .loading import SD21, Shapes, Tensors, add_lora, check_tensors, load, read
from .networks import Autoencoder, UNet


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
    networks = load(*read(model, shapes), model.name, shapes)
    _add(networks, weights, source, merge=True)
    return LdmBackbone(*networks, device=device, dtype=dtype)


def lend_osediff(
    unet: Tensors,
    autoencoder: Tensors,
    model: str,
    weights: Weights,
    source: str = "OSEDiff's weights",
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    shapes: Shapes = SD21,
    remedy: str = REMEDY,
) -> LdmBackbone:
    """The backbone of tensors that another program holds, with OSEDiff's weights.

    They are neither copied nor written to. Raises OSDFaceError as LdmBackbone.from_tensors does.

    unet: as there.
    autoencoder: as there.
    model: what it is, such as the checkpoint's name, for errors.
    weights: each merged whenever its layer is called.
    source: the weights' name, for errors.
    device: to compute on; the best there is, if None.
    dtype: to compute in; the best for the device, if None.
    shapes: of the networks.
    remedy: the end of an error's sentence.
    """
    check_tensors(unet, autoencoder, model, remedy)
    networks = load(unet, autoencoder, model, shapes, remedy)
    _add(networks, weights, source, merge=False)
    return LdmBackbone(*networks, device=device, dtype=dtype, owned=False)


def _add(networks: tuple[UNet, Autoencoder], weights: Weights, source: str, *, merge: bool) -> None:
    unet, autoencoder = networks
    first = unet.get_submodule(unet_layers()[FIRST].ldm)
    first.weight = nn.Parameter(weights.first_weight.clone(), requires_grad=False)
    first.bias = nn.Parameter(weights.first_bias.clone(), requires_grad=False)
    add_lora(unet, weights.unet, 1.0, source, merge=merge)
    add_lora(autoencoder, weights.encoder, 1.0, source, merge=merge)
