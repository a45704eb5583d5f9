"""Trains the built-in face detector to answer as RetinaFace does, on pictures made from a folder of
portraits.

    python -m osdface_core.training.detector PICTURES --teacher FILE --hold-out 6 \\
        --minutes 25 --out detector.safetensors

Each training picture is a made ground (noise, gradient, blurred stripes, or a part of a portrait
below its face) with none to six portraits on it, scaled, turned, mirrored, shifted and side by
side, then darkened, blurred, made noisy or grey. The teacher, a RetinaFace with weights of its own,
looks at the very same picture; what it says at each anchor (a confidence, a box, five landmarks) is
learned.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, autocast

from ..faces.refine import BEST_SIZE, WINDOW
from ..faces.retinaface import MEAN_BGR, RetinaFace, build_retinaface
from ..weights.reading import read_tensors
from .autoencoder import SIDE, squares, training_pictures

log = logging.getLogger(__name__)

# Sides of training pictures and how many make a batch of about equal cost.
BATCHES = ((256, 12), (384, 5), (512, 3))
MOST_TURNED = 45
# Every other batch is of so many windows as detection's second look has them. A face's height is
# this share of a portrait's.
WINDOWS = 10
FACE_HEIGHT = 0.37


def uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def ground(portraits: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """(3,side,side) in [0,1] with no face on it."""
    kind = int(torch.randint(4, (), generator=generator))
    colours = torch.rand(2, 3, 1, 1, generator=generator)
    if kind == 0:
        coarse = torch.rand(
            1, 3, *torch.randint(2, 40, (2,), generator=generator).tolist(), generator=generator
        )
        return F.interpolate(coarse, (side, side), mode="bicubic")[0].clamp(0, 1)
    if kind == 1:
        ramp = torch.linspace(0, 1, side).expand(side, side)
        return torch.lerp(
            colours[0], colours[1], ramp if uniform(0, 1, generator) < 0.5 else ramp.T
        )
    if kind == 2:
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        angle, period = uniform(0, math.pi, generator), uniform(4, 60, generator)
        waves = torch.sin((x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / period))
        waves = waves * torch.sin(y * uniform(0.01, 0.5, generator))
        return torch.lerp(colours[0], colours[1], waves * 0.5 + 0.5)
    # The lowest quarter of a portrait is shoulders and cloth.
    body = (
        portraits[
            int(torch.randint(len(portraits), (), generator=generator)), :, SIDE * 13 // 16 :
        ].float()
        / 255
    )
    width = int(uniform(body.shape[1], SIDE, generator))
    left = int(uniform(0, SIDE - width, generator))
    return F.interpolate(
        body[None, :, :, left : left + width], (side, side), mode="bilinear", antialias=True
    )[0]


def placed(
    canvas: Tensor,
    portrait: Tensor,
    middle: tuple[float, float],
    scale: float,
    degrees: float,
    mirrored: bool,
) -> None:
    """Draws a portrait (3,512,512) on the canvas, turned and `scale` times its size, about the
    point `middle`.
    """
    side = canvas.shape[-1]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    reach = scale * SIDE / 2 * (abs(cos) + abs(sin))
    x1, x2 = (max(0, int(middle[0] - reach)), min(side, math.ceil(middle[0] + reach)))
    y1, y2 = (max(0, int(middle[1] - reach)), min(side, math.ceil(middle[1] + reach)))
    if x2 <= x1 or y2 <= y1:
        return
    size = max(8, round(scale * SIDE))
    small = (
        portrait
        if size >= SIDE
        else F.interpolate(portrait[None], (size, size), mode="bilinear", antialias=True)[0]
    )
    y, x = torch.meshgrid(
        torch.arange(y1, y2) + 0.5 - middle[1],
        torch.arange(x1, x2) + 0.5 - middle[0],
        indexing="ij",
    )
    half = scale * SIDE / 2
    grid = torch.stack(
        [(x * cos + y * sin) / half * (-1 if mirrored else 1), (y * cos - x * sin) / half], -1
    )
    drawn = F.grid_sample(small[None], grid[None], align_corners=False, padding_mode="border")[0]
    soft = ((1 - grid.abs().amax(-1)) * half).clamp(0, 1)
    canvas[:, y1:y2, x1:x2] = torch.lerp(canvas[:, y1:y2, x1:x2], drawn, soft)


def picture(portraits: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """One training picture (3,side,side) in [0,1]."""
    canvas = ground(portraits, side, generator)
    count = (0, 1, 1, 1, 2, 2, 4, 6)[int(torch.randint(8, (), generator=generator))]
    columns = math.ceil(math.sqrt(count)) if count > 1 else 1
    for i in range(count):
        portrait = (
            portraits[int(torch.randint(len(portraits), (), generator=generator))].float() / 255
        )
        cell = side / columns
        scale = (
            math.exp(uniform(math.log(0.12 if count == 1 else 0.3), math.log(1.6), generator))
            * cell
            / SIDE
        )
        scale = max(scale, 56 / SIDE)
        turn = (
            0.0
            if uniform(0, 1, generator) < 0.75
            else uniform(-MOST_TURNED, MOST_TURNED, generator)
        )
        middle = (
            (i % columns + uniform(0.25, 0.75, generator)) * cell,
            (i // columns + uniform(0.3, 0.8, generator)) * cell,
        )
        placed(canvas, portrait, middle, scale, turn, uniform(0, 1, generator) < 0.5)
    tint = 1 + 0.1 * torch.randn(3, 1, 1, generator=generator)
    canvas = (canvas * uniform(0.6, 1.2, generator) + uniform(-0.1, 0.1, generator)) * tint
    if uniform(0, 1, generator) < 0.2:
        canvas = canvas.mean(0, keepdim=True).expand(3, -1, -1)
    if uniform(0, 1, generator) < 0.3:
        small = max(16, int(side / uniform(1, 4, generator)))
        canvas = F.interpolate(canvas[None], (small, small), mode="bilinear", antialias=True)
        canvas = F.interpolate(canvas, (side, side), mode="bilinear")[0]
    if uniform(0, 1, generator) < 0.4:
        canvas = canvas + torch.randn(canvas.shape, generator=generator) * uniform(
            0, 0.1, generator
        )
    return canvas.clamp(0, 1)


def window(portraits: Tensor, generator: torch.Generator) -> Tensor:
    """(3,288,288) in [0,1]: one face, nearly upright and about as large and central as detection's
    second look shows it.
    """
    canvas = ground(portraits, WINDOW, generator)
    portrait = portraits[int(torch.randint(len(portraits), (), generator=generator))].float() / 255
    scale = math.exp(uniform(-0.2, 0.2, generator)) * BEST_SIZE / FACE_HEIGHT / SIDE
    # Faces are above the middle of a portrait.
    middle = (
        WINDOW / 2 + uniform(-16, 16, generator),
        WINDOW / 2 + uniform(-16, 16, generator) + 0.18 * scale * SIDE,
    )
    placed(
        canvas, portrait, middle, scale, uniform(-10, 10, generator), uniform(0, 1, generator) < 0.5
    )
    return (canvas * uniform(0.7, 1.15, generator) + uniform(-0.05, 0.05, generator)).clamp(0, 1)


def answers(network: RetinaFace, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """At each anchor: how much more likely a face than none, as a logit (B,A), and box (B,A,4) and
    landmarks (B,A,10) as the heads give them.
    """
    maps = network.fpn(*network.body(x))
    features = [
        module(m)
        for module, m in zip((network.ssh1, network.ssh2, network.ssh3), maps, strict=True)
    ]
    classes, boxes, landmarks = (
        torch.cat([head(feature) for head, feature in zip(heads, features, strict=True)], 1)
        for heads in (network.ClassHead, network.BboxHead, network.LandmarkHead)
    )
    return classes[..., 1] - classes[..., 0], boxes, landmarks


def loss_of(
    given: tuple[Tensor, Tensor, Tensor], wanted: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the confidences (focal, towards the teacher's), and of boxes and landmarks where the
    teacher sees a face.
    """
    (logits, boxes, landmarks), (their_logits, their_boxes, their_landmarks) = (
        tuple(t.float() for t in part) for part in (given, wanted)
    )
    sure = their_logits.sigmoid()
    faces = sure.sum().clamp(min=1)
    missed = (logits.sigmoid() - sure).abs()
    confidence = (
        F.binary_cross_entropy_with_logits(logits, sure, reduction="none") * missed
    ).sum() / faces
    weight = sure * (sure > 0.3)

    def apart(ours: Tensor, theirs: Tensor) -> Tensor:
        return (
            F.smooth_l1_loss(ours, theirs, reduction="none", beta=0.1).mean(-1) * weight
        ).sum() / faces

    return confidence, apart(boxes, their_boxes), apart(landmarks, their_landmarks)


