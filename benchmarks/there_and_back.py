"""Cuts a face out and pastes it back unchanged, beside OpenCV's cubic warp with exact matrices.

    python -m benchmarks.there_and_back PORTRAIT.jpg ...

Prints PSNR inside the mask, in dB: a row for each size of the face's square and scale at which it
is pasted, a column for each picture, with OpenCV's, then ours.
"""

from __future__ import annotations

import sys

import cv2
import numpy as np
from PIL import Image

from tests.test_paste import placed, there_and_back

SIZES = (
    (128, 1),
    (256, 1),
    (400, 1),
    (500, 1),
    (700, 1),
    (1000, 1),
    (128, 0.5),
    (300, 0.5),
    (900, 0.5),
    (128, 1.5),
    (300, 1.5),
    (128, 4),
)
ANGLES = (0, 7, 20, -50)


def main() -> None:
    cv2.setNumThreads(2)
    pictures = [
        np.asarray(Image.open(path).convert("RGB")).astype(np.float32) / 255
        for path in sys.argv[1:]
    ]
    worst = np.inf
    for side, scale in SIZES:
        cells = []
        for picture in pictures:
            height, width = picture.shape[:2]
            results = [
                there_and_back(
                    picture, placed(side, angle, (width / 2 + 0.3, height / 2 - 0.1)), scale
                )
                for angle in ANGLES
            ]
            worst = min(worst, *(ours - theirs for ours, theirs, _ in results))
            cells.append("{1:.1f} {0:.1f}".format(*results[0]))
        print(f"{side:5} px, {scale}x | " + " | ".join(cells), flush=True)
    print(f"ours less OpenCV's at {len(ANGLES)} angles: {worst:.2f} dB at the least")


if __name__ == "__main__":
    main()
