"""Compares the built-in detector with RetinaFace.

    python -m benchmarks.builtin DATA [--limit N] [--detector FILE]

DATA is the folder with images/ and weights/. Only portraits that training never saw are used: those
whose number is a multiple of 6. benchmarks/quality.py measures what the built-in model restores.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image
from torch import Tensor

from osdface_core.faces.detect import Detection, DetectOptions, detect
from osdface_core.faces.files import BUILTIN_DETECTOR
from osdface_core.faces.retinaface import build_retinaface
from osdface_core.training.data import number_of
from osdface_core.weights.reading import read_tensors

HOLD_OUT = 6
SIDE = 512


def bytes_of(picture: Tensor) -> np.ndarray:
    """(H,W,3) in [0,1] -> the same in 0..255, as numpy's uint8."""
    return picture.clamp(0, 1).mul(255).round().byte().numpy()


def floats(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels.copy()).float() / 255


def load(path: Path, side: int = 0) -> Tensor:
    image = Image.open(path).convert("RGB")
    return floats(
        np.asarray(image.resize((side, side), Image.Resampling.LANCZOS) if side else image)
    )


def held_out(folder: Path, limit: int) -> list[Path]:
    """Pictures that training never saw; about `limit` of them, or all."""
    paths = [
        path
        for path in sorted(folder.glob("*.jpg"))
        if (n := number_of(path)) is not None and n % HOLD_OUT == 0
    ]
    return paths[:: max(1, math.ceil(len(paths) / limit))] if limit else paths


def held_out_portraits(data: Path, limit: int) -> list[Path]:
    return held_out(data / "images" / "portraits", limit)


def apart(known: Detection, found: Detection) -> list[float]:
    """The distance of each landmark, as a share of the known face's height."""
    return [
        math.dist(a, b) / (known.box[3] - known.box[1])
        for a, b in zip(known.landmarks, found.landmarks, strict=True)
    ]


def faceless(data: Path, limit: int) -> list[Tensor]:
    """Pictures without a face: scikit-image's, and chests and shoulders of held-out portraits."""
    names = (
        *("brick", "cell", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field"),
        *("immunohistochemistry", "moon", "page", "retina", "rocket", "text"),
    )
    found = [
        floats(pixels if pixels.ndim == 3 else np.stack([pixels] * 3, -1))
        for pixels in (getattr(skimage.data, name)() for name in names)
    ]
    for path in held_out(data / "images" / "portraits", limit):
        portrait = load(path)
        found.append(portrait[len(portrait) * 13 // 16 :])
    return found


def detection(data: Path, limit: int, file: Path) -> None:
    """Compares a detector with RetinaFace mobilenet0.25, the only truth available."""
    teacher = build_retinaface(read_tensors(data / "weights" / "detection_mobilenet0.25_Final.pth"))
    ours = build_retinaface(read_tensors(file))
    paths = held_out_portraits(data, limit)
    images = data / "images"
    sets = {
        "held-out portraits, 1024 px": [load(path) for path in paths],
        "the same, 512 px": [load(path, SIDE) for path in paths],
        "mosaic, six faces": [load(images / "cc0_mosaic_6faces_1080p.png")],
        "astronaut": [load(images / "astronaut.png")],
        "camera, a profile": [load(images / "camera.png")],
        "held-out old portraits, 450 x 600 px": [
            load(path) for path in held_out(images / "old", limit)
        ],
        "without a face": faceless(data, limit),
    }
    print(
        "| pictures | confidence | RetinaFace's faces found | others | mean landmark error, of "
        "the face's height | largest |"
    )
    print("|---|---|---|---|---|---|")
    for name, pictures in sets.items():
        for confidence in (0.9, 0.5):
            known_faces = hits = others = 0
            errors: list[list[float]] = []
            for picture in pictures:
                known = detect(picture[None], teacher, DetectOptions(confidence=0.9))[0]
                found = detect(picture[None], ours, DetectOptions(confidence=confidence))[0]
                near = {}
                for i, face in enumerate(known):
                    best = min(found, key=lambda f, face=face: max(apart(face, f)), default=None)  # type: ignore[misc]
                    if best is not None and max(apart(face, best)) < 0.25:
                        near[i] = best
                        errors.append(apart(face, best))
                known_faces, hits = known_faces + len(known), hits + len(near)
                others += len(found) - len({id(f) for f in near.values()})
            flat = [e for of in errors for e in of]
            mean = f"{sum(flat) / len(flat):.3f} | {max(flat):.3f}" if flat else "- | -"
            print(
                f"| {name} | {confidence} | {hits} of {known_faces} | {others} | {mean} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--limit", type=int, default=0, help="of the portraits, about so many")
    parser.add_argument(
        "--detector", type=Path, default=BUILTIN_DETECTOR, help="file of the detector (built-in)"
    )
    given = parser.parse_args()
    detection(given.data, given.limit, given.detector)


if __name__ == "__main__":
    main()
