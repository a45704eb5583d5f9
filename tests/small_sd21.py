"""A small Stable Diffusion 2.1 with the real one's names, and small LoRAs for it."""

from __future__ import annotations

import torch
from torch import Tensor

from osdface_core.ldm.loading import Shapes
from osdface_core.ldm.networks import Autoencoder, UNet
from osdface_core.osdface.lora import adapted_layers
from osdface_core.osediff.weights import Weights
from osdface_core.sd21.adapters import Adapter, Lora
from osdface_core.sd21.base_model import TEXT_PREFIX, UNET_PREFIX, VAE_PREFIX
from osdface_core.sd21.modules import Layer, UNetShape, unet_layers, vae_encoder_layers

SMALL = Shapes(
    UNetShape(widths=(8, 16, 32, 32), heads=(2, 2, 2, 2), groups=4),
    vae=(8, 16, 32, 32),
    vae_groups=4,
)


def small_checkpoint() -> dict[str, Tensor]:
    """UNet and autoencoder of SMALL, with no norm or bias as it was initialised."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    parts = ((UNET_PREFIX, UNet(SMALL.unet)), (VAE_PREFIX, Autoencoder(SMALL.vae, 4)))
    for prefix, network in parts:
        for name, place in network.named_parameters():
            drawn = torch.randn(place.shape, generator=generator)
            if place.ndim > 1:
                tensors[prefix + name] = drawn / place[0].numel() ** 0.5
            else:
                is_norm = "norm" in name or name.endswith(("layers.0.weight", "out.0.weight"))
                centre = 1.0 if is_norm and name.endswith("weight") else 0.0
                tensors[prefix + name] = centre + 0.05 * drawn
    return tensors


def text_encoder(blocks: int, width: int = 1024) -> dict[str, Tensor]:
    """OpenCLIP's text encoder of random numbers in fp16, by its names in a checkpoint.

    The last of the blocks is the one that Stable Diffusion 2 leaves out.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).half()

    tensors = {
        "token_embedding.weight": random(49408, width),
        "positional_embedding": random(77, width),
        "text_projection": random(width, width),
        "logit_scale": torch.tensor(4.6).half(),
    }
    norms = ["ln_final"]
    for i in range(blocks):
        block = f"transformer.resblocks.{i}."
        norms += [f"{block}ln_1", f"{block}ln_2"]
        for name, out, inside in (
            ("attn.in_proj_", 3 * width, width),
            ("attn.out_proj.", width, width),
            ("mlp.c_fc.", 4 * width, width),
            ("mlp.c_proj.", width, 4 * width),
        ):
            tensors[f"{block}{name}weight"] = random(out, inside)
            tensors[f"{block}{name}bias"] = random(out)
    for name in norms:
        tensors[f"{name}.weight"] = torch.ones(width).half()
        tensors[f"{name}.bias"] = torch.zeros(width).half()
    return {TEXT_PREFIX + name: tensor for name, tensor in tensors.items()}


def small_lora(layers: dict[str, Layer]) -> Lora:
    """A LoRA of several ranks and scales for these layers."""
    generator = torch.Generator().manual_seed(1)
    lora = {}
    for i, (name, layer) in enumerate(layers.items()):
        rank, scale = (4, 1.0) if i % 5 else (2, 0.5)
        down = 0.2 * torch.randn(rank, *layer.shape[1:], generator=generator)
        up = 0.2 * torch.randn(layer.shape[0], rank, generator=generator)
        lora[name] = Adapter(layer.ldm, down, up, scale)
    return lora


def small_osdface() -> Lora:
    """OSDFace's LoRA for SMALL."""
    layers = unet_layers(SMALL.unet)
    return small_lora({name: layers[name] for name in adapted_layers()})


def small_osediff() -> Weights:
    """OSEDiff's weights for SMALL."""
    layers = unet_layers(SMALL.unet)
    return Weights(
        small_lora({name: layer for name, layer in layers.items() if "time_emb" not in name}),
        small_lora(vae_encoder_layers(SMALL.vae)),
        torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(3)),
        torch.ones(8),
    )
