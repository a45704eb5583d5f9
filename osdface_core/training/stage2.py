"""Stage 2: the UNet learns to restore a face in one step, conditioned on the visual prompts
(OSDFace, section 3.3).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, autocast, nn

from ..errors import OSDFaceError
from ..osdface import builtin
from ..osdface.files import LORA, VRE
from ..osdface.restore import TIMESTEP
from ..sd21.backbone import LATENT_CHANNELS, TEXT_WIDTH
from ..sd21.schedule import alphas_cumprod
from .data import Pictures, training_and_held_out
from .degradation import Degradation, generator_for
from .discriminators import PatchDiscriminator, UNetDiscriminator, noise_for
from .loop import Optimiser, Run, bare, for_file
from .losses import (
    Term,
    charbonnier,
    differences,
    edge_aware_dists,
    gan_losses,
    identity,
    leaning,
    load_dists,
    load_identity,
    load_lpips,
    shaken,
    tones,
    wanted,
    weave,
)
from .networks import (
    BuiltinAutoencoder,
    KLAutoencoder,
    Lora,
    UNetConfig,
    VaeConfig,
    adapted_in,
    add_lora,
    load_unet,
    load_vae,
    load_vre,
    lora_tensors,
    start_lora,
)
from .samples import show_restored

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gan:
    """The adversarial loss.

    weight: of the generator's loss.
    discriminator: unet, OSDFace's, which judges noised latents; or patch, which judges pixels.
    network: the UNet that the unet discriminator is made of.
    lora_rank: of the adapters through which it is trained, 0 to train all its weights.
    loss: of the two networks.
    start: the first step with this loss, from 0.
    channels: of the patch discriminator's first layer.
    layers: of the patch discriminator.
    """

    weight: float = 0.0
    discriminator: Literal["unet", "patch"] = "unet"
    network: UNetConfig = field(default_factory=UNetConfig)
    lora_rank: int = 16
    loss: Literal["softplus", "hinge"] = "softplus"
    start: int = 0
    channels: int = 64
    layers: int = 3


@dataclass(frozen=True)
class Losses:
    """Weights, 0 for a loss that is not computed; losses.py has the formulas.

    mse: mean squared error of the pixels.
    charbonnier: smooth absolute error of the pixels.
    differences: of neighbouring pixels' differences.
    tones: mean squared error at an eighth of the size.
    weave: what the error repeats in every block of 8 x 8 px.
    latent: mean squared error of the latents.
    autoencoding: of the losses of pixels and LPIPS, for undegraded pictures through the autoencoder
        alone, a quarter of each batch. Without it a trained decoder forgets them.
    lpips: LPIPS, of pictures that are shifted, mirrored and resized by chance, each time anew: with
        a network of strides patterns that repeat pass for detail otherwise (Kettunen et al. 2019).
    ea_dists: edge-aware DISTS.
    seen: pixels a side of the random part that DISTS is shown, 0 for the whole.
    shown: how many pictures of a batch DISTS is shown, 0 for all.
    identity: of ArcFace's embeddings, or dlib's.
    gan: adversarial.
    spoilt: the mean squared error of a degraded picture at which LPIPS, DISTS and the adversarial
        loss have the weights given; up to twice as much where more is lost, down to a quarter where
        less is, so that detail is made up where none is left and kept where it is. 0 for the same
        weights everywhere.
    lean: the power of those shares, from 0.25 to 2; above 1 the difference is larger.
    """

    mse: float = 1.0
    charbonnier: float = 0.0
    differences: float = 0.0
    tones: float = 0.0
    weave: float = 0.0
    latent: float = 0.0
    autoencoding: float = 0.0
    lpips: Term = field(default_factory=Term)
    ea_dists: Term = field(default_factory=lambda: Term(1.0))
    seen: int = 0
    shown: int = 0
    identity: Term = field(default_factory=lambda: Term(0.1))
    gan: Gan = field(default_factory=Gan)
    spoilt: float = 0.0
    lean: float = 1.0


@dataclass(frozen=True)
class Stage2Config:
    """What `configs/stage2*.yaml` hold.

    vre: a file of stage 1, associate_2.ckpt or osdface_vre.safetensors. A projector in it, or in
        the file beside it, is trained further.
    unet: the denoiser.
    vae: between pictures and latents.
    discriminator_optimiser: `optimiser` where it is not given.
    train: lora or full, the UNet's LoRA or all of the UNet, each with the projector; none, only
        what `vae.train` names.
    lora: on the UNet.
    projector_hidden: width of a new projector.
    timestep: the one step.
    frozen_precision: of an autoencoder that is not trained.
    gradient_checkpointing: computes activations twice instead of keeping them.
    degradation: of the faces.
    losses: and their weights.
    """

    run: Run
    data: Pictures
    optimiser: Optimiser
    vre: Path
    unet: UNetConfig
    vae: VaeConfig
    discriminator_optimiser: Optimiser | None = None
    train: Literal["lora", "full", "none"] = "lora"
    lora: Lora = field(default_factory=Lora)
    projector_hidden: int = 256
    timestep: int = TIMESTEP
    frozen_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_checkpointing: bool = False
    degradation: Degradation = field(default_factory=Degradation)
    losses: Losses = field(default_factory=Losses)


class Generator(nn.Module):
    """Projector, UNet and autoencoder, run as inference runs them."""

    def __init__(
        self,
        unet: Any,
        projector: nn.Module,
        vae: KLAutoencoder | BuiltinAutoencoder,
        timestep: int,
    ) -> None:
        super().__init__()
        self.unet, self.projector, self.vae, self.timestep = unet, projector, vae, timestep
        alpha = float(alphas_cumprod()[timestep])
        self.signal, self.noise = alpha**0.5, (1 - alpha) ** 0.5

    def forward(
        self, pixels: Tensor, codes: Tensor, clean: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(restored pixels, not clamped; x0 (B,C,H/8,W/8); `clean` encoded and decoded).

        pixels: degraded (B,3,H,W) in [0,1].
        codes: of the whole faces (B,77,features).
        clean: undegraded pictures in [0,1], or None.
        """
        with autocast(pixels.device.type, enabled=False):
            prompts = self.projector(codes)
        latents = self.vae.encode(pixels)
        predicted = self.unet(latents, self.timestep, encoder_hidden_states=prompts).sample.float()
        x0 = (latents - self.noise * predicted) / self.signal
        again = None if clean is None else self.vae.decode(self.vae.encode(clean)).float()
        return self.vae.decode(x0).float(), x0, again


