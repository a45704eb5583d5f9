"""OSEDiff: LoRA on Stable Diffusion's UNet and on its autoencoder's encoder, led by the pixels and
by variational score distillation in latent space (Wu et al. 2024, section 3).

The released code was read for what the paper leaves open. Where it draws from the autoencoder's
posterior, the mean is taken here, as in inference.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import OSDFaceError
from ..osediff.files import PICTURES
from ..osediff.upscale import TIMESTEP
from ..osediff.weights import ALPHA, FIRST, Weights, as_tensors, parse_weights
from ..sd21.adapters import Adapter, Lora
from ..sd21.backbone import LATENT_CHANNELS
from ..sd21.schedule import TIMESTEPS, alphas_cumprod
from ..weights.reading import read_tensors
from .data import Pictures, Samples, training_and_held_out
from .degradation import Degradation, generator_for
from .loop import Optimiser, Run, bare, for_file
from .losses import Term, load_lpips, wanted
from .networks import KLAutoencoder, UNetConfig, VaeConfig, load_unet, load_vae
from .samples import show_restored

log = logging.getLogger(__name__)

# Timesteps at which the distillation looks: neither nearly clean nor nearly noise alone.
EARLIEST, LATEST = 20, 980
# Texts whose prompts are kept, 0.3 MB each.
MAX_TEXTS = 512


@dataclass(frozen=True)
class Losses:
    """Weights, 0 for a loss that is not computed.

    mse: mean squared error of the pixels in [-1,1].
    lpips: perceptual, over VGG16.
    vsd: variational score distillation, of the latents.
    regulariser: of the second UNet, which learns what the generator's latents look like.
    """

    mse: float = 1.0
    lpips: Term = field(default_factory=lambda: Term(2.0))
    vsd: float = 1.0
    regulariser: float = 1.0


@dataclass(frozen=True)
class OSEDiffConfig:
    """What `configs/osediff*.yaml` hold.

    unet: Stable Diffusion 2.1-base's; of one that is made anew, all weights are random.
    vae: its autoencoder, of kind kl, which is not trained but for the LoRA on its encoder.
    text: a folder in diffusers' layout with text_encoder and tokenizer, or a checkpoint. A picture
        is described by the text file of its name beside it, such as photo_001.txt; without one,
        by an empty text.
    tokenizer: a folder with vocab.json and merges.txt, where `text` is a checkpoint.
    negative: the text that the distillation leads away from.
    guidance: how far (Ho and Salimans 2022).
    rank: of the adapters.
    start: a file of OSEDiff's weights to go on from; None for new ones.
    regulariser_optimiser: `optimiser` where it is not given.
    gradient_checkpointing: computes activations twice instead of keeping them.
    degradation: of the pictures.
    losses: and their weights.
    """

    run: Run
    data: Pictures
    optimiser: Optimiser
    unet: UNetConfig
    vae: VaeConfig
    text: Path
    tokenizer: Path | None = None
    negative: str = ""
    guidance: float = 7.5
    rank: int = 4
    start: Path | None = None
    regulariser_optimiser: Optimiser | None = None
    gradient_checkpointing: bool = False
    degradation: Degradation = field(default_factory=Degradation)
    losses: Losses = field(default_factory=Losses)


def adapted_in_unet(unet: nn.Module) -> list[str]:
    """The names of a UNet's layers that OSEDiff adapts: all but those of the time embedding."""
    return [name for name in _layers(unet) if "time_emb" not in name]


def adapted_in_encoder(vae: nn.Module) -> list[str]:
    """The names of an autoencoder's layers on the way to its latents."""
    return [name for name in _layers(vae) if name.startswith("encoder.") or name == "quant_conv"]


def _layers(network: nn.Module) -> list[str]:
    return [
        name for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)
    ]


def add_adapters(network: Any, names: list[str], rank: int) -> None:
    """Puts a LoRA on these layers of a network of diffusers and freezes the rest."""
    from peft import LoraConfig

    network.requires_grad_(False)
    network.add_adapter(
        LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=names, init_lora_weights="gaussian")
    )


