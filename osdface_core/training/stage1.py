"""Stage 1: code books of good and of degraded faces, learned by reconstruction; then the features
of both are associated (OSDFace, section 3.2).
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
from .data import Pictures, training_and_held_out
from .degradation import Degradation, generator_for
from .discriminators import PatchDiscriminator
from .loop import Optimiser, Run, bare, for_file, grid
from .losses import Term, gan_losses, load_lpips, mean_of_each, measures, wanted
from .vq import Coded, VQAutoencoder, association

log = logging.getLogger(__name__)

HQ, LQ = "vqvae", "vqvae_LQ"  # as in the released checkpoint
PARTS = {"hq": (HQ,), "lq": (LQ,), "associate": (HQ, LQ)}


@dataclass(frozen=True)
class Losses:
    """Weights, 0 for a loss that is not computed.

    l1: mean absolute error of the pixels.
    commitment: of the features to their codes.
    codebook: of the codes to their features.
    lpips: perceptual.
    gan: adversarial, after scaling its gradient at the last layer to the other losses' size.
    gan_start: the first step with it, from 0.
    association: of the features of good and degraded faces, in the part of that name.
    """

    l1: float = 1.0
    commitment: float = 1.0
    codebook: float = 0.25
    lpips: Term = field(default_factory=lambda: Term(1.0))
    gan: float = 0.8
    gan_start: int = 30001
    association: float = 1.0


@dataclass(frozen=True)
class Stage1Config:
    """What `configs/stage1*.yaml` hold.

    part: hq, lq, associate are trained in this order.
    start: exported files of the parts before.
    vre: widths of the encoder and size of the code book.
    range: of the encoder's input, [-1,1], or [-3,1] as in OSDFace's inference.
    temperature: of the association.
    restart_every: steps after which codes that were not used since are set to features of the
        batch; 0 for never.
    discriminator_channels: of its first layer.
    discriminator_layers: how many.
    degradation: of the faces.
    losses: and their weights.
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
    """One or two autoencoders, under the names of the released checkpoint."""

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
    def __init__(self, config: Stage1Config, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.names = PARTS[config.part]
        self.samples, self.held_out = training_and_held_out(
            config.data, config.degradation, config.run.seed, config.run.samples
        )
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
        """The faces in [0,1] at the encoder's size, by the name of the autoencoder for them."""
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
            # Twice, for pictures in [-1,1] as VQGAN has them.
            parts[f"{label}_l1"] = 2 * (given - right).abs().mean()
            faithful = weights.l1 * parts[f"{label}_l1"]
            if self.lpips:
                parts[f"{label}_lpips"] = self.lpips(given, right)
                faithful = faithful + weights.lpips.weight * parts[f"{label}_lpips"]
            parts[f"{label}_commitment"] = coded.commitment
            parts[f"{label}_codebook"] = coded.codebook
            total = (
                total
                + faithful
                + weights.commitment * coded.commitment
                + weights.codebook * coded.codebook
            )
            if on and "discriminator" in self.networks:
                discriminator = bare(self.networks["discriminator"])
                parts[f"{label}_gan"] = gan_losses("hinge", discriminator({part: given})[part])
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
        """VQGAN's adaptive weight (Esser et al. 2021, equation 7): it makes the two losses'
        gradients at the last layer equally large.
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
                    "step %d: %d of the %d codes of %s were not used and are set anew",
                    step,
                    len(unused),
                    len(quantize.uses),
                    name,
                )
            if every and step % every == 0:
                quantize.uses.zero_()

    def show(self, count: int) -> tuple[Tensor, dict[str, float]]:
        """Rows, for each autoencoder: its input, its output. `codes` are those used by all faces
        measured, `codes_a_face` by a face.
        """
        rows: dict[str, list[Tensor]] = {}
        codes: dict[str, list[Tensor]] = {}
        figures = []
        for n in range(len(self.held_out)):
            sample = {
                key: v[None].to(self.accelerator.device) for key, v in self.held_out[n].items()
            }
            pictures, measured = self.pictures(sample), {}
            for name, coded in bare(self.networks["autoencoder"])(self._range(pictures)).items():
                given = (coded.picture.float() + 1) / 2
                for key, value in measures(given, pictures[name]).items():
                    measured[f"{name}_{key}"] = value
                codes.setdefault(name, []).append(coded.codes.flatten().unique())
                if n < count:
                    rows.setdefault(name, []).append(pictures[name])
                    rows.setdefault(f"{name}+", []).append(given)
            figures.append(measured)
        means = mean_of_each(figures)
        for name, of in codes.items():
            means[f"{name}_codes"] = float(len(torch.cat(of).unique()))
            means[f"{name}_codes_a_face"] = sum(map(len, of)) / len(of)
        return grid([torch.cat(row) for row in rows.values()]), means

    def _range(self, pictures: dict[str, Tensor]) -> dict[str, Tensor]:
        scale, shift = (4, 3) if self.config.range == "[-3,1]" else (2, 1)
        return {name: x * scale - shift for name, x in pictures.items()}

    def export(self, folder: Path) -> None:
        """stage1_PART.safetensors: `vqvae.*` of good faces, `vqvae_LQ.*` of degraded ones. Stage 2
        and osdface.vre read the latter.
        """
        network = bare(self.networks["autoencoder"])
        state = {
            f"{name}.{key}": tensor
            for name in self.names
            for key, tensor in getattr(network, name).weights().items()
        }
        save_file(for_file(state), folder / f"stage1_{self.config.part}.safetensors")


def _start(network: VQAutoencoder, name: str, files: tuple[Path, ...]) -> None:
    """Sets the autoencoder `name` to the weights that the files hold of it, if any."""
    state = {
        key.removeprefix(f"{name}."): t
        for file in files
        for key, t in read_tensors(file).items()
        if key.startswith(f"{name}.")
    }
    if not state:
        log.info("No file in `start` holds %s: it begins untrained.", name)
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

    The gradient flows into this process's own, multiplied by the number of processes: each process
    computes the whole loss, and their gradients are averaged.
    """
    count = accelerator.num_processes
    if count == 1:
        return features
    parts = list(accelerator.gather(features.detach()).chunk(count))
    parts[accelerator.process_index] = features + (count - 1) * (features - features.detach())
    return torch.cat(parts)
