"""Cuts aligned faces, as OSDFace's training data are, out of a folder of pictures."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from ..errors import OSDFaceError
from ..faces.detect import DetectOptions
from ..faces.detector_check import build_detector
from ..faces.find import find_faces
from ..weights.reading import read_tensors
from .data import picture_files

log = logging.getLogger(__name__)


def prepare(pictures: Path, faces: Path, detector: Path, size: int) -> None:
    """Writes NAME.png for a picture's first face, face1_NAME.png, ... for the others, each in the
    picture's subfolder. The number by which a picture is held out stays its name's last.

    A picture whose first face is written already is skipped.

    pictures: folder, searched with its subfolders.
    faces: folder to write to.
    detector: weights of a RetinaFace.
    size: pixels a side of a face.

    Raises OSDFaceError where no picture is found.
    """
    network = build_detector(read_tensors(detector))
    files = picture_files(pictures)
    if not files:
        raise OSDFaceError(f"{pictures} holds no pictures: give a folder of them.")
    count = 0
    for number, path in enumerate(files, 1):
        place = faces / path.parent.relative_to(pictures)
        if (place / f"{path.stem}.png").exists():
            continue
        try:
            with Image.open(path) as image:
                pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB")).copy()
        except OSError as error:
            log.warning("%s is skipped: %s", path, error)
            continue
        crops = find_faces(
            torch.from_numpy(pixels).float()[None] / 255, network, DetectOptions(crop_size=size)
        ).faces.crops
        place.mkdir(parents=True, exist_ok=True)
        for i, crop in enumerate(crops):
            name = f"{path.stem}.png" if i == 0 else f"face{i}_{path.stem}.png"
            Image.fromarray(crop.clamp(0, 1).mul(255).round().byte().numpy()).save(place / name)
        count += len(crops)
        if not len(crops):
            log.warning("%s shows no face", path)
        if number % 100 == 0 or number == len(files):
            log.info("%d of %d pictures, %d faces", number, len(files), count)
