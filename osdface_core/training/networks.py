"""The networks that stage 2 starts from, and the LoRA on its UNet."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import OSDFaceError
from ..osdface import builtin
from ..osdface.builtin.autoencoder import Autoencoder
from ..osdface.files import PROJECTOR_PREFIX
from ..osdface.lora import is_adapted, parse_lora
from ..osdface.vre import Shape, VisualEmbedder, build_embedder
from ..osdface.vre.embedder import Projector
from ..osdface.vre.loading import read_parts
from ..weights.reading import read_tensors
from .loop import for_file

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class UNetConfig:
    """A UNet of diffusers.

    kind: diffusers, from `folder` or made of `config`; or builtin, made as the built-in model's;
        without weights its step changes nothing.
    folder: in diffusers' layout, or one that holds such a folder `unet`.
    config: what diffusers makes a new UNet of, where there is no folder.
    weights: safetensors file for a UNet that is not from a folder; random weights without one.
    """

    kind: Literal["diffusers", "builtin"] = "diffusers"
    folder: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)
    weights: Path | None = None


@dataclass(frozen=True)
class VaeConfig:
    """An autoencoder between pictures and latents.

    kind: kl, diffusers' AutoencoderKL; or builtin, the built-in model's.
    folder: in diffusers' layout, or one that holds such a folder `vae`; for kl.
    config: what diffusers makes a new one of, where there is no folder; for kl.
    weights: safetensors file for one that is not from a folder; random weights without one.
    train: the part that is trained. grain is the built-in one's last layer, the amount of grain;
        its denoiser is trained by itself (autoencoder.py) and never here.
    """

    kind: Literal["kl", "builtin"] = "kl"
    folder: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)
    weights: Path | None = None
    train: Literal["none", "decoder", "all", "grain"] = "none"


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters. start: a LoRA file, in any spelling, to go on from."""

    rank: int = 16
    alpha: int = 16
    start: Path | None = None


def load_unet(unet: UNetConfig) -> Any:
    """A UNet in fp32. Raises OSDFaceError where it cannot be made."""
    from diffusers import UNet2DConditionModel

    if unet.kind == "builtin":
        made = _load(UNet2DConditionModel, None, builtin.UNET_CONFIG, unet.weights, "unet")
        if not unet.weights:
            # Its step changes nothing then, so that training starts from the degraded picture.
            nn.init.zeros_(made.conv_out.weight)
            nn.init.zeros_(made.conv_out.bias)
        return made
    return _load(UNet2DConditionModel, unet.folder, unet.config, unet.weights, "unet")


def _load(
    kind: Any,
    folder: Path | None,
    config: dict[str, Any],
    weights: Path | None,
    name: str,
) -> Any:
    """A network of diffusers in fp32. Raises OSDFaceError where it cannot be made.

    kind: its class.
    folder: in diffusers' layout, or one that holds such a folder `name`.
    config: what it is made of where there is no folder.
    weights: safetensors file, where there is no folder.
    name: of its key in the configuration, for errors.
    """
    try:
        if folder:
            inside = folder / name
            return kind.from_pretrained(
                inside if inside.is_dir() else folder,
                local_files_only=True,
                torch_dtype=torch.float32,
            )
        if not config:
            raise OSDFaceError(
                f"`{name}` names neither a folder nor a config: give a folder in diffusers' layout."
            )
        made = kind.from_config(config)
        if weights:
            made.load_state_dict(_read_floats(weights))
        return made
    except (OSError, ValueError, RuntimeError, SafetensorError, json.JSONDecodeError) as error:
        why = " ".join(str(error).split())[:200]
        remedy = (
            f"give another `{name}.weights`." if weights else "give a folder in diffusers' layout."
        )
        raise OSDFaceError(f"`{name}` cannot be loaded ({why}): {remedy}") from error


def _read_floats(path: Path) -> dict[str, Tensor]:
    return {name: t.float() for name, t in load_file(path).items()}


