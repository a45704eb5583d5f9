"""How long videos and crowds take, and how steady crops are where frames come one by one:
`python -m benchmarks.following [follow] [any_angle] [stream]`.

First how long it takes to follow, number and choose faces that are found already; then to find
those of one picture at any angle, by the built-in detector on one thread, with the most memory that
the process held. There the seconds are the processor's own, which other work on the machine does
not lengthen much. Last the jitter of a face's crop, in pixels a frame, and its lag, in frames, on
60 frames of a known motion: of a whole film, and of one whose frames are seen one by one.
"""

from __future__ import annotations

import random
import sys
import time

import numpy as np
import psutil
import torch
from torch import Tensor

from osdface_core.faces.detect import Detection, DetectOptions, detect
from osdface_core.faces.files import BUILTIN_DETECTOR
from osdface_core.faces.find import find_faces, place_faces
from osdface_core.faces.retinaface import build_retinaface
from osdface_core.faces.stream import FaceStream
from osdface_core.faces.track import THUMBNAIL
from osdface_core.weights.reading import read_tensors
from tests import photographs
from tests.test_track import film, jitter_and_lag


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


def following() -> None:
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


def mosaic(side: int) -> Tensor:
    """(1,H,W,3): a group of six faces, 480 x 270 px, `side` times across and down."""
    group = np.asarray(photographs.group().resize((480, 270)), np.float32) / 255
    return torch.from_numpy(np.tile(group, (side, side, 1)))[None]


def at_any_angle() -> None:
    torch.set_num_threads(1)
    network = build_retinaface(read_tensors(BUILTIN_DETECTOR))
    print("faces in one picture, found: seconds, milliseconds a face, GiB at most")
    for side in (4, 8, 12, 16, 24):
        picture = mosaic(side)
        started = time.process_time()
        found = detect(picture, network, DetectOptions(any_angle=True))[0]
        spent = time.process_time() - started
        print(
            f"{6 * side**2:5}, {len(found):5}: {spent:.1f}, {1000 * spent / len(found):.0f}, "
            f"{most_memory():.1f}",
            flush=True,
        )


def stream() -> None:
    network = build_retinaface(read_tensors(BUILTIN_DETECTOR))
    face = photographs.astronaut().convert("RGB").crop((100, 0, 356, 256)).resize((1024, 1024))
    images = film(torch.from_numpy(np.array(face))[None] / 255, 60)
    print("smoothing: jitter and lag of the whole film; as frames come")
    for smoothing in (0.0, 0.5, 0.8):
        options = DetectOptions(smoothing=smoothing)
        coming = FaceStream(options)
        found = [coming.find(image[None], network).faces.faces for image in images]
        one_by_one = [faces[0].matrix for faces in found]
        whole = [face.matrix for face in find_faces(images, network, options).faces.faces]
        figures = "; ".join(
            "{:.2f} {:.2f}".format(*jitter_and_lag(matrices)) for matrices in (whole, one_by_one)
        )
        print(f"{smoothing}: {figures}", flush=True)


def most_memory() -> float:
    """The most memory in GiB that this process has held."""
    held = psutil.Process().memory_info()
    if hasattr(held, "peak_wset"):
        return float(held.peak_wset) / 2**30
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**30 if sys.platform == "darwin" else 2**20)


def main() -> None:
    parts = {"follow": following, "any_angle": at_any_angle, "stream": stream}
    for name in sys.argv[1:] or parts:
        parts[name]()


if __name__ == "__main__":
    main()
