"""Detection against facexlib's own, against geometry, and against pictures nobody would send."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks.detection import turned
from osdface_core.chunks import OUT_OF_MEMORY
from osdface_core.errors import OSDFaceError
from osdface_core.faces.align import TEMPLATE
from osdface_core.faces.candidates import (
    OVERLAP,
    Candidates,
    Overlaps,
    detect_once,
    nms,
    overlaps,
    suppressed,
)
from osdface_core.faces.choose import Choice
from osdface_core.faces.detect import Detection, DetectOptions, detect
from osdface_core.faces.files import BUILTIN_DETECTOR
from osdface_core.faces.find import find_faces
from osdface_core.faces.preview import draw_faces
from osdface_core.faces.retinaface import RetinaFace, anchors, build_retinaface
from osdface_core.pictures.geometry import apply, inverse
from osdface_core.pictures.picture import finite
from osdface_core.weights.reading import read_tensors
from tests import photographs

MOBILE = "weights/detection_mobilenet0.25_Final.pth"
Load = Callable[[Path], Tensor]


def weights(data: Path) -> dict[str, Tensor]:
    return torch.load(data / MOBILE, map_location="cpu", weights_only=True)


@pytest.fixture(scope="module")
def network() -> RetinaFace:
    """The built-in detector."""
    return build_retinaface(read_tensors(BUILTIN_DETECTOR))


@pytest.fixture(scope="module")
def real(data: Path) -> RetinaFace:
    """facexlib's small detector, which is not part of the project."""
    return build_retinaface(weights(data))


@pytest.fixture(scope="module")
def astronaut() -> Tensor:
    return torch.from_numpy(photographs.pixels(photographs.astronaut())).float()[None] / 255


def portraits(data: Path, step: int) -> list[Path]:
    return sorted((data / "images" / "portraits").glob("*.jpg"))[::step]


def halved(image: Tensor) -> Tensor:
    return F.avg_pool2d(image.movedim(-1, 1), 2).movedim(1, -1)


def iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    shared = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(
        0.0, min(a[3], b[3]) - max(a[1], b[1])
    )
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def landmark_error(found: Detection, wanted: list[tuple[float, float]]) -> float:
    """The worst landmark's distance, as a share of the face's height."""
    return max(map(math.dist, found.landmarks, wanted)) / (found.box[3] - found.box[1])


def test_boxes_and_landmarks_are_facexlibs(
    data: Path, real: RetinaFace, load_picture: Load
) -> None:
    theirs = pytest.importorskip(
        "facexlib.detection.retinaface", reason="facexlib is not installed"
    ).RetinaFace("mobile0.25", device="cpu")
    theirs.load_state_dict(weights(data))
    pictures = [
        data / "images" / name for name in ("astronaut.png", "cc0_mosaic_6faces_1080p.png")
    ] + portraits(data, 36)
    compared = 0
    for path in pictures:
        image = load_picture(path)
        bgr = np.ascontiguousarray((image[0] * 255).round().byte().numpy()[..., ::-1])
        with torch.no_grad():
            rows = theirs.detect_faces(bgr, 0.9)
        ours = detect(image, real)[0]
        assert len(ours) == len(rows)
        for row in rows:
            if max(row[2] - row[0], row[3] - row[1]) > 512:
                # larger than the largest anchor: facexlib's box is a guess, ours comes from a
                # smaller copy
                continue
            found = max(ours, key=lambda d, row=row: iou(d.box, row[:4]))
            assert iou(found.box, row[:4]) > 0.99
            # facexlib puts the first pixel's centre at 0, not at 0.5.
            assert np.abs(np.array(found.landmarks) - 0.5 - row[5:].reshape(5, 2)).max() < 0.05
            assert abs(found.score - row[4]) < 1e-3
            compared += 1
    assert compared >= 10


def test_looked_at_once_every_face_is_where_facexlib_has_it(
    data: Path, real: RetinaFace, load_picture: Load
) -> None:
    """The same real and decoding: what else `detect` finds in these pictures comes from its
    further looks alone.

    facexlib_faces.json holds what facexlib 0.3.0's RetinaFace finds in them with the same weights
    at a confidence of 0.9: box and landmarks, to a thousandth of a pixel. One of the 191 is no face
    but a torso.
    """
    known = json.loads((Path(__file__).parent / "facexlib_faces.json").read_text(encoding="utf-8"))
    assert sum(map(len, known.values())) == 191
    for name, rows in known.items():
        with torch.inference_mode():
            found = detect_once(
                real, finite(load_picture(data / "images" / name).movedim(-1, 1)), 0.9
            )
        assert len(found) == len(rows), name
        for row in rows:
            nearest = max(
                range(len(found)),
                key=lambda k, row=row, found=found: iou(found.box[k].tolist(), row[:4]),
            )
            assert iou(found.box[nearest].tolist(), row[:4]) > 0.95, name
            assert (found.landmarks[nearest] - 0.5 - torch.tensor(row[4:]).view(5, 2)).norm(
                dim=1
            ).max() < 1, name


