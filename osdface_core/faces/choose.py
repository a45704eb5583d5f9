"""Numbers the faces of a picture or a shot, and chooses which of them are restored."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any

import torch

from ..errors import OSDFaceError
from .face import Face, Faces

ALL, LARGEST, CENTRAL, BY_INDEX = SELECT = ("all", "largest", "most central", "by index")
ORDER = (
    "left to right",
    "top to bottom",
    "largest first",
    "smallest first",
    "most confident first",
)
CHOSEN = "chosen"
MAX_SHOWN = 60

Person = Sequence[Face]


@dataclass(frozen=True)
class Choice:
    """Which faces are chosen. Sizes are the shorter side of the box in pixels.

    select: one of SELECT.
    order: one of ORDER, by which faces are numbered and `max_faces` counts them.
    indices: numbers of the faces, for "by index".
    max_faces: in each picture; 0 is no limit.
    min_size: smaller faces are left out.
    max_size: larger faces are left out; 0 is no limit.
    """

    select: str = ALL
    order: str = ORDER[0]
    indices: str = "0"
    max_faces: int = 0
    min_size: float = 24
    max_size: float = 0


def parse_indices(text: str) -> tuple[tuple[int, int], ...]:
    """The text 0,2-4 -> ((0, 0), (2, 4)); an empty text names no face.

    Raises OSDFaceError for anything else.
    """
    ranges = []
    for part in filter(None, map(str.strip, text.split(","))):
        # int() refuses numbers of more than 4300 digits.
        match = re.fullmatch(r"(\d{1,18})(?:\s*-\s*(\d{1,18}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise OSDFaceError(
                f'`indices` is "{_shorten(text)}"; numbers and ranges counted from 0 are wanted, '
                f'such as "0,2-4": correct "{_shorten(part)}".'
            )
        ranges.append((first, last))
    return tuple(ranges)


def _shorten(text: str) -> str:
    """The text on one line, cut after MAX_SHOWN characters."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_SHOWN else f"{line[:MAX_SHOWN]}..."


def group_by_person(faces: Sequence[Face]) -> dict[tuple[int, int], list[int]]:
    """The positions in `faces` of each person's faces, by shot and number.

    A person is followed within a shot, never beyond.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for i, face in enumerate(faces):
        groups.setdefault((face.shot, face.number), []).append(i)
    return groups


def median_size(person: Person) -> float:
    """The median of a person's sizes over the shot, in pixels."""
    return median(face.size for face in person)


def mean_centre(person: Person) -> tuple[float, float]:
    """The mean of the centres (x, y) of a person's boxes over the shot."""
    return fmean((f.box[0] + f.box[2]) / 2 for f in person), fmean(
        (f.box[1] + f.box[3]) / 2 for f in person
    )


_ORDER_KEYS: dict[str, Callable[[Person], float]] = {
    "left to right": lambda person: mean_centre(person)[0],
    "top to bottom": lambda person: mean_centre(person)[1],
    "largest first": lambda person: -median_size(person),
    "smallest first": median_size,
    "most confident first": lambda person: -fmean(face.score for face in person),
}


def _check_option(name: str, value: str, options: Sequence[str]) -> None:
    if value not in options:
        raise OSDFaceError(f'`{name}` is "{value}"; one of these is wanted: {", ".join(options)}.')


def _rank(
    persons: dict[tuple[int, int], list[int]], faces: Sequence[Face], key: Callable[[Person], float]
) -> dict[tuple[int, int], int]:
    """The rank by `key` of each person among those of the same shot, from 0."""
    places: dict[tuple[int, int], int] = {}
    seen: dict[int, int] = {}
    for person in sorted(persons, key=lambda p: key([faces[i] for i in persons[p]])):
        places[person] = seen.get(person[0], 0)
        seen[person[0]] = places[person] + 1
    return places


def number_faces(faces: Sequence[Face], order: str) -> list[Face]:
    """The same faces, the persons of each shot numbered from 0 in `order`.

    Position, size and confidence are those over the whole shot.
    """
    _check_option("order", order, ORDER)
    persons = group_by_person(faces)
    places = _rank(persons, faces, _ORDER_KEYS[order])
    return [replace(face, number=places[face.shot, face.number]) for face in faces]


