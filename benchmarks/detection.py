"""Compares detection with facexlib's: angles, agreement, time, and steadiness of crops in a video.

    python -m benchmarks.detection DATA [counts] [agreement] [time] [video]

DATA is the folder with images/ and weights/. Prints a table for each part that is named, or for
all. All but the counts need facexlib and OpenCV. Times are of this machine; the ratios are the
point.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from osdface_core.faces.align import TEMPLATE, crop_face, similarity
from osdface_core.faces.candidates import detect_once
from osdface_core.faces.choose import Choice
from osdface_core.faces.detect import Detection, DetectOptions, detect
from osdface_core.faces.find import find_faces
from osdface_core.faces.retinaface import RetinaFace, build_retinaface
from osdface_core.pictures.geometry import Affine, apply, compose, inverse, scale_of
from osdface_core.pictures.resampling import sample_affine, warp

ANGLES = (0, 30, 60, 90, 135, 180)
# A face counts as found upright if its worst landmark is off by at most this share of the face's
# height.
RIGHT = 0.15
CONFIDENCE = 0.9


def load(path: Path) -> Tensor:
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).float()[None] / 255


def turned(image: Tensor, degrees: float) -> tuple[Tensor, Affine]:
    """The picture turned clockwise with nothing cut off, and the map from the one to the other."""
    height, width = image.shape[1:3]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    w = math.ceil(abs(width * cos) + abs(height * sin) - 1e-6)
    h = math.ceil(abs(width * sin) + abs(height * cos) - 1e-6)
    matrix = (
        (cos, -sin, w / 2 - cos * width / 2 + sin * height / 2),
        (sin, cos, h / 2 - sin * width / 2 - cos * height / 2),
    )
    return warp(image[0].movedim(-1, 0), matrix, h, w).movedim(0, -1)[None].clamp(0, 1), matrix


def error(known: Detection, found: Detection, matrix: Affine) -> float:
    """The largest distance of a landmark, as a share of the known face's height."""
    wanted = [apply(matrix, *point) for point in known.landmarks]
    return max(map(math.dist, found.landmarks, wanted)) / (known.box[3] - known.box[1])


def counts(data: Path, network: RetinaFace) -> None:
    portraits = sorted((data / "images" / "portraits").glob("*.jpg"))
    singles = [
        len(detect(load(path), network, DetectOptions(confidence=CONFIDENCE))[0])
        for path in portraits
    ]
    print(
        f"{len(portraits)} portraits of 1024 px: {singles.count(1)} with one face, "
        f"{sum(n > 1 for n in singles)} with more, ",
        end="",
    )
    print(f"{singles.count(0)} with none", flush=True)
    sets = {
        "portraits, 512 px": [
            F.avg_pool2d(load(path).movedim(-1, 1), 2).movedim(1, -1) for path in portraits
        ],
        "mosaic, six faces": [load(data / "images" / "cc0_mosaic_6faces_1080p.png")],
        "astronaut": [load(data / "images" / "astronaut.png")],
        "camera, a profile": [load(data / "images" / "camera.png")],
    }
    for name, pictures in sets.items():
        known = [
            detect(picture, network, DetectOptions(confidence=CONFIDENCE))[0]
            for picture in pictures
        ]
        print(f"{name}: {sum(map(len, known))} faces upright")
        for any_angle in (False, True):
            cells = []
            for degrees in ANGLES:
                right = extra = 0
                for picture, faces in zip(pictures, known, strict=True):
                    image, matrix = turned(picture, degrees)
                    found = detect(
                        image, network, DetectOptions(confidence=CONFIDENCE, any_angle=any_angle)
                    )[0]
                    hits = sum(any(error(face, d, matrix) < RIGHT for d in found) for face in faces)
                    right += hits
                    extra += max(0, len(found) - hits)
                cells.append(f"{degrees}: {right}" + (f" (+{extra} wrong)" if extra else ""))
            print(f"  any_angle {'on ' if any_angle else 'off'}: " + ", ".join(cells), flush=True)


def facexlib_detector(data: Path) -> Any:
    from facexlib.detection.retinaface import RetinaFace as Theirs

    theirs = Theirs("mobile0.25", device="cpu")
    theirs.load_state_dict(weights(data))
    return theirs


def bgr(image: Tensor) -> np.ndarray:
    return np.ascontiguousarray((image[0] * 255).round().byte().numpy()[..., ::-1])