@pytest.mark.parametrize("name", ["mobile0.25", "resnet50"])
@pytest.mark.parametrize("size", [(96, 130), (1, 1), (7, 33)])
def test_networks_compute_what_facexlibs_do(name: str, size: tuple[int, int]) -> None:
    theirs = pytest.importorskip(
        "facexlib.detection.retinaface", reason="facexlib is not installed"
    )
    utils = pytest.importorskip(
        "facexlib.detection.retinaface_utils", reason="facexlib is not installed"
    )
    torch.manual_seed(0)
    reference = theirs.RetinaFace(name, device="cpu")
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    for heads in (reference.BboxHead, reference.ClassHead, reference.LandmarkHead):
        for head in heads:
            head.conv1x1.weight.data *= 1e-3
    state = {f"module.{key}": value.clone() for key, value in reference.state_dict().items()}
    pictures = torch.randn(2, 3, *size) * 60
    with torch.no_grad():
        boxes, scores, landmarks = build_retinaface(state)(pictures)
        their_boxes, their_scores, their_landmarks = reference(pictures)
    priors = utils.PriorBox(reference.cfg, image_size=size).forward()[None]
    scale = torch.tensor([size[1], size[0]], dtype=torch.float32)
    torch.testing.assert_close(
        boxes,
        utils.batched_decode(their_boxes, priors, [0.1, 0.2]) * scale.repeat(2),
        rtol=1e-4,
        atol=1e-3,
    )
    torch.testing.assert_close(scores, their_scores[..., 1], rtol=1e-4, atol=1e-5)
    points = (
        utils.batched_decode_landm(their_landmarks, priors, [0.1, 0.2]) * scale.repeat(5)
    ).unflatten(-1, (5, 2))
    torch.testing.assert_close(landmarks, points, rtol=1e-4, atol=1e-3)


def test_a_file_that_does_not_fit_is_refused_by_name() -> None:
    tensors = RetinaFace("mobilenet0.25").state_dict()
    del tensors["fpn.merge1.0.weight"]
    with pytest.raises(
        OSDFaceError, match=r"fpn\.merge1\.0\.weight.*detection_Resnet50_Final\.pth"
    ):
        build_retinaface(tensors)
    with pytest.raises(OSDFaceError, match="does not fit"):
        build_retinaface({"conv.weight": torch.zeros(1)})


def test_one_face_in_each_portrait_and_every_face_of_the_others(
    data: Path, real: RetinaFace, load_picture: Load
) -> None:
    for path in portraits(data, 15):
        assert len(detect(load_picture(path), real)[0]) == 1, path.name
    # A torso that the detector takes for a face when it sees it large.
    assert len(detect(load_picture(data / "images/portraits/male_031.jpg"), real)[0]) == 1
    assert len(detect(load_picture(data / "images/astronaut.png"), real)[0]) == 1
    assert len(detect(load_picture(data / "images/camera.png"), real)[0]) == 1
    assert len(detect(load_picture(data / "images/cc0_mosaic_6faces_1080p.png"), real)[0]) == 6


@pytest.mark.parametrize("degrees", [30, 60, 90, 135, 180, 270])
def test_faces_at_any_angle_are_found_and_cut_out_upright(
    data: Path, real: RetinaFace, load_picture: Load, degrees: int
) -> None:
    for path in portraits(data, 60):
        upright = halved(load_picture(path))
        (known,) = detect(upright, real)[0]
        image, matrix = turned(upright, degrees)
        found = find_faces(image, real, DetectOptions(any_angle=True))
        assert len(found.everyone) == 1, path.name
        face = found.everyone[0]
        assert face.angle == {30: 0, 60: 90, 135: face.angle}.get(degrees, degrees)
        if degrees % 90 == 0:
            box = [apply(matrix, x, y) for x, y in (known.box[:2], known.box[2:])]
            xs, ys = zip(*box, strict=True)
            assert iou((min(xs), min(ys), max(xs), max(ys)), face.box) > 0.95
        assert landmark_error(known, [apply(inverse(matrix), *p) for p in face.landmarks]) < 0.06
        # Where the eyes of the upright picture come to lie in the crop: left and right of each
        # other, above the mouth.
        left, right, _, mouth, _ = (apply(face.matrix, *apply(matrix, *p)) for p in known.landmarks)
        assert abs(math.degrees(math.atan2(right[1] - left[1], right[0] - left[0]))) < 12
        assert mouth[1] > left[1] + 50
        assert all(math.dist(p, t) < 50 for p, t in zip((left, right), TEMPLATE, strict=False))


