"""Trains the built-in autoencoder by self-reconstruction.

    python -m osdface_core.training.autoencoder PICTURES --detector FILE --hold-out 6 \\
        --minutes 30 --out autoencoder.safetensors

PICTURES is a folder. Crops are taken from the pictures and, where the weights of a RetinaFace are
given, from the faces that it finds in them, aligned as the model will see them. The schedule runs
to the end of the minutes given, whatever the machine does in them.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, autocast, nn

from ..faces.choose import Choice
from ..faces.detect import DetectOptions
from ..faces.find import find_faces
from ..faces.retinaface import build_retinaface
from ..osdface.builtin.autoencoder import Autoencoder
from ..sd21.backbone import STRIDE
from ..weights.reading import read_tensors

log = logging.getLogger(__name__)

SIDE = 512
PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
# Share of the crops that are blurred and noisy: a picture to be restored goes through the same
# encoder.
DEGRADED = 0.3


def held_out(path: Path, every: int) -> bool:
    """Whether the number at the end of a file's name is a multiple of `every`; such pictures are
    for measuring alone.
    """
    number = re.search(r"(\d+)$", path.stem)
    return bool(every and number and int(number[1]) % every == 0)


def training_pictures(folder: Path, hold_out: int) -> list[Path]:
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in PICTURE_SUFFIXES and not held_out(path, hold_out)
    ]


def squares(paths: list[Path], detector: Path | None) -> Tensor:
    """Every picture's middle square at 512 px and, with a detector, its largest face as an aligned
    crop of 512 px: (N,3,512,512) bytes.
    """
    network = build_retinaface(read_tensors(detector)) if detector else None
    found = []
    for path in paths:
        image = Image.open(path).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        found.append(
            np.asarray(
                image.crop((left, top, left + side, top + side)).resize(
                    (SIDE, SIDE), Image.Resampling.LANCZOS
                )
            )
        )
        if network:
            pixels = torch.from_numpy(np.asarray(image).copy()).float()[None] / 255
            crops = find_faces(
                pixels, network, DetectOptions(confidence=0.5, choice=Choice("largest"))
            ).faces.crops
            found += [(crop.clamp(0, 1) * 255).round().byte().numpy() for crop in crops]
    return torch.from_numpy(np.stack(found)).movedim(-1, 1).contiguous()


def batches(
    pictures: Tensor, side: int, count: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Random crops, mirrored or not, (count,3,side,side) in [-1,1]."""
    pixels = math.ceil(side / STRIDE) * STRIDE
    while True:
        picked = torch.randint(len(pictures), (count,), generator=generator).tolist()
        corners = torch.randint(SIDE - pixels + 1, (count, 2), generator=generator).tolist()
        mirrored = (torch.rand(count, generator=generator) < 0.5).tolist()
        crops = []
        for i, (y, x), flip in zip(picked, corners, mirrored, strict=True):
            crop = pictures[i, :, y : y + pixels, x : x + pixels].float() / 127.5 - 1
            crops.append(crop.flip(-1) if flip else crop)
        x = torch.stack(crops)
        poor = int(count * DEGRADED)
        if poor:
            factor = float(torch.rand((), generator=generator)) * 6 + 2
            small = F.interpolate(
                x[:poor], scale_factor=1 / factor, mode="bilinear", antialias=True
            )
            small = small + torch.randn(small.shape, generator=generator) * 0.12 * float(
                torch.rand((), generator=generator)
            )
            x[:poor] = F.interpolate(small, (pixels, pixels), mode="bicubic").clamp(-1, 1)
        yield x


def loss_of(given: Tensor, wanted: Tensor) -> Tensor:
    """Mean absolute difference of the pixels and of their differences across and down."""
    across = (given.diff(dim=-1) - wanted.diff(dim=-1)).abs().mean()
    down = (given.diff(dim=-2) - wanted.diff(dim=-2)).abs().mean()
    return (given - wanted).abs().mean() + across + down


def train(
    pictures: Tensor,
    network: Autoencoder,
    minutes: float,
    *,
    side: int = 128,
    batch: int = 16,
    rate: float = 1e-3,
    seed: int = 0,
) -> Autoencoder:
    """The moving average of `network`'s weights after so many minutes of training."""
    generator = torch.Generator().manual_seed(seed)
    average = copy.deepcopy(network).requires_grad_(False)
    network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), rate, betas=(0.9, 0.98), weight_decay=1e-4)
    begun, shown, done, mean = time.monotonic(), 0.0, 0, 0.0
    for drawn in batches(pictures, side, batch, generator):
        elapsed = (time.monotonic() - begun) / 60
        if elapsed >= minutes:
            break
        for group in optimizer.param_groups:
            group["lr"] = (
                rate
                * min(1, (done + 1) / 100)
                * (0.01 + 0.99 * (1 + math.cos(math.pi * elapsed / minutes)) / 2)
            )
        crops = drawn.contiguous(memory_format=torch.channels_last)
        with autocast("cpu", torch.bfloat16):
            given = network(crops)
        loss = loss_of(given.float(), crops)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        done += 1
        keep = min(0.999, done / (done + 50))
        torch._foreach_lerp_(
            list(average.parameters()), [p.detach() for p in network.parameters()], 1 - keep
        )
        mean += (float(loss) - mean) * max(0.01, 1 / done)
        if elapsed - shown > 0.5:
            shown = elapsed
            log.info("%5.1f min, step %d, loss %.4f", elapsed, done, mean)
    log.info("%d steps of %d crops of %d px in %.1f min", done, batch, side, minutes)
    return average


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", type=Path)
    parser.add_argument(
        "--detector", type=Path, help="weights of a RetinaFace, to train on aligned faces too"
    )
    parser.add_argument(
        "--hold-out",
        type=int,
        default=0,
        help="leave out pictures whose number is a multiple of this",
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--side", type=int, default=128, help="pixels a side of the crops")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument(
        "--threads", type=int, default=1, help="on a busy machine one is faster than two"
    )
    parser.add_argument("--cache", type=Path, help="where the squares are kept from run to run")
    parser.add_argument("--start", type=Path, help="go on from these weights")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(given.threads)
    if given.cache and given.cache.exists():
        pictures = load_file(given.cache)["pictures"]
    else:
        pictures = squares(training_pictures(given.pictures, given.hold_out), given.detector)
        if given.cache:
            save_file({"pictures": pictures}, given.cache)
    log.info("%d squares", len(pictures))
    network = Autoencoder()
    if given.start:
        network.load_state_dict({name: t.float() for name, t in load_file(given.start).items()})
    else:
        network.start(pictures[::4, :, ::1, ::1].float() / 127.5 - 1)
    average = train(
        pictures, network, given.minutes, side=given.side, batch=given.batch, rate=given.rate
    )
    save_file({name: t.half().contiguous() for name, t in average.state_dict().items()}, given.out)


if __name__ == "__main__":
    main()
