"""Compares restored faces by measures that eyes agree with.

    python -m benchmarks.measures FOLDER                                   # once: the networks
    python -m benchmarks.quality FOLDER made DATA [--sheet FILE] [--limit N] [--each FILE]
    python -m benchmarks.quality FOLDER old DATA [--sheet FILE] [--limit N]
    python -m benchmarks.quality FOLDER folders TRUTH NAME=DIR [NAME=DIR ...]

`made` degrades held-out faces and restores them by the built-in model; DATA is the folder with
images/ and weights/. Bicubic enlargement and Real-ESRGAN x4plus stand beside it; the latter takes
nearly all of the time, and --no-peer leaves it out. --each writes a CSV file with a line for each
face beside the means that are printed.

`old` restores held-out old portraits as they are. There is no truth to them: NIQE alone is given,
and the distance of the identities before and after.

`folders` takes pictures that are there: the truth, and for each method (the degraded pictures may
be one of them) a folder with results of the same names and sizes, such as

    python -m osdface_core restore --aligned LQ RESULTS

Each measure is given for the whole crop and, in columns that end in "face", for the square from
brows to chin of a crop that is aligned as FFHQ is. Higher is better for PSNR and SSIM, lower for
all others: LPIPS over AlexNet (A) and over VGG16 (V), DISTS, NIQE, and the distance of dlib's
identities, of which one person's are less than 0.6 apart. The weave is that of a decoder which
draws blocks of 8 x 8 px, in dB: 0.5 to 1 for photographs, from about 5 on to be seen in walls.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.builtin import bytes_of, floats, held_out, held_out_portraits, load
from benchmarks.measures import PEER, niqe
from benchmarks.measures import load as load_measures
from osdface_core.diffusers.builtin import load_backbone
from osdface_core.faces.choose import Choice
from osdface_core.faces.detect import DetectOptions
from osdface_core.faces.find import find_faces
from osdface_core.faces.retinaface import build_retinaface
from osdface_core.osdface import builtin
from osdface_core.osdface.restore import restore
from osdface_core.training.losses import DlibFace
from osdface_core.weights.reading import read_tensors

# Results by a small picture and the same enlarged, both (H,W,3) in [0,1].
Method = Callable[[Tensor, Tensor], Tensor]
# Name: blur in pixels, factor of shrinking, noise in 255ths, JPEG quality.
KINDS = {
    "8x: blur 3, noise 15, JPEG 50": (3.0, 8, 15.0, 50),
    "4x: blur 2, noise 8, JPEG 70": (2.0, 4, 8.0, 70),
}
# What the undegraded faces are called.
NOTHING = "nothing"


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


def weave(picture: Tensor) -> float:
    """How far what repeats every 8 px stands out of a picture (H,W,3) in [0,1], in dB.

    It is the mean, over the lines that such a repeat has in the spectrum, of the line's power over
    the median of its neighbours', in the half of the windows of 64 px in which rows differ least.
    """
    grey = picture.clamp(0, 1).mean(-1) * 255
    windows = grey.unfold(0, 64, 32).unfold(1, 64, 32).reshape(-1, 64, 64)
    unrest = windows.diff(dim=1).square().mean((1, 2))
    calm = windows[unrest <= unrest.median()]
    taps = torch.hann_window(64)
    calm = (calm - calm.mean((1, 2), keepdim=True)) * torch.outer(taps, taps)
    # Nothing stands out of a picture of one colour.
    power = torch.fft.fft2(calm).abs().square().mean(0).clamp(min=1e-6)
    around = torch.stack(
        [power.roll((dy, dx), (0, 1)) for dy in (-3, 0, 3) for dx in (-3, 0, 3) if dy or dx]
    )
    ratio = 10 * (power / around.median(0).values).log10()[::8, ::8].flatten()
    return float(ratio[1:].mean())


def figures(given: Tensor, right: Tensor, networks: dict[str, Any]) -> dict[str, float]:
    """Every measure of a picture against the truth, both (H,W,3) in [0,1]."""
    given = floats(bytes_of(given))
    x, y = (part.movedim(-1, 0)[None] for part in (given, right))
    first, second = (networks["identity"].of_crops(part) for part in (x, y))
    left, top, side = (round(part * len(right)) for part in DlibFace.SQUARE)
    found = {}
    for name, part in (("", slice(None)), (" face", None)):
        rows, columns = (part, part) if part else (slice(top, top + side), slice(left, left + side))
        a, b = given[rows, columns], right[rows, columns]
        u, v = x[..., rows, columns], y[..., rows, columns]
        found |= {f"PSNR{name}": psnr(a, b), f"SSIM{name}": ssim(a, b)}
        for key, label in (("lpips_alex", "LPIPS A"), ("lpips_vgg", "LPIPS V"), ("dists", "DISTS")):
            found[label + name] = float(networks[key](u, v))
    return found | {
        "NIQE": niqe(given, networks["niqe"]),
        "weave": weave(given),
        "identity": float((first - second).norm()),
    }


def real_esrgan(folder: Path) -> Method:
    """Four times larger, then to the size that is wanted."""
    from spandrel import ModelLoader

    found = ModelLoader().load_from_state_dict(dict(read_tensors(folder / PEER)))
    network = found.model.eval()

    def enlarge(small: Tensor, large: Tensor) -> Tensor:
        made = network(small.movedim(-1, 0)[None])
        size = large.shape[:2]
        if made.shape[-2:] != size:
            made = F.interpolate(made, size, mode="bicubic", antialias=True)
        return made[0].movedim(0, -1)

    return enlarge


def builtin_model() -> Method:
    backbone = load_backbone(torch.device("cpu"), torch.float32)
    embedder = builtin.embedder()

    def restored(small: Tensor, large: Tensor) -> Tensor:
        prompts = embedder(large[None].movedim(-1, 1))
        return restore(large[None], prompts, backbone).pictures[0]

    return restored


def methods_of(given: argparse.Namespace, nothing: str) -> dict[str, Method]:
    """What is compared, by name; `nothing` is the name of the picture that nothing restored."""
    peers = {} if given.no_peer else {"Real-ESRGAN x4plus": real_esrgan(given.measures)}
    return {nothing: lambda small, large: large, **peers, "**built-in model**": builtin_model()}


def faces_of(data: Path, limit: int) -> list[Tensor]:
    """Aligned crops (512,512,3) of held-out portraits."""
    detector = build_retinaface(
        read_tensors(data / "weights" / "detection_mobilenet0.25_Final.pth")
    )
    options = DetectOptions(confidence=0.5, choice=Choice("largest"))
    crops = (
        find_faces(load(path)[None], detector, options).faces.crops[0]
        for path in held_out_portraits(data, limit)
    )
    return [floats(bytes_of(crop)) for crop in crops]


class Table:
    """Prints means; `each`, an open file, gets the figures of every picture as CSV."""

    def __init__(self, networks: dict[str, Any], each: TextIO | None = None) -> None:
        self.networks, self.begun = networks, False
        self.lines = csv.writer(each) if each else None

    def row(self, labels: list[str], pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Prints the means of a method's results and truths."""
        each = [figures(given, right, self.networks) for given, right in pairs]
        if not self.begun:
            head = ["degraded by", "", *each[0]]
            print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|", flush=True)
            self.begun = True
            if self.lines:
                self.lines.writerow(["degraded by", "method", "face", *each[0]])
        if self.lines:
            self.lines.writerows([*labels, i, *one.values()] for i, one in enumerate(each))
        means = (sum(one[key] for one in each) / len(each) for key in each[0])
        cells = (f"{mean:.2f}" if mean > 1 else f"{mean:.3f}" for mean in means)
        print(f"| {' | '.join([*labels, *cells])} |", flush=True)