def test_a_face_that_fills_a_large_picture_is_one_face(
    data: Path, real: RetinaFace, load_picture: Load
) -> None:
    image = load_picture(portraits(data, 20)[1])[:, 50:650, 200:800].movedim(-1, 1)
    large = F.interpolate(image, (2400, 2400), mode="bilinear").movedim(1, -1)
    (small_found,) = detect(F.interpolate(image, (300, 300), mode="area").movedim(1, -1), real)[0]
    (found,) = detect(large, real)[0]
    assert iou(tuple(c / 8 for c in found.box), small_found.box) > 0.75
    assert landmark_error(found, [(x * 8, y * 8) for x, y in small_found.landmarks]) < 0.06


def test_small_faces_of_a_large_picture_are_found_with_exact_landmarks(
    data: Path, real: RetinaFace, load_picture: Load
) -> None:
    mosaic = load_picture(data / "images/cc0_mosaic_6faces_1080p.png").movedim(-1, 1)
    group = F.interpolate(mosaic, (180, 320), mode="area")
    image = torch.full((1, 3, 2160, 3840), 0.5)
    corners = [(60, 90), (1830, 1000), (3500, 1970)]
    for x, y in corners:
        image[:, :, y : y + 180, x : x + 320] = group
    found = detect(image.movedim(1, -1), real)[0]
    assert len(found) == 6 * len(corners)
    reference = detect(F.interpolate(mosaic, (720, 1280), mode="area").movedim(1, -1), real)[0]
    for x, y in corners:
        for known in reference:
            wanted = [(x + a / 4, y + b / 4) for a, b in known.landmarks]
            assert min(landmark_error(d, wanted) for d in found) < 0.08


def test_alpha_and_single_channels_and_batches_change_nothing(
    network: RetinaFace, astronaut: Tensor
) -> None:
    image, grey = astronaut, astronaut.flip(2).mean(3, keepdim=True).expand(-1, -1, -1, 3)
    alone, of_grey = detect(image, network)[0], detect(grey, network)[0]
    assert detect(torch.cat([image, torch.rand(1, 512, 512, 1)], -1), network)[0] == alone
    (of_one_channel,) = detect(grey[..., :1], network)[0]
    assert of_one_channel.landmarks == pytest.approx(np.array(of_grey[0].landmarks), abs=1e-2)
    together = detect(torch.cat([grey, image, torch.zeros_like(image)]), network)
    assert [len(faces) for faces in together] == [1, 1, 0]
    for one, other in ((together[1][0], alone[0]), (together[0][0], of_grey[0])):
        assert one.landmarks == pytest.approx(np.array(other.landmarks), abs=1e-2)
    assert detect(image.half(), network)[0][0].landmarks == pytest.approx(
        np.array(alone[0].landmarks), abs=0.5
    )


@pytest.mark.parametrize(
    "shape",
    [
        (0, 64, 64, 3),
        (1, 1, 1, 3),
        (2, 1, 700, 1),
        (1, 8000, 37, 4),
        (1, 37, 8001, 3),
        (3, 33, 65, 2),
        (1, 0, 5, 3),
        (1, 7, 1, 5),
    ],
)
@pytest.mark.parametrize("any_angle", [False, True])
def test_pictures_of_any_shape_and_value_pass(
    network: RetinaFace, shape: tuple[int, ...], any_angle: bool
) -> None:
    image = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    image[..., :1, :] = math.nan
    image[..., -1:, :] = math.inf
    found = find_faces(
        image,
        network,
        DetectOptions(any_angle=any_angle, crop_size=576, choice=Choice(min_size=0), smoothing=0.5),
    )
    assert (found.faces.frames, found.faces.height, found.faces.width) == shape[:3]
    assert found.faces.crops.shape == (len(found.faces), 576, 576, 3)
    preview = draw_faces(image, found.everyone, found.verdicts)
    assert len(preview) == shape[0] and preview.shape[3] == 3 and max(preview.shape[1:3]) <= 1024
    assert preview.isfinite().all()


