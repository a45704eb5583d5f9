"""Compares the built-in network that fills holes with OpenCV's two methods and two plain fills.

    python -m benchmarks.inpainting DATA [--file FILE] [--measures FOLDER] [--sheet FILE]
                                         [--limit N]

DATA is the folder with images/ and weights/. Only portraits that training never saw are used: those
whose number is a multiple of 6, as aligned crops of 256 px. OpenCV is needed; LPIPS is measured
where --measures names the folder that benchmarks.measures wrote.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.builtin import HOLD_OUT, bytes_of, floats, load
from benchmarks.measures import FILES
from osdface_core.diffir.files import BUILTIN_INPAINTER
from osdface_core.diffir.inpaint import inpaint
from osdface_core.diffir.network import build_network
from osdface_core.diffir.weights import read_weights
from osdface_core.faces.detect import DetectOptions
from osdface_core.faces.find import find_faces
from osdface_core.faces.retinaface import build_retinaface
from osdface_core.training.data import number_of
from osdface_core.training.degradation import generator_for
from osdface_core.training.diffir import Masks, drawn_mask
from osdface_core.training.losses import LPIPS, load_lpips
from osdface_core.weights.reading import read_tensors

SIDE = 256
DETECTOR = "weights/detection_mobilenet0.25_Final.pth"
# What a hole is, for each kind: scratches 1 to 5 px wide, strokes of 8 to 24 px, boxes of 24 to 80.
HOLES = Masks(
    scratch=(1.0, 5.0),
    scratches=(2, 6),
    lines=(1, 3),
    length=(20.0, 110.0),
    thickness=(8.0, 24.0),
    boxes=(1, 2),
    sides=(24, 80),
    margin=10,
)
KINDS = {"scratches": "scratches", "strokes": "lines", "boxes": "boxes"}
RADIUS = 3
Fill = Callable[[Tensor, Tensor], Tensor]


def by_opencv(method: int) -> Fill:
    def fill(picture: Tensor, hole: Tensor) -> Tensor:
        return floats(cv2.inpaint(bytes_of(picture), bytes_of(hole), RADIUS, method))

    return fill


def push_pull(picture: Tensor, hole: Tensor) -> Tensor:
    """Means over ever larger squares of what is known (Gortler et al. 1996). (H,W,3), (H,W)."""
    return _pushed(picture.movedim(-1, 0)[None] * (1 - hole), 1 - hole[None, None])[0].movedim(
        0, -1
    )


def _pushed(sums: Tensor, known: Tensor) -> Tensor:
    """Pictures (1,3,H,W), 0 where nothing is known, and what is known (1,1,H,W)."""
    if min(known.shape[-2:]) == 1:
        return sums / known.clamp_min(1e-6)
    smaller, share = (F.avg_pool2d(x, 2, ceil_mode=True) for x in (sums, known))
    scale = share.clamp(0, 1) / share.clamp_min(1e-6)
    below = F.interpolate(
        _pushed(smaller / share.clamp_min(1e-6) * scale, scale),
        known.shape[-2:],
        mode="bilinear",
        align_corners=False,
    )
    return sums + (1 - known) * below


def harmonic(picture: Tensor, hole: Tensor, steps: int = 1000) -> Tensor:
    """The smoothest membrane across the holes: each pixel is the mean of its four neighbours."""
    x = push_pull(picture, hole).movedim(-1, 0)[None]
    inside = hole[None, None] > 0
    for _ in range(steps):
        y = F.pad(x, (1, 1, 1, 1), mode="replicate")
        mean = (y[..., 1:-1, 2:] + y[..., 1:-1, :-2] + y[..., 2:, 1:-1] + y[..., :-2, 1:-1]) / 4
        x = torch.where(inside, mean, x)
    return x[0].movedim(0, -1)


def by_network(path: Path) -> Fill:
    network = build_network(read_weights(path))

    @torch.inference_mode()
    def fill(picture: Tensor, hole: Tensor) -> Tensor:
        found = inpaint(picture[None], hole[None], lambda memory: (network, torch.device("cpu")))
        return found.pictures[0]

    return fill


def held_out_faces(data: Path, limit: int) -> list[Tensor]:
    """Aligned crops (256,256,3) in [0,1]."""
    detector = build_retinaface(read_tensors(data / DETECTOR))
    found = []
    for path in sorted((data / "images" / "portraits").glob("*.jpg")):
        if (number_of(path) or 0) % HOLD_OUT == 0 and (not limit or len(found) < limit):
            faces = find_faces(load(path)[None], detector, DetectOptions(crop_size=SIDE)).faces
            found += [crop.clamp(0, 1) for crop in faces.crops[:1]]
    return found


def error_in(given: Tensor, right: Tensor, hole: Tensor) -> float:
    """PSNR in dB of the pixels in the hole."""
    return float(-10 * (given - right)[hole > 0].square().mean().clamp(min=1e-10).log10())


@torch.inference_mode()
def compare(
    faces: list[Tensor], fills: dict[str, Fill], lpips: LPIPS | None
) -> tuple[list[str], dict[str, list[Tensor]]]:
    """(lines of a table in Markdown, rows of the sheet by the kind of hole)."""
    head = ["hole", "share of the picture", "filled by", "PSNR dB in the hole"]
    head += (["LPIPS"] if lpips else []) + ["ms"]
    lines, rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"], {}
    for kind, drawn in KINDS.items():
        holes = [drawn_mask(HOLES, drawn, SIDE, generator_for(1, n))[0] for n in range(len(faces))]
        share = sum(float(hole.mean()) for hole in holes) / len(holes)
        rows[kind] = [
            torch.cat([face, face * (1 - hole[..., None]) + hole[..., None]])
            for face, hole in zip(faces, holes, strict=True)
        ]
        for name, fill in fills.items():
            psnr, distance, begun = [], [], time.perf_counter()
            filled = [fill(face, hole) for face, hole in zip(faces, holes, strict=True)]
            took = 1000 * (time.perf_counter() - begun) / len(faces)
            for i, (face, hole, made) in enumerate(zip(faces, holes, filled, strict=True)):
                # What OpenCV rounds outside of the hole is not counted.
                whole = torch.where(hole[..., None] > 0, made.clamp(0, 1), face)
                psnr.append(error_in(whole, face, hole))
                if lpips:
                    pair = (x.movedim(-1, 0)[None] for x in (whole, face))
                    distance.append(float(lpips(*pair)))
                rows[kind][i] = torch.cat([rows[kind][i], whole])
            cells = [kind, f"{share:.3f}", name, f"{sum(psnr) / len(psnr):.2f}"]
            cells += [f"{sum(distance) / len(distance):.4f}"] if lpips else []
            lines.append(f"| {' | '.join([*cells, f'{took:.0f}'])} |")
    return lines, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--file", type=Path, default=BUILTIN_INPAINTER, help="of DiffIR's weights")
    parser.add_argument("--measures", type=Path, help="folder with LPIPS' numbers")
    parser.add_argument("--sheet", type=Path, help="picture to write: for each kind of hole three")
    parser.add_argument("--limit", type=int, default=0, help="faces, 0 for all")
    given = parser.parse_args()
    fills = {
        "Telea": by_opencv(cv2.INPAINT_TELEA),
        "Navier-Stokes": by_opencv(cv2.INPAINT_NS),
        "push-pull": push_pull,
        "harmonic": harmonic,
        "**built-in network**": by_network(given.file),
    }
    faces = held_out_faces(given.data, given.limit)
    files = [given.measures / name for name in FILES["lpips_vgg"]] if given.measures else []
    lpips = load_lpips(files) if files else None
    lines, rows = compare(faces, fills, lpips)
    print("\n".join(lines))
    if given.sheet:
        step = max(1, len(faces) // 4)
        columns = [column for kind in rows.values() for column in kind[::step][:4]]
        Image.fromarray(bytes_of(torch.cat(columns, 1))).save(given.sheet)


if __name__ == "__main__":
    main()
