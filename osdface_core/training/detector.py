"""The built-in face detector, trained to answer as another RetinaFace does: distillation.

A training picture is a background (noise, a gradient, stripes, or a part of a portrait below its
face) with none to six portraits on it: scaled, rotated, mirrored, side by side, then darkened,
blurred, made noisy or grey, or given the look of an old photograph. The teacher sees the same
picture; what it says at each anchor (a confidence, a box, five landmarks) is the target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import OSDFaceError
from ..faces.detector_check import build_detector
from ..faces.refine import BEST_SIZE, WINDOW
from ..faces.retinaface import MEAN_BGR, RetinaFace, build_retinaface
from ..weights.reading import read_tensors
from .data import Folder, read_square, split
from .degradation import drawn, generator_for
from .loop import Optimiser, Run, bare, for_file, grid

# A face's height as a share of a portrait's, and how far below the face the portrait's centre is.
FACE_HEIGHT, BELOW_FACE = 0.37, 0.18
# Shoulders and cloth begin at this share of a portrait's height.
SHOULDERS = 13 / 16
LEAST_PORTRAIT = 56
SHOWN_SIDE = 256
GREEN, RED = (0.0, 1.0, 0.0), (1.0, 0.0, 0.0)


@dataclass(frozen=True)
class Scenes:
    """What a batch is: either pictures of one size, drawn from `sizes`, or windows.

    sizes: (pixels a side, pictures in a batch), each of about the same cost.
    windows: windows in a batch: one upright face each, as the detector's second pass sees it.
    windows_chance: chance that a batch is of windows.
    turned: largest rotation of a portrait in a picture, in degrees.
    old: chance that a portrait is one of the old ones, where there are any.
    aged: chance that a picture or a window gets the look of an old photograph.
    """

    sizes: tuple[tuple[int, int], ...] = ((256, 12), (384, 5), (512, 3))
    windows: int = 10
    windows_chance: float = 0.5
    turned: float = 45.0
    old: float = 0.0
    aged: float = 0.0


@dataclass(frozen=True)
class Losses:
    """Weights: confidence at every anchor; boxes and landmarks where the teacher sees a face."""

    confidence: float = 1.0
    boxes: float = 2.0
    landmarks: float = 8.0


@dataclass(frozen=True)
class DetectorConfig:
    """What `configs/detector_builtin.yaml` holds.

    data: portraits, one centred face each.
    teacher: weights of a RetinaFace.
    start: an exported file to go on from.
    old: old portraits, one face each, anywhere in the middle square.
    """

    run: Run
    data: Folder
    optimiser: Optimiser
    teacher: Path
    start: Path | None = None
    old: Folder | None = None
    scenes: Scenes = Scenes()
    losses: Losses = Losses()


@dataclass(frozen=True)
class Place:
    """Of a face in its portrait, as shares of the portrait's side: its centre and its height."""

    x: float = 0.5
    y: float = 0.5 - BELOW_FACE
    height: float = FACE_HEIGHT


class Portraits:
    """Portraits (3,size,size) in [0,1].

    files: a face in the usual place each.
    size: in pixels.
    old: more of them, and where their faces are.
    old_chance: that one drawn is of these.
    """

    def __init__(
        self,
        files: list[Path],
        size: int,
        old: dict[Path, Place] | None = None,
        old_chance: float = 0.0,
    ) -> None:
        self.files, self.size = files, size
        self.old, self.old_chance = list((old or {}).items()), old_chance

    def __len__(self) -> int:
        return len(self.files) + len(self.old)

    def placed(self, generator: torch.Generator) -> tuple[Tensor, Place]:
        # Without old ones nothing more is drawn, so that the other draws stay as they were.
        if self.old and _chance(self.old_chance, generator):
            path, place = self.old[_one_of(len(self.old), generator)]
        else:
            path, place = self.files[_one_of(len(self.files), generator)], Place()
        return read_square(path, self.size).float() / 255, place

    def one(self, generator: torch.Generator) -> Tensor:
        return self.placed(generator)[0]


