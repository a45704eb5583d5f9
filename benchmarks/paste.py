"""Compares pasting with facexlib's FaceRestoreHelper: time, and fidelity of an untouched crop.

    python -m benchmarks.paste PORTRAIT.jpg [--mask box | parsing] [--threads 2]

Both get the same faces in one run. facexlib needs numba, filterpy and OpenCV. With --mask parsing
both get the same ready-made label map: the network is left out, so that only pasting is timed.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from facexlib.utils.face_restoration_helper import FaceRestoreHelper

from osdface_core.faces.align import crop_faces, similarity
from osdface_core.faces.face import Face, Faces
from osdface_core.faces.face_parser import face_probability
from osdface_core.faces.paste import PasteOptions, paste

TEMPLATE = np.array(
    [
        [192.98138, 239.94708],
        [318.90277, 240.1936],
        [256.63416, 314.01935],
        [201.26117, 371.41043],
        [313.08905, 371.15118],
    ]
)
FRAMES = {"1080p": (1920, 1080), "4K": (3840, 2160)}
COUNTS = (1, 6, 20)


def landmarks_of(count: int, width: int, height: int) -> list[np.ndarray]:
    """FFHQ's five points for `count` faces on a grid, each turned a little.

    Pixel centres are at whole numbers.
    """
    columns = math.ceil(math.sqrt(count * width / height))
    rows = math.ceil(count / columns)
    side = 0.8 * min(width / columns, height / rows)
    faces = []
    for i in range(count):
        x, y = (i % columns + 0.5) * width / columns, (i // columns + 0.5) * height / rows
        turn = math.radians(-12 + 24 * i / max(count - 1, 1))
        matrix = (
            side
            / 512
            * np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        )
        faces.append((TEMPLATE - 256) @ matrix.T + (x, y))
    return faces


def labels() -> torch.Tensor:
    """Label scores (1,19,512,512) of a face: an ellipse of skin."""
    down, across = torch.meshgrid(torch.arange(512), torch.arange(512), indexing="ij")
    face = ((across - 256) / 190) ** 2 + ((down - 270) / 225) ** 2 < 1
    return torch.nn.functional.one_hot(face.long(), 19).movedim(-1, 0)[None] * 20.0


SCORES = labels()


def theirs(
    image: np.ndarray, landmarks: list[np.ndarray], mask: str
) -> tuple[np.ndarray, float, float]:
    helper = FaceRestoreHelper.__new__(FaceRestoreHelper)
    helper.upscale_factor, helper.face_size, helper.face_template = 1, (512, 512), TEMPLATE
    helper.use_parse, helper.pad_blur = mask == "parsing", False
    helper.face_parse, helper.device = lambda picture: (SCORES,), "cpu"
    helper.input_img, helper.all_landmarks_5 = image, landmarks
    (
        helper.affine_matrices,
        helper.inverse_affine_matrices,
        helper.cropped_faces,
        helper.restored_faces,
    ) = [], [], [], []
    start = time.perf_counter()
    helper.align_warp_face()
    cut = time.perf_counter() - start
    start = time.perf_counter()
    helper.get_inverse_affine()
    for crop in helper.cropped_faces:
        helper.add_restored_face(crop)
    result = helper.paste_faces_to_input_image()
    return result, cut, time.perf_counter() - start


def ours(
    image: torch.Tensor, landmarks: list[np.ndarray], mask_type: str
) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    start = time.perf_counter()
    points = [tuple((float(x) + 0.5, float(y) + 0.5) for x, y in face) for face in landmarks]
    faces = tuple(
        Face(0, (0, 0, 1, 1), p, 1.0, i, similarity(p, 512)) for i, p in enumerate(points)
    )
    crops = crop_faces(image, [0] * len(faces), [face.matrix for face in faces], 512)
    found = Faces(faces, crops, 1, image.shape[1], image.shape[2])
    cut = time.perf_counter() - start
    start = time.perf_counter()
    parse = lambda crops: face_probability(SCORES).expand(len(crops), -1, -1)  # noqa: E731
    out, mask = paste(
        image, found, crops, PasteOptions(mask_type=mask_type), skip_unchanged=False, parser=parse
    )
    return out, mask, cut, time.perf_counter() - start


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((one - other) ** 2)))


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument(
        "portrait", type=Path, help="a sharp picture that the frames are tiled from"
    )
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--mask", choices=("box", "parsing"), default="parsing")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    cv2.setNumThreads(given.threads)
    tile = cv2.imread(str(given.portrait))
    print(
        f"{'frame':6} {'faces':>5} {'px':>5} | {'cut ms':>15} | {'paste ms':>15} {'times':>6} | "
        f"{'PSNR dB':>13}   (facexlib, ours)"
    )
    for name, (width, height) in FRAMES.items():
        image = np.tile(
            tile, (math.ceil(height / tile.shape[0]), math.ceil(width / tile.shape[1]), 1)
        )[:height, :width].copy()
        tensor = torch.from_numpy(image[..., ::-1].copy()).float()[None] / 255
        for count in COUNTS:
            faces = landmarks_of(count, width, height)
            one = [theirs(image, [face.copy() for face in faces], given.mask) for _ in range(3)]
            other = [ours(tensor, faces, given.mask) for _ in range(3)]
            inside = other[0][1][0].numpy() > 0.999
            truth = image[inside] / 255
            quality = (
                psnr(one[0][0][inside] / 255, truth),
                psnr(other[0][0][0].numpy()[inside][:, ::-1], truth),
            )
            cuts = min(r[1] for r in one) * 1e3, min(r[2] for r in other) * 1e3
            pastes = min(r[2] for r in one) * 1e3, min(r[3] for r in other) * 1e3
            side = float(
                np.linalg.norm(faces[0][1] - faces[0][0])
                / np.linalg.norm(TEMPLATE[1] - TEMPLATE[0])
                * 512
            )
            print(
                f"{name:6} {count:5} {side:5.0f} | {cuts[0]:7.0f} {cuts[1]:7.0f} | "
                f"{pastes[0]:7.0f} {pastes[1]:7.0f} "
                f"{pastes[0] / pastes[1]:5.1f}x | {quality[0]:6.1f} {quality[1]:6.1f}"
            )


if __name__ == "__main__":
    main()
