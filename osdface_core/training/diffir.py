"""DiffIR: first a teacher that sees the picture it is to make, then the network that guesses what
the teacher saw (Xia et al. 2023, section 3).

The released code was read for what the paper leaves open. It computes a divergence of the two
priors that it never adds to the loss; here there is none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor, nn

from ..diffir.membrane import membrane
from ..diffir.network import (
    AT_ONCE,
    INPAINT,
    LEVELS,
    PRIOR,
    STEPS,
    TAIL_SCALE,
    UPSCALE,
    Condition,
    DiffIR,
    Shape,
    Transformer,
    start_vector,
)
from ..diffir.network import signal as signal_after
from ..diffir.weights import FIRST, PREFIXES, WRAPPER, read_weights
from ..errors import OSDFaceError
from ..layers import load_network
from ..weights.reading import read_tensors
from .data import Numbered, Pictures, Samples, training_and_held_out
from .degradation import Degradation, drawn, generator_for, picked
from .discriminators import PatchDiscriminator
from .loop import Optimiser, Run, bare, for_file, grid
from .losses import Term, differences, gan_losses, load_lpips, mean_of_each, measures, wanted

TEACHER, STUDENT = "DiffIRS1.safetensors", "DiffIRS2.safetensors"
# The teacher's reader gathers so many pixels a side of the picture that is to be made.
SEEN = 4
MASKS = ("lines", "boxes", "scratches")


@dataclass(frozen=True)
class Network:
    """The size of what is trained.

    job: upscale, deblur or inpaint.
    scale: of the result's sides: 1, 2 or 4 for upscale.
    width: channels at the finest level; each further level has twice as many.
    blocks: transformer blocks at each level, going down and coming up.
    refinement: blocks after the last level.
    heads: of attention, at each level.
    expansion: of the gated layers.
    centred: whether norms subtract the mean and have a bias.
    residuals: residual blocks of the network that reads the condition.
    prefilled: for inpainting, whether it gets its holes with a smooth fill and adds to that.
    """

    job: Literal["upscale", "deblur", "inpaint"]
    scale: int = 1
    width: int = 64
    blocks: tuple[int, int, int, int] = (13, 1, 1, 1)
    refinement: int = 13
    heads: tuple[int, int, int, int] = (1, 2, 4, 8)
    expansion: float = 2.2
    centred: bool = False
    residuals: int = 9
    prefilled: bool = False

    def shape(self) -> Shape:
        """Raises OSDFaceError for a size that no network has."""
        enlarges = self.job == UPSCALE
        if self.scale not in ((1, 2, TAIL_SCALE) if enlarges else (1,)):
            raise OSDFaceError(
                f"`network.scale` is {self.scale} for the job {self.job}; "
                f"{'1, 2 or 4' if enlarges else '1'} is wanted: set it so."
            )
        if self.width < 2 or self.width % 2:
            raise OSDFaceError(
                f"`network.width` is {self.width}; an even number is wanted: set it so."
            )
        widths = [self.width * 2**level for level in range(LEVELS)]
        for width, heads in zip(widths, self.heads, strict=True):
            if heads < 1 or width % heads:
                raise OSDFaceError(
                    f"`network.heads` has {heads} for {width} channels; a divisor is wanted: set "
                    "network.width and network.heads so."
                )
        if self.prefilled and self.job != INPAINT:
            raise OSDFaceError(
                f"`network.prefilled` is true for the job {self.job}, which has no holes; false is "
                "wanted: set it so."
            )
        if min(self.blocks) < 1:
            raise OSDFaceError(
                f"`network.blocks` is {list(self.blocks)}; one or more at each level is wanted: "
                "set it so."
            )
        return Shape(
            job=self.job,
            scale=self.scale,
            unshuffle=TAIL_SCALE // self.scale if enlarges else 1,
            gather=TAIL_SCALE // self.scale if enlarges else SEEN,
            channels=4 if self.job == INPAINT else 3,
            width=self.width,
            blocks=self.blocks,
            refinement=self.refinement,
            heads=self.heads,
            hidden=tuple(int(width * self.expansion) for width in widths),
            centred=self.centred,
            residuals=self.residuals,
            prefilled=self.prefilled,
        )


@dataclass(frozen=True)
class Masks:
    """Holes for inpainting, in pixels of the sample; a pair is a range, drawn from evenly.

    kinds: the chance of each of MASKS: thick broken lines as LaMa draws them (Suvorov et al. 2022),
        boxes, and thin scratches with specks.
    lines: how many.
    length: of each part of a line.
    thickness: of a line.
    boxes: how many.
    sides: of a box.
    margin: between a box and the picture's edge.
    scratches: how many.
    scratch: thickness of a scratch.
    """

    kinds: dict[str, float] = field(default_factory=lambda: {"lines": 0.5, "boxes": 0.5})
    lines: tuple[int, int] = (1, 5)
    length: tuple[float, float] = (10.0, 210.0)
    thickness: tuple[float, float] = (5.0, 105.0)
    boxes: tuple[int, int] = (1, 4)
    sides: tuple[int, int] = (30, 150)
    margin: int = 10
    scratches: tuple[int, int] = (1, 6)
    scratch: tuple[float, float] = (1.0, 6.0)

    def __post_init__(self) -> None:
        if set(self.kinds) - set(MASKS) or not sum(self.kinds.values()):
            raise OSDFaceError(
                f"`masks.kinds` is {self.kinds}; chances of {', '.join(MASKS)} are wanted: correct "
                "them."
            )

    def __call__(self, side: int, generator: torch.Generator) -> Tensor:
        """(1,side,side), 1 in the holes."""
        kind = picked(self.kinds, generator)
        return drawn_mask(self, kind, side, generator)


def drawn_mask(masks: Masks, kind: str, side: int, generator: torch.Generator) -> Tensor:
    """A mask (1,side,side) of one kind, 1 in the holes."""
    picture = Image.new("L", (side, side))
    draw = ImageDraw.Draw(picture)

    def whole(of: tuple[int, int]) -> int:
        return int(torch.randint(of[0], of[1] + 1, (), generator=generator))

    def stroke(points: list[tuple[float, float]], thickness: float) -> None:
        draw.line(points, fill=1, width=max(1, round(thickness)))
        for x, y in points if thickness > 2 else ():
            r = thickness / 2
            draw.ellipse((x - r, y - r, x + r, y + r), fill=1)

    if kind == "lines":
        for i in range(whole(masks.lines)):
            points = [(drawn((0, side), generator), drawn((0, side), generator))]
            thickness = drawn(masks.thickness, generator)
            for _ in range(whole((1, 5))):
                # LaMa's turns: 0.01, 1.01, 2.01 or 3.01, of every other line the other way.
                angle = (-1) ** (i + 1) * (0.01 + whole((0, 3)))
                length = drawn(masks.length, generator)
                points.append(
                    tuple(  # type: ignore[arg-type]
                        min(max(at + length * turn, 0), side)
                        for at, turn in zip(
                            points[-1], (math.sin(angle), math.cos(angle)), strict=True
                        )
                    )
                )
            stroke(points, thickness)
    elif kind == "boxes":
        margin = min(masks.margin, side // 4)
        for _ in range(whole(masks.boxes)):
            width, height = (min(whole(masks.sides), side - 2 * margin) for _ in range(2))
            left, top = (whole((margin, side - margin - of)) for of in (width, height))
            draw.rectangle((left, top, left + width - 1, top + height - 1), fill=1)
    else:
        for _ in range(whole(masks.scratches)):
            x, y = (drawn((0, side), generator) for _ in range(2))
            angle = drawn((0, math.pi), generator)
            length = drawn((0.3, 1.5), generator) * side
            bend = drawn((-1.5, 1.5), generator)
            points = []
            for part in range(9):
                points.append((x, y))
                turned = angle + bend * part / 8 + drawn((-0.25, 0.25), generator)
                x += length / 8 * math.cos(turned)
                y += length / 8 * math.sin(turned)
            stroke(points, drawn(masks.scratch, generator))
        for _ in range(whole((0, 12))):
            x, y = (drawn((0, side), generator) for _ in range(2))
            r = drawn(masks.scratch, generator) / 2 + 0.5
            draw.ellipse((x - r, y - r, x + r, y + r), fill=1)
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(1, side, side).float()


@dataclass(frozen=True)
class Losses:
    """Weights, 0 for a loss that is not computed.

    l1: absolute error of the pixels; for inpainting, of those that are known.
    l1_hole: the same of those in holes.
    differences: absolute error of neighbouring pixels' differences, of the filled picture in
        inpainting.
    distance: absolute error of the prior after the last step, against the teacher's.
    lpips: perceptual, over VGG16.
    gan: adversarial, of a patch discriminator; in inpainting it sees the filled picture.
    """

    l1: float = 1.0
    l1_hole: float = 0.0
    differences: float = 0.0
    distance: float = 1.0
    lpips: Term = field(default_factory=Term)
    gan: float = 0.0


@dataclass(frozen=True)
class DiffIRConfig:
    """What `configs/diffir*.yaml` hold.

    part: teacher, which sees the truth; prior, only what guesses the teacher's vector; joint, that
        and the transformer together.
    teacher: a file of part teacher, for prior and joint: its transformer is what they begin with.
    start: a file to go on from, of the same network: of part teacher for teacher, of prior or joint
        otherwise.
    half: whether the file is written in fp16.
    """

    run: Run
    data: Pictures
    optimiser: Optimiser
    network: Network
    part: Literal["teacher", "prior", "joint"] = "teacher"
    teacher: Path | None = None
    start: Path | None = None
    half: bool = False
    masks: Masks = field(default_factory=Masks)
    degradation: Degradation = field(default_factory=lambda: Degradation(()))
    losses: Losses = field(default_factory=Losses)
    discriminator_optimiser: Optimiser | None = None


class Teacher(nn.Module):
    """Stage 1: its reader E sees the picture that is to be made, too."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gather = shape.gather
        self.G = Transformer(shape, nn)
        if shape.prefilled:
            # Training begins with the smooth fill.
            nn.init.zeros_(self.G.output.weight)
        channels = shape.channels * shape.gather**2 + 3 * SEEN**2
        self.E = Condition(replace(shape, channels=channels, gather=1), nn)

    def prior(self, lq: Tensor, hq: Tensor) -> Tensor:
        """The vector (B,256). lq (B,channels,H,W), hq (B,3,H*scale,W*scale)."""
        parts = (
            x if side == 1 else F.pixel_unshuffle(x, side)
            for x, side in ((lq, self.gather), (hq, SEEN))
        )
        read: Tensor = self.E(torch.cat(list(parts), 1), _nothing, AT_ONCE)
        return read

    def forward(self, lq: Tensor, hq: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(the picture, [the prior])."""
        prior = self.prior(lq, hq)
        return self.G(lq, prior, _nothing), [prior]


class Student(nn.Module):
    """Stage 2: the network that inference runs, begun from a given vector."""

    def __init__(self, network: DiffIR, *, with_picture: bool = True) -> None:
        super().__init__()
        self.network, self.with_picture = network, with_picture

    def forward(self, lq: Tensor, start: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        """(the picture, or None where only the prior is trained; the vector after each step)."""
        condition = self.network.condition(lq, _nothing, AT_ONCE)
        priors = self.network.priors(condition, start)
        return self.network.restore(lq, priors[-1]) if self.with_picture else None, priors


def _nothing() -> None:
    pass


def noised(prior: Tensor, noise: Tensor) -> Tensor:
    """The teacher's vector (B,256) at the last step of noising, from which training begins."""
    share = signal_after(STEPS)
    return math.sqrt(share) * prior + math.sqrt(1 - share) * noise


def distance(priors: list[Tensor], target: Tensor) -> Tensor:
    """Absolute error of the vector (B,256) after the last step; the steps before it are free."""
    return (priors[-1].float() - target).abs().mean()


def filled(given: Tensor, lq: Tensor) -> Tensor:
    """The picture as inference gives it: in inpainting only the holes are the network's."""
    if lq.shape[1] == 3:
        return given
    return torch.where(lq[:, 3:] > 0, given, lq[:, :3])


def pixel_loss(given: Tensor, hq: Tensor, lq: Tensor, losses: Losses) -> Tensor:
    """Absolute error, weighted by what `lq`, the network's input, says of holes."""
    error = (given - hq).abs()
    if lq.shape[1] == 3:
        return losses.l1 * error.mean()
    weights = losses.l1 + (losses.l1_hole - losses.l1) * lq[:, 3:]
    return (error * weights).mean()


class Tasks:
    """Samples for a job: `lq` is what the network is given, `hq` what it is to make."""

    def __init__(self, samples: Samples, shape: Shape, masks: Masks, seed: int) -> None:
        self.samples, self.shape, self.masks, self.seed = samples, shape, masks, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        sample = self.samples[n]
        if self.shape.job == INPAINT:
            hole = self.masks(sample["hq"].shape[-1], generator_for(self.seed, -4, n))
            lq = sample["lq"] * (1 - hole)
            if self.shape.prefilled:
                lq = membrane(lq[None], hole[None])[0]
            sample["lq"] = torch.cat([lq, hole])
        elif self.shape.scale > 1:
            side = sample["hq"].shape[-1] // self.shape.scale
            smaller = F.interpolate(
                sample["lq"][None], (side, side), mode="bicubic", antialias=True
            )
            sample["lq"] = smaller[0].clamp(0, 1).mul(255).round().div(255)
        return sample


class DiffIRTask:
    def __init__(self, config: DiffIRConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator, self.step = config, accelerator, 0
        self.shape = config.network.shape()
        side, multiple = (
            config.data.crop or config.data.size,
            self.shape.multiple * self.shape.scale,
        )
        if side % multiple or config.data.size % multiple:
            raise OSDFaceError(
                f"`data.size` is {config.data.size} and `data.crop` {config.data.crop}; multiples "
                f"of {multiple} are wanted for this network: set them so."
            )
        samples, held_out = training_and_held_out(
            config.data, config.degradation, config.run.seed, config.run.samples, with_face=False
        )
        self.samples: Numbered = Tasks(samples, self.shape, config.masks, config.run.seed)
        self.held_out = Tasks(held_out, self.shape, config.masks, config.run.seed)
        self.teacher: Teacher | None = None
        network: nn.Module
        if config.part == "teacher":
            network = Teacher(self.shape)
            if config.start:
                network = load_teacher(config.start, self.shape).requires_grad_(True)
        else:
            if config.teacher is None:
                raise OSDFaceError(
                    f"`teacher` is missing for part={config.part}: give the file that part=teacher "
                    "wrote."
                )
            self.teacher = load_teacher(config.teacher, self.shape).to(accelerator.device)
            inner = DiffIR(self.shape)
            if config.start:
                inner.load_state_dict(_fitting(read_weights(config.start), inner, config.start))
            else:
                inner.G.load_state_dict(self.teacher.G.state_dict())
            with_picture = config.part == "joint"
            inner.G.requires_grad_(with_picture)
            network = Student(inner, with_picture=with_picture)
        self.networks: dict[str, nn.Module] = {"restorer": network}
        self.optimisers = {"restorer": config.optimiser}
        terms, makes = config.losses, config.part != "prior"
        self.lpips = (
            load_lpips(terms.lpips.files).to(accelerator.device)
            if makes and wanted("lpips", terms.lpips, "VGG16's and LPIPS'")
            else None
        )
        if makes and wanted("gan", Term(terms.gan)):
            self.networks["discriminator"] = PatchDiscriminator()
            self.optimisers["discriminator"] = config.discriminator_optimiser or config.optimiser
        self.made: Tensor | None = None

    def _restored(
        self, network: nn.Module, batch: dict[str, Tensor]
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The picture, and the distance of the priors in stage 2."""
        lq, hq = batch["lq"], batch["hq"]
        if self.teacher is None:
            return network(lq, hq)[0].float(), {}
        with torch.no_grad(), self.accelerator.autocast():
            target = self.teacher.prior(lq, hq).float()
        numbers = batch["number"].tolist()
        generators = [generator_for(self.config.run.seed, -3, n) for n in numbers]
        noise = torch.stack([torch.randn(PRIOR, generator=g) for g in generators])
        given, priors = network(lq, noised(target, noise.to(target)))
        parts = {"distance": distance(priors, target)}
        return None if given is None else given.float(), parts

    def losses(self, name: str, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        terms, lq, hq = self.config.losses, batch["lq"], batch["hq"]
        if name == "discriminator":
            assert self.made is not None
            both = self.networks[name](torch.cat([self.made, hq])).float()
            loss = gan_losses("softplus", *both.chunk(2))
            return loss, {"discriminator": loss}
        given, parts = self._restored(self.networks[name], batch)
        total = sum((terms.distance * part for part in parts.values()), hq.new_zeros(()))
        if given is None:
            return total, parts | {"total": total}
        parts["l1"] = pixel_loss(given, hq, lq, terms)
        total = total + parts["l1"]
        picture = filled(given, lq)
        self.made = picture.detach()
        if terms.differences:
            parts["differences"] = differences(picture, hq)
            total = total + terms.differences * parts["differences"]
        if self.lpips:
            parts["lpips"] = self.lpips(picture, hq)
            total = total + terms.lpips.weight * parts["lpips"]
        if "discriminator" in self.networks:
            parts["gan"] = gan_losses("softplus", bare(self.networks["discriminator"])(picture))
            total = total + terms.gan * parts["gan"]
        return total, parts | {"total": total}

    def after_step(self, step: int) -> None:
        pass

    def show(self, count: int) -> tuple[Tensor, dict[str, float]]:
        """Rows: given, made, original. `hole` is the PSNR inside of holes."""
        network: Any = bare(self.networks["restorer"])
        rows: list[list[Tensor]] = [[], [], []]
        figures = []
        for n in range(len(self.held_out)):
            sample = {k: v[None].to(self.accelerator.device) for k, v in self.held_out[n].items()}
            lq, hq = sample["lq"], sample["hq"]
            if self.teacher is None:
                given = network(lq, hq)[0]
            else:
                inner = network.network
                given = inner.restore(lq, inner.prior(lq, start_vector().to(lq)))
            given = filled(given.float(), lq).clamp(0, 1)
            seen = F.interpolate(lq[:, :3], hq.shape[-2:], mode="nearest")
            figures.append(
                measures(given, hq)
                | {f"lq_{key}": value for key, value in measures(seen, hq).items()}
            )
            if self.shape.job == INPAINT:
                hole = lq[:, 3:].expand_as(hq) > 0
                error = (given - hq)[hole].square().mean()
                figures[-1]["hole"] = float(-10 * error.clamp(min=1e-10).log10())
            if n < count:
                for row, picture in zip(rows, (seen, given, hq), strict=True):
                    row.append(picture)
        return grid([torch.cat(row) for row in rows]), mean_of_each(figures)

    def export(self, folder: Path) -> None:
        """DiffIRS2.safetensors, which the nodes and the command line read, or the teacher's file
        DiffIRS1.safetensors; both spelled as the released ones.
        """
        network: Any = bare(self.networks["restorer"])
        made, name = (network, TEACHER) if self.teacher is None else (network.network, STUDENT)
        save_file(for_file(made.state_dict(), half=self.config.half), folder / name)


def load_teacher(path: Path, shape: Shape) -> Teacher:
    """A teacher, frozen, from our file or a released one.

    Raises OSDFaceError for a file of anything else, or of another size.
    """
    held = read_tensors(path)
    prefixes = [start + more for start in PREFIXES for more in ("", WRAPPER)]
    prefix = next((p for p in prefixes if {p + FIRST, f"{p}E.E.0.weight"} <= held.keys()), "")
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in held.items()
        if name.startswith((f"{prefix}G.", f"{prefix}E."))
    }
    return load_network(
        lambda: Teacher(shape),
        tensors,
        f"{path.name} does not hold a teacher of this `network`",
        "give the file that part=teacher wrote, and the same network.",
    )


def _fitting(tensors: dict[str, Tensor], network: nn.Module, path: Path) -> dict[str, Tensor]:
    wrong = [
        name
        for name, place in network.state_dict().items()
        if name not in tensors or tensors[name].shape != place.shape
    ]
    if wrong or len(tensors) > len(network.state_dict()):
        raise OSDFaceError(
            f"{path.name} is of another size than `network` ({', '.join(wrong[:3])}): give the "
            "file that part=prior or part=joint wrote, and the same network."
        )
    return tensors