def places(files: list[Path], detector: RetinaFace) -> dict[Path, Place]:
    """Where each portrait's face is; those in which the detector sees none are left out."""
    found = {}
    for path in files:
        picture = read_square(path, SHOWN_SIDE).float()[None] / 255
        with torch.no_grad():
            boxes, confidences, _ = detector(network_input(picture.to(detector.home)))
        best = int(confidences[0].argmax())
        if float(confidences[0, best]) > 0.9:
            x1, y1, x2, y2 = (boxes[0, best] / SHOWN_SIDE).tolist()
            found[path] = Place((x1 + x2) / 2, (y1 + y2) / 2, y2 - y1)
    return found


def _one_of(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def _chance(of: float, generator: torch.Generator) -> bool:
    return drawn((0, 1), generator) < of


def background(portraits: Portraits, side: int, generator: torch.Generator) -> Tensor:
    """(3,side,side) in [0,1], without a face."""
    kind = _one_of(4, generator)
    colours = torch.rand(2, 3, 1, 1, generator=generator)
    if kind == 0:
        cells = torch.randint(2, 40, (2,), generator=generator).tolist()
        coarse = torch.rand(1, 3, *cells, generator=generator)
        return F.interpolate(coarse, (side, side), mode="bicubic")[0].clamp(0, 1)
    if kind == 1:
        ramp = torch.linspace(0, 1, side).expand(side, side)
        return torch.lerp(colours[0], colours[1], ramp if _chance(0.5, generator) else ramp.T)
    if kind == 2:
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        angle, period = drawn((0, math.pi), generator), drawn((4, 60), generator)
        waves = torch.sin((x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / period))
        waves = waves * torch.sin(y * drawn((0.01, 0.5), generator))
        return torch.lerp(colours[0], colours[1], waves * 0.5 + 0.5)
    portrait = portraits.one(generator)
    size = portrait.shape[-1]
    body = portrait[:, int(size * SHOULDERS) :]
    width = int(drawn((body.shape[1], size), generator))
    left = int(drawn((0, size - width), generator))
    return F.interpolate(
        body[None, :, :, left : left + width], (side, side), mode="bilinear", antialias=True
    )[0]


def draw(
    canvas: Tensor,
    portrait: Tensor,
    centre: tuple[float, float],
    side: float,
    degrees: float,
    mirrored: bool,
) -> None:
    """Draws a portrait on the canvas, in place, with an edge that is one pixel soft.

    canvas: (3,H,H) in [0,1].
    portrait: (3,S,S) in [0,1].
    centre: where the portrait's centre comes to, (x,y) in pixels.
    side: of the portrait on the canvas, in pixels.
    degrees: rotation.
    mirrored: whether left and right are exchanged.
    """
    width = canvas.shape[-1]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    reach = side / 2 * (abs(cos) + abs(sin))
    (x1, x2), (y1, y2) = (
        (max(0, int(c - reach)), min(width, math.ceil(c + reach))) for c in centre
    )
    if x2 <= x1 or y2 <= y1:
        return
    if (size := max(8, round(side))) < portrait.shape[-1]:
        portrait = F.interpolate(portrait[None], (size, size), mode="bilinear", antialias=True)[0]
    y, x = torch.meshgrid(
        torch.arange(y1, y2) + 0.5 - centre[1],
        torch.arange(x1, x2) + 0.5 - centre[0],
        indexing="ij",
    )
    half = side / 2
    places = torch.stack(
        [(x * cos + y * sin) / half * (-1 if mirrored else 1), (y * cos - x * sin) / half], -1
    )
    drawn_portrait = F.grid_sample(
        portrait[None], places[None], align_corners=False, padding_mode="border"
    )[0]
    soft = ((1 - places.abs().amax(-1)) * half).clamp(0, 1)
    canvas[:, y1:y2, x1:x2] = torch.lerp(canvas[:, y1:y2, x1:x2], drawn_portrait, soft)


def scene(portraits: Portraits, side: int, turned: float, generator: torch.Generator) -> Tensor:
    """A training picture (3,side,side) in [0,1] with none to six portraits.

    portraits: to choose from.
    side: in pixels.
    turned: largest rotation of a portrait, in degrees; three in four stay upright.
    generator: of all that is random.
    """
    canvas = background(portraits, side, generator)
    count = (0, 1, 1, 1, 2, 2, 4, 6)[_one_of(8, generator)]
    columns = math.ceil(math.sqrt(count)) if count > 1 else 1
    cell = side / columns
    for i in range(count):
        portrait = portraits.one(generator)
        least = 0.12 if count == 1 else 0.3
        size = cell * math.exp(drawn((math.log(least), math.log(1.6)), generator))
        degrees = 0.0 if _chance(0.75, generator) else drawn((-turned, turned), generator)
        centre = (
            (i % columns + drawn((0.25, 0.75), generator)) * cell,
            (i // columns + drawn((0.3, 0.8), generator)) * cell,
        )
        mirrored = _chance(0.5, generator)
        draw(canvas, portrait, centre, max(size, LEAST_PORTRAIT), degrees, mirrored)
    tint = 1 + 0.1 * torch.randn(3, 1, 1, generator=generator)
    canvas = (canvas * drawn((0.6, 1.2), generator) + drawn((-0.1, 0.1), generator)) * tint
    if _chance(0.2, generator):
        canvas = canvas.mean(0, keepdim=True).expand(3, -1, -1)
    if _chance(0.3, generator):
        small = max(16, int(side / drawn((1, 4), generator)))
        canvas = F.interpolate(canvas[None], (small, small), mode="bilinear", antialias=True)
        canvas = F.interpolate(canvas, (side, side), mode="bilinear")[0]
    if _chance(0.4, generator):
        noise = torch.randn(canvas.shape, generator=generator)
        canvas = canvas + noise * drawn((0, 0.1), generator)
    return canvas.clamp(0, 1)


def aged(picture: Tensor, generator: torch.Generator) -> Tensor:
    """A picture (3,H,H) in [0,1] with the look of an old photograph or of its print in a book: one
    tone, faded, with grain, specks, and a halftone screen in one of three.
    """
    side = picture.shape[-1]
    grey = picture.mean(0).clamp(0, 1) ** math.exp(drawn((-0.5, 0.5), generator))
    if _chance(0.35, generator):
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        turn, wave = drawn((0, math.pi / 2), generator), 2 * math.pi / drawn((2.5, 6), generator)
        u, v = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
        screen = (torch.cos(u * wave) + torch.cos(v * wave)) / 4 + 0.5
        dots = ((grey - screen) * drawn((4, 14), generator)).sigmoid()
        grey = torch.lerp(grey, dots, drawn((0.2, 0.8), generator))
    cells = int(side / drawn((1, 2.5), generator))
    grain = torch.randn(1, 1, cells, cells, generator=generator)
    grain = F.interpolate(grain, (side, side), mode="bilinear")[0, 0]
    grey = grey + grain * drawn((0, 0.1), generator)
    specks = torch.rand(side, side, generator=generator) < drawn((0, 0.002), generator)
    grey = grey.masked_fill(specks, drawn((0, 1), generator)).clamp(0, 1)
    paper = torch.lerp(
        torch.ones(3, 1, 1),
        torch.tensor([1.0, 0.92, 0.7]).view(3, 1, 1)
        + 0.06 * torch.randn(3, 1, 1, generator=generator),
        drawn((0, 1), generator),
    )
    ink = torch.rand(3, 1, 1, generator=generator) * drawn((0, 0.35), generator)
    return torch.lerp(ink, paper * drawn((0.7, 1), generator), grey).clamp(0, 1)


def window(portraits: Portraits, generator: torch.Generator) -> Tensor:
    """(3,288,288) in [0,1]: one face, about as upright, as large and as central as in a window of
    the detector's second pass.
    """
    canvas = background(portraits, WINDOW, generator)
    portrait, place = portraits.placed(generator)
    side = math.exp(drawn((-0.2, 0.2), generator)) * BEST_SIZE / place.height
    x, y = (WINDOW / 2 + drawn((-16, 16), generator) for _ in range(2))
    degrees, mirrored = drawn((-10, 10), generator), _chance(0.5, generator)
    x += (0.5 - place.x) * side * (-1 if mirrored else 1)
    draw(canvas, portrait, (x, y + (0.5 - place.y) * side), side, degrees, mirrored)
    return (canvas * drawn((0.7, 1.15), generator) + drawn((-0.05, 0.05), generator)).clamp(0, 1)


class SceneBatches:
    """Sample number n is a whole batch, since pictures of one size only can be stacked."""

    def __init__(self, portraits: Portraits, scenes: Scenes, seed: int) -> None:
        self.portraits, self.scenes, self.seed = portraits, scenes, seed

    def __len__(self) -> int:
        return len(self.portraits)

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        """`pictures` (N,3,side,side) in [0,1]."""
        scenes, generator = self.scenes, generator_for(self.seed, n)
        if _chance(scenes.windows_chance, generator):
            made = [window(self.portraits, generator) for _ in range(scenes.windows)]
        else:
            side, count = scenes.sizes[_one_of(len(scenes.sizes), generator)]
            made = [scene(self.portraits, side, scenes.turned, generator) for _ in range(count)]
        if scenes.aged:
            made = [aged(m, generator) if _chance(scenes.aged, generator) else m for m in made]
        return {"pictures": torch.stack(made)}


def network_input(pictures: Tensor) -> Tensor:
    """(B,3,H,W) RGB in [0,1] -> as RetinaFace takes them: BGR, 0..255, less a mean."""
    return pictures.flip(1) * 255 - pictures.new_tensor(MEAN_BGR).view(3, 1, 1)


class Heads(nn.Module):
    """A RetinaFace up to its heads: what they say, not yet boxes and points in pixels."""

    def __init__(self, detector: RetinaFace) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x as of `network_input` -> at each anchor the logit of a face (B,A), a box (B,A,4) and
        landmarks (B,A,10).
        """
        of = self.detector
        maps = of.fpn(*of.body(x))
        features = [f(m) for f, m in zip((of.ssh1, of.ssh2, of.ssh3), maps, strict=True)]
        classes, boxes, landmarks = (
            torch.cat([head(feature) for head, feature in zip(heads, features, strict=True)], 1)
            for heads in (of.ClassHead, of.BboxHead, of.LandmarkHead)
        )
        return classes[..., 1] - classes[..., 0], boxes, landmarks


def distillation(
    student: tuple[Tensor, Tensor, Tensor], teacher: tuple[Tensor, Tensor, Tensor]
) -> dict[str, Tensor]:
    """Losses of what `Heads` give, each summed over the anchors and divided by the number of faces.

    confidence: cross entropy with the teacher's probability, times the two probabilities'
    difference (a focal loss). boxes, landmarks: smooth L1, weighted with the teacher's probability
    where that is over 0.3.
    """
    logits, boxes, landmarks = (t.float() for t in student)
    target, target_boxes, target_landmarks = (t.float() for t in teacher)
    face = target.sigmoid()
    faces = face.sum().clamp(min=1)
    missed = (logits.sigmoid() - face).abs()
    weight = face * (face > 0.3)

    def distance(ours: Tensor, theirs: Tensor) -> Tensor:
        apart = F.smooth_l1_loss(ours, theirs, reduction="none", beta=0.1).mean(-1)
        return (apart * weight).sum() / faces

    entropy = F.binary_cross_entropy_with_logits(logits, face, reduction="none")
    return {
        "confidence": (entropy * missed).sum() / faces,
        "boxes": distance(boxes, target_boxes),
        "landmarks": distance(landmarks, target_landmarks),
    }


def new_detector() -> RetinaFace:
    """An untrained one that sees a face nowhere, as nearly no anchor holds one."""
    network = RetinaFace("narrow")
    for head in network.ClassHead:
        bias = head.get_parameter("conv1x1.bias")
        nn.init.constant_(bias[0::2], 2.0)
        nn.init.constant_(bias[1::2], -2.0)
    return network


class DetectorTask:
    def __init__(self, config: DetectorConfig, accelerator: Accelerator) -> None:
        if config.run.batch != 1:
            raise OSDFaceError(
                f"`run.batch` is {config.run.batch}, but one sample of the detector's is a batch "
                f"already: set run.batch=1, and `scenes` or run.accumulate to more."
            )
        self.config, self.accelerator, self.step = config, accelerator, 0
        files, held_out = split(config.data)
        teacher = build_detector(read_tensors(config.teacher))
        self.teacher = Heads(teacher).to(accelerator.device)
        old = places(split(config.old)[0], teacher) if config.old else {}
        self.samples = SceneBatches(
            Portraits(files, config.data.size, old, config.scenes.old),
            config.scenes,
            config.run.seed,
        )
        self.held_out = Portraits(held_out or files, config.data.size)
        student = build_retinaface(read_tensors(config.start)) if config.start else new_detector()
        self.networks: dict[str, nn.Module] = {"detector": Heads(student.requires_grad_(True))}
        self.optimisers = {"detector": config.optimiser}

    def losses(self, name: str, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self._losses(self.networks[name], batch["pictures"].flatten(0, 1))

    def _losses(self, network: nn.Module, pictures: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = network_input(pictures)
        if self.config.run.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            target = self.teacher(x)
        parts = distillation(network(x), target)
        weights = self.config.losses
        total = (
            weights.confidence * parts["confidence"]
            + weights.boxes * parts["boxes"]
            + weights.landmarks * parts["landmarks"]
        )
        return total, parts | {"total": total}

    def after_step(self, step: int) -> None:
        pass

    def show(self, count: int) -> tuple[Tensor, dict[str, float]]:
        """Scenes of held-out portraits; the teacher's landmarks are green, the student's red."""
        network = bare(self.networks["detector"])
        pictures = torch.stack(
            [
                scene(
                    self.held_out,
                    SHOWN_SIDE,
                    self.config.scenes.turned,
                    generator_for(self.config.run.seed, -2, n),
                )
                for n in range(count)
            ]
        ).to(self.accelerator.device)
        _, parts = self._losses(network, pictures)
        shown = pictures.clone()
        for heads, colour in ((self.teacher, GREEN), (network, RED)):
            _mark(shown, heads.get_submodule("detector")(network_input(pictures)), colour)
        return grid([shown]), {key: float(value) for key, value in parts.items()}

    def export(self, folder: Path) -> None:
        """detector.safetensors, in fp16, as `faces.retinaface.build_retinaface` reads it."""
        state = bare(self.networks["detector"]).get_submodule("detector").state_dict()
        save_file(for_file(state, half=True), folder / "detector.safetensors")


def _mark(
    pictures: Tensor, found: tuple[Tensor, Tensor, Tensor], colour: tuple[float, float, float]
) -> None:
    """Marks the landmarks of every anchor of a confidence over 0.5 in pictures (B,3,H,W)."""
    _, confidences, landmarks = found
    last = pictures.shape[-1] - 1
    for picture, confidence, points in zip(pictures, confidences, landmarks, strict=True):
        for x, y in points[confidence > 0.5].reshape(-1, 2).round().long().clamp(0, last).tolist():
            part = picture[:, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
            part.copy_(picture.new_tensor(colour).view(3, 1, 1).expand_as(part))