@given(st.integers(0, 2), st.integers(1, 90), st.integers(1, 90), st.integers(1, 5))
@settings(deadline=None, max_examples=20)
def test_no_shape_is_refused(frames: int, height: int, width: int, channels: int) -> None:
    torch.manual_seed(0)
    # An untrained network sees faces of every size everywhere.
    found = find_faces(
        torch.rand(frames, height, width, channels),
        untrained(),
        DetectOptions(confidence=0.5, choice=Choice(min_size=0)),
    )
    assert (found.faces.frames, found.faces.height, found.faces.width) == (frames, height, width)
    assert found.faces.crops.shape == (len(found.faces), 512, 512, 3)
    assert sorted({face.frame for face in found.everyone}) == list(range(frames))
    assert (
        len(draw_faces(torch.rand(frames, height, width, channels), found.everyone, found.verdicts))
        == frames
    )


@functools.cache
def untrained() -> RetinaFace:
    torch.manual_seed(0)
    network = RetinaFace("mobilenet0.25").eval()
    for heads, weight in (
        (network.BboxHead, 1.0),
        (network.LandmarkHead, 1.0),
        (network.ClassHead, 0.0),
    ):
        for head in heads:
            head.conv1x1.weight.data *= weight
    for head in network.ClassHead:
        head.conv1x1.bias.data = torch.tensor([0.0, -1.0, 0.0, 0.1])
    return network


def test_a_face_half_out_of_the_picture_is_cut_out_whole(
    network: RetinaFace, astronaut: Tensor
) -> None:
    image = astronaut[:, 90:, 190:]
    found = find_faces(image, network, DetectOptions(confidence=0.5))
    assert len(found.faces) == 1 and min(found.faces.faces[0].box) < 0
    assert found.faces.crops.isfinite().all()


def test_anything_but_a_batch_of_pictures_is_refused(network: RetinaFace) -> None:
    with pytest.raises(OSDFaceError, match="`image` has 3 dimensions"):
        find_faces(torch.zeros(5, 5, 3), network)
    with pytest.raises(OSDFaceError, match="holds no colour channel"):
        find_faces(torch.zeros(1, 5, 5, 0), network)


def test_a_callers_error_stops_the_search_and_progress_counts_every_picture(
    network: RetinaFace,
) -> None:
    images, done = torch.zeros(5, 40, 40, 3), []
    find_faces(images, network, progress=lambda count, picture=None: done.append(count))
    assert sum(done) == 5

    def stop(count: int, picture: Tensor | None = None) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        find_faces(images, network, progress=stop)


def test_a_batch_that_does_not_fit_is_halved(network: RetinaFace, astronaut: Tensor) -> None:
    class Little(nn.Module):
        home = torch.device("cpu")
        needs_refinement = False
        largest = 0

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            if len(x) > 2:
                raise OUT_OF_MEMORY("full")
            self.largest = max(self.largest, len(x))
            return network(x)

    little = Little()
    found = detect(torch.cat([astronaut] * 5), little)  # type: ignore[arg-type]
    assert [len(faces) for faces in found] == [1] * 5
    assert little.largest == 2


def test_anchors_cover_a_picture_whose_sides_no_step_divides() -> None:
    centres, sides = anchors(33, 65)
    assert len(centres) == len(sides) == 2 * (5 * 9 + 3 * 5 + 2 * 3)
    assert centres[0].tolist() == [4, 4] and centres[2].tolist() == [12, 4]
    assert sides[:2].tolist() == [16, 32] and sides[-2:].tolist() == [256, 512]


def every_pair(one: Candidates, other: Candidates) -> Overlaps:
    """All pairs of two lists, from a table of each with each."""
    i, j = torch.cartesian_prod(torch.arange(len(one)), torch.arange(len(other))).view(-1, 2).T
    low = torch.maximum(one.box[i, :2], other.box[j, :2])
    high = torch.minimum(one.box[i, 2:], other.box[j, 2:])
    shared = (high - low).clamp(min=0).prod(1) * (one.frame[i] == other.frame[j])
    area, other_area = ((c.box[k, 2:] - c.box[k, :2]).prod(1) for c, k in ((one, i), (other, j)))
    union = area + other_area - shared
    smaller = torch.minimum(area, other_area)
    return Overlaps(i, j, shared / union.clamp(min=1e-6), shared / smaller.clamp(min=1e-6))


