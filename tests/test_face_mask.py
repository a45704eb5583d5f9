"""A mask painted on a picture, carried into the crops of its faces."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from osdface_core.diffir.inpaint import inpaint
from osdface_core.errors import OSDFaceError
from osdface_core.faces.align import crop_face
from osdface_core.faces.detect import DetectOptions
from osdface_core.faces.face import Face, Faces
from osdface_core.faces.files import BUILTIN_DETECTOR
from osdface_core.faces.find import find_faces
from osdface_core.faces.mask import mask_to_crops
from osdface_core.faces.retinaface import build_retinaface
from osdface_core.pictures.geometry import Affine, apply, inverse
from osdface_core.weights.reading import read_tensors
from tests.test_diffir import loading, never, small

HEIGHT, WIDTH, SIZE = 240, 320, 96


def similarity(scale: float, degrees: float, x: float, y: float) -> Affine:
    """The map that brings (x,y) to the middle of a crop of SIZE px."""
    cos, sin = (scale * f(math.radians(degrees)) for f in (math.cos, math.sin))
    middle = SIZE / 2
    return (cos, -sin, middle - cos * x + sin * y), (sin, cos, middle - sin * x - cos * y)


def faces_at(*matrices: Affine, frames: tuple[int, ...] = ()) -> Faces:
    made = tuple(
        Face(frame, (0, 0, 9, 9), ((0.0, 0.0),) * 5, 0.9, i, matrix)
        for i, (matrix, frame) in enumerate(
            zip(matrices, frames or (0,) * len(matrices), strict=True)
        )
    )
    crops = torch.zeros(len(made), SIZE, SIZE, 3)
    return Faces(made, crops, max(frames, default=0) + 1, HEIGHT, WIDTH, SIZE)


def a_scratch() -> Tensor:
    """One pixel wide, dim, and aslant across the whole picture."""
    mask = torch.zeros(1, HEIGHT, WIDTH)
    columns = torch.arange(WIDTH)
    mask[0, 60 + columns // 3, columns] = 0.01
    return mask


PLACES = [
    similarity(scale, degrees, 150, 115)
    for scale in (4.0, 1.3, 1.0, 0.75, 0.5)
    for degrees in (0, 28, 180)
]


@pytest.mark.parametrize("matrix", PLACES)
def test_nothing_of_a_scratch_is_lost_in_the_crop_and_little_else_is_taken(matrix: Affine) -> None:
    mask = a_scratch()
    (found,) = mask_to_crops(mask, faces_at(matrix))
    assert set(found.unique().tolist()) == {0, 1}
    places = torch.tensor(
        [apply(matrix, x + 0.5, y + 0.5) for y, x in mask[0].nonzero().tolist()]
    ).T
    across, down = places[:, ((places > 0) & (places < SIZE)).all(0)].long()
    assert len(across) > 20
    assert (found[down, across] == 1).all()
    # Farther from it than interpolation reaches, in pixels of the picture or of the crop, is none.
    scale = math.hypot(*matrix[0][:2])
    back = inverse(matrix)
    taken = [apply(back, x + 0.5, y + 0.5) for y, x in found.nonzero().tolist()]
    scratch = torch.tensor([(x + 0.5, y + 0.5) for y, x in mask[0].nonzero().tolist()])
    apart = torch.cdist(torch.tensor(taken), scratch, p=math.inf).amin(1)
    assert apart.max() <= max(2, 3 / scale if scale < 0.9 else 2)


@pytest.mark.parametrize("matrix", PLACES)
def test_the_scratchs_colour_does_not_show_beside_its_mask(matrix: Affine) -> None:
    """Where the picture is enlarged not at all, where it is shrunk by less than a tenth."""
    mask = a_scratch()
    (found,) = mask_to_crops(mask, faces_at(matrix))
    black, white = (
        crop_face(torch.where(mask[0, ..., None] > 0, colour, 0.5), matrix, SIZE)
        for colour in (0.0, 1.0)
    )
    shows = (white - black).abs().amax(-1)
    inside = torch.ones(1, HEIGHT, WIDTH)
    (there,) = mask_to_crops(inside, faces_at(matrix))
    beside = shows[(found == 0) & (there == 1)]
    assert shows.max() > 0.2
    assert beside.max() < (1e-5 if math.hypot(*matrix[0][:2]) > 0.99 else 0.1)


def test_beyond_the_picture_nothing_is_a_hole() -> None:
    matrix = similarity(2.0, 0, 10, HEIGHT - 5)
    (found,) = mask_to_crops(torch.ones(1, HEIGHT, WIDTH), faces_at(matrix))
    # The picture ends 10 px to the left of the middle and 5 px below it.
    assert (found[: 48 + 10, 48 - 20 :] == 1).all()
    assert (found[:, : 48 - 20] == 0).all()
    assert (found[48 + 10 :] == 0).all()


def test_each_crop_has_the_mask_of_its_picture() -> None:
    matrix = similarity(1.0, 0, 150, 115)
    faces = faces_at(matrix, matrix, matrix, frames=(2, 0, 1))
    masks = torch.zeros(3, HEIGHT, WIDTH)
    masks[0, 115, 150], masks[2, 115:125, 150:160] = 1, 1
    found = mask_to_crops(masks, faces)
    assert found.shape == (3, SIZE, SIZE)
    assert found[0].sum() > found[1].sum() > 0
    assert not found[2].any()
    one = mask_to_crops(masks[2], faces)
    assert all(torch.equal(each, found[0]) for each in one)


@pytest.mark.parametrize("times", [2, 3])
def test_a_mask_of_the_enlarged_picture_is_taken(times: int) -> None:
    matrix = similarity(1.0, 20, 150, 115)
    mask = torch.zeros(1, HEIGHT, WIDTH)
    mask[0, 100:140, 120:180] = 1
    large = mask.repeat_interleave(times, 1).repeat_interleave(times, 2)
    found, of_large = (mask_to_crops(given, faces_at(matrix)) for given in (mask, large))
    middle = of_large[0, 35:60, 30:65]
    assert (middle == 1).all()
    assert 0.9 < of_large.sum() / found.sum() < 1.2


@pytest.mark.parametrize(
    "mask", [torch.zeros(1, 64, 64), torch.zeros(64, 64), torch.zeros(5, 1, 1)]
)
def test_an_empty_mask_of_any_size_is_none(mask: Tensor) -> None:
    found = mask_to_crops(mask, faces_at(*PLACES[:2]))
    assert found.shape == (2, SIZE, SIZE)
    assert not found.any()


@pytest.mark.parametrize("mask", [a_scratch(), torch.zeros(1, 64, 64)])
def test_without_a_face_the_batch_is_of_zero(mask: Tensor) -> None:
    faces = Faces.empty(1, HEIGHT, WIDTH, SIZE)
    masks = mask_to_crops(mask, faces)
    assert masks.shape == (0, SIZE, SIZE)
    assert torch.equal(inpaint(faces.crops, masks, never).pictures, faces.crops)


def test_a_face_that_has_no_place_has_no_hole(caplog: pytest.LogCaptureFixture) -> None:
    nowhere: Affine = ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    found = mask_to_crops(a_scratch(), faces_at(nowhere, PLACES[0]))
    assert not found[0].any()
    assert found[1].any()
    assert "has no place in it" in caplog.text


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (torch.ones(1, 64, 64), "`mask` is 64 x 64 px and the faces come from a picture of 320 x"),
        (torch.ones(2, HEIGHT, WIDTH), "`mask` holds 2 masks and `faces` come from 1 pictures"),
        (torch.ones(1, 1, HEIGHT, WIDTH), r"`mask` is \(1, 1, 240, 320\)"),
        (a_scratch() * torch.nan, "`mask` holds values that are not numbers"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask: Tensor, says: str) -> None:
    with pytest.raises(OSDFaceError, match=says):
        mask_to_crops(mask, faces_at(PLACES[0]))


def test_faces_whose_crops_are_missing_are_refused() -> None:
    faces = replace(faces_at(PLACES[0]), crops=torch.zeros(0, SIZE, SIZE, 3))
    with pytest.raises(OSDFaceError, match="`faces` hold 1 faces and crops"):
        mask_to_crops(a_scratch(), faces)


@pytest.mark.parametrize("size", [256, 512])
@torch.inference_mode()
def test_only_the_face_that_is_scratched_is_filled(group: Tensor, size: int) -> None:
    """The hole is filled whatever is in it, and the other face's crop stays bit for bit."""
    detector = build_retinaface(read_tensors(BUILTIN_DETECTOR))
    faces = find_faces(group, detector, DetectOptions(crop_size=size)).faces
    assert faces.crops.shape == (2, size, size, 3)
    x, y = (round(c) for c in faces.faces[1].landmarks[2])
    mask = torch.zeros(1, *group.shape[1:3])
    mask[0, y - 30 : y + 30, x - 1 : x + 2] = 1
    masks = mask_to_crops(mask, faces)
    assert not masks[0].any()
    # The nose lies a little below the middle of the aligned face.
    nose = masks[1, round(0.61 * size), round(0.5 * size)]
    assert nose == 1
    network = small("inpaint")
    filled = inpaint(faces.crops, masks, loading(network)).pictures
    assert len(network.seen) == 1
    assert torch.equal(filled[0], faces.crops[0])
    hole = masks[1] > 0
    assert torch.equal(filled[1][~hole], faces.crops[1][~hole])
    assert not torch.equal(filled[1][hole], faces.crops[1][hole])