def choose(faces: Sequence[Face], choice: Choice, width: int, height: int) -> list[str]:
    """CHOSEN or the reason for leaving it out, for each face of pictures of width x height px.

    A person's size is the median over the shot, so that nobody comes and goes from frame to frame.
    `largest`, `most central` and `max_faces` hold in each picture, among the faces within the
    limits of size, and compare persons over the whole shot. Raises OSDFaceError if an option or
    `indices` cannot be understood.
    """
    _check_option("select", choice.select, SELECT)
    _check_option("order", choice.order, ORDER)
    wanted = parse_indices(choice.indices) if choice.select == BY_INDEX else ()
    verdicts = [CHOSEN] * len(faces)
    persons = group_by_person(faces)

    def reject(positions: Sequence[int], reason: str) -> None:
        for i in positions:
            verdicts[i] = reason

    for (_, number), positions in persons.items():
        size = median_size([faces[i] for i in positions])
        if size < choice.min_size:
            reject(positions, f"smaller than min_size {choice.min_size:g}")
        elif choice.max_size and size > choice.max_size:
            reject(positions, f"larger than max_size {choice.max_size:g}")
        elif choice.select == BY_INDEX and not any(
            first <= number <= last for first, last in wanted
        ):
            reject(positions, f'not in indices "{_shorten(choice.indices)}"')

    def keep_first(key: Callable[[Person], float], count: int, reason: str) -> None:
        places = _rank(persons, faces, key)
        frames: dict[int, list[int]] = {}
        for i, face in enumerate(faces):
            if verdicts[i] == CHOSEN:
                frames.setdefault(face.frame, []).append(i)
        for there in frames.values():
            there.sort(key=lambda i: places[faces[i].shot, faces[i].number])
            reject(there[count:], reason)

    if choice.select == LARGEST:
        keep_first(lambda person: -median_size(person), 1, "not the largest")
    elif choice.select == CENTRAL:
        keep_first(
            lambda person: math.dist(mean_centre(person), (width / 2, height / 2)),
            1,
            "not the most central",
        )
    if choice.max_faces:
        keep_first(
            _ORDER_KEYS[choice.order], choice.max_faces, f"beyond max_faces {choice.max_faces}"
        )
    return verdicts


def split(faces: Faces, choice: Choice) -> tuple[Faces, Faces, str]:
    """The chosen faces, the rest, and the report. Faces keep their numbers."""
    faces.check()
    verdicts = choose(faces.faces, choice, faces.width, faces.height)

    def part(of: bool) -> Faces:
        positions = [i for i, verdict in enumerate(verdicts) if (verdict == CHOSEN) == of]
        index = torch.tensor(positions, dtype=torch.long, device=faces.crops.device)
        return replace(
            faces, faces=tuple(faces.faces[i] for i in positions), crops=faces.crops[index]
        )

    return part(True), part(False), report(faces.faces, verdicts, faces.frames)


def describe_faces(
    everyone: Sequence[Face], verdicts: Sequence[str], notes: Mapping[tuple[int, int], str]
) -> list[dict[str, Any]]:
    """The faces for the report, one by one."""
    return [
        {
            "frame": face.frame,
            "number": face.number,
            "box": [round(c, 1) for c in face.box],
            "size": round(face.size, 1),
            "confidence": round(face.score, 4),
            "verdict": verdict,
            **({"bridged": True} if face.bridged else {}),
            **(
                {"note": notes[face.frame, face.number]}
                if (face.frame, face.number) in notes and verdict == CHOSEN
                else {}
            ),
        }
        for face, verdict in zip(everyone, verdicts, strict=True)
    ]


def report(faces: Sequence[Face], verdicts: Sequence[str], frames: int) -> str:
    """A text: how many faces were found and chosen, then a line for each person.

    The line has number, box, size, confidence, and whether the face was chosen or why not. For a
    person in several pictures it has the first box, and the range of size and confidence. Pictures
    without a face are named at the end.
    """
    persons = group_by_person(faces)
    chosen = sum(verdict == CHOSEN for verdict in verdicts)
    pictures = "1 picture" if frames == 1 else f"{frames} pictures"
    lines = [
        f"{len(faces)} {'face' if len(faces) == 1 else 'faces'} found in {pictures}, {chosen} "
        "chosen."
    ]
    for (_, number), positions in sorted(
        persons.items(), key=lambda item: (faces[item[1][0]].frame, item[0])
    ):
        own = [faces[i] for i in positions]
        first, last = own[0].frame, own[-1].frame
        where = (
            ""
            if frames == 1
            else f"picture {first}, "
            if first == last
            else f"pictures {first}-{last} ({len(own)}), "
        )
        box = ", ".join(f"{c:.0f}" for c in own[0].box)
        turned = f", turned by {own[0].angle} degrees" if own[0].angle else ""
        kept = sum(verdicts[i] == CHOSEN for i in positions)
        left_out = ", ".join(dict.fromkeys(verdicts[i] for i in positions if verdicts[i] != CHOSEN))
        verdict = (
            CHOSEN
            if kept == len(own)
            else left_out
            if not kept
            else f"{CHOSEN} in {kept}, else {left_out}"
        )
        size = _join_range([f.size for f in own], ".0f")
        confidence = _join_range([f.score for f in own], ".3f")
        missed = [face.frame for face in own if face.bridged]
        bridged = f", bridged in {_join_runs(missed)}" if missed else ""
        lines.append(
            f"{where}face {number}: box {box}, size {size} px, confidence {confidence}{turned}: "
            f"{verdict}{bridged}"
        )
    empty = sorted(set(range(frames)) - {face.frame for face in faces})
    if faces and empty:
        lines.append(
            f"no face in {'picture' if len(empty) == 1 else 'pictures'} {_join_runs(empty)}"
        )
    return "\n".join(lines)


def _join_runs(numbers: Sequence[int]) -> str:
    """Numbers as text: 0,1,2,5 -> "0-2, 5"."""
    starts = [n for i, n in enumerate(numbers) if not i or n != numbers[i - 1] + 1]
    ends = [n for i, n in enumerate(numbers) if i + 1 == len(numbers) or n != numbers[i + 1] - 1]
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _join_range(values: Sequence[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low}-{high}"
