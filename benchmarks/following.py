"""How long it takes to follow, number and choose the faces of long videos and of crowds, without
finding them: `python -m benchmarks.following`.
"""

from __future__ import annotations

import random
import time

import torch

from osdface_core.faces.detect import Detection, DetectOptions
from osdface_core.faces.find import place_faces
from osdface_core.faces.track import THUMBNAIL


def crowd(frames: int, faces: int) -> list[list[Detection]]:
    """Faces that drift over a picture of 1920 x 1080 px and are missed in one of seven frames."""
    numbers = random.Random(0)
    places = [(numbers.uniform(0, 1800), numbers.uniform(0, 960)) for _ in range(faces)]
    found = []
    for frame in range(frames):
        seen = [(x + 20 * (frame % 50) / 50, y) for x, y in places if numbers.random() < 6 / 7]
        found.append(
            [
                Detection(
                    (x, y, x + 60, y + 80),
                    (
                        (x + 18, y + 30),
                        (x + 42, y + 30),
                        (x + 30, y + 45),
                        (x + 21, y + 60),
                        (x + 39, y + 60),
                    ),
                    0.99,
                )
                for x, y in seen
            ]
        )
    return found


def main() -> None:
    print("frames, faces in each: seconds")
    for frames, faces in (
        (5000, 1),
        (10000, 1),
        (20000, 1),
        (40000, 1),
        (20, 108),
        (20, 216),
        (20, 432),
        (20, 864),
    ):
        found = crowd(frames, faces)
        still = torch.rand(1, 3, THUMBNAIL, THUMBNAIL, generator=torch.Generator().manual_seed(0))
        small = still.repeat(frames, 1, 1, 1)
        started = time.perf_counter()
        place_faces(found, small, 1920, 1080, DetectOptions(smoothing=0.5))
        print(f"{frames:6}, {faces:4}: {time.perf_counter() - started:.1f}", flush=True)


if __name__ == "__main__":
    main()
