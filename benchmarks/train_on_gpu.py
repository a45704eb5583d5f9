"""Gives what is left of a GPU's time to the built-in model: trains it on from the file in the pack.

    python -m benchmarks.train_on_gpu pack FACES MEASURES [--out .gpu_training]
    python -m benchmarks.train_on_gpu train [--seconds 400] [--kit DIR] OUT [key=value ...]

`pack` puts all that a machine which reaches nothing must be given into one ignored folder, under
24 MB: the aligned portraits that training may see (FACES is the folder that `prepare` wrote, 512 px
a side) as WebP, and VGG16 of `python -m benchmarks.measures MEASURES` at 8 bits.

`train` measures how many steps a second the card takes, plans as many as fit in the time, so that
the learning rate falls to its end within it, and writes OUT/unet.safetensors, autoencoder and vre,
which replace the files in osdface_core/osdface/builtin. OUT/samples has pictures of held-out faces.
The losses are LPIPS and DISTS over VGG16 with a discriminator of patches; LPIPS over AlexNet, which
is not among them, is what `python -m benchmarks.quality` may judge by. Further arguments change the
configuration: `run.cpu=true run.batch=1` tries all of it without a card.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.measures import FILES
from osdface_core.training.data import number_of, picture_files
from osdface_core.training.loop import for_file
from osdface_core.weights.reading import read_tensors

ROOT = Path(__file__).resolve().parents[1]
BUILTIN = ROOT / "osdface_core" / "osdface" / "builtin"
CONFIG = ROOT / "osdface_core" / "training" / "configs" / "stage2_builtin.yaml"
HOLD_OUT = 6
# WebP's, of pictures that are degraded before anything sees them.
QUALITY = 88
LIMIT = 24_000_000
# A run to measure the speed: the first steps choose convolutions and are not counted.
FIRST, PROBED = 20, 60
# What the run's start, its last checkpoint and the pictures take of the time.
SPARE = 30
NAMES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "autoencoder": "autoencoder.safetensors",
    "vre": "osdface_vre.safetensors",
}


def in_eight_bits(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as bytes from -127 to 127 and, under the name with `.scale`, each output's step."""
    made = {}
    for name, t in tensors.items():
        if t.ndim < 2:
            made[name] = t.half()
            continue
        scale = t.float().flatten(1).abs().amax(1).clamp(min=1e-12) / 127
        wide = scale.view(-1, *[1] * (t.ndim - 1))
        made[name] = (t.float() / wide).round().to(torch.int8)
        made[f"{name}.scale"] = scale
    return made


