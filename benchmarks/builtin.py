"""Compares the built-in model with plain filters, and its detector with RetinaFace.

    python -m benchmarks.builtin DATA [restoration] [ceiling] [detection] [--grid FILE] [--limit N]
        [--detector FILE]

DATA is the folder with images/ and weights/. Only portraits that training never saw are used: those
whose number is a multiple of 6. The filters need OpenCV.
"""

from __future__ import annotations

import argparse
import io
import math
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from osdface_core.diffusers.builtin import load_backbone
from osdface_core.faces.choose import Choice
from osdface_core.faces.detect import Detection, DetectOptions, detect
from osdface_core.faces.files import BUILTIN_DETECTOR
from osdface_core.faces.find import find_faces
from osdface_core.faces.retinaface import build_retinaface
from osdface_core.osdface import builtin
from osdface_core.osdface.builtin.autoencoder import blue_noise
from osdface_core.osdface.restore import restore
from osdface_core.training.data import number_of
from osdface_core.weights.reading import read_tensors

HOLD_OUT = 6
SIDE = 512
# Name: blur in pixels, factor of shrinking, noise in 255ths, JPEG quality.
KINDS = {
    "8x: blur 3, noise 15, JPEG 50": (3.0, 8, 15.0, 50),
    "4x: blur 2, noise 8, JPEG 70": (2.0, 4, 8.0, 70),
}


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