def train(
    portraits: Tensor,
    network: RetinaFace,
    teacher: RetinaFace,
    minutes: float,
    *,
    rate: float = 3e-3,
    seed: int = 0,
) -> RetinaFace:
    """The moving average of `network`'s weights after so many minutes of training. portraits:
    (N,3,512,512) bytes.
    """
    generator = torch.Generator().manual_seed(seed)
    network.train().requires_grad_(True).to(memory_format=torch.channels_last)
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), rate, betas=(0.9, 0.98), weight_decay=1e-3)
    mean_bgr = torch.tensor(MEAN_BGR).view(3, 1, 1)
    begun, shown, done, means = time.monotonic(), 0.0, 0, [0.0] * 3
    while (elapsed := (time.monotonic() - begun) / 60) < minutes:
        for group in optimizer.param_groups:
            group["lr"] = (
                rate
                * min(1, (done + 1) / 50)
                * (0.01 + 0.99 * (1 + math.cos(math.pi * elapsed / minutes)) / 2)
            )
        if done % 2:
            pixels = torch.stack([window(portraits, generator) for _ in range(WINDOWS)])
        else:
            side, count = BATCHES[int(torch.randint(len(BATCHES), (), generator=generator))]
            pixels = torch.stack([picture(portraits, side, generator) for _ in range(count)])
        x = (pixels.flip(1) * 255 - mean_bgr).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            wanted = answers(teacher, x)
        with autocast("cpu", torch.bfloat16):
            found = answers(network, x)
        losses = loss_of(found, wanted)
        optimizer.zero_grad()
        (losses[0] + 2 * losses[1] + 8 * losses[2]).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        done += 1
        keep = min(0.998, done / (done + 20))
        with torch.no_grad():
            for ours, theirs in zip(
                average.state_dict().values(), network.state_dict().values(), strict=True
            ):
                if ours.is_floating_point():
                    ours.lerp_(theirs, 1 - keep)
        means = [
            m + (part.item() - m) * max(0.02, 1 / done)
            for m, part in zip(means, losses, strict=True)
        ]
        if elapsed - shown > 0.5:
            shown = elapsed
            log.info(
                "%5.1f min, step %d, confidence %.3f, boxes %.4f, landmarks %.4f",
                elapsed,
                done,
                *means,
            )
    log.info("%d steps in %.1f min", done, minutes)
    return average.eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--teacher", type=Path, required=True, help="weights of a RetinaFace")
    parser.add_argument(
        "--hold-out",
        type=int,
        default=0,
        help="leave out pictures whose number is a multiple of this",
    )
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument(
        "--threads", type=int, default=1, help="on a busy machine one is faster than two"
    )
    parser.add_argument("--start", type=Path, help="go on from these weights")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(given.threads)
    portraits = squares(training_pictures(given.pictures, given.hold_out), None)
    log.info("%d portraits", len(portraits))
    network = RetinaFace("narrow")
    if given.start:
        network.load_state_dict(load_file(given.start))
    else:
        for head in network.ClassHead:
            # At first no anchor is a face, as nearly none is.
            torch.nn.init.constant_(head.get_parameter("conv1x1.bias")[0::2], 2.0)
            torch.nn.init.constant_(head.get_parameter("conv1x1.bias")[1::2], -2.0)
    average = train(
        portraits,
        network,
        build_retinaface(read_tensors(given.teacher)),
        given.minutes,
        rate=given.rate,
    )
    save_file(
        {
            k: (t.half() if t.is_floating_point() else t).contiguous()
            for k, t in average.state_dict().items()
        },
        given.out,
    )


if __name__ == "__main__":
    main()