def weights(data: Path) -> dict[str, Tensor]:
    return torch.load(
        data / "weights" / "detection_mobilenet0.25_Final.pth",
        map_location="cpu",
        weights_only=True,
    )


def iou(a: Any, b: Any) -> float:
    shared = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(
        0.0, min(a[3], b[3]) - max(a[1], b[1])
    )
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def agreement(data: Path, network: RetinaFace) -> None:
    theirs = facexlib_detector(data)
    paths = sorted((data / "images" / "portraits").glob("*.jpg"))
    paths += [
        data / "images" / name
        for name in ("astronaut.png", "camera.png", "cc0_mosaic_6faces_1080p.png")
    ]
    apart: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    crops: list[tuple[float, float, float]] = []
    once: list[tuple[float, float]] = []
    only_theirs = only_ours = 0
    for path in paths:
        image = load(path)
        with torch.inference_mode():
            rows = theirs.detect_faces(bgr(image), CONFIDENCE)
            seen = detect_once(network, image.movedim(-1, 1), CONFIDENCE)
        assert len(seen) == len(rows), path.name
        for row in rows:
            k = max(range(len(seen)), key=lambda k, row=row: iou(seen.box[k].tolist(), row[:4]))
            off = np.linalg.norm(
                seen.landmarks[k].numpy() - 0.5 - row[5:].reshape(5, 2), axis=1
            ).max()
            once.append((iou(seen.box[k].tolist(), row[:4]), float(off)))
        ours = detect(image, network, DetectOptions(confidence=CONFIDENCE))[0]
        only_ours += sum(all(iou(d.box, row[:4]) < 0.5 for row in rows) for d in ours)
        for row in rows:
            best = max(ours, key=lambda d: iou(d.box, row[:4]))
            if iou(best.box, row[:4]) < 0.5:
                only_theirs += 1
                continue
            points = row[5:].reshape(5, 2) + 0.5
            distance = np.linalg.norm(np.array(best.landmarks) - points, axis=1).max()
            apart[max(row[2] - row[0], row[3] - row[1]) > 512].append(
                (iou(best.box, row[:4]), float(distance))
            )
            crops.append(crop_agreement(image, points))
            if iou(best.box, row[:4]) <= 0.95 or distance >= 1:
                truth, height = consensus(image, network, best), best.box[3] - best.box[1]
                off = [
                    100 * np.linalg.norm(np.array(p) - truth, axis=1).max() / height
                    for p in (best.landmarks, points)
                ]
                print(
                    f"{path.name}: farthest landmark from what smaller copies agree on: ours "
                    f"{off[0]:.1f} %, theirs {off[1]:.1f} %"
                )
    print(
        f"looked at once: {len(once)} boxes, least IoU {min(p[0] for p in once):.4f}, farthest "
        f"landmark {max(p[1] for p in once):.4f} px"
    )
    for large, pairs in apart.items():
        near = sum(overlap > 0.95 and distance < 1 for overlap, distance in pairs)
        print(
            f"faces {'over' if large else 'up to'} 512 px: {near} of {len(pairs)} agree (IoU over "
            "0.95, landmarks within 1 px), ",
            end="",
        )
        print(
            f"least IoU {min(p[0] for p in pairs):.4f}, farthest landmark "
            f"{max(p[1] for p in pairs):.3f} px"
        )
    print(f"only facexlib finds {only_theirs}, only we find {only_ours}")
    near_size = [crop for crop in crops if 512 / 1.12 < crop[0] < 512 * 1.12]
    for name, chosen in (("all", crops), ("within 12 % of the crop's size", near_size)):
        alike, own = ([crop[k] for crop in chosen] for k in (1, 2))
        print(
            f"crops, {len(chosen)} faces {name}, beside facexlib's: sampled as it does, "
            f"{min(alike):.1f} dB at least, ",
            end="",
        )
        print(
            f"median {statistics.median(alike):.1f}; as we do, {min(own):.1f} at least, median "
            f"{statistics.median(own):.1f}"
        )


