"""The face parser against facexlib's, what its labels do to the mask, and the small built-in parser
against MediaPipe's masks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from osdface_core.errors import OSDFaceError
from osdface_core.faces.choose import Choice
from osdface_core.faces.detect import DetectOptions
from osdface_core.faces.face_parser import (
    SIDE,
    SmallParser,
    build_parser,
    face_probability,
    feather_mask,
    parse_faces,
)
from osdface_core.faces.files import BUILTIN_PARSER
from osdface_core.faces.find import find_faces
from osdface_core.faces.retinaface import RetinaFace, build_retinaface
from osdface_core.weights.reading import read_tensors
from tests import photographs

SKIN = [
    "skin",
    "nose",
    "glasses",
    "left_eye",
    "right_eye",
    "left_brow",
    "right_brow",
    "left_ear",
    "right_ear",
    "mouth",
]
NAMES = [
    "background",
    *SKIN,
    "upper_lip",
    "lower_lip",
    "hair",
    "hat",
    "earring",
    "necklace",
    "neck",
    "cloth",
]
NOT_FACE = {"background", "hat", "necklace", "neck", "cloth"}
# Drawn by MediaPipe (benchmarks/face_masks.py): 255 face, 128 a hand.
MASKS = Path(__file__).parent / "golden" / "face_masks"
# A square around the astronaut's face, as large as an aligned crop.
ASTRONAUT = (141, 23, 310, 192)


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    parsenet = pytest.importorskip("facexlib.parsing.parsenet", reason="facexlib is not installed")
    torch.manual_seed(0)
    network = parsenet.ParseNet(in_size=512, out_size=512, parsing_ch=19)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
    return network.eval()


def test_network_gives_what_facexlib_gives_for_the_same_file(theirs: torch.nn.Module) -> None:
    ours = build_parser(theirs.state_dict())
    picture = torch.rand(2, 3, 128, 160, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        wanted = theirs(picture)[0]
        assert wanted.std() > 0.01
        torch.testing.assert_close(ours(picture), wanted, atol=1e-5, rtol=1e-5)


def test_crops_of_any_size_are_parsed_as_facexlib_parses_them_at_512(
    theirs: torch.nn.Module,
) -> None:
    crop = torch.rand(1, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        scores = theirs((crop.movedim(-1, 1) - 0.5) / 0.5)[0]
    maps = parse_faces(crop, build_parser(theirs.state_dict()))
    torch.testing.assert_close(maps, face_probability(scores), atol=1e-4, rtol=0)
    assert parse_faces(crop[:0], build_parser(theirs.state_dict())).shape == (0, SIDE, SIDE)


def test_a_file_that_is_not_parsenet_is_refused_by_name(theirs: torch.nn.Module) -> None:
    tensors = theirs.state_dict()
    tensors.pop("body.3.conv1.norm.norm.running_var")
    with pytest.raises(
        OSDFaceError, match=r"body\.3\.conv1\.norm\.norm\.running_var.*parsing_parsenet\.pth"
    ):
        build_parser(tensors)


@pytest.mark.parametrize(("label", "name"), list(enumerate(NAMES)))
def test_labels_that_are_face(label: int, name: str) -> None:
    scores = torch.full((1, len(NAMES), 2, 2), -20.0)
    scores[:, label] = 20
    assert face_probability(scores).allclose(
        torch.tensor(0.0 if name in NOT_FACE else 1.0), atol=1e-6
    )


@pytest.mark.parametrize("feather", [0.0, 0.1, 0.3])
def test_what_is_none_of_the_face_is_left_alone_and_the_inside_is_whole(feather: float) -> None:
    face = torch.zeros(SIDE, SIDE)
    face[40:480, 60:460] = 1
    face[200:230, 100:180] = 0
    mask = feather_mask(face, feather)
    # Corners are rounded by what counts as a speck.
    near_face = torch.nn.functional.max_pool2d(face[None], 5, 1, 2)[0] > 0
    assert not mask[~near_face].any()
    assert mask[face == 0].mean() < 1e-3
    assert mask.max() <= 1 and mask.min() >= 0
    assert mask[380, 330] == pytest.approx(1, abs=1e-5 if feather < 0.2 else 0.2)
    ramp = mask[350, 60:200]
    assert (ramp.diff() >= -1e-6).all()
    half = int((ramp < 0.5).sum())
    assert half == pytest.approx(max(feather * SIDE * 0.2, 1), abs=3)


def test_a_speck_of_another_label_does_not_show() -> None:
    face = torch.zeros(SIDE, SIDE)
    face[40:480, 60:460] = 1
    clean = feather_mask(face, 0.1)
    face[300:303, 250:252] = 0
    assert (clean - feather_mask(face, 0.1)).max() < 0.5
    assert (clean - feather_mask(face, 0.1)).abs().mean() < 1e-3


@pytest.fixture(scope="module")
def small() -> SmallParser:
    network = build_parser(read_tensors(BUILTIN_PARSER))
    assert isinstance(network, SmallParser)
    return network


@pytest.fixture(scope="module")
def retinaface(data: Path) -> RetinaFace:
    return build_retinaface(read_tensors(data / "weights" / "detection_mobilenet0.25_Final.pth"))


def mask_of(name: str) -> torch.Tensor:
    """(512,512) of 0, 128 and 255."""
    with Image.open(MASKS / f"{name}.png") as image:
        pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.NEAREST))
    return torch.from_numpy(pixels.copy())


def overlap(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one & other).sum() / (one | other).sum())


def astronaut() -> torch.Tensor:
    crop = photographs.astronaut().crop(ASTRONAUT).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return torch.from_numpy(photographs.pixels(crop)).float() / 255


def test_the_small_parser_sees_the_face_that_mediapipe_sees(small: SmallParser) -> None:
    found = parse_faces(astronaut()[None], small)[0] > 0.5
    assert overlap(found, mask_of("astronaut") == 255) > 0.85


def test_the_small_parser_is_as_good_on_crops_of_other_sizes(small: SmallParser) -> None:
    crop = F.avg_pool2d(astronaut().movedim(-1, 0)[None], 2).movedim(1, -1)
    assert overlap(parse_faces(crop, small)[0] > 0.5, mask_of("astronaut") == 255) > 0.85


@pytest.mark.parametrize("name", ["female_006", "male_012"])
def test_the_small_parser_sees_the_faces_of_portraits(
    name: str,
    small: SmallParser,
    retinaface: RetinaFace,
    data: Path,
    load_picture: Callable[[Path], torch.Tensor],
) -> None:
    picture = load_picture(data / "images" / "portraits" / f"{name}.jpg")
    crops = find_faces(picture, retinaface, DetectOptions()).faces.crops
    assert overlap(parse_faces(crops, small)[0] > 0.5, mask_of(name) == 255) > 0.85


def test_a_hand_in_front_of_a_face_is_not_taken_for_face(
    small: SmallParser, retinaface: RetinaFace, data: Path
) -> None:
    av = pytest.importorskip("av", reason="no PyAV: pip install av")
    with av.open(str(data / "videos" / "bird.mkv")) as clip:
        frame = next(frame for n, frame in enumerate(clip.decode(video=0)) if n == 24)
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).float()[None] / 255
    options = DetectOptions(confidence=0.5, choice=Choice("largest"))
    crops = find_faces(pixels, retinaface, options).faces.crops
    found = parse_faces(crops, small)[0] > 0.5
    mask = mask_of("bird_024")
    # The hand covers the mouth; an ellipse would take all of it.
    assert found[mask == 128].float().mean() < 0.4
    assert found[mask == 255].float().mean() > 0.85


def test_a_file_that_is_not_quite_the_small_parser_is_refused_by_name(small: SmallParser) -> None:
    tensors = small.state_dict()
    tensors.pop("middle.0.weight")
    with pytest.raises(OSDFaceError, match=r"middle\.0\.weight"):
        build_parser(tensors)
