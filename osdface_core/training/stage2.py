"""Stage 2: the diffusion UNet learns to restore a face in one step, led by the visual prompts
(OSDFace, section 3.3).
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, autocast, nn

from ..errors import OSDFaceError
from ..osdface.files import LORA, PROJECTOR_PREFIX, VRE
from ..osdface.lora import is_adapted, parse_lora
from ..osdface.restore import TIMESTEP
from ..osdface.vre import Shape, VisualEmbedder, build_embedder
from ..osdface.vre.embedder import Projector
from ..osdface.vre.loading import read_parts
from ..sd21.backbone import LATENT_CHANNELS, TEXT_WIDTH
from ..sd21.schedule import alphas_cumprod
from ..weights.reading import read_tensors
from .data import Pictures, Samples, split
from .degradation import Degradation, generator_for
from .discriminators import PatchDiscriminator, UNetDiscriminator, noise_for
from .loop import Optimiser, Run, bare, grid
from .losses import (
    Term,
    charbonnier,
    coarse,
    differences,
    edge_aware_dists,
    energies,
    gan_losses,
    identity,
    lattice,
    load_arcface,
    load_dists,
    measures,
    wanted,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Network:
    """A diffusers network: its folder, or what it is to be made of, anew; `weights` a safetensors
    file for the latter.
    """

    folder: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)
    weights: Path | None = None


@dataclass(frozen=True)
class Autoencoding:
    """kind: kl, diffusers' AutoencoderKL, or builtin, our small one, from `weights`. train: which
    of it is trained; grain: the small one's last layer that says how much grain there is.
    """

    kind: Literal["kl", "builtin"] = "kl"
    folder: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)
    weights: Path | None = None
    train: Literal["none", "decoder", "all", "grain"] = "none"


@dataclass(frozen=True)
class Lora:
    """start: a LoRA file in any spelling to go on from."""

    rank: int = 16
    alpha: int = 16
    start: Path | None = None


@dataclass(frozen=True)
class Gan:
    """weight: of what the generator pays. discriminator: unet, OSDFace's kind, over the UNet in
    `network`; or patch, over pixels, made anew. lora_rank: of the adapters that the UNet
    discriminator is trained through, 0 to train all of it. start: first step.
    """

    weight: float = 0.0
    discriminator: Literal["unet", "patch"] = "unet"
    network: Network = field(default_factory=Network)
    lora_rank: int = 16
    loss: Literal["softplus", "hinge"] = "softplus"
    start: int = 0
    channels: int = 64
    layers: int = 3


@dataclass(frozen=True)
class Losses:
    """mse, coarse, lattice, charbonnier, differences, energies: of pixels, weights alone, and
    energy_lags, the last one's. latent: of the latents, squared. autoencoding: how much those of
    pixels weigh for undegraded pictures through the autoencoder alone, a quarter of each batch,
    without which a trained decoder forgets them. The others as `Term`.
    """

    mse: float = 1.0
    coarse: float = 0.0
    lattice: float = 0.0
    charbonnier: float = 0.0
    differences: float = 0.0
    energies: float = 0.0
    energy_lags: tuple[int, ...] = (1,)
    latent: float = 0.0
    autoencoding: float = 0.0
    ea_dists: Term = field(default_factory=lambda: Term(1.0))
    identity: Term = field(default_factory=lambda: Term(0.1))
    gan: Gan = field(default_factory=Gan)


@dataclass(frozen=True)
class Stage2:
    """vre: a file of stage 1, associate_2.ckpt or osdface_vre.safetensors; a projector in it, or
    beside it, is gone on from. train: the UNet's LoRA, or all of it, each with the projector; or
    nothing but what `vae.train` names. frozen_precision: of the networks that are not trained, the
    embedder excepted. gradient_checkpointing: computes activations twice instead of keeping them.
    """

    run: Run
    data: Pictures
    optimiser: Optimiser
    vre: Path
    unet: Network
    vae: Autoencoding
    discriminator_optimiser: Optimiser | None = None
    train: Literal["lora", "full", "none"] = "lora"
    lora: Lora = field(default_factory=Lora)
    projector_hidden: int = 256
    timestep: int = TIMESTEP
    frozen_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_checkpointing: bool = False
    degradation: Degradation = field(default_factory=Degradation)
    losses: Losses = field(default_factory=Losses)


class KL(nn.Module):
    """diffusers' autoencoder: pixels in [0,1] to scaled latents, the posterior's mean, and back."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.scale = vae.config.scaling_factor

    def encode(self, pixels: Tensor) -> Tensor:
        return (
            self.vae.encode((pixels * 2 - 1).to(self.vae.dtype)).latent_dist.mode().float()
            * self.scale
        )

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode((latents / self.scale).to(self.vae.dtype)).sample.float() / 2 + 0.5


