"""The face parser against facexlib's, and what its labels do to the mask."""

from __future__ import annotations

import pytest
import torch

from osdface_core.errors import OSDFaceError
from osdface_core.faces.face_parser import (
    SIDE,
    build_parser,
    face_probability,
    feather_mask,
    parse_faces,
)

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
