"""Loads the UNet and autoencoder of Stable Diffusion 2.1-base by diffusers' own loaders.

From a folder in diffusers' layout, or a checkpoint.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import OSDFaceError
from ..layers import load_network
from ..sd21.adapters import some
from ..sd21.backbone import LATENT_CHANNELS, SIDE, TEXT_WIDTH
from ..sd21.base_model import BaseFacts, check_autoencoder, check_base, refusal
from ..sd21.modules import VAE_WIDTHS, WIDTHS
from ..sd21.schedule import BETA_END, BETA_START, TIMESTEPS
from ..weights.reading import read_tensors

# A UNet2DConditionModel; an AutoencoderKL or AutoencoderTiny. Not imported, even for types, because
# diffusers imports its classes lazily, which a type checker does not see.
UNet: TypeAlias = Any
Autoencoder: TypeAlias = Any

SCALING = 0.18215
REMEDY = (
    "give the folder of stable-diffusion-2-1-base in diffusers' layout, or "
    "v2-1_512-ema-pruned.safetensors."
)

UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
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
# SD 2.1's 768-v checkpoint has the same names and shapes. As in ComfyUI, it is recognised by the
# standard deviation of this bias, which is far larger there.
V_WITNESS = UNET_PREFIX + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
V_DEVIATION = 0.09


def load(path: Path) -> tuple[UNet, Autoencoder]:
    """The UNet and the autoencoder of a folder in diffusers' layout or of a checkpoint.

    fp32, on the CPU. Nothing is downloaded. Raises OSDFaceError for anything but Stable Diffusion
    2.1-base or a fine-tune of it.
    """
    return _load_folder(path) if path.is_dir() else _load_checkpoint(path)


def _load_folder(path: Path) -> tuple[UNet, Autoencoder]:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    configs = {}
    files = (("unet", "config"), ("vae", "config"), ("scheduler", "scheduler_config"))
    for part, name in files:
        file = f"{part}/{name}.json"
        try:
            configs[part] = json.loads((path / file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OSDFaceError(
                f"{path} is not a model in diffusers' layout ({file} cannot be read: {error}); "
                f"{REMEDY}"
            ) from error
    check_unet(configs["unet"], path.name, configs["scheduler"].get("prediction_type", "epsilon"))
    check_vae(configs["vae"], path.name)
    check_scheduler(configs["scheduler"], path.name)
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


def check_checkpoint(tensors: dict[str, Tensor], source: str) -> None:
    """Raises OSDFaceError unless a checkpoint's tensors are those of Stable Diffusion 2.1-base."""
    first = tensors.get(UNET_PREFIX + "input_blocks.0.0.weight")
    text = tensors.get(UNET_PREFIX + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    if first is None:
        raise refusal(source, "is not a checkpoint of Stable Diffusion with its UNet", REMEDY)
    if any(name.startswith(UNET_PREFIX + "label_emb") for name in tensors) or text is None:
        raise refusal(source, "is another kind of model (SDXL, unCLIP or the like)", REMEDY)
    witness = tensors.get(V_WITNESS)
    is_v = witness is not None and float(witness.float().std(correction=0)) > V_DEVIATION
    facts = BaseFacts(
        f"{source} is a model", text.shape[1], first.shape[1], prediction="v" if is_v else "epsilon"
    )
    check_base(facts, REMEDY)
    if not any(name.startswith(VAE_PREFIX) for name in tensors):
        raise refusal(source, "is a UNet without its autoencoder", REMEDY)


def check_unet(config: dict[str, Any], source: str, prediction: str = "epsilon") -> None:
    """Raises OSDFaceError unless a UNet's configuration is that of Stable Diffusion 2.1-base."""
    channels = config.get("in_channels")
    extras = ("class_embed_type", "num_class_embeds", "addition_embed_type")
    facts = BaseFacts(
        f"{source} is a model",
        config.get("cross_attention_dim"),
        channels,
        any(map(config.get, extras)) or config.get("out_channels", channels) != channels,
        prediction,
    )
    check_base(facts, REMEDY)


def check_vae(config: dict[str, Any], source: str) -> None:
    """Raises OSDFaceError unless an autoencoder makes 4 channels at an eighth of the size."""
    stride = 2 ** (len(config.get("block_out_channels", ())) - 1)
    channels = config.get("latent_channels", 0)
    check_autoencoder(f"The autoencoder of {source}", channels, stride, REMEDY)
    if config.get("shift_factor"):
        raise refusal(source, "is a model whose autoencoder shifts its latents", REMEDY)


def check_scheduler(config: dict[str, Any], source: str) -> None:
    """Raises OSDFaceError unless a scheduler's configuration is Stable Diffusion's schedule."""
    names = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")
    given = tuple(map(config.get, names))
    if given != (TIMESTEPS, "scaled_linear", BETA_START, BETA_END):
        raise refusal(source, f"is a model with another noise schedule {given}", REMEDY)