class Builtin(nn.Module):
    """The built-in autoencoder behind the same two calls."""

    def __init__(self, weights: Path | None) -> None:
        super().__init__()
        from ..osdface.builtin.autoencoder import Autoencoder

        self.vae = Autoencoder()
        if weights:
            self.vae.load_state_dict({name: t.float() for name, t in load_file(weights).items()})

    def encode(self, pixels: Tensor) -> Tensor:
        return self.vae.encode(pixels * 2 - 1).float()

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents).float() / 2 + 0.5


def make_vae(config: Autoencoding, dtype: torch.dtype) -> KL | Builtin:
    """Frozen but for what `config.train` names."""
    made: KL | Builtin
    if config.kind == "builtin":
        made = Builtin(config.weights)
    else:
        from diffusers import AutoencoderKL

        made = KL(
            _network(AutoencoderKL, Network(config.folder, config.config, config.weights), "vae")
        )
    made.requires_grad_(False)
    if config.train == "none":
        return made.to(dtype)
    if config.train == "grain" and not isinstance(made, Builtin):
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
    return made


def _network(kind: Any, network: Network, name: str) -> Any:
    """A diffusers network in fp32. Raises OSDFaceError where it cannot be made."""
    try:
        if network.folder:
            inside = network.folder / name
            folder = inside if inside.is_dir() else network.folder
            return kind.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
        if not network.config:
            raise OSDFaceError(
                f"`{name}` names neither a folder nor a config: give a folder in diffusers' layout."
            )
        made = kind.from_config(network.config)
        if network.weights:
            made.load_state_dict({key: t.float() for key, t in load_file(network.weights).items()})
        return made
    except (OSError, ValueError, RuntimeError, json.JSONDecodeError) as error:
        why = " ".join(str(error).split())[:200]
        raise OSDFaceError(
            f"`{name}` cannot be loaded ({why}): give a folder in diffusers' layout."
        ) from error


def load_vre(path: Path, hidden: int) -> VisualEmbedder:
    """The embedder of degraded faces, frozen, with the file's projector or else a new one, which
    alone is to be trained.
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
        log.info("The projector starts anew: %s holds none.", path.name)
    network = build_embedder(encoder | projector, source=path.name)
    network.projector.requires_grad_(True)
    return network


def adapted_in(unet: nn.Module) -> list[str]:
    return [
        name
        for name, layer in unet.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and is_adapted(name)
    ]


def add_lora(unet: Any, rank: int, alpha: int) -> list[str]:
    """Puts a LoRA on the layers that OSDFace adapts; all else is frozen. Returns their names."""
    from peft import LoraConfig

    names = adapted_in(unet)
    unet.requires_grad_(False)
    unet.add_adapter(
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, init_lora_weights="gaussian")
    )
    return names


def start_lora(unet: Any, path: Path) -> None:
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
    elsewhere, its scale (alpha/rank) put in.
    """
    found = {}
    for name, layer in unet.named_modules():
        if not hasattr(layer, "lora_A") or "default" not in layer.lora_A:
            continue
        attention = re.search(r"\.(to_[qkv]|to_out\.0)$", name)
        down, up = ("lora.down", "lora.up") if attention else ("lora_A", "lora_B")
        found[f"unet.{name}.{down}.weight"] = (
            layer.lora_A["default"].weight.detach().float().cpu().contiguous()
        )
        found[f"unet.{name}.{up}.weight"] = (
            (layer.lora_B["default"].weight * layer.scaling["default"])
            .detach()
            .float()
            .cpu()
            .contiguous()
        )
    return found