class Generator(nn.Module):
    """Encoder, UNet and decoder, run as inference runs them."""

    def __init__(self, unet: Any, vae: KLAutoencoder) -> None:
        super().__init__()
        self.unet, self.vae = unet, vae

    def forward(self, pixels: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """(restored pixels; x0 (B,4,H/8,W/8)). pixels: degraded (B,3,H,W) in [0,1]."""
        latents = self.vae.encode(pixels)
        predicted = self.unet(latents, TIMESTEP, encoder_hidden_states=prompts).sample.float()
        x0 = clean_of(latents, predicted, torch.full((len(latents),), TIMESTEP))
        return self.vae.decode(x0).float().clamp(0, 1), x0


def _factors(steps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """What signal and noise are multiplied by at timesteps (B,), each (B,1,1,1)."""
    alpha = alphas_cumprod()[steps.cpu()].view(-1, 1, 1, 1)
    return alpha.sqrt().to(like), (1 - alpha).sqrt().to(like)


def noised(latents: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
    """Latents (B,4,h,w) at timesteps (B,)."""
    signal, share = _factors(steps, latents)
    return signal * latents + share * noise


def clean_of(noisy: Tensor, predicted: Tensor, steps: Tensor) -> Tensor:
    """x0 of noised latents (B,4,h,w) by the noise that was predicted."""
    signal, share = _factors(steps, noisy)
    return (noisy - share * predicted) / signal


def distillation(
    latents: Tensor,
    noise: Tensor,
    steps: Tensor,
    own: Callable[[Tensor, Tensor], Tensor],
    teacher: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The loss whose gradient is that of variational score distillation (Wang et al. 2023).

    It leads latents from what the generator's look like to what the teacher takes for pictures.

    latents: x0 (B,4,h,w) of the generator.
    noise: (B,4,h,w).
    steps: timesteps (B,).
    own: (noisy latents, timesteps) -> the noise that the regulariser predicts.
    teacher: the same of the frozen UNet, guided.
    """
    with torch.no_grad():
        noisy = noised(latents, noise, steps)
        likely = clean_of(noisy, own(noisy, steps).float(), steps)
        right = clean_of(noisy, teacher(noisy, steps).float(), steps)
        weight = (latents - right).abs().mean((1, 2, 3), keepdim=True)
        target = latents - (likely - right) / weight
    return F.mse_loss(latents, target)


class OSEDiffTask:
    def __init__(self, config: OSEDiffConfig, accelerator: Accelerator) -> None:
        from ..diffusers.text import TextEncoder

        self.config, self.accelerator, self.step = config, accelerator, 0
        device = accelerator.device
        self.samples, self.held_out = training_and_held_out(
            config.data, config.degradation, config.run.seed, config.run.samples, with_face=False
        )
        self.encode_text = TextEncoder(config.text, config.tokenizer, device)
        self.texts: OrderedDict[str, Tensor] = OrderedDict()
        unet, regulariser = (_unet(config) for _ in range(2))
        first = unet.get_submodule(FIRST).base_layer
        first.requires_grad_(True)
        vae = _vae(config)
        if config.start:
            _set(unet, vae.vae, parse_weights(read_tensors(config.start), config.start.name))
        if config.gradient_checkpointing:
            for network in (unet, regulariser, vae.vae):
                network.enable_gradient_checkpointing()
        self.networks: dict[str, nn.Module] = {"generator": Generator(unet, vae).to(device)}
        self.optimisers = {"generator": config.optimiser}
        terms = config.losses
        if wanted("vsd", Term(terms.vsd)):
            self.networks["regulariser"] = regulariser.to(device)
            self.optimisers["regulariser"] = config.regulariser_optimiser or config.optimiser
        self.lpips = (
            load_lpips(terms.lpips.files).to(device)
            if wanted("lpips", terms.lpips, "VGG16's and LPIPS'")
            else None
        )
        self.made: tuple[Tensor, Tensor] | None = None

    def prompts(self, samples: Samples, numbers: list[int]) -> Tensor:
        """The prompts (B,77,1024) of samples, by the texts beside their pictures."""
        texts = [samples.file(n).with_suffix(".txt") for n in numbers]
        return torch.cat([self._prompt(_text(path)) for path in texts])

    def _prompt(self, text: str) -> Tensor:
        if text not in self.texts:
            self.texts[text] = self.encode_text(text).to(self.accelerator.device)
        self.texts.move_to_end(text)
        if len(self.texts) > MAX_TEXTS:
            self.texts.popitem(last=False)
        return self.texts[text]

    def _noise(
        self, like: Tensor, numbers: list[int], salt: int, low: int, high: int
    ) -> tuple[Tensor, Tensor]:
        """Timesteps (B,) from low to high - 1, and noise, of each sample by its number."""
        generators = [generator_for(self.config.run.seed, -3 - salt, n) for n in numbers]
        steps = torch.cat([torch.randint(low, high, (1,), generator=g) for g in generators])
        noise = torch.stack([torch.randn(like.shape[1:], generator=g) for g in generators])
        return steps.to(like.device), noise.to(like)

    def _distillation(self, x0: Tensor, prompts: Tensor, numbers: list[int]) -> Tensor:
        regulariser: Any = bare(self.networks["regulariser"])
        steps, noise = self._noise(x0, numbers, 0, EARLIEST, LATEST)
        negative = self._prompt(self.config.negative).expand(len(x0), -1, -1)

        def own(noisy: Tensor, at: Tensor) -> Tensor:
            predicted: Tensor = regulariser(noisy, at, encoder_hidden_states=prompts).sample
            return predicted

        def teacher(noisy: Tensor, at: Tensor) -> Tensor:
            # Without its adapters the regulariser is the frozen UNet.
            regulariser.disable_adapters()
            try:
                both = regulariser(
                    noisy.repeat(2, 1, 1, 1),
                    at.repeat(2),
                    encoder_hidden_states=torch.cat([negative, prompts]),
                ).sample
            finally:
                regulariser.enable_adapters()
            away, towards = both.float().chunk(2)
            return away + self.config.guidance * (towards - away)

        with self.accelerator.autocast():
            return distillation(x0, noise, steps, own, teacher)

    def losses(self, name: str, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        terms, numbers = self.config.losses, batch["number"].tolist()
        if name == "regulariser":
            assert self.made is not None
            x0, prompts = self.made
            steps, noise = self._noise(x0, numbers, 1, 0, TIMESTEPS)
            noisy = noised(x0, noise, steps)
            predicted = self.networks[name](noisy, steps, encoder_hidden_states=prompts).sample
            loss = F.mse_loss(predicted.float(), noise)
            return terms.regulariser * loss, {"regulariser": loss}
        prompts = self.prompts(self.samples, numbers)
        given, x0 = self.networks["generator"](batch["lq"], prompts)
        self.made = x0.detach(), prompts
        parts = {"mse": (2 * (given - batch["hq"])).square().mean()}
        total = terms.mse * parts["mse"]
        if self.lpips:
            parts["lpips"] = self.lpips(given, batch["hq"])
            total = total + terms.lpips.weight * parts["lpips"]
        if "regulariser" in self.networks:
            parts["vsd"] = self._distillation(x0, prompts, numbers)
            total = total + terms.vsd * parts["vsd"]
        return total, parts | {"total": total}

    def after_step(self, step: int) -> None:
        pass

    def show(self, count: int) -> tuple[Tensor, dict[str, float]]:
        generator = bare(self.networks["generator"])

        def restore(sample: dict[str, Tensor]) -> Tensor:
            prompts = self.prompts(self.held_out, sample["number"].tolist())
            return generator(sample["lq"], prompts)[0]

        return show_restored(restore, self.held_out, count, self.accelerator.device)

    def export(self, folder: Path) -> None:
        """osediff.safetensors, which the node and the command line read."""
        generator: Any = bare(self.networks["generator"])
        first = generator.unet.get_submodule(FIRST).base_layer
        weights = Weights(
            _adapters(generator.unet), _adapters(generator.vae.vae), first.weight, first.bias
        )
        save_file(for_file(as_tensors(weights)), folder / PICTURES.name)


def _unet(config: OSEDiffConfig) -> Any:
    unet = load_unet(config.unet)
    if unet.config.in_channels != LATENT_CHANNELS:
        raise OSDFaceError(
            f"`unet` takes {unet.config.in_channels} channels; {LATENT_CHANNELS} are wanted: give "
            "the UNet of Stable Diffusion 2.1-base."
        )
    add_adapters(unet, adapted_in_unet(unet), config.rank)
    return unet


def _vae(config: OSEDiffConfig) -> KLAutoencoder:
    if config.vae.kind != "kl" or config.vae.train != "none":
        raise OSDFaceError(
            f"`vae` is of kind {config.vae.kind} with train {config.vae.train}; kl and none are "
            "wanted, for only a LoRA on its encoder is trained: set vae.kind=kl vae.train=none."
        )
    vae = load_vae(config.vae, torch.float32)
    assert isinstance(vae, KLAutoencoder)
    add_adapters(vae.vae, adapted_in_encoder(vae.vae), config.rank)
    return vae


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def _adapters(network: nn.Module) -> Lora:
    """The LoRA of a network, by its layers' names."""
    return {
        name: Adapter(
            "", layer.lora_A["default"].weight, layer.lora_B["default"].weight, _scale(layer)
        )
        for name, layer in network.named_modules()
        if hasattr(layer, "lora_A") and "default" in layer.lora_A
    }


def _scale(layer: Any) -> float:
    return float(layer.scaling["default"])


@torch.no_grad()
def _set(unet: nn.Module, vae: nn.Module, weights: Weights) -> None:
    """Sets the adapters and the first layer to a file's."""
    for network, lora in ((unet, weights.unet), (vae, weights.encoder)):
        for name, adapter in lora.items():
            layer: Any = network.get_submodule(name)
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            if adapter.rank != len(down):
                raise OSDFaceError(
                    f"`start` has rank {adapter.rank} and `rank` is {len(down)}: set rank to the "
                    "file's."
                )
            down.copy_(adapter.down.view_as(down))
            up.copy_(adapter.up.view_as(up) * (adapter.scale / _scale(layer)))
    first: Any = unet.get_submodule(FIRST)
    first.base_layer.weight.copy_(weights.first_weight)
    first.base_layer.bias.copy_(weights.first_bias)