def load_autoencoder(path: Path) -> Autoencoder:
    """The built-in autoencoder in fp32. Raises OSDFaceError for a file that does not fit it."""
    network = Autoencoder()
    try:
        network.load_state_dict(_read_floats(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        why = " ".join(str(error).split())[:200]
        raise OSDFaceError(
            f"{path} is no file of the built-in autoencoder ({why}): give an exported "
            "autoencoder.safetensors."
        ) from error
    return network


class KLAutoencoder(nn.Module):
    """diffusers' autoencoder: pixels in [0,1] to scaled latents, the posterior's mean, and back."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.scale = vae.config.scaling_factor

    def encode(self, pixels: Tensor) -> Tensor:
        posterior = self.vae.encode((pixels * 2 - 1).to(self.vae.dtype)).latent_dist
        return posterior.mode().float() * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode((latents / self.scale).to(self.vae.dtype)).sample.float() / 2 + 0.5


class BuiltinAutoencoder(nn.Module):
    """The built-in autoencoder behind the same two calls."""

    def __init__(self, weights: Path | None) -> None:
        super().__init__()
        self.vae = load_autoencoder(weights) if weights else Autoencoder()

    def encode(self, pixels: Tensor) -> Tensor:
        return self.vae.encode(pixels * 2 - 1).float()

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents).float() / 2 + 0.5


def load_vae(config: VaeConfig, dtype: torch.dtype) -> KLAutoencoder | BuiltinAutoencoder:
    """The autoencoder, frozen but for the part that `config.train` names.

    dtype: of one that is frozen altogether; others are fp32.

    Raises OSDFaceError where it cannot be made.
    """
    made: KLAutoencoder | BuiltinAutoencoder
    if config.kind == "builtin":
        made = BuiltinAutoencoder(config.weights)
    else:
        from diffusers import AutoencoderKL

        made = KLAutoencoder(
            _load(AutoencoderKL, config.folder, config.config, config.weights, "vae")
        )
    made.requires_grad_(False)
    if config.train == "none":
        return made.to(dtype)
    if config.train == "grain" and not isinstance(made, BuiltinAutoencoder):
        raise OSDFaceError(
            "`vae.train` is grain, which only the built-in autoencoder has: set vae.kind=builtin."
        )
    names = {
        "all": ("",),
        "grain": ("decoder.conv_grain",),
        "decoder": ("decoder", "post_quant_conv"),
    }[config.train]
    modules = dict(made.vae.named_modules())
    for part in (modules[name] for name in names if name in modules):
        part.requires_grad_(True)
    if isinstance(made, BuiltinAutoencoder):
        # It has learned from whole faces and large batches, and loses that in a few hundred steps.
        made.vae.encoder.denoiser.requires_grad_(False)
    return made


def load_vre(path: Path, hidden: int) -> VisualEmbedder:
    """The embedder of degraded faces, frozen but for its projector.

    hidden: width of a new projector, where the file holds none.
    """
    encoder, projector = read_parts(path)
    if not projector:
        if "quant_conv.weight" not in encoder:
            raise OSDFaceError(
                f"{path.name} holds no embedder of degraded faces: give stage 1's file of part lq "
                "or associate."
            )
        features = len(encoder["quant_conv.weight"])
        new = Projector(shape=Shape(features=features, hidden=hidden)).state_dict()
        projector = {PROJECTOR_PREFIX + name: t for name, t in new.items()}
        log.info("%s holds no projector: a new one is trained.", path.name)
    network = build_embedder(encoder | projector, source=path.name)
    network.projector.requires_grad_(True)
    return network


def adapted_in(unet: nn.Module) -> list[str]:
    """The names of a UNet's layers that OSDFace's LoRA adapts."""
    return [
        name
        for name, layer in unet.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and is_adapted(name)
    ]


def add_lora(unet: Any, rank: int, alpha: int) -> list[str]:
    """Puts a LoRA on the layers that OSDFace adapts and freezes the rest. Returns their names."""
    from peft import LoraConfig

    names = adapted_in(unet)
    unet.requires_grad_(False)
    unet.add_adapter(
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, init_lora_weights="gaussian")
    )
    return names


def start_lora(unet: Any, path: Path) -> None:
    """Sets the UNet's LoRA to a file's. Raises OSDFaceError for one of another rank."""
    modules = dict(unet.named_modules())
    for name, adapter in parse_lora(read_tensors(path), path.name).items():
        layer = modules[name]
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if adapter.rank != len(down):
            raise OSDFaceError(
                f"{path.name} has rank {adapter.rank} and `lora.rank` is {len(down)}: set "
                "lora.rank to the file's."
            )
        with torch.no_grad():
            down.copy_(adapter.down.view_as(down))
            up.copy_(adapter.up.view_as(up) * (adapter.scale / layer.scaling["default"]))


def lora_tensors(unet: Any) -> dict[str, Tensor]:
    """The LoRA as the released file spells it: `lora.down/up` in attention, `lora_A/lora_B`
    elsewhere; multiplied by its scale, alpha/rank.
    """
    found = {}
    for name, layer in unet.named_modules():
        if not hasattr(layer, "lora_A") or "default" not in layer.lora_A:
            continue
        attention = re.search(r"\.(to_[qkv]|to_out\.0)$", name)
        down, up = ("lora.down", "lora.up") if attention else ("lora_A", "lora_B")
        found[f"unet.{name}.{down}.weight"] = layer.lora_A["default"].weight.float()
        found[f"unet.{name}.{up}.weight"] = (
            layer.lora_B["default"].weight * layer.scaling["default"]
        ).float()
    return for_file(found)