class Stage2Task:
    def __init__(self, config: Stage2Config, accelerator: Accelerator) -> None:
        self.config, self.accelerator, self.step = config, accelerator, 0
        device = accelerator.device
        self.samples, self.held_out = training_and_held_out(
            config.data, config.degradation, config.run.seed, config.run.samples
        )
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
            config.frozen_precision
        ]
        self.embedder = load_vre(config.vre, config.projector_hidden).to(device)
        unet = load_unet(config.unet)
        channels = builtin.CHANNELS if config.vae.kind == "builtin" else LATENT_CHANNELS
        if (unet.config.cross_attention_dim, unet.config.in_channels) != (TEXT_WIDTH, channels):
            raise OSDFaceError(
                f"`unet` takes {unet.config.in_channels} channels and prompts of "
                f"{unet.config.cross_attention_dim}; {channels} and {TEXT_WIDTH} are wanted: give "
                "the UNet that goes with `vae`, for Stable Diffusion's that of 2.1-base."
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
        vae = load_vae(config.vae, dtype).to(device)
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
            if isinstance(vae, KLAutoencoder):
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
        self.lpips = (
            load_lpips(terms.lpips.files).to(device)
            if wanted("lpips", terms.lpips, "VGG16's or AlexNet's, and LPIPS'")
            else None
        )
        self.face = (
            load_identity(terms.identity.files).to(device)
            if wanted("identity", terms.identity, "ArcFace's IR-SE50, or dlib's")
            else None
        )
        if discriminator := self._discriminator():
            self.networks["discriminator"] = discriminator
            self.optimisers["discriminator"] = config.discriminator_optimiser or config.optimiser
        self.fake: tuple[Tensor, Tensor] | None = None
        self.codes = torch.empty(0)

    def _discriminator(self) -> nn.Module | None:
        gan = self.config.losses.gan
        if not wanted("gan", Term(gan.weight)):
            return None
        if gan.discriminator == "patch":
            return PatchDiscriminator(gan.channels, gan.layers)
        if gan.network == UNetConfig():
            log.warning(
                "gan is switched off: `losses.gan.network` names no UNet for its discriminator "
                "(SDXL's in OSDFace)."
            )
            return None
        from peft import LoraConfig

        discriminator = UNetDiscriminator(
            load_unet(gan.network), self.embedder.quant_conv.out_channels
        )
        unet = discriminator.unet
        if gan.lora_rank:
            unet.requires_grad_(False)
            unet.add_adapter(
                LoraConfig(
                    r=gan.lora_rank, lora_alpha=gan.lora_rank, target_modules=adapted_in(unet)
                )
            )
        if self.config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        return discriminator

    def _latents(self, pictures: Tensor) -> Tensor:
        generator: Any = bare(self.networks["generator"])
        with torch.no_grad(), self.accelerator.autocast():
            return generator.vae.encode(pictures)

    def _verdict(
        self,
        network: nn.Module,
        pixels: Tensor,
        latents: Tensor,
        numbers: list[int],
        salt: int,
    ) -> Tensor:
        """What the discriminator says of pictures of the faces whose codes are `self.codes`.

        network: the discriminator.
        pixels: (n*B,3,H,W) in [0,1], n versions of the B faces.
        latents: of the same, (n*B,C,H/8,W/8).
        numbers: the B sample numbers, which the noise depends on.
        salt: another number gives another noise.
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

    def _of_pixels(
        self, given: Tensor, right: Tensor, number: int, seen: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """number: a sample's, on which what is random depends.

        seen: what LPIPS sees in place of `given`.
        """
        terms = self.config.losses
        parts: dict[str, Tensor] = {"mse": (given - right).square().mean()}
        total = terms.mse * parts["mse"]
        for key, weight, loss in (
            ("charbonnier", terms.charbonnier, charbonnier),
            ("differences", terms.differences, differences),
            ("tones", terms.tones, tones),
            ("weave", terms.weave, weave),
        ):
            if weight:
                parts[key] = loss(given, right)
                total = total + weight * parts[key]
        if self.lpips:
            generator = generator_for(self.config.run.seed, -6, number)
            seen = given if seen is None else seen
            parts["lpips"] = self.lpips(*shaken([seen, right], generator))
            total = total + terms.lpips.weight * parts["lpips"]
        return total, parts

    def _shown(self, number: int, *pictures: Tensor) -> list[Tensor]:
        """The same random part of pictures (B,3,H,W), or of some of them, that DISTS is shown."""
        seen = self.config.losses.seen
        pictures = tuple(x[: self.config.losses.shown or None] for x in pictures)
        if not seen:
            return list(pictures)
        generator = generator_for(self.config.run.seed, -5, number)
        top, left = (
            int(torch.randint(max(1, side - seen + 1), (), generator=generator))
            for side in pictures[0].shape[-2:]
        )
        return [x[..., top : top + seen, left : left + seen] for x in pictures]

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
        seen = leaning(given, batch["lq"], right, terms.spoilt, terms.lean)
        total, parts = self._of_pixels(given, right, numbers[0], seen)
        if clean is not None:
            parts["autoencoding"], _ = self._of_pixels(again, clean, numbers[0])
            total = total + terms.autoencoding * parts["autoencoding"]
        if terms.latent:
            parts["latent"] = (x0 - self._latents(right)).square().mean()
            total = total + terms.latent * parts["latent"]
        if self.dists:
            parts["ea_dists"] = edge_aware_dists(self.dists, *self._shown(numbers[0], seen, right))
            total = total + terms.ea_dists.weight * parts["ea_dists"]
        if self.face:
            parts["identity"] = identity(self.face, given, right)
            total = total + terms.identity.weight * parts["identity"]
        if on and "discriminator" in self.networks:
            parts["gan"] = gan_losses(
                terms.gan.loss,
                self._verdict(bare(self.networks["discriminator"]), seen, x0, numbers, salt=0),
            )
            total = total + terms.gan.weight * parts["gan"]
        return total, parts | {"total": total}

    def after_step(self, step: int) -> None:
        pass

    def show(self, count: int) -> tuple[Tensor, dict[str, float]]:
        generator = bare(self.networks["generator"])

        def restore(sample: dict[str, Tensor]) -> Tensor:
            restored: Tensor = generator(sample["lq"], self.embedder.codes(sample["face"]))[0]
            return restored

        return show_restored(restore, self.held_out, count, self.accelerator.device)

    def export(self, folder: Path) -> None:
        """osdface_vre.safetensors; pytorch_lora_weights.safetensors, or the folder unet; the
        autoencoder where it was trained.
        """
        generator: Any = bare(self.networks["generator"])
        save_file(for_file(self.embedder.state_dict()), folder / VRE.name)
        if self.config.train == "lora":
            save_file(lora_tensors(generator.unet), folder / LORA.name)
        else:
            generator.unet.save_pretrained(folder / "unet")
        if self.config.vae.train == "none":
            return
        if isinstance(generator.vae, KLAutoencoder):
            generator.vae.vae.save_pretrained(folder / "vae")
        else:
            state = for_file(generator.vae.vae.state_dict())
            save_file(state, folder / "autoencoder.safetensors")
