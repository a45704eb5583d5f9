"""A handful of benchmarks/fuzz.py's graphs; and that its judges notice what they are there for."""

from __future__ import annotations

from typing import Any

import pytest
import requests

from benchmarks import fuzz

pytestmark = [pytest.mark.host, pytest.mark.full]


@pytest.fixture(scope="module")
def info(small_server: Any) -> dict[str, Any]:
    return requests.get(f"{small_server.address}/object_info", timeout=120).json()


def files(small_server: Any) -> tuple[list[str], list[str]]:
    return fuzz.write_pictures(small_server.base / "input")


def test_random_graphs_end_in_a_right_result_or_in_one_sentence(
    small_server: Any, info: dict[str, Any]
) -> None:
    tally = fuzz.Tally()
    fuzz.run(small_server.address, fuzz.graphs(range(60), 1, info, *files(small_server)), tally)
    assert not tally.violations, "\n\n".join(
        f"{number}: {what}" for what, number, _ in tally.violations
    )
    assert sum(tally.kinds.values()) == 60
    assert tally.kinds["right: faces restored, the rest of the picture bit for bit"] >= 3
    assert tally.kinds["right: pictures enlarged"] >= 2
    assert sum(tally.sentences.values()) >= 3


def test_the_same_seed_makes_the_same_graphs(small_server: Any, info: dict[str, Any]) -> None:
    names = files(small_server)
    first, again, other = (
        [made.graph for _, made in fuzz.graphs(range(5), seed, info, *names)] for seed in (7, 7, 8)
    )
    assert first == again
    assert first != other


def judged(small_server: Any, graph: dict[str, Any]) -> fuzz.Tally:
    tally = fuzz.Tally()
    fuzz.run(small_server.address, iter([(0, fuzz.Made(graph, False))]), tally, lambda text: None)
    return tally


@pytest.mark.parametrize(
    ("kind", "values", "wrong"),
    [
        ("ImageInvert", {}, "a pixel outside of the mask has changed"),
        ("FuzzHarm", {"harm": "all nan", "seed": 0}, "not finite where the picture is"),
        ("FuzzHarm", {"harm": "fp16", "seed": 0}, "torch.float16"),
        ("ImageScaleBy", {"upscale_method": "area", "scale_by": 0.5}, "torch.Size"),
    ],
)
def test_a_wrong_picture_is_noticed(
    kind: str, values: dict[str, Any], wrong: str, small_server: Any
) -> None:
    graph = {
        "load": {
            "class_type": "EmptyImage",
            "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 99},
        },
        "after": {"class_type": kind, "inputs": {"image": ["load", 0]} | values},
        "mask": {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": 8, "height": 8}},
        "judge": {
            "class_type": "JudgePaste",
            "inputs": {"image": ["load", 0], "after": ["after", 0], "mask": ["mask", 0]},
        },
    }
    ((what, _, _),) = judged(small_server, graph).violations
    assert wrong in what


def test_an_error_of_a_node_of_ours_that_is_no_sentence_of_ours_is_noticed() -> None:
    ours = ['File "custom_nodes/osdface/nodes/osdface_vre.py", line 1']
    given = {
        "node_type": "OSDFaceVRE",
        "exception_type": "KeyError",
        "exception_message": "'x'",
        "traceback": ours,
    }
    assert fuzz.judged(given, fuzz.Tally())[1]
    assert not fuzz.judged(given | {"traceback": ['File "execution.py", line 1']}, fuzz.Tally())[1]
    sentence = given | {
        "exception_type": "a.b.OSDFaceError",
        "exception_message": "`crops` are wrong: change them.",
    }
    assert not fuzz.judged(sentence, fuzz.Tally())[1]
    assert fuzz.judged(sentence | {"exception_message": "one.\ntwo."}, fuzz.Tally())[1]
    assert not fuzz.judged(given | {"node_type": "ImageBlur"}, fuzz.Tally())[1]
