"""Photographs for tests, made of scikit-image's (public domain or CC0) and of nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image, ImageEnhance, ImageOps

from osdface_core.faces.files import BUILTIN_DETECTOR, SMALL_DETECTOR
from osdface_core.weights.reading import read_tensors

# Of the astronaut's picture: head and shoulders.
HEAD = (116, 8, 344, 200)


def astronaut() -> Image.Image:
    """512 x 512, one frontal face."""
    return Image.fromarray(skimage.data.astronaut())


def camera() -> Image.Image:
    """512 x 512, grey, one small face in profile."""
    return Image.fromarray(skimage.data.camera())


def group() -> Image.Image:
    """1920 x 1080, six faces in two rows of three, each with its own light, size and place."""
    picture = Image.new("RGB", (1920, 1080))
    for i in range(6):
        left, top, right, bottom = HEAD
        step = 3 * i
        part = astronaut().crop((left - step, top, right + step, bottom))
        part = ImageOps.mirror(part) if i % 2 else part
        part = ImageEnhance.Color(part).enhance(0.7 + 0.1 * i)
        part = ImageEnhance.Brightness(part).enhance(0.94 + 0.03 * i)
        part = ImageOps.fit(part, (640, 540), Image.Resampling.BICUBIC)
        picture.paste(part, (i % 3 * 640, i // 3 * 540))
    return picture


def portrait() -> Image.Image:
    """1024 x 1024, a smooth close-up of one face."""
    left, top = 116, 0
    part = astronaut().crop((left, top, left + 220, top + 220))
    return part.resize((1024, 1024), Image.Resampling.BICUBIC)


def eye() -> Image.Image:
    """1024 x 1024, the back of an eye: a photograph of that size that is sharp to the pixel."""
    return Image.fromarray(skimage.data.retina()[190:1214, 190:1214])


def write(folder: Path) -> Path:
    """All of them as PNG files in the folder, under their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for make in (astronaut, camera, group, portrait):
        make().save(folder / f"{make.__name__}.png")
    return folder


def write_detector(folder: Path) -> Path:
    """The built-in face detector as a file under the name of facexlib's small one."""
    path = folder / SMALL_DETECTOR.name
    tensors = read_tensors(BUILTIN_DETECTOR)
    torch.save({name: tensor.float() for name, tensor in tensors.items()}, path)
    return path


def pixels(image: Image.Image) -> np.ndarray:
    """(H,W,3) bytes."""
    return np.asarray(image.convert("RGB")).copy()