def consensus(image: Tensor, network: RetinaFace, face: Detection) -> np.ndarray:
    """The median of the face's landmarks (5,2) over copies of the picture.

    The copies show the face at sizes where the detector is at its best.
    """
    found = []
    for side in range(300, 640, 20):
        zoom = max(image.shape[1:3]) / side
        size = [round(n / zoom) for n in image.shape[1:3]]
        copy = (
            F.interpolate(image.movedim(-1, 1), size, mode="bicubic", antialias=True)
            .clamp(0, 1)
            .movedim(1, -1)
        )
        if faces := detect(copy, network, DetectOptions(confidence=CONFIDENCE))[0]:
            nearest = max(faces, key=lambda d: iou([c * zoom for c in d.box], face.box))
            found.append(np.array(nearest.landmarks) * zoom)
    return np.median(found, axis=0)


def crop_agreement(image: Tensor, points: np.ndarray) -> tuple[float, float, float]:
    """Side of the face's square in the picture, and two PSNRs of our crop with facexlib's.

    Both crops have the same landmarks `points` (5,2). Ours is sampled linearly between four pixels
    as facexlib does, then as we do. Beyond the picture its edge is repeated for both, where
    facexlib itself has grey.
    """
    import cv2

    template = (np.array(TEMPLATE) - 0.5).astype(np.float32)
    to_crop = cv2.estimateAffinePartial2D(points - 0.5, template, method=cv2.LMEDS)[0]
    theirs = cv2.warpAffine(bgr(image), to_crop, (512, 512), borderMode=cv2.BORDER_REPLICATE)
    matrix = similarity(tuple((float(x), float(y)) for x, y in points), 512)
    alike = sample_affine(image[0].movedim(-1, 0), inverse(matrix), 512, 512, "bilinear").movedim(
        0, -1
    )
    own = crop_face(image[0], matrix, 512)
    truth = torch.from_numpy(theirs[..., ::-1].copy()) / 255
    side = 512 / scale_of(matrix)
    return side, *(float(-10 * torch.log10(((c - truth) ** 2).mean())) for c in (alike, own))


def clock(work: Callable[[], object], times: int = 3) -> float:
    work()
    spent = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        spent.append(time.perf_counter() - start)
    return min(spent)


def speed(data: Path, network: RetinaFace) -> None:
    theirs = facexlib_detector(data)
    mosaic = load(data / "images" / "cc0_mosaic_6faces_1080p.png")
    large = F.interpolate(mosaic.movedim(-1, 1), (2160, 3840), mode="bilinear").movedim(1, -1)
    small = F.interpolate(mosaic.movedim(-1, 1), (540, 960), mode="area").movedim(1, -1)
    for name, images in (
        ("960x540, 8 frames", small.expand(8, -1, -1, -1)),
        ("1920x1080", mosaic),
        ("3840x2160", large),
    ):
        pictures = [bgr(image[None]) for image in images]
        with torch.inference_mode():
            a = clock(
                lambda pictures=pictures: [theirs.detect_faces(p, CONFIDENCE) for p in pictures]
            )
            b = clock(
                lambda images=images: detect(images, network, DetectOptions(confidence=CONFIDENCE))
            )
            c = clock(
                lambda images=images: detect(
                    images,
                    network,
                    DetectOptions(confidence=CONFIDENCE, choice=Choice(min_size=48)),
                )
            )
            d = clock(
                lambda images=images: detect(
                    images, network, DetectOptions(confidence=CONFIDENCE, any_angle=True)
                ),
                1,
            )
        print(
            f"{name}: facexlib {a * 1e3:.0f} ms, ours {b * 1e3:.0f} ms ({a / b:.1f} times "
            "faster), ",
            end="",
        )
        print(
            f"min_size 48 {c * 1e3:.0f} ms ({a / c:.1f}), any_angle {d * 1e3:.0f} ms ({a / d:.1f})",
            flush=True,
        )


FRAMES, SIDE = 60, 480


def motion(t: float) -> Affine:
    """Pan, zoom and roll of a 1024 px portrait in a frame of 480 px."""
    scale = 0.47 * (1 + 0.15 * math.sin(t / 17))
    angle = math.radians(8 * math.sin(t / 13))
    a, b = scale * math.cos(angle), scale * math.sin(angle)
    x, y = 240 + 25 * math.sin(t / 11) + 0.3 * t, 240 + 10 * math.cos(t / 9)
    return (a, -b, x - a * 512 + b * 420), (b, a, y - b * 512 - a * 420)


def corners(matrix: Affine) -> np.ndarray:
    back = inverse(matrix)
    return np.array([apply(back, x, y) for x in (0.0, 512.0) for y in (0.0, 512.0)])