def degraded(
    picture: Tensor, kind: tuple[float, int, float, int], seed: int
) -> tuple[Tensor, Tensor]:
    """The picture (H,W,3) in [0,1] after blur, shrinking, noise and JPEG.

    Returns the small picture, and the same enlarged to the picture's size (bicubic).
    """
    blur, shrink, noise, quality = kind
    pixels = cv2.GaussianBlur(bytes_of(picture), (0, 0), blur)
    height, width = pixels.shape[:2]
    small = cv2.resize(
        pixels, (width // shrink, height // shrink), interpolation=cv2.INTER_AREA
    ).astype(np.float32)
    small += np.random.default_rng(seed).normal(0, noise, small.shape).astype(np.float32)
    file = io.BytesIO()
    Image.fromarray(small.round().clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
    small = np.asarray(Image.open(file))
    return floats(small), floats(cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC))


def filtered(small: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """Results of plain filters on the small picture, each applied before and after enlarging it."""
    pixels = bytes_of(small)

    def enlarged(x: np.ndarray, how: int = cv2.INTER_CUBIC) -> np.ndarray:
        return cv2.resize(x, size[::-1], interpolation=how)

    found = {
        "bicubic": enlarged(pixels),
        "bilinear": enlarged(pixels, cv2.INTER_LINEAR),
        "lanczos": enlarged(pixels, cv2.INTER_LANCZOS4),
    }
    for strength in (20, 40, 60):
        found[f"bilateral {strength}, then enlarged"] = enlarged(
            cv2.bilateralFilter(pixels, 5, strength, 2)
        )
    for strength in (3, 6, 10):
        denoised = cv2.fastNlMeansDenoisingColored(pixels, None, strength, strength, 5, 15)
        found[f"non-local means {strength}, then enlarged"] = enlarged(denoised)
    # Only the middle strength, since these are slow at this size.
    found["bilateral 40"] = cv2.bilateralFilter(enlarged(pixels), 9, 40, 5)
    found["non-local means 6"] = cv2.fastNlMeansDenoisingColored(
        enlarged(pixels), None, 6, 6, 7, 21
    )
    return {name: floats(x) for name, x in found.items()}


def psnr(given: Tensor, right: Tensor) -> float:
    return float(-10 * (given.clamp(0, 1) - right).square().mean().log10())


def ssim(given: Tensor, right: Tensor) -> float:
    """Structural similarity (Wang et al. 2004) of luma, without padding.

    Gaussian window of 11 px with a deviation of 1.5 px.
    """
    weights = torch.tensor([0.299, 0.587, 0.114])
    x, y = ((p.clamp(0, 1) @ weights)[None, None] for p in (given, right))
    taps = torch.exp(-((torch.arange(11.0) - 5) ** 2) / (2 * 1.5**2))
    window = (torch.outer(taps, taps) / taps.sum() ** 2)[None, None]

    def mean(v: Tensor) -> Tensor:
        return F.conv2d(v, window)

    mx, my = mean(x), mean(y)
    xx, yy, xy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return float(
        ((2 * mx * my + c1) * (2 * xy + c2) / ((mx**2 + my**2 + c1) * (xx + yy + c2))).mean()
    )


def energy(picture: Tensor) -> float:
    return float(picture.diff(dim=0).square().mean() + picture.diff(dim=1).square().mean())


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


def restoration(data: Path, limit: int, grid: Path | None) -> None:
    teacher = build_retinaface(read_tensors(data / "weights" / "detection_mobilenet0.25_Final.pth"))
    backbone, embedder, autoencoder = (
        load_backbone(torch.device("cpu"), torch.float32),
        builtin.embedder(),
        builtin.autoencoder(),
    )
    paths = held_out_portraits(data, limit)
    astronaut = load(data / "images" / "astronaut.png")

    def face(picture: Tensor) -> Tensor:
        return (
            find_faces(
                picture[None], teacher, DetectOptions(confidence=0.5, choice=Choice("largest"))
            )
            .faces.crops[0]
            .clamp(0, 1)
        )

    sets = {
        f"{len(paths)} portraits, 512 px": [load(path, SIDE) for path in paths],
        f"{len(paths)} aligned faces, 512 px": [
            floats(bytes_of(face(load(path)))) for path in paths
        ],
        "astronaut.png": [astronaut],
        "astronaut.png, aligned face": [floats(bytes_of(face(astronaut)))],
    }
    rows = []
    print(
        "| pictures | degraded by | | PSNR dB | SSIM | gradient energy |\n|---|---|---|---|---|---|"
    )
    for name, pictures in sets.items():
        with torch.inference_mode():
            again = [
                (autoencoder(p.movedim(-1, 0)[None] * 2 - 1)[0] / 2 + 0.5)
                .clamp(0, 1)
                .movedim(0, -1)
                for p in pictures
            ]
        table(name, "nothing", "autoencoder alone", again, pictures)
        for kind, numbers in KINDS.items():
            pairs = [degraded(picture, numbers, seed) for seed, picture in enumerate(pictures)]
            poor = [large for _, large in pairs]
            crops = torch.stack(poor)
            with torch.inference_mode():
                prompts = torch.cat([embedder(crop[None].movedim(-1, 1)) for crop in crops])
                better = list(restore(crops, prompts, backbone).pictures)
            plain = [filtered(small, (SIDE, SIDE)) for small, _ in pairs]
            scores = {
                f: sum(psnr(p[f], r) for p, r in zip(plain, pictures, strict=True))
                for f in plain[0]
            }
            best = max(scores, key=lambda f: scores[f])
            table(name, kind, "degraded", poor, pictures)
            table(name, kind, f"best filter ({best})", [p[best] for p in plain], pictures)
            table(name, kind, "**built-in model**", better, pictures)
            if "aligned" in name:
                rows += [
                    torch.cat([a, b, c], 1)
                    for a, b, c in zip(poor[:3], better[:3], pictures[:3], strict=True)
                ]
    if grid:
        Image.fromarray(bytes_of(torch.cat(rows))).save(grid)


def energies(picture: Tensor) -> Tensor:
    """(H,W,3) -> (H,W): `energy` around each pixel, as the mean over 17 x 17 px."""
    x = picture.movedim(-1, 0)[None]
    steps = F.pad(x.diff(dim=3).square(), (0, 1)) + F.pad(x.diff(dim=2).square(), (0, 0, 0, 1))
    return F.avg_pool2d(steps.mean(1, keepdim=True), 17, 1, 8, count_include_pad=False)[0, 0]


def ceiling(data: Path, limit: int, share: float = 0.7) -> None:
    """The cost in PSNR of sharpness for a method that knows where it belongs.

    Grain is added until every place has `share` of the original's gradient energy: on the degraded
    picture, and on one from which noise and JPEG blocks were removed perfectly.
    """
    pictures = [load(path, SIDE) for path in held_out_portraits(data, limit)]
    tile = blue_noise(torch.Generator().manual_seed(0))[0, 0]
    grain = tile.repeat(SIDE // len(tile), SIDE // len(tile))[..., None]
    unit = energy(grain.expand(-1, -1, 3))
    print(
        "| pictures | degraded by | | PSNR dB | SSIM | gradient energy |\n|---|---|---|---|---|---|"
    )
    for kind, (blur, shrink, noise, quality) in KINDS.items():
        for what, numbers in (
            ("degraded", (blur, shrink, noise, quality)),
            ("a perfect denoiser", (blur, shrink, 0.0, 100)),
        ):
            poor = [degraded(picture, numbers, seed)[1] for seed, picture in enumerate(pictures)]
            table(f"{len(pictures)} portraits", kind, what, poor, pictures)
            grainy = []
            for x, right in zip(poor, pictures, strict=True):
                missing = (share * energies(right) - energies(x)).clamp(min=0)
                grainy.append((x + grain * (missing / unit).sqrt()[..., None]).clamp(0, 1))
            table(f"{len(pictures)} portraits", kind, f"{what}, and grain", grainy, pictures)


def table(
    pictures: str,
    kind: str,
    what: str,
    given: list[Tensor],
    right: list[Tensor],
) -> None:
    """Prints a row: the mean PSNR, SSIM and gradient energy of `given`.

    pictures: their name.
    kind: of degradation.
    what: the method.
    given: its results, each (H,W,3) in [0,1].
    right: the originals.
    """

    def mean(measure: Callable[[Tensor, Tensor], float]) -> float:
        return sum(measure(g, r) for g, r in zip(given, right, strict=True)) / len(given)

    shares = mean(lambda g, r: energy(g.clamp(0, 1)) / energy(r))
    print(
        f"| {pictures} | {kind} | {what} | {mean(psnr):.2f} | {mean(ssim):.3f} | {shares:.2f} |",
        flush=True,
    )


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
    parser.add_argument("parts", nargs="*", choices=["restoration", "ceiling", "detection", []])
    parser.add_argument(
        "--grid",
        type=Path,
        help="where to write degraded, restored and original faces side by side",
    )
    parser.add_argument("--limit", type=int, default=0, help="of the portraits, about so many")
    parser.add_argument(
        "--detector", type=Path, default=BUILTIN_DETECTOR, help="file of the detector (built-in)"
    )
    given = parser.parse_args()
    if "restoration" in given.parts or not given.parts:
        restoration(given.data, given.limit, given.grid)
    if "ceiling" in given.parts or not given.parts:
        ceiling(given.data, given.limit)
    if "detection" in given.parts or not given.parts:
        detection(given.data, given.limit, given.detector)


if __name__ == "__main__":
    main()
