"""Who is chosen, against rules that a reader can check by eye, and what the report says of the
rest.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from osdface_core.errors import OSDFaceError
from osdface_core.faces.choose import (
    CHOSEN,
    ORDER,
    SELECT,
    Choice,
    choose,
    number_faces,
    parse_indices,
    report,
    split,
)
from osdface_core.faces.face import Face, Faces

NOWHERE = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
WIDTH, HEIGHT = 1000, 800


def face(
    x: float,
    y: float,
    size: float,
    *,
    frame: int = 0,
    number: int = 0,
    score: float = 0.99,
    shot: int = 0,
) -> Face:
    """A face of `size` px, its box's centre at (x, y)."""
    box = (x - size / 2, y - size * 0.6, x + size / 2, y + size * 0.6)
    return Face(frame, box, ((x, y),) * 5, score, number, NOWHERE, shot=shot)


# The middle one is largest, the left one highest up, the right one smallest and surest.
GROUP = [
    face(800, 600, 40, number=0, score=0.999),
    face(480, 500, 200, number=1, score=0.95),
    face(100, 100, 90, number=2, score=0.97),
]


def chosen(faces: list[Face], choice: Choice) -> list[int]:
    return [
        f.number
        for f, verdict in zip(faces, choose(faces, choice, WIDTH, HEIGHT), strict=True)
        if verdict == CHOSEN
    ]


@pytest.mark.parametrize(
    ("order", "xs"),
    [
        ("left to right", [100, 480, 800]),
        ("top to bottom", [100, 480, 800]),
        ("largest first", [480, 100, 800]),
        ("smallest first", [800, 100, 480]),
        ("most confident first", [800, 100, 480]),
    ],
)
def test_numbers_follow_the_order(order: str, xs: list[int]) -> None:
    by_number = sorted(number_faces(GROUP, order), key=lambda f: f.number)
    assert [f.number for f in by_number] == [0, 1, 2]
    assert [f.landmarks[0][0] for f in by_number] == xs


@pytest.mark.parametrize(
    ("choice", "numbers"),
    [
        (Choice(), [0, 1, 2]),
        (Choice("largest"), [1]),
        (Choice("most central"), [1]),
        (Choice("by index", indices="0,2"), [0, 2]),
        (Choice("by index", indices=" 1 - 2 ,"), [1, 2]),
        (Choice("by index", indices=""), []),
        (Choice("by index", indices="7"), []),
        (Choice(min_size=60), [1, 2]),
        (Choice(max_size=100), [0, 2]),
        (Choice("largest", max_size=100), [2]),
        (Choice(order="smallest first", max_faces=2), [0, 2]),
        (Choice("by index", order="largest first", indices="0-2", max_faces=1), [1]),
        (Choice(min_size=1000), []),
    ],
)
def test_choices(choice: Choice, numbers: list[int]) -> None:
    assert chosen(GROUP, choice) == numbers


def test_limits_and_ranks_hold_in_each_picture() -> None:
    faces = [
        face(100 + 300 * k, 400, 50 + 20 * k, frame=f, number=k, shot=f)
        for f in range(3)
        for k in range(f + 1)
    ]
    assert [
        f.frame
        for f, v in zip(faces, choose(faces, Choice("largest"), WIDTH, HEIGHT), strict=True)
        if v == CHOSEN
    ] == [0, 1, 2]
    assert chosen(faces, Choice(max_faces=1)) == [0, 0, 0]
    assert chosen(faces, Choice("by index", indices="1")) == [1, 1]


def test_over_a_shot_a_person_stays_chosen() -> None:
    # Two people whose sizes cross from frame to frame, and cross the limit of size too.
    faces = []
    for frame in range(10):
        faces += [
            face(200, 400, 100 + 10 * (-1) ** frame, frame=frame, number=0),
            face(700, 400, 102, frame=frame, number=1),
        ]
    assert chosen(faces, Choice("largest")) == [1] * 10
    assert chosen(faces, Choice(min_size=95)) == [0, 1] * 10
    # Where that person is gone, the other is the largest.
    gone = [f for f in faces if not (f.number == 1 and f.frame == 4)]
    assert chosen(gone, Choice("largest")) == [1] * 4 + [0] + [1] * 5


@pytest.mark.parametrize("text", ["one", "0;2", "3-1", "-1", "1-", "0 2", "1.5"])
def test_indices_that_cannot_be_read_say_so(text: str) -> None:
    with pytest.raises(OSDFaceError, match=r"`indices`.*0,2-4"):
        choose(GROUP, Choice("by index", indices=text), WIDTH, HEIGHT)
    assert chosen(GROUP, Choice(indices=text)) == [0, 1, 2]


@pytest.mark.parametrize("choice", [Choice(select="both"), Choice(order="by name")])
def test_an_unknown_option_names_those_there_are(choice: Choice) -> None:
    with pytest.raises(OSDFaceError, match="one of these is wanted"):
        choose(GROUP, choice, WIDTH, HEIGHT)


