"""Loads the UNet and autoencoder of Stable Diffusion 2.1-base by diffusers' own loaders.

From a folder in diffusers' layout, or a checkpoint.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch

from ..errors import OSDFaceError
from ..layers import load_network
from ..sd21.adapters import some
from ..sd21.backbone import LATENT_CHANNELS, SIDE, TEXT_WIDTH
from ..sd21.base_model import (
    REMEDY,
    SCALING,
    UNET_PREFIX,
    VAE_PREFIX,
    check_checkpoint,
    check_folder,
)
from ..sd21.modules import VAE_WIDTHS, WIDTHS
from ..weights.reading import read_tensors

# A UNet2DConditionModel; an AutoencoderKL or AutoencoderTiny. Not imported, even for types, because
# diffusers imports its classes lazily, which a type checker does not see.
UNet: TypeAlias = Any
Autoencoder: TypeAlias = Any

# Configurations for checkpoints, which carry none.
UNET_CONFIG: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "layers_per_block": 2,
    "block_out_channels": WIDTHS,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
VAE_CONFIG: dict[str, Any] = {
    "block_out_channels": VAE_WIDTHS,
    "layers_per_block": 2,
    "latent_channels": LATENT_CHANNELS,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "sample_size": SIDE,
    "scaling_factor": SCALING,
}


def load(path: Path) -> tuple[UNet, Autoencoder]:
    """The UNet and the autoencoder of a folder in diffusers' layout or of a checkpoint.

    fp32, on the CPU. Nothing is downloaded. Raises OSDFaceError for anything but Stable Diffusion
    2.1-base or a fine-tune of it.
    """
    return _load_folder(path) if path.is_dir() else _load_checkpoint(path)


def _load_folder(path: Path) -> tuple[UNet, Autoencoder]:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    check_folder(path)
    networks: list[Any] = []
    for network, part in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae")):
        whole = any((path / part).glob("diffusion_pytorch_model.[bs]*"))
        half = not whole and any((path / part).glob("*.fp16.*"))
        try:
            made, info = network.from_pretrained(
                path / part,
                variant="fp16" if half else None,
                torch_dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            why = " ".join(str(error).split())[:200]
            raise OSDFaceError(f"{path / part} cannot be loaded ({why}); {REMEDY}") from error
        kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
        if wrong := [str(key) for kind in kinds for key in info[kind]]:
            raise OSDFaceError(
                f"{path / part} does not fit its configuration ({some(wrong)}); {REMEDY}"
            )
        networks.append(made.eval().requires_grad_(False))
    return networks[0], networks[1]


def _load_checkpoint(path: Path) -> tuple[UNet, Autoencoder]:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import (
        convert_ldm_unet_checkpoint,
        convert_ldm_vae_checkpoint,
    )

    tensors = read_tensors(path, (UNET_PREFIX, VAE_PREFIX))
    check_checkpoint(tensors, path.name)
    misfit = f"{path.name} does not fit Stable Diffusion 2.1-base"
    parts: tuple[tuple[Any, Any, str, dict[str, Any]], ...] = (
        (UNet2DConditionModel, convert_ldm_unet_checkpoint, UNET_PREFIX, UNET_CONFIG),
        (AutoencoderKL, convert_ldm_vae_checkpoint, VAE_PREFIX, VAE_CONFIG),
    )
    networks = []
    for network, convert, prefix, config in parts:
        state = convert({k: t for k, t in tensors.items() if k.startswith(prefix)}, config)
        networks.append(load_network(partial(network, **config), state, misfit, REMEDY, spare=True))
    return networks[0], networks[1]
