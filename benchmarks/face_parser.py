"""Compares the built-in face parser with the masks that `benchmarks/face_masks.py` draws.

    python -m osdface_core.training prepare PICTURES FACES --detector DETECTOR
    python benchmarks/face_masks.py FACES MASKS                 # in MediaPipe's environment
    python -m benchmarks.face_parser cut DATA CLIPS             # faces in frames of the clips
    python benchmarks/face_masks.py CLIPS CLIP_MASKS --around
    python -m benchmarks.face_parser measure FACES MASKS CLIPS CLIP_MASKS [--sheet FILE]

PICTURES has the folders `portraits` and `old`. Only faces that training never saw are used: those
whose number is a multiple of 6. An ellipse, which needs no parser, stands beside it; another
parser's file (`--parser parsing_parsenet.pth`) too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from osdface_core.faces.choose import Choice
from osdface_core.faces.detect import DetectOptions
from osdface_core.faces.face_parser import SMALL_SIDE, build_parser, parse_faces
from osdface_core.faces.files import BUILTIN_PARSER
from osdface_core.faces.find import find_faces
from osdface_core.faces.paste import ELLIPSE_CENTRE, ELLIPSE_RADII
from osdface_core.faces.retinaface import build_retinaface
from osdface_core.pictures.geometry import translated
from osdface_core.pictures.resampling import warp
from osdface_core.training.config import read_config
from osdface_core.training.data import number_of
from osdface_core.training.face_parser import FACE_FROM, MaskedFaces, ParserConfig
from osdface_core.training.loop import grid
from osdface_core.weights.reading import read_tensors

CONFIG = Path(__file__).parents[1] / "osdface_core" / "training" / "configs" / "parser_builtin.yaml"
HOLD_OUT = 6
CROP = 512
EVERY = 6
HAND = 128

Method = Callable[[Tensor], Tensor]


def cut(data: Path, clips: Path) -> None:
    """Writes the largest face of every sixth frame of each clip, with as much around it."""
    detector = build_retinaface(
        read_tensors(data / "weights" / "detection_mobilenet0.25_Final.pth")
    )
    options = DetectOptions(confidence=0.5, choice=Choice("largest"), crop_size=CROP)
    clips.mkdir(parents=True, exist_ok=True)
    for path in sorted((data / "videos").glob("*.mkv")):
        with av.open(str(path)) as video:
            for n, frame in enumerate(video.decode(video=0)):
                if n % EVERY:
                    continue
                pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).float() / 255
                for face in find_faces(pixels[None], detector, options).faces.faces:
                    wide = translated(face.matrix, CROP / 2, CROP / 2)
                    shown = warp(pixels.movedim(-1, 0), wide, 2 * CROP, 2 * CROP)
                    Image.fromarray(
                        shown.clamp(0, 1).mul(255).round().byte().movedim(0, -1).numpy()
                    ).save(clips / f"{path.stem}_{n:03d}.png")


def methods(file: Path | None) -> dict[str, Method]:
    """Each gives where face is (256,256) in a picture (3,256,256) in [0,1]."""

    def parse(path: Path) -> Method:
        network = build_parser(read_tensors(path))

        def found(picture: Tensor) -> Tensor:
            face = parse_faces(picture.movedim(0, -1)[None], network)
            return F.interpolate(face[None], (SMALL_SIDE, SMALL_SIDE), mode="area")[0, 0] > 0.5

        return found

    places = (torch.arange(SMALL_SIDE) + 0.5) / SMALL_SIDE
    y, x = torch.meshgrid(places, places, indexing="ij")
    inside = ((x - ELLIPSE_CENTRE[0]) / ELLIPSE_RADII[0]) ** 2
    inside = inside + ((y - ELLIPSE_CENTRE[1]) / ELLIPSE_RADII[1]) ** 2 < 1
    found: dict[str, Method] = {
        "ellipse": lambda picture: inside,
        "**built-in parser**": parse(BUILTIN_PARSER),
    }
    return found | ({file.name: parse(file)} if file else {})


def row(
    name: str, how: str, method: Method, samples: list[tuple[Tensor, Tensor, Tensor]]
) -> list[Tensor]:
    """Prints a row, and returns what was found.

    samples: pictures (3,256,256), their faces and what covers faces (256,256).
    """
    shown, ious, taken = [], [], []
    for picture, face, covered in samples:
        found = method(picture)
        shown.append(found)
        ious.append(float((found & face).sum() / (found | face).sum()))
        if bool(covered.any()):
            taken.append(float((found & covered).sum() / covered.sum()))
    share = f"{sum(taken) / len(taken):.3f}" if taken else "-"
    print(
        f"| {name} | {len(samples)} | {how} | {sum(ious) / len(ious):.3f} | {min(ious):.3f} "
        f"| {share} |",
        flush=True,
    )
    return shown


def drawn_over(faces: Path, masks: Path, hand: float, thing: float) -> list[tuple[Tensor, ...]]:
    changes = [
        f"data.folder={faces}",
        f"masks={masks}",
        f"front.hand={hand}",
        f"front.thing={thing}",
    ]
    files = [
        path
        for path in sorted(faces.rglob("*.png"))
        if (n := number_of(path)) is not None and n % HOLD_OUT == 0
    ]
    samples = MaskedFaces(files, read_config(ParserConfig, CONFIG, changes), still=True)
    made = []
    for n in range(len(samples)):
        sample = samples[n]
        covered = sample["weights"][0] > 1 + samples.config.front.weight / 2
        made.append((sample["pictures"], sample["masks"][0] > 0.5, covered))
    return made


def in_clips(clips: Path, masks: Path) -> list[tuple[Tensor, ...]]:
    """The frames in which MediaPipe sees a hand within the crop."""
    made = []
    for path in sorted(masks.glob("*.png")):
        mask = torch.from_numpy(np.asarray(Image.open(path)).copy())
        if not bool((mask == HAND).any()):
            continue
        border = CROP // 2
        crop = Image.open(clips / path.name).crop((border, border, border + CROP, border + CROP))
        pixels = np.asarray(crop.resize((SMALL_SIDE, SMALL_SIDE), Image.Resampling.BOX)).copy()
        picture = torch.from_numpy(pixels).movedim(-1, 0).float() / 255
        made.append((picture, mask >= FACE_FROM, mask == HAND))
    return made


def measure(given: argparse.Namespace) -> None:
    sets: dict[str, list[tuple[Tensor, ...]]] = {}
    for kind in ("portraits", "old"):
        faces, masks = given.faces / kind, given.masks / kind
        sets[f"{kind}, nothing in front"] = drawn_over(faces, masks, 0, 0)
        sets[f"{kind}, a hand in front"] = drawn_over(faces, masks, 1, 0)
        sets[f"{kind}, a thing in front"] = drawn_over(faces, masks, 0, 1)
    sets["frames of clips with a hand"] = in_clips(given.clips, given.clip_masks)
    print("| faces | number | mask | mean IoU | least | of what is in front, taken for face |")
    print("|---|---|---|---|---|---|")
    rows = []
    for name, samples in sets.items():
        for how, method in methods(given.parser).items():
            found = row(name, how, method, samples)
            if "built-in" in how:
                step = max(1, len(samples) // 12)
                for shown in (found, [face for _, face, _ in samples]):
                    rows.append(
                        torch.stack(
                            [
                                picture * (0.3 + 0.7 * face)
                                for (picture, _, _), face in zip(samples, shown, strict=True)
                            ][::step][:12]
                        )
                    )
    if given.sheet:
        wide = max(len(r) for r in rows)
        rows = [torch.cat([r, torch.zeros(wide - len(r), *r.shape[1:])]) for r in rows]
        pixels = grid([F.avg_pool2d(r, 2) for r in rows]).clamp(0, 1).mul(255).byte()
        Image.fromarray(pixels.movedim(0, -1).numpy()).save(given.sheet)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ways = parser.add_subparsers(dest="way", required=True)
    way = ways.add_parser("cut", help="cut the faces out of the clips")
    way.add_argument("data", type=Path)
    way.add_argument("clips", type=Path)
    way = ways.add_parser("measure", help="print the table")
    for name in ("faces", "masks", "clips", "clip_masks"):
        way.add_argument(name, type=Path)
    way.add_argument("--parser", type=Path, help="another parser's file, to stand beside")
    way.add_argument("--sheet", type=Path, help="where to write what was found and the truth")
    given = parser.parse_args()
    if given.way == "cut":
        cut(given.data, given.clips)
    else:
        with torch.inference_mode():
            measure(given)


if __name__ == "__main__":
    main()