@torch.inference_mode()
def made(table: Table, given: argparse.Namespace) -> None:
    faces = faces_of(given.data, given.limit)
    methods = methods_of(given, "degraded, bicubic")
    rows: list[Tensor] = []
    for kind, how in {**KINDS, NOTHING: None}.items():
        pairs = [
            degraded(face, how, seed) if how else (face, face) for seed, face in enumerate(faces)
        ]
        shown = [faces]
        for name, method in methods.items():
            if not how and name != "**built-in model**":
                continue
            results = [method(*pair) for pair in pairs]
            table.row([kind, name], list(zip(results, faces, strict=True)))
            shown.append(results)
        if how:
            rows += [torch.cat([*column]) for column in zip(*shown, strict=True)][:6]
    if given.sheet:
        Image.fromarray(bytes_of(torch.cat(rows, 1))).save(given.sheet)


@torch.inference_mode()
def old(table: Table, given: argparse.Namespace) -> None:
    """Prints NIQE of aligned old faces as they are and as each method restores them."""
    detector = build_retinaface(
        read_tensors(given.data / "weights" / "detection_mobilenet0.25_Final.pth")
    )
    options = DetectOptions(confidence=0.5, choice=Choice("largest"))
    files = held_out(given.data / "images" / "old", 0)
    found = (find_faces(load(path)[None], detector, options).faces for path in files)
    faces = [x.crops[0] for x in found if len(x.crops)][: given.limit or None]
    methods = methods_of(given, "as they are")
    networks, columns = table.networks, []
    print(f"| {len(faces)} old faces | NIQE | identity |\n|---|---|---|", flush=True)
    for name, method in methods.items():
        # Old crops have about half of the detail that a crop has room for.
        results = [method(half_of(face), face) for face in faces]
        natural = sum(niqe(floats(bytes_of(x)), networks["niqe"]) for x in results) / len(results)
        who = [
            networks["identity"].of_crops(torch.stack(x).movedim(-1, 1)) for x in (faces, results)
        ]
        moved = float((who[0] - who[1]).norm(dim=1).mean())
        print(f"| {name} | {natural:.2f} | {moved:.3f} |", flush=True)
        columns.append(torch.cat(results[:10], 1))
    if given.sheet:
        Image.fromarray(bytes_of(torch.cat(columns))).save(given.sheet)