def steadiness(matrices: dict[int, Affine]) -> tuple[float, float, float]:
    """Jitter, error and lag of a crop's corners.

    Change of the error from frame to frame in pixels, the error in pixels, and the frames by which
    the corners trail.
    """
    frames = sorted(matrices)
    own = np.mean([corners(compose(matrices[t], motion(t % FRAMES))) for t in frames], axis=0)
    true = np.array([[apply(motion(t % FRAMES), x, y) for x, y in own] for t in frames])
    off = np.array([corners(matrices[t]) for t in frames]) - true
    velocity = (true[2:] - true[:-2]) / 2
    lag = -(off[1:-1] * velocity).sum() / (velocity**2).sum()
    return (
        float(np.linalg.norm(np.diff(off, axis=0), axis=-1).mean()),
        float(np.linalg.norm(off, axis=-1).mean()),
        float(lag),
    )


def video(data: Path, network: RetinaFace) -> None:
    import cv2

    theirs = facexlib_detector(data)
    paths = sorted((data / "images" / "portraits").glob("*.jpg"))
    generator = torch.Generator().manual_seed(0)
    template = (np.array(TEMPLATE) - 0.5).astype(np.float32)
    shots = [paths[n] for n in (5, 60, 120, 150)]
    parts = []
    for path in shots:
        source = load(path)[0].movedim(-1, 0)
        part = torch.stack(
            [warp(source, motion(t), SIDE, SIDE).movedim(0, -1) for t in range(FRAMES)]
        )
        part = part + torch.randn(part.shape, generator=generator) * 0.03
        parts.append((part.clamp(0, 1) * 255).round() / 255)
    images = torch.cat(parts)
    blank = FRAMES // 2
    images[blank] = 0
    rows: dict[str, list[tuple[float, float, float]]] = {}

    def note(name: str, matrices: dict[int, Affine]) -> None:
        for n in range(len(shots)):
            rows.setdefault(name, []).append(
                steadiness({t: m for t, m in matrices.items() if t // FRAMES == n})
            )

    by_facexlib = {}
    for t, image in enumerate(images):
        with torch.inference_mode():
            found = theirs.detect_faces(bgr(image[None]), CONFIDENCE)
        if len(found):
            largest = max(found, key=lambda row: row[2] - row[0])
            (a, _, x), (b, _, y) = cv2.estimateAffinePartial2D(
                largest[5:].reshape(5, 2), template, method=cv2.LMEDS
            )[0]
            # From pixel centres at whole numbers to pixel centres at .5.
            by_facexlib[t] = (a, -b, x + 0.5 - 0.5 * (a - b)), (b, a, y + 0.5 - 0.5 * (a + b))
    note("facexlib, frame by frame", by_facexlib)
    for smoothing in (0.0, 0.25, 0.5, 0.75, 1.0):
        found_by_us = find_faces(
            images, network, DetectOptions(confidence=CONFIDENCE, smoothing=smoothing)
        )
        largest_of: dict[int, Any] = {}
        for face in found_by_us.everyone:
            if face.frame not in largest_of or face.size > largest_of[face.frame].size:
                largest_of[face.frame] = face
        note(f"smoothing {smoothing}", {t: face.matrix for t, face in largest_of.items()})
        if smoothing == 0:
            cuts = [t for t in range(1, len(images)) if largest_of.get(t) and largest_of.get(t - 1)]
            cuts = [t for t in cuts if largest_of[t].shot != largest_of[t - 1].shot]
            print(
                f"cuts at {cuts}, faces in {len(largest_of)} of {len(images)} frames, one in the "
                f"blank frame: {blank in largest_of}"
            )
    raw = statistics.fmean(row[0] for row in rows["facexlib, frame by frame"])
    for name, values in rows.items():
        jitter, off, lag = (statistics.fmean(row[k] for row in values) for k in range(3))
        worst = max(abs(row[2]) for row in values)
        print(
            f"{name}: jitter {jitter:.2f} px a frame (1/{raw / jitter:.1f}), error {off:.2f} px, ",
            end="",
        )
        print(f"lag {lag:.2f} frames (worst {worst:.2f})")


PARTS = {"counts": counts, "agreement": agreement, "time": speed, "video": video}

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    detector = build_retinaface(weights(folder))
    for part in sys.argv[2:] or PARTS:
        print(f"# {part}")
        PARTS[part](folder, detector)