@pytest.mark.parametrize("text", ["9" * 5000, "1\n2-", "-1", "x" * 300])
def test_a_sentence_about_indices_is_short_and_on_one_line(text: str) -> None:
    with pytest.raises(
        OSDFaceError, match="numbers and ranges counted from 0 are wanted"
    ) as raised:
        parse_indices(text)
    assert len(str(raised.value)) < 250
    assert "\n" not in str(raised.value)


def test_faces_without_their_crops_are_not_split() -> None:
    with pytest.raises(OSDFaceError, match=r"`faces` hold 3 faces and crops \(2, 8, 8, 3\)"):
        split(Faces(tuple(GROUP), torch.zeros(2, 8, 8, 3), 1, HEIGHT, WIDTH, 8), Choice())


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)).map(sorted), max_size=5))
def test_ranges_mean_the_numbers_between_them(ranges: list[list[int]]) -> None:
    text = ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in ranges)
    named = {n for first, last in parse_indices(text) for n in range(first, last + 1)}
    assert named == {n for a, b in ranges for n in range(a, b + 1)}


@given(
    st.lists(
        st.tuples(st.floats(0, 1000), st.floats(0, 800), st.floats(1, 500), st.integers(0, 3)),
        max_size=12,
    ),
    st.sampled_from(SELECT),
    st.sampled_from(ORDER),
    st.text("0123456789-, ", max_size=6),
    st.integers(0, 3),
)
def test_no_choice_ever_means_more_than_it_says(
    places: list[tuple[float, float, float, int]],
    select: str,
    order: str,
    indices: str,
    most: int,
) -> None:
    faces = number_faces(
        [face(x, y, size, frame=f, number=i, shot=f) for i, (x, y, size, f) in enumerate(places)],
        order,
    )
    try:
        verdicts = choose(
            faces, Choice(select, order, indices, most, min_size=30, max_size=300), WIDTH, HEIGHT
        )
    except OSDFaceError:
        return
    for frame in range(4):
        there = [
            f for f, v in zip(faces, verdicts, strict=True) if v == CHOSEN and f.frame == frame
        ]
        assert all(29.99 <= f.size <= 300.01 for f in there)
        assert len(there) <= (most or 12)
        if select in ("largest", "most central"):
            assert len(there) <= 1
        if select == "by index":
            assert {f.number for f in there} <= {
                n for a, b in parse_indices(indices) for n in range(a, min(b, 20) + 1)
            }


def test_the_report_says_for_each_face_why() -> None:
    faces = number_faces(GROUP, "left to right")
    choice = Choice("largest", min_size=60)
    lines = report(faces, choose(faces, choice, WIDTH, HEIGHT), 1).splitlines()
    assert lines[0] == "3 faces found in 1 picture, 1 chosen."
    assert lines[1:] == [
        "face 0: box 55, 46, 145, 154, size 90 px, confidence 0.970: not the largest",
        "face 1: box 380, 380, 580, 620, size 200 px, confidence 0.950: chosen",
        "face 2: box 780, 576, 820, 624, size 40 px, confidence 0.999: smaller than min_size 60",
    ]
    assert report([], [], 2) == "0 faces found in 2 pictures, 0 chosen."


def test_the_report_has_a_line_for_a_person_of_a_video() -> None:
    faces = [face(100 + t, 100, 50 + t, frame=t, number=0) for t in range(30)] + [
        face(500, 500, 80, frame=7, number=1)
    ]
    lines = report(faces, choose(faces, Choice(max_faces=1), WIDTH, HEIGHT), 30).splitlines()
    assert len(lines) == 3
    assert (
        lines[1].startswith("pictures 0-29 (30), face 0:")
        and "size 50-79 px" in lines[1]
        and lines[1].endswith(": chosen")
    )
    faces = [face(100, 100, 50, frame=t) for t in (0, 4)]
    assert report(faces, [CHOSEN] * 2, 8).splitlines()[-1] == "no face in pictures 1-3, 5-7"
    assert lines[2].startswith("picture 7, face 1:") and lines[2].endswith("beyond max_faces 1")


def test_the_chosen_and_the_rest_are_all_and_keep_number_and_crop() -> None:
    crops = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 512, 512, 3)
    faces = Faces(tuple(GROUP), crops, 1, HEIGHT, WIDTH)
    picked, rest, text = split(faces, Choice("by index", indices="0,2"))
    assert [f.number for f in picked.faces] == [0, 2] and [f.number for f in rest.faces] == [1]
    assert picked.crops[:, 0, 0, 0].tolist() == [0, 2] and rest.crops[:, 0, 0, 0].tolist() == [1]
    assert (picked.height, picked.width, rest.frames) == (HEIGHT, WIDTH, 1)
    assert text.splitlines()[0] == "3 faces found in 1 picture, 2 chosen."
    nobody, everybody, _ = split(faces, Choice("by index", indices=""))
    assert len(nobody) == 0 and nobody.crops.shape == (0, 512, 512, 3) and len(everybody) == 3
    empty, _, _ = split(Faces.empty(2, 10, 10), Choice())
    assert empty.crops.shape == (0, 512, 512, 3)
