"""Stage 1: code books of good and of degraded faces, learned by self-reconstruction, and then
brought together (OSDFace, section 3.2).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import OSDFaceError
from ..osdface.vre import Shape
from ..weights.reading import read_tensors
from .data import Pictures, Samples, split
from .degradation import Degradation, generator_for
from .discriminators import PatchDiscriminator
from .loop import Optimiser, Run, bare, grid
from .losses import Term, gan_losses, load_lpips, measures, wanted
from .vq import Coded, VQAutoencoder, association

log = logging.getLogger(__name__)

HQ, LQ = "vqvae", "vqvae_LQ"  # as in the released checkpoint
PARTS = {"hq": (HQ,), "lq": (LQ,), "associate": (HQ, LQ)}


@dataclass(frozen=True)
class Losses:
    """l1; commitment and codebook, the quantiser's; lpips, with its files; gan, scaled so that its
    gradient at the last layer is gan.weight times the others'; gan_start: the step at which it sets
    in; association: in the part of that name.
    """

    l1: float = 1.0
    commitment: float = 1.0
    codebook: float = 0.25
    lpips: Term = field(default_factory=lambda: Term(1.0))
    gan: float = 0.8
    gan_start: int = 30001
    association: float = 1.0


@dataclass(frozen=True)
class Stage1:
    """part: hq | lq | associate, in that order. start: files of the parts before. range: what the
    encoder is fed, [-1,1] or the [-3,1] that OSDFace's inference feeds it. temperature: of the
    association. restart_every: steps after which codes that were not used since are set to features
    of the batch, 0 for never.
    """

    run: Run
    data: Pictures
    optimiser: Optimiser
    part: Literal["hq", "lq", "associate"] = "hq"
    start: tuple[Path, ...] = ()
    vre: Shape = field(default_factory=Shape)
    range: Literal["[-1,1]", "[-3,1]"] = "[-1,1]"
    temperature: float = 0.07
    restart_every: int = 0
    discriminator_channels: int = 64
    discriminator_layers: int = 3
    degradation: Degradation = field(default_factory=Degradation)
    losses: Losses = field(default_factory=Losses)


class Autoencoders(nn.Module):
    """One or both, under the names of the released checkpoint."""

    def __init__(self, names: tuple[str, ...], shape: Shape) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, VQAutoencoder(shape))

    def forward(self, pictures: dict[str, Tensor]) -> dict[str, Coded]:
        return {name: getattr(self, name)(x) for name, x in pictures.items()}


class Discriminators(nn.Module):
    def __init__(self, names: tuple[str, ...], channels: int, layers: int) -> None:
        super().__init__()
        self.of = nn.ModuleDict({name: PatchDiscriminator(channels, layers) for name in names})

    def forward(self, pictures: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.of[name](x) for name, x in pictures.items()}


class Stage1Task:
    def __init__(self, config: Stage1, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.names = PARTS[config.part]
        files, self.measured = split(config.data)
        self.samples = Samples(files, config.data, config.degradation, config.run.seed)
        autoencoders = Autoencoders(self.names, config.vre)
        for name in self.names if config.start else ():
            _start(getattr(autoencoders, name), name, config.start)
        self.networks: dict[str, nn.Module] = {"autoencoder": autoencoders}
        self.optimisers = {"autoencoder": config.optimiser}
        weights = config.losses
        self.lpips = (
            load_lpips(weights.lpips.files)
            if wanted("lpips", weights.lpips, "VGG16 and LPIPS' linear layers")
            else None
        )
        if self.lpips:
            self.lpips.to(accelerator.device)
        if weights.gan:
            self.networks["discriminator"] = Discriminators(
                self.names, config.discriminator_channels, config.discriminator_layers
            )
            self.optimisers["discriminator"] = config.optimiser
        self.step = 0
        self.latest: dict[str, Coded] = {}
        self.uses = {
            name: torch.zeros(config.vre.codes, device=accelerator.device) for name in self.names
        }

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The faces at the encoder's size, in [0,1], by the autoencoder that learns them."""
        side = self.config.vre.side
        found = {HQ: batch["hq"], LQ: batch["face"]}
        return {
            name: x
            if x.shape[-1] == side
            else F.interpolate(x, (side, side), mode="bilinear", antialias=True)
            for name, x in found.items()
            if name in self.names
        }

    def losses(self, name: str, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        pictures = self.pictures(batch)
        weights = self.config.losses
        on = float(self.step >= weights.gan_start)
        if name == "discriminator":
            fakes = {
                part: ((coded.picture.detach() + 1) / 2) for part, coded in self.latest.items()
            }
            both = self.networks[name](
                {part: torch.cat([fakes[part], x]) for part, x in pictures.items()}
            )
            total = torch.zeros((), device=self.accelerator.device)
            for verdict in both.values():
                total = total + gan_losses("hinge", *verdict.chunk(2))
            return total * on, {"discriminator": total}
        self.latest = self.networks["autoencoder"](self._range(pictures))
        total = torch.zeros((), device=self.accelerator.device)
        parts: dict[str, Tensor] = {}
        for part, coded in self.latest.items():
            right, given = pictures[part], (coded.picture + 1) / 2
            label = "hq" if part == HQ else "lq"
            parts[f"{label}_l1"] = (
                2 * (given - right).abs().mean()
            )  # of pictures in [-1,1], as VQGAN counts it
            faithful = weights.l1 * parts[f"{label}_l1"]
            if self.lpips:
                parts[f"{label}_lpips"] = self.lpips(given, right)
                faithful = faithful + weights.lpips.weight * parts[f"{label}_lpips"]
            parts[f"{label}_commitment"], parts[f"{label}_codebook"] = (
                coded.commitment,
                coded.codebook,
            )
            total = (
                total
                + faithful
                + weights.commitment * coded.commitment
                + weights.codebook * coded.codebook
            )
            if on and "discriminator" in self.networks:
                judge = bare(self.networks["discriminator"])
                parts[f"{label}_gan"] = gan_losses("hinge", judge({part: given})[part])
                last = getattr(bare(self.networks["autoencoder"]), part).decoder.conv_out.weight
                total = (
                    total
                    + weights.gan
                    * self._balance(faithful, parts[f"{label}_gan"], last)
                    * parts[f"{label}_gan"]
                )
            self.uses[part] += torch.bincount(
                coded.codes.flatten(), minlength=self.config.vre.codes
            )
        if self.config.part == "associate" and weights.association:
            hq, lq = (
                _everywhere(self.latest[part].features, self.accelerator) for part in (HQ, LQ)
            )
            parts["association"] = association(hq, lq, 1 / self.config.temperature)
            total = total + weights.association * parts["association"]
        return total, parts | {"total": total}

    def _balance(self, faithful: Tensor, gan: Tensor, last: Tensor) -> Tensor:
        """VQGAN's adaptive weight: as large a gradient at the last layer from the one as from the
        other.
        """
        norms = []
        for loss in (faithful, gan):
            (gradient,) = torch.autograd.grad(loss, last, retain_graph=True)
            norms.append(self.accelerator.reduce(gradient, "mean").norm())
        return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()

    def after_step(self, step: int) -> None:
        every = self.config.restart_every
        for i, name in enumerate(self.names):
            quantize = getattr(bare(self.networks["autoencoder"]), name).quantize
            quantize.uses += self.accelerator.reduce(self.uses[name], "sum")
            self.uses[name].zero_()
            if every and step % every == 0 and step <= 0.8 * self.config.run.steps:
                features = self.accelerator.gather(self.latest[name].features.detach())
                tokens = features.movedim(1, -1).flatten(0, -2)
                unused = (quantize.uses == 0).nonzero()[:, 0]
                chosen = torch.randint(
                    0,
                    len(tokens),
                    (len(unused),),
                    generator=generator_for(self.config.run.seed, -2, step, i),
                )
                quantize.embedding.weight.data[unused] = tokens[chosen.to(tokens.device)].to(
                    quantize.embedding.weight
                )
                log.info(
                    "step %d: %d of the %d codes of %s were not used and start again",
                    step,
                    len(unused),
                    len(quantize.uses),
                    name,
                )
            if every and step % every == 0:
                quantize.uses.zero_()

    def show(self, count: int) -> tuple[Tensor, dict[str, float]]:
        held = Samples(
            self.measured or self.samples.files,
            self.config.data,
            self.config.degradation,
            self.config.run.seed,
            still=True,
        )
        rows: dict[str, list[Tensor]] = {}
        codes: dict[str, list[Tensor]] = {}
        figures: dict[str, list[float]] = {}
        for n in range(len(held) if self.measured else count):
            pictures = self.pictures(
                {key: value[None].to(self.accelerator.device) for key, value in held[n].items()}
            )
            for name, coded in bare(self.networks["autoencoder"])(self._range(pictures)).items():
                given = (coded.picture.float() + 1) / 2
                for key, value in measures(given, pictures[name]).items():
                    figures.setdefault(f"{name}_{key}", []).append(value)
                codes.setdefault(name, []).append(coded.codes.flatten().unique())
                if n < count:
                    rows.setdefault(name, []).append(pictures[name])
                    rows.setdefault(f"{name}+", []).append(given)
        measured = {key: sum(of) / len(of) for key, of in figures.items()}
        for name, of in codes.items():
            measured[f"{name}_codes"] = float(len(torch.cat(of).unique()))
            measured[f"{name}_codes_a_face"] = sum(map(len, of)) / len(of)
        return grid([torch.cat(row) for row in rows.values()]), measured

    def _range(self, pictures: dict[str, Tensor]) -> dict[str, Tensor]:
        scale, shift = (4, 3) if self.config.range == "[-3,1]" else (2, 1)
        return {name: x * scale - shift for name, x in pictures.items()}

    def export(self, folder: Path) -> None:
        """stage1_PART.safetensors: `vqvae.*` (good faces), `vqvae_LQ.*` (degraded ones); stage 2
        and osdface_core.vre read the latter.
        """
        network = bare(self.networks["autoencoder"])
        state = {
            f"{name}.{key}": tensor.detach().cpu().contiguous()
            for name in self.names
            for key, tensor in getattr(network, name).weights().items()
        }
        save_file(state, folder / f"stage1_{self.config.part}.safetensors")


def _start(network: VQAutoencoder, name: str, files: tuple[Path, ...]) -> None:
    state = {
        key.removeprefix(f"{name}."): t
        for file in files
        for key, t in read_tensors(file).items()
        if key.startswith(f"{name}.")
    }
    if not state:
        log.info("None of the files in `start` holds %s: it starts anew.", name)
        return
    places = network.weights()
    wrong = [
        key for key, place in places.items() if key not in state or state[key].shape != place.shape
    ]
    if wrong:
        raise OSDFaceError(
            f"The files in `start` do not fit {name} ({', '.join(wrong[:3])}): give files of "
            f"stage 1 with the same `vre`."
        )
    with torch.no_grad():
        for key, place in places.items():
            place.copy_(state[key])


def _everywhere(features: Tensor, accelerator: Accelerator) -> Tensor:
    """The features of all processes' pictures.

    The gradient flows into one's own, times the number of processes, since their gradients are
    averaged and each is of the whole loss.
    """
    count = accelerator.num_processes
    if count == 1:
        return features
    parts = list(accelerator.gather(features.detach()).chunk(count))
    parts[accelerator.process_index] = features + (count - 1) * (features - features.detach())
    return torch.cat(parts)