def scattered(count: int, seed: int) -> Candidates:
    """Boxes from a tenth of a pixel to thousands, some beyond the picture, in two pictures."""
    numbers = torch.Generator().manual_seed(seed)
    place = torch.rand(count, 2, generator=numbers) * 2000 - 500
    side = 10 ** (torch.rand(count, 2, generator=numbers) * 4.6 - 1)
    # Some begin and end at whole powers of two, where cells do.
    place[::3], side[::3] = (place[::3] / 64).round() * 64, 2.0 ** side[::3].log2().round()
    frame = torch.randint(0, 2, (count,), generator=numbers)
    points = torch.zeros(count, 5, 2)
    return Candidates(frame, torch.cat([place, place + side], 1), side[:, 0], points, frame * 0)


def kept_by_a_table(scores: Tensor, same: Overlaps) -> Tensor:
    """Non-maximum suppression as `nms`, by a table of each with each."""
    table = torch.zeros(len(scores), len(scores), dtype=torch.bool)
    table[same.one, same.other] = True
    left, kept = torch.ones(len(scores), dtype=torch.bool), []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if left[i]:
            kept.append(i)
            left &= ~table[i]
    return torch.tensor(kept, dtype=torch.long)


@pytest.mark.parametrize(("count", "more"), [(0, 0), (0, 5), (5, 0), (1, 1), (300, 200)])
def test_every_two_boxes_that_overlap_are_looked_up(count: int, more: int) -> None:
    one, other = scattered(count, 0), scattered(more, 1)
    found, wanted = overlaps(one, other), every_pair(one, other)
    touching = wanted[wanted.smaller > 0]
    assert len(touching.one) >= (1000 if count == 300 else 0)
    found = found[found.smaller > 0]
    for ours, theirs in zip(vars(found).values(), vars(touching).values(), strict=True):
        assert torch.equal(ours, theirs)


def test_of_boxes_that_are_one_the_best_is_kept() -> None:
    """A box that is one with a suppressed one alone is kept, as in a table of each with each."""
    boxes = scattered(400, 2)
    scores = torch.rand(400, generator=torch.Generator().manual_seed(3))
    pairs = overlaps(boxes, boxes)
    same = pairs[pairs.smaller > 0.6]
    kept = nms(scores, same)
    assert 50 < len(kept) < 350
    assert torch.equal(kept, kept_by_a_table(scores, same))


def test_suppression_is_torchvision_s() -> None:
    """Each of 60 faces seen twelve times, some scores equal."""
    from torchvision.ops import batched_nms

    numbers = torch.Generator().manual_seed(5)
    centre = torch.rand(60, 4, generator=numbers) * 900
    sides = 10 + torch.rand(60, 1, generator=numbers) * 300
    box = torch.cat([centre[:, :2], centre[:, :2] + sides], 1).repeat(12, 1)
    box += torch.randn(box.shape, generator=numbers) * sides.repeat(12, 1) * 0.06
    frame = torch.arange(len(box)) % 2
    score = (torch.rand(len(box), generator=numbers) * 50).round() / 50
    found = Candidates(frame, box, score, torch.zeros(len(box), 5, 2), frame * 0)
    kept = batched_nms(box, score, frame, OVERLAP)
    ours = suppressed(found)
    assert 30 < len(ours) < 600
    assert torch.equal(ours.box, box[kept])
    assert torch.equal(ours.frame, frame[kept])


def test_a_crowd_at_any_angle_is_what_a_table_of_each_with_each_gives(
    network: RetinaFace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ninety-six faces, every other group on its side or upside down."""
    small = photographs.group().resize((360, 202))
    square = np.zeros((360, 360, 3), np.float32)
    square[79:281] = np.asarray(small, np.float32) / 255
    tiles = [[np.rot90(square, (i + j) % 4) for i in range(4)] for j in range(4)]
    picture = torch.from_numpy(np.concatenate([np.concatenate(row, 1) for row in tiles]))[None]
    options = DetectOptions(any_angle=True)
    found = detect(picture, network, options, faint=True)
    assert len([face for face in found[0] if not face.faint]) >= 90
    monkeypatch.setattr("osdface_core.faces.detect.nms", kept_by_a_table)
    for module in ("candidates", "detect"):
        monkeypatch.setattr(f"osdface_core.faces.{module}.overlaps", every_pair)
    assert detect(picture, network, options, faint=True) == found