class Generator(nn.Module):
    """What is trained: projector, UNet, and what of the autoencoder is asked for, run as inference
    runs them.
    """

    def __init__(self, unet: Any, projector: nn.Module, vae: KL | Builtin, timestep: int) -> None:
        super().__init__()
        self.unet, self.projector, self.vae, self.timestep = unet, projector, vae, timestep
        alpha = float(alphas_cumprod()[timestep])
        self.signal, self.noise = alpha**0.5, (1 - alpha) ** 0.5

    def forward(
        self, pixels: Tensor, codes: Tensor, clean: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """pixels (B,3,H,W) in [0,1], codes (B,77,features) -> restored pixels, not clamped, and x0
        (B,4,H/8,W/8); beside them pictures `clean` as the autoencoder alone gives them back.
        """
        with autocast(pixels.device.type, enabled=False):
            prompts = self.projector(codes)
        latents = self.vae.encode(pixels)
        predicted = self.unet(latents, self.timestep, encoder_hidden_states=prompts).sample.float()
        x0 = (latents - self.noise * predicted) / self.signal
        again = None if clean is None else self.vae.decode(self.vae.encode(clean)).float()
        return self.vae.decode(x0).float(), x0, again


class Stage2Task:
    def __init__(self, config: Stage2, accelerator: Accelerator) -> None:
        from diffusers import UNet2DConditionModel

        self.config, self.accelerator, self.step = config, accelerator, 0
        device = accelerator.device
        files, self.measured = split(config.data)
        self.samples = Samples(files, config.data, config.degradation, config.run.seed)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
            config.frozen_precision
        ]
        self.embedder = load_vre(config.vre, config.projector_hidden).to(device)
        unet = _network(UNet2DConditionModel, config.unet, "unet")
        if (unet.config.cross_attention_dim, unet.config.in_channels) != (
            TEXT_WIDTH,
            LATENT_CHANNELS,
        ):
            raise OSDFaceError(
                f"`unet` takes {unet.config.in_channels} channels and prompts of "
                f"{unet.config.cross_attention_dim}; {LATENT_CHANNELS} and "
                f"{TEXT_WIDTH} are wanted: give the UNet of Stable Diffusion 2.1-base."
            )
        if config.train == "lora":
            names = add_lora(unet, config.lora.rank, config.lora.alpha)
            if config.lora.start:
                start_lora(unet, config.lora.start)
            log.info("LoRA of rank %d on %d layers", config.lora.rank, len(names))
        if config.train == "none":
            if config.vae.train == "none":
                raise OSDFaceError("`train` and `vae.train` are none: name something to train.")
            unet.requires_grad_(False)
            self.embedder.projector.requires_grad_(False)
        vae = make_vae(config.vae, dtype).to(device)
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
            if isinstance(vae, KL):
                vae.vae.enable_gradient_checkpointing()
        self.networks: dict[str, nn.Module] = {
            "generator": Generator(unet, self.embedder.projector, vae, config.timestep).to(device)
        }
        self.optimisers = {"generator": config.optimiser}
        terms = config.losses
        self.dists = (
            load_dists(terms.ea_dists.files).to(device)
            if wanted("ea_dists", terms.ea_dists, "VGG16's and DISTS'")
            else None
        )
        self.face = (
            load_arcface(terms.identity.files).to(device)
            if wanted("identity", terms.identity, "ArcFace's IR-SE50")
            else None
        )
        if judge := self._discriminator():
            self.networks["discriminator"] = judge
            self.optimisers["discriminator"] = config.discriminator_optimiser or config.optimiser
        self.fake: tuple[Tensor, Tensor] | None = None
        self.codes = torch.empty(0)

    def _discriminator(self) -> nn.Module | None:
        gan = self.config.losses.gan
        if not wanted("gan", Term(gan.weight)):
            return None
        if gan.discriminator == "patch":
            return PatchDiscriminator(gan.channels, gan.layers)
        if not gan.network.folder and not gan.network.config:
            log.warning(
                "gan is switched off: `losses.gan.network` names no UNet for its discriminator "
                "(SDXL's in OSDFace)."
            )
            return None
        from diffusers import UNet2DConditionModel
        from peft import LoraConfig

        judge = UNetDiscriminator(
            _network(UNet2DConditionModel, gan.network, "unet"),
            self.embedder.quant_conv.out_channels,
        )
        if gan.lora_rank:
            judge.unet.requires_grad_(False)
            adapter = LoraConfig(
                r=gan.lora_rank, lora_alpha=gan.lora_rank, target_modules=adapted_in(judge.unet)
            )
            judge.unet.add_adapter(adapter)
        if self.config.gradient_checkpointing:
            judge.unet.enable_gradient_checkpointing()
        return judge

    def _latents(self, pictures: Tensor) -> Tensor:
        generator: Any = bare(self.networks["generator"])
        with torch.no_grad(), self.accelerator.autocast():
            return generator.vae.encode(pictures)

    def _verdict(
        self, network: nn.Module, pixels: Tensor, latents: Tensor, numbers: list[int], salt: int
    ) -> Tensor:
        """What the discriminator says of these pictures, whose codes are `self.codes`, as many
        times over as there are pictures.
        """
        if isinstance(bare(network), PatchDiscriminator):
            return network(pixels)
        times = len(latents) // len(numbers)
        generators = [generator_for(self.config.run.seed, -3 - salt, n) for n in numbers]
        steps, noise = (
            v.repeat(times, *[1] * (v.ndim - 1))
            for v in noise_for(generators, latents[: len(numbers)])
        )
        return network(latents, self.codes.repeat(times, 1, 1), steps, noise)

    def _of_pixels(self, given: Tensor, right: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        terms = self.config.losses
        parts: dict[str, Tensor] = {"mse": (given - right).square().mean()}
        total = terms.mse * parts["mse"]
        for key, weight, loss in (
            ("coarse", terms.coarse, coarse),
            ("lattice", terms.lattice, lattice),
            ("charbonnier", terms.charbonnier, charbonnier),
            ("differences", terms.differences, differences),
            ("energies", terms.energies, partial(energies, lags=terms.energy_lags)),
        ):
            if weight:
                parts[key] = loss(given, right)
                total = total + weight * parts[key]
        return total, parts

    def losses(self, name: str, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        terms, right, numbers = self.config.losses, batch["hq"], batch["number"].tolist()
        on = float(self.step >= terms.gan.start)
        if name == "discriminator":
            assert self.fake is not None
            pixels, latents = self.fake
            latents = torch.cat([latents, self._latents(right)])
            both = self._verdict(
                self.networks[name], torch.cat([pixels, right]), latents, numbers, salt=1
            )
            total = gan_losses(terms.gan.loss, *both.chunk(2))
            return total * on, {"discriminator": total}
        with torch.no_grad():
            self.codes = self.embedder.codes(batch["face"])
        clean = right[: max(1, len(right) // 4)] if terms.autoencoding else None
        given, x0, again = self.networks["generator"](batch["lq"], self.codes, clean)
        self.fake = given.detach(), x0.detach()
        total, parts = self._of_pixels(given, right)
        if clean is not None:
            parts["autoencoding"], _ = self._of_pixels(again, clean)
            total = total + terms.autoencoding * parts["autoencoding"]
        if terms.latent:
            parts["latent"] = (x0 - self._latents(right)).square().mean()
            total = total + terms.latent * parts["latent"]
        if self.dists:
            parts["ea_dists"] = edge_aware_dists(self.dists, given, right)
            total = total + terms.ea_dists.weight * parts["ea_dists"]
        if self.face:
            parts["identity"] = identity(self.face, given, right)
            total = total + terms.identity.weight * parts["identity"]
        if on and "discriminator" in self.networks:
            parts["gan"] = gan_losses(
                terms.gan.loss,
                self._verdict(bare(self.networks["discriminator"]), given, x0, numbers, salt=0),
            )
            total = total + terms.gan.weight * parts["gan"]
        return total, parts | {"total": total}

    def after_step(self, step: int) -> None:
        pass

    def show(self, count: int) -> tuple[Tensor, dict[str, float]]:
        """Rows: degraded, restored, original. Measured over all held-out pictures, whole, beside
        what the degraded ones measure.
        """
        held = Samples(
            self.measured or self.samples.files,
            self.config.data,
            self.config.degradation,
            self.config.run.seed,
            still=True,
        )
        generator = bare(self.networks["generator"])
        rows: list[list[Tensor]] = [[], [], []]
        figures: dict[str, list[float]] = {}
        for n in range(len(held) if self.measured else min(count, len(held))):
            sample = {
                key: value[None].to(self.accelerator.device) for key, value in held[n].items()
            }
            restored = generator(sample["lq"], self.embedder.codes(sample["face"]))[0].clamp(0, 1)
            for prefix, picture in (("", restored), ("lq_", sample["lq"])):
                for key, value in measures(picture, sample["hq"]).items():
                    figures.setdefault(prefix + key, []).append(value)
            if n < count:
                for row, picture in zip(rows, (sample["lq"], restored, sample["hq"]), strict=True):
                    row.append(picture)
        return grid([torch.cat(row) for row in rows]), {
            key: sum(of) / len(of) for key, of in figures.items()
        }

    def export(self, folder: Path) -> None:
        """osdface_vre.safetensors; pytorch_lora_weights.safetensors, or the folder unet; the
        autoencoder where it was trained.
        """
        generator: Any = bare(self.networks["generator"])
        vre = {
            name: t.detach().cpu().contiguous() for name, t in self.embedder.state_dict().items()
        }
        save_file(vre, folder / VRE.name)
        if self.config.train == "lora":
            save_file(lora_tensors(generator.unet), folder / LORA.name)
        else:
            generator.unet.save_pretrained(folder / "unet")
        if self.config.vae.train != "none":
            if isinstance(generator.vae, KL):
                generator.vae.vae.save_pretrained(folder / "vae")
            else:
                state = {
                    name: t.detach().cpu().contiguous()
                    for name, t in generator.vae.vae.state_dict().items()
                }
                save_file(state, folder / "autoencoder.safetensors")