def from_eight_bits(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    made = {}
    for name, t in tensors.items():
        if name.endswith(".scale"):
            continue
        scale = tensors.get(f"{name}.scale")
        wide = 1 if scale is None else scale.view(-1, *[1] * (t.ndim - 1))
        made[name] = t.float() * wide
    return made


def pack(faces: Path, measures: Path, out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    (out / "faces").mkdir(parents=True)
    seen = [path for path in picture_files(faces) if (number_of(path) or 0) % HOLD_OUT]
    shown = [path for path in picture_files(faces) if number_of(path) in (6, 12)]
    for path in (*seen, *shown):
        name = "_".join(path.relative_to(faces).with_suffix(".webp").parts)
        with Image.open(path) as face:
            face.convert("RGB").save(out / "faces" / name, quality=QUALITY, method=6)
    for name in {*FILES["lpips_vgg"], *FILES["dists"]}:
        save_file(in_eight_bits(read_tensors(measures / name)), out / name)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {len(seen)} faces, {size / 1e6:.1f} MB")
    if size > LIMIT:
        raise SystemExit(f"more than the {LIMIT / 1e6:.0f} MB that may travel")


def run(folder: Path, kit: Path, files: Path, steps: int, changes: list[str]) -> None:
    lpips, dists = ([str(files / name) for name in FILES[way]] for way in ("lpips_vgg", "dists"))
    command = [sys.executable, "-m", "osdface_core.training", "stage2", "--config", str(CONFIG)]
    command += [
        f"run.folder={folder}",
        f"run.steps={steps}",
        "run.cpu=false",
        "run.threads=0",
        "run.workers=12",
        "run.batch=24",
        "run.samples=4",
        "run.checkpoint_every=100000",
        f"data.folder={kit / 'faces'}",
        f"vre={BUILTIN / 'vre.safetensors'}",
        f"unet.weights={BUILTIN / 'unet.safetensors'}",
        f"vae.weights={BUILTIN / 'autoencoder.safetensors'}",
        f"losses.lpips.files=[{','.join(lpips)}]",
        f"losses.ea_dists.files=[{','.join(dists)}]",
        "losses.mse=10",
        "losses.charbonnier=4",
        "losses.tones=500",
        "losses.weave=6000",
        "losses.lpips.weight=0.4",
        "losses.ea_dists.weight=0.3",
        "losses.gan.weight=0.01",
        "losses.gan.discriminator=patch",
        "losses.gan.channels=48",
        "losses.gan.loss=hinge",
        "discriminator_optimiser={learning_rate: 4.0e-4, betas: [0.5, 0.98]}",
        "optimiser.end=0.01",
        *changes,
    ]
    if code := subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise SystemExit(code)


def train(out: Path, kit: Path, seconds: float, changes: list[str]) -> None:
    begun = time.monotonic()
    if not (kit / "faces").is_dir():
        raise SystemExit(f"{kit} holds no faces: fill it by `train_on_gpu pack FACES MEASURES`.")
    out.mkdir(parents=True, exist_ok=True)
    files, work = out / "measures", out / "run"
    shutil.rmtree(work, ignore_errors=True)
    files.mkdir(exist_ok=True)
    for path in kit.glob("*.safetensors"):
        save_file(from_eight_bits(read_tensors(path)), files / path.name)
    # A start takes its time: what the longer of two runs takes more is that of its further steps.
    took = []
    for steps in (FIRST, PROBED):
        at = time.monotonic()
        run(work, kit, files, steps, [*changes, "run.samples=0"])
        took.append(time.monotonic() - at)
        shutil.rmtree(work)
    step = max(took[1] - took[0], 1e-3) / (PROBED - FIRST)
    left = seconds - (time.monotonic() - begun) - (took[0] - FIRST * step) - SPARE
    steps = int(left / step)
    print(f"{1 / step:.2f} steps a second: {steps} steps in {left:.0f} s", flush=True)
    if steps < PROBED:
        raise SystemExit(f"too little time for {PROBED} steps: give more --seconds")
    run(work, kit, files, steps, changes)
    for name, place in NAMES.items():
        half = for_file(read_tensors(work / place), half=True)
        save_file(half, out / f"{name}.safetensors")
    if (work / "samples").is_dir():
        shutil.copytree(work / "samples", out / "samples", dirs_exist_ok=True)
    shutil.rmtree(work)
    shutil.rmtree(files)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ways = parser.add_subparsers(dest="way", required=True)
    way = ways.add_parser("pack", help="fill the folder that travels")
    way.add_argument("faces", type=Path)
    way.add_argument("measures", type=Path)
    way.add_argument("--out", type=Path, default=ROOT / ".gpu_training")
    way = ways.add_parser("train", help="train within a time")
    way.add_argument("out", type=Path)
    way.add_argument("changes", nargs="*", metavar="key=value")
    way.add_argument("--kit", type=Path, default=ROOT / ".gpu_training")
    way.add_argument("--seconds", type=float, default=400)
    given = parser.parse_args()
    if given.way == "pack":
        pack(given.faces, given.measures, given.out)
    else:
        train(given.out.resolve(), given.kit.resolve(), given.seconds, given.changes)


if __name__ == "__main__":
    main()
