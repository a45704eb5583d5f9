"""OSEDiff's weights: LoRAs on the UNet and on the VAE's encoder, and the UNet's first layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..errors import OSDFaceError
from ..sd21.adapters import Lora, kohya_tensors, parse_lora, some
from ..sd21.modules import Layer, unet_layers, vae_encoder_layers
from .files import RELEASED_PREFIX, UNET, VAE

# peft's default of lora_alpha, which the training left as it is: the scale is this over the rank.
ALPHA = 8
# The layer of the UNet whose own weights were trained too.
FIRST = "conv_in"
REMEDY = "load osediff.safetensors or osediff_face.safetensors, as install.py --osediff makes them."


@dataclass(frozen=True)
class Weights:
    """What OSEDiff changes in Stable Diffusion 2.1-base.

    unet: adapters by the diffusers names of the UNet's layers.
    encoder: adapters by the names of the VAE's layers, of its encoder and `quant_conv`.
    first_weight: (320,4,3,3), in place of the UNet's first layer's, before its adapter.
    first_bias: (320,).
    """

    unet: Lora
    encoder: Lora
    first_weight: Tensor
    first_bias: Tensor


@cache
def adapted_layers() -> dict[str, Layer]:
    """The 258 layers of the UNet that OSEDiff adapts: all but those of the time embedding."""
    return {name: layer for name, layer in unet_layers().items() if "time_emb" not in name}


def parse_weights(tensors: Mapping[str, Tensor], source: str) -> Weights:
    """OSEDiff's weights from the tensors of a released or a converted file.

    Raises OSDFaceError unless they are complete and nothing is left over. source: the file's name.
    """
    parts: dict[str, dict[str, Tensor]] = {UNET: {}, VAE: {}}
    left_over = []
    for key, tensor in tensors.items():
        part, _, name = key.removeprefix(RELEASED_PREFIX).partition(".")
        if part in parts:
            parts[part][name] = tensor
        else:
            left_over.append(key)
    if left_over:
        raise OSDFaceError(
            f"{source} does not hold OSEDiff's weights: {some(left_over)} belongs to no part of "
            f"them; {REMEDY}"
        )
    if not all(parts.values()):
        raise OSDFaceError(
            f"{source} does not hold OSEDiff's weights, which are of the UNet and of the VAE; "
            f"{REMEDY}"
        )
    weight, bias = (
        _base(parts[UNET].pop(f"{FIRST}.base_layer.{name}", None), name, shape, source)
        for name, shape in (("weight", unet_layers()[FIRST].shape), ("bias", (320,)))
    )
    layers = {UNET: adapted_layers(), VAE: vae_encoder_layers()}
    whose = {
        UNET: "OSEDiff's LoRA for the UNet",
        VAE: "OSEDiff's LoRA for the VAE's encoder",
    }
    unet, encoder = (
        parse_lora(given, layers[part], source, whose[part], REMEDY, ALPHA / _rank(given))
        for part, given in parts.items()
    )
    return Weights(unet, encoder, weight, bias)


def as_tensors(weights: Weights) -> dict[str, Tensor]:
    """The tensors of the converted file."""
    tensors: dict[str, Tensor] = {}
    for part, lora in ((UNET, weights.unet), (VAE, weights.encoder)):
        tensors |= kohya_tensors(lora, f"{part}.{{}}".format)
    tensors[f"{UNET}.{FIRST}.base_layer.weight"] = weights.first_weight.contiguous()
    tensors[f"{UNET}.{FIRST}.base_layer.bias"] = weights.first_bias.contiguous()
    return tensors


def _base(tensor: Tensor | None, name: str, shape: tuple[int, ...], source: str) -> Tensor:
    key = f"{FIRST}.base_layer.{name}"
    if tensor is None:
        raise OSDFaceError(f"{source} is incomplete: OSEDiff's weights also have {key}; {REMEDY}")
    if tensor.shape != shape:
        raise OSDFaceError(
            f"{source} has a wrong shape at {key}: {tuple(tensor.shape)} instead of {shape}; "
            f"{REMEDY}"
        )
    if not bool(torch.isfinite(tensor).all()):
        raise OSDFaceError(
            f"{source} has values that are not finite at {key}: fetch the file again."
        )
    return tensor


def _rank(tensors: Mapping[str, Tensor]) -> int:
    """The rank of a released LoRA, all of whose layers have the same."""
    ranks = (t.shape[0] for name, t in tensors.items() if ".lora_A." in name and t.ndim)
    return max(1, next(ranks, 1))
