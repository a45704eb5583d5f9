"""The built-in face parser, trained on masks of faces with things drawn in front of them.

Masks come from `benchmarks/face_masks.py`. Whatever is drawn is not face, even a hand of the
face's own colour: hands are drawn as fingers, palm and forearm, things as polygons, ellipses and
rods, filled with noise, gradients, stripes or cloth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import OSDFaceError
from ..faces.face_parser import SMALL_SIDE, SmallParser, build_parser
from ..weights.reading import read_tensors
from .data import Folder, read_square, split
from .degradation import compressed, drawn, generator_for
from .detector import Portraits, aged, background
from .loop import Optimiser, Run, bare, for_file, grid

# What a mask's pixel must be for face: hands are 128 (benchmarks/face_masks.py).
FACE_FROM = 192


@dataclass(frozen=True)
class Front:
    """What is drawn in front of a face.

    hand: chance of a hand.
    thing: chance of a thing.
    weight: of the covered pixels in the loss, beside 1 of all others.
    """

    hand: float = 0.45
    thing: float = 0.3
    weight: float = 3.0


@dataclass(frozen=True)
class ParserConfig:
    """What `configs/parser_builtin.yaml` holds.

    data: aligned faces.
    masks: folder with the mask of each face under the same name; faces without one are left out.
    start: an exported file to go on from.
    """

    run: Run
    data: Folder
    masks: Path
    optimiser: Optimiser
    start: Path | None = None
    front: Front = Front()


def _segments(side: int, generator: torch.Generator) -> Tensor:
    """The capsules (n,5) of a hand with its forearm: x, y of both ends, and radius, in pixels."""
    palm = drawn((0.16, 0.36), generator) * side
    turn = drawn((0, 2 * math.pi), generator)
    x, y = (drawn((0.2, 0.9), generator) * side for _ in range(2))

    def to(forward: float, across: float) -> tuple[float, float]:
        along = (math.cos(turn), math.sin(turn))
        return (
            x + palm * (forward * along[0] - across * along[1]),
            y + palm * (forward * along[1] + across * along[0]),
        )

    thumb = 1 if drawn((0, 1), generator) < 0.5 else -1
    made = [(*to(-0.5, 0), *to(-5, drawn((-1, 1), generator)), 0.33 * palm)]
    made += [(*to(-0.35, a), *to(0.25, a * 1.2), 0.28 * palm) for a in (-0.2, 0.0, 0.2)]
    spread = drawn((0, 0.22), generator)
    is_fist = drawn((0, 1), generator) < 0.25
    width = drawn((0.1, 0.14), generator) * palm
    for finger in range(4):
        across = -0.36 + 0.24 * finger
        length = drawn((0.55, 1.0), generator) * (
            0.35 if drawn((0, 1), generator) < 0.2 or is_fist else 1
        )
        lean = spread * (finger - 1.5)
        bend = lean + drawn((-0.5, 0.5), generator)
        knuckle = (0.45, across)
        joint = (
            knuckle[0] + length / 2 * math.cos(lean),
            knuckle[1] + length / 2 * math.sin(lean),
        )
        tip = (joint[0] + length / 2 * math.cos(bend), joint[1] + length / 2 * math.sin(bend))
        made += [(*to(*knuckle), *to(*joint), width), (*to(*joint), *to(*tip), width * 0.9)]
    lean = thumb * drawn((0.2, 1.1), generator)
    root = (-0.15, thumb * 0.35)
    tip = (root[0] + 0.75 * math.cos(lean), root[1] + 0.75 * math.sin(lean))
    made.append((*to(*root), *to(*tip), width * 1.1))
    return torch.tensor(made)


def _distances(capsules: Tensor, side: int) -> Tensor:
    """(n,side,side): how far outside of each capsule a pixel is, as a multiple of its radius."""
    y, x = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
    x1, y1, x2, y2, radius = (v[:, None, None] for v in capsules.T)
    dx, dy = x2 - x1, y2 - y1
    along = ((x - x1) * dx + (y - y1) * dy) / (dx**2 + dy**2).clamp(min=1e-6)
    along = along.clamp(0, 1)
    return ((x - x1 - along * dx) ** 2 + (y - y1 - along * dy) ** 2).sqrt() / radius - 1


def draw_hand(picture: Tensor, skin: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws a hand on a picture (3,H,H) in [0,1]. Returns the new picture and where the hand is
    (H,H), 0 to 1.

    skin: its colours (3,h,w), stretched over the picture.
    """
    # At half the size, which a quarter of the time does for, and fingers lose nothing by.
    side = picture.shape[-1] // 2
    capsules = _segments(side, generator)
    outside = _distances(capsules, side)
    pixels = outside * capsules[:, 4, None, None]
    # Fingers lie before the palm: of those that cover a pixel the last one shows.
    order = torch.arange(len(capsules))[:, None, None].expand_as(outside)
    top = torch.where(outside < 0, order, -1).amax(0).clamp(min=0)
    round_off = outside.gather(0, top[None])[0].clamp(-1, 0) + 1
    shade = 1 - drawn((0.1, 0.5), generator) * round_off**2
    tones = 1 + 0.08 * torch.randn(len(capsules), generator=generator)
    uneven = torch.randn(1, 1, 6, 6, generator=generator)
    uneven = F.interpolate(uneven, (side, side), mode="bicubic")[0, 0] * drawn((0, 0.1), generator)
    grain = torch.randn(side, side, generator=generator) * drawn((0, 0.03), generator)
    light = shade * tones[top] * (1 + uneven) + grain
    away, light = F.interpolate(
        torch.stack([2 * pixels.amin(0), light])[None], picture.shape[-2:], mode="bilinear"
    )[0]
    there = (0.5 - away / drawn((1, 4), generator)).clamp(0, 1)
    if drawn((0, 1), generator) < 0.5:
        reach = drawn((4, 20), generator)
        dark = (1 - away.clamp(min=0) / reach).clamp(0, 1) * drawn((0, 0.4), generator)
        picture = picture * (1 - dark)
    skin = F.interpolate(skin[None], picture.shape[-2:], mode="bicubic")[0]
    hand = (skin * light).clamp(0, 1)
    return torch.lerp(picture, hand, there), there