def half_of(picture: Tensor) -> Tensor:
    """(H,W,3) at half the size."""
    return F.avg_pool2d(picture.movedim(-1, 0)[None], 2)[0].movedim(0, -1)


def pictures_in(folder: Path) -> dict[str, Path]:
    """Its pictures by their names without endings."""
    kinds = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in kinds}


@torch.inference_mode()
def folders(table: Table, given: argparse.Namespace) -> None:
    truth = pictures_in(given.truth)
    for method in given.results:
        name, _, folder = method.partition("=")
        found = pictures_in(Path(folder))
        if missing := sorted(truth.keys() - found.keys()):
            raise SystemExit(f"{folder} lacks {', '.join(missing[:5])}: give a result for each.")
        pairs = []
        for stem, path in truth.items():
            right, result = load(path), load(found[stem])
            if result.shape != right.shape:
                size = right.shape[1::-1]
                result = floats(cv2.resize(bytes_of(result), size, interpolation=cv2.INTER_CUBIC))
            pairs.append((result, right))
        table.row([f"{len(pairs)} pictures", name], pairs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("measures", type=Path, help="folder that benchmarks.measures wrote")
    ways = parser.add_subparsers(required=True)
    for name, run in (("made", made), ("old", old)):
        way = ways.add_parser(name)
        way.add_argument("data", type=Path)
        way.add_argument("--sheet", type=Path, help="picture to write: truth, degraded, methods")
        way.add_argument("--limit", type=int, default=0, help="faces, 0 for all")
        way.add_argument("--no-peer", action="store_true", help="leaves Real-ESRGAN out")
        way.set_defaults(run=run)
        if run is made:
            way.add_argument("--each", type=argparse.FileType("w"), help="CSV file to write")
    way = ways.add_parser("folders")
    way.add_argument("truth", type=Path)
    way.add_argument("results", nargs="+", metavar="NAME=DIR")
    way.set_defaults(run=folders)
    given = parser.parse_args()
    given.run(Table(load_measures(given.measures), getattr(given, "each", None)), given)


if __name__ == "__main__":
    main()