def draw_thing(
    picture: Tensor, textures: Portraits, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draws a polygon, an ellipse or a rod on a picture (3,H,H), as `draw_hand` does."""
    side = picture.shape[-1]
    x, y = (drawn((0.1, 0.9), generator) * side for _ in range(2))
    kind = int(torch.randint(3, (), generator=generator))
    if kind == 2:
        turn, length = drawn((0, 2 * math.pi), generator), drawn((0.4, 2), generator) * side
        radius = drawn((0.02, 0.08), generator) * side
        rod = [x, y, x + length * math.cos(turn), y + length * math.sin(turn), radius]
        head = [x, y, x + 0.1, y, radius * drawn((1, 2.5), generator)]
        capsules = torch.tensor([rod, head])
        away = (_distances(capsules, side) * capsules[:, 4, None, None]).amin(0)
    else:
        v, u = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
        turn = drawn((0, math.pi), generator)
        a = (u - x) * math.cos(turn) + (v - y) * math.sin(turn)
        b = (v - y) * math.cos(turn) - (u - x) * math.sin(turn)
        wide, high = (drawn((0.06, 0.3), generator) * side for _ in range(2))
        if kind == 0:
            away = (((a / wide) ** 2 + (b / high) ** 2).sqrt() - 1) * min(wide, high)
        else:
            away = torch.maximum(a.abs() - wide, b.abs() - high)
            cut = drawn((0, math.pi), generator)
            corner = (a * math.cos(cut) + b * math.sin(cut)).abs() - max(wide, high)
            away = torch.maximum(away, corner)
    there = (0.5 - away / drawn((1, 4), generator)).clamp(0, 1)
    filled = background(textures, side, generator) * drawn((0.3, 1.1), generator)
    return torch.lerp(picture, filled.clamp(0, 1), there), there


class MaskedFaces:
    """Samples of faces and masks; see `__getitem__`.

    files: aligned faces.
    config: of the training.
    still: whether all but what is in front stays as it is.
    """

    def __init__(self, files: list[Path], config: ParserConfig, *, still: bool = False) -> None:
        if config.data.size != SMALL_SIDE:
            raise OSDFaceError(
                f"`data.size` is {config.data.size}, but the parser looks at {SMALL_SIDE} px: set "
                f"data.size={SMALL_SIDE}."
            )
        self.config, self.still = config, still
        self.files = [path for path in files if self.mask_of(path).exists()]
        if not self.files:
            raise OSDFaceError(
                f"{config.masks} holds no mask of a face in {config.data.folder}: make them by "
                f"benchmarks/face_masks.py."
            )
        self.textures = Portraits(self.files, SMALL_SIDE)

    def __len__(self) -> int:
        return len(self.files)

    def mask_of(self, path: Path) -> Path:
        relative = path.relative_to(self.config.data.folder)
        return (self.config.masks / relative).with_suffix(".png")

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        """`pictures` (3,256,256) in [0,1]; `masks` (1,256,256): 1 for face; `weights` as masks."""
        generator = generator_for(self.config.run.seed, n) if not self.still else generator_for(n)

        def chance(of: float) -> bool:
            return drawn((0, 1), generator) < of

        index = (
            n % len(self) if self.still else int(torch.randint(len(self), (), generator=generator))
        )
        path = self.files[index]
        picture = read_square(path, SMALL_SIDE).float() / 255
        with Image.open(self.mask_of(path)) as image:
            pixels = np.asarray(image.convert("L").resize((SMALL_SIDE, SMALL_SIDE), 0)).copy()
        mask = (torch.from_numpy(pixels) >= FACE_FROM).float()[None]
        if not self.still:
            picture, mask = _moved(picture, mask, generator)
        own = picture
        covered = torch.zeros_like(mask)
        if chance(self.config.front.hand):
            if chance(0.4):
                own = self.textures.one(generator)
            tone = 1 + 0.04 * torch.randn(3, 1, 1, generator=generator)
            tone = tone * drawn((0.7, 1.25), generator)
            skin = (_skin(own, generator) * tone).clamp(0, 1)
            picture, there = draw_hand(picture, skin, generator)
            covered = torch.maximum(covered, there[None])
        if chance(self.config.front.thing):
            picture, there = draw_thing(picture, self.textures, generator)
            covered = torch.maximum(covered, there[None])
        if not self.still:
            picture = _worse(picture, generator)
        face = mask * (1 - covered)
        weights = 1 + self.config.front.weight * mask * covered
        return {"pictures": picture, "masks": face, "weights": weights}


def _skin(face: Tensor, generator: torch.Generator) -> Tensor:
    """The mean colour of an aligned face (3,256,256), or a part of its forehead or of a cheek with
    the light and the grain that are on it, (3,h,w).
    """
    if drawn((0, 1), generator) < 0.4:
        return face[:, 100:180, 90:166].mean((1, 2), keepdim=True)
    places = torch.tensor([[72, 104], [140, 72], [140, 154]])
    top, left = places[torch.randint(3, (), generator=generator)].tolist()
    side = int(drawn((8, 30), generator))
    return face[:, top : top + side, left : left + side]


def _moved(picture: Tensor, mask: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Both turned, scaled, moved and mirrored a little, with mirrored edges."""
    turn = drawn((-0.3, 0.3), generator)
    scale = math.exp(drawn((-0.15, 0.2), generator))
    mirror = -1.0 if drawn((0, 1), generator) < 0.5 else 1.0
    cos, sin = math.cos(turn) * scale, math.sin(turn) * scale
    x, y = (drawn((-0.08, 0.08), generator) for _ in range(2))
    matrix = torch.tensor([[[cos * mirror, -sin, x], [sin * mirror, cos, y]]])
    places = F.affine_grid(matrix, [1, 3, SMALL_SIDE, SMALL_SIDE], align_corners=False)
    both = torch.cat([picture, mask])[None]
    moved = F.grid_sample(both, places, padding_mode="reflection", align_corners=False)[0]
    return moved[:3], moved[3:]


def _worse(picture: Tensor, generator: torch.Generator) -> Tensor:
    """Other light and colours, and in some samples blurred, noisy, grey or of an old photograph."""

    def chance(of: float) -> bool:
        return drawn((0, 1), generator) < of

    side = picture.shape[-1]
    gamma = math.exp(drawn((-0.5, 0.5), generator))
    tint = 1 + 0.08 * torch.randn(3, 1, 1, generator=generator)
    picture = picture.clamp(0, 1) ** gamma * drawn((0.6, 1.2), generator) * tint
    if chance(0.5):
        small = int(side / drawn((1, 8), generator))
        picture = F.interpolate(picture[None], (small, small), mode="bilinear", antialias=True)
        picture = F.interpolate(picture, (side, side), mode="bicubic")[0]
    if chance(0.2):
        picture = picture.mean(0, keepdim=True).expand(3, -1, -1)
    if chance(0.12):
        picture = aged(picture, generator)
    if chance(0.3):
        noise = torch.randn(picture.shape, generator=generator)
        picture = picture + noise * drawn((0, 0.08), generator)
    if chance(0.2):
        picture = compressed(picture[None], round(drawn((30, 90), generator)))[0]
    return picture.clamp(0, 1)


class ParserTask:
    def __init__(self, config: ParserConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator, self.step = config, accelerator, 0
        files, held_out = split(config.data)
        self.samples = MaskedFaces(files, config)
        self.held_out = MaskedFaces(held_out or files, config, still=True)
        network = SmallParser()
        if config.start:
            made = build_parser(read_tensors(config.start))
            if not isinstance(made, SmallParser):
                raise OSDFaceError(
                    f"{config.start} is no file of the built-in face parser: give one that this "
                    f"training has written."
                )
            network = made
        self.networks: dict[str, nn.Module] = {"parser": network.requires_grad_(True)}
        self.optimisers = {"parser": config.optimiser}

    def losses(self, name: str, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross entropy, and one less the soft intersection over union of each mask."""
        logits = self.networks[name](batch["pictures"] * 2 - 1).float()
        target, weights = batch["masks"], batch["weights"]
        entropy = F.binary_cross_entropy_with_logits(logits, target, weights)
        face = logits.sigmoid()
        both = (face * target).flatten(1).sum(1)
        either = (face + target - face * target).flatten(1).sum(1)
        apart = 1 - ((both + 1) / (either + 1)).mean()
        total = entropy + apart
        return total, {"entropy": entropy, "apart": apart, "total": total}

    def after_step(self, step: int) -> None:
        pass

    def show(self, count: int) -> tuple[Tensor, dict[str, float]]:
        """Held-out faces with something in front of most, what is found of them, and the truth.

        `iou` is of all held-out faces, each once.
        """
        network = bare(self.networks["parser"])
        found, shown = [], []
        for n in range(len(self.held_out)):
            sample = self.held_out[n]
            picture = sample["pictures"][None].to(self.accelerator.device)
            face = (network(picture * 2 - 1) > 0).float().cpu()[0]
            truth = (sample["masks"] > 0.5).float()
            found.append(float((face * truth).sum() / (face + truth).clamp(max=1).sum().clamp(1)))
            if n < count:
                shown.append((sample["pictures"], face, truth))
        rows = [
            torch.stack([picture for picture, _, _ in shown]),
            torch.stack([picture * (0.3 + 0.7 * face) for picture, face, _ in shown]),
            torch.stack([picture * (0.3 + 0.7 * truth) for picture, _, truth in shown]),
        ]
        return grid(rows), {"iou": sum(found) / len(found)}

    def export(self, folder: Path) -> None:
        """parser.safetensors, in fp16, as `faces.face_parser.build_parser` reads it."""
        state = bare(self.networks["parser"]).state_dict()
        save_file(for_file(state, half=True), folder / "parser.safetensors")
