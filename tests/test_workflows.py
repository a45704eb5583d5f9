"""Shared workflows and the blueprint are sound files: whole links, known nodes, values that fit,
addresses, a note and a picture.
"""

from __future__ import annotations

import asyncio
import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from osdface_core.catalogue import CATALOGUE

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
PROMISED = {
    "osdface_basic",
    "osdface_all_in_one",
    "osdface_txt2img_portrait",
    "osdface_old_photo",
    "osdface_old_photo_upscaler",
    "osediff_faces",
    "osediff_compare",
    "osdface_scratches",
    "osdface_old_photo_complete",
    "diffir_motion_blur",
    "osdface_one_person",
    "osdface_video",
    "osdface_strengths",
    "osdface_step_taken_apart",
    "osdface_try_it",
}
FROM_OUTSIDE, TO_OUTSIDE = -10, -20
PASSED_OVER = 4
TITLE = 30
# Below this the frontend draws nodes without their text.
READABLE = 0.6
# Where nodes of other files than nodes.py are. nodes_images wants a whole server: test_browser.py
# asks one.
EXTRAS = ("custom_sampler", "latent", "preview_any", "upscale_model", "video")
# Files that a person brings, or that the graph's own text names.
OWN_FILES = {"example.png", "video.mp4"}

each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
each_file = pytest.mark.parametrize("path", [*WORKFLOWS, *BLUEPRINTS], ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def graphs(
    workflow: dict[str, Any],
) -> list[tuple[list[Any], dict[int, tuple[int, int, int, int, str]], dict[str, Any]]]:
    """(nodes, links by id as (origin, slot, target, slot, type), the graph itself) of the graph and
    of each subgraph within.
    """
    found = [
        (workflow["nodes"], {link[0]: tuple(link[1:]) for link in workflow["links"]}, workflow)
    ]
    for graph in workflow.get("definitions", {}).get("subgraphs", []):
        keys = ("origin_id", "origin_slot", "target_id", "target_slot", "type")
        found.append(
            (
                graph["nodes"],
                {link["id"]: tuple(link[key] for key in keys) for link in graph["links"]},
                graph,
            )
        )
    return found


def all_nodes(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    """Every node but the one that stands for a subgraph."""
    subgraphs = {graph["id"] for graph in workflow.get("definitions", {}).get("subgraphs", [])}
    return [
        node for nodes, _, _ in graphs(workflow) for node in nodes if node["type"] not in subgraphs
    ]


def widgets(node: dict[str, Any]) -> dict[str, Any]:
    """Widget values by name. A seed is followed by what becomes of it, which is no input."""
    names = []
    for given in node["inputs"]:
        if "widget" in given and given["type"] != "IMAGEUPLOAD":
            names.append(given["name"])
            if given["name"] == "seed":
                names.append("control_after_generate")
    return dict(zip(names, node.get("widgets_values", []), strict=False))


def as_api(workflow: dict[str, Any]) -> dict[str, Any]:
    """The API form of a workflow in the UI's format: inputs that are widgets hold their values in
    order, the others are links. A node that is passed over hands on its first input of the type.
    """
    links = {link[0]: link for link in workflow["links"]}
    nodes = {node["id"]: node for node in workflow["nodes"]}

    def origin(number: int) -> list[Any]:
        _, start, slot, _, _, kind = links[number]
        if nodes[start]["mode"] != PASSED_OVER:
            return [str(start), slot]
        return origin(next(i["link"] for i in nodes[start]["inputs"] if i["type"] == kind))

    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] != "MarkdownNote" and node["mode"] != PASSED_OVER:
            inputs = widgets(node)
            for given in node["inputs"]:
                if given["link"] is not None:
                    inputs[given["name"]] = origin(given["link"])
            prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def version() -> str:
    match = re.search(
        r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M
    )
    assert match
    return match[1]


def test_all_that_are_promised_are_there() -> None:
    assert {path.stem for path in WORKFLOWS} >= PROMISED
    assert [path.stem for path in BLUEPRINTS] == ["OSDFace", "OSEDiff"]


def test_the_basic_workflow_is_the_graph_that_is_tested() -> None:
    """Its nodes may have other numbers there: they are compared by kind, and each kind is in it
    once.
    """

    def by_kind(prompt: dict[str, Any]) -> dict[str, Any]:
        kinds = {key: node["class_type"] for key, node in prompt.items()}
        assert len(set(kinds.values())) == len(prompt)
        return {
            node["class_type"]: {
                k: [kinds[v[0]], v[1]] if isinstance(v, list) else v
                for k, v in node["inputs"].items()
            }
            for node in prompt.values()
        }

    assert by_kind(as_api(read(ROOT / "workflows" / "osdface_basic.json"))) == by_kind(
        read(ROOT / "tests" / "osdface_basic_api.json")
    )


@each_file
def test_the_format_is_what_the_frontend_saves(path: Path) -> None:
    workflow = read(path)
    assert workflow["version"] == 0.4
    assert workflow["last_node_id"] >= max(node["id"] for node in workflow["nodes"])
    assert workflow["last_link_id"] >= max((link[0] for link in workflow["links"]), default=0)


@each_file
def test_every_link_has_both_its_ends(path: Path) -> None:
    for nodes, links, graph in graphs(read(path)):
        by_id = {node["id"]: node for node in nodes}
        assert len(by_id) == len(nodes)
        inside = {
            (node["id"], i): given["link"]
            for node in nodes
            for i, given in enumerate(node["inputs"])
            if given["link"] is not None
        }
        for number, (origin, out_slot, target, in_slot, kind) in links.items():
            out = (
                graph["inputs"][out_slot]
                if origin == FROM_OUTSIDE
                else by_id[origin]["outputs"][out_slot]
            )
            into = (
                graph["outputs"][in_slot]
                if target == TO_OUTSIDE
                else by_id[target]["inputs"][in_slot]
            )
            assert number in (out.get("links") or out.get("linkIds") or [])
            assert (
                number in into["linkIds"]
                if target == TO_OUTSIDE
                else inside.pop((target, in_slot)) == number
            )
            assert kind in (out["type"], "*")
            assert into["type"] == kind
        assert not inside
        for node in nodes:
            assert {number for out in node["outputs"] for number in out["links"] or []} <= set(
                links
            )


@each_file
def test_every_node_names_the_pack_that_brings_it(path: Path) -> None:
    ours = json.loads((ROOT / "tests" / "interfaces.json").read_text())
    for node in all_nodes(read(path)):
        properties = node["properties"]
        assert (properties["cnr_id"], properties["ver"]) == (
            ("osdface", version()) if node["type"] in ours else ("comfy-core", "0.3.64")
        )


@each_file
def test_our_nodes_have_the_inputs_and_outputs_of_today(path: Path) -> None:
    ours = json.loads((ROOT / "tests" / "interfaces.json").read_text())
    for node in all_nodes(read(path)):
        if node["type"] in ours:
            inputs, outputs = ours[node["type"]]
            assert sorted(given["name"] for given in node["inputs"]) == sorted(inputs)
            assert [[out["name"], out["type"]] for out in node["outputs"]] == outputs
            # Values are told apart by their place alone: they stand in the inputs' order.
            shown = [given["name"] for given in node["inputs"] if "widget" in given]
            assert shown == [name for name in inputs if name in shown]
            assert len(node.get("widgets_values", [])) == len(shown)


@each_file
def test_files_that_the_frontend_can_offer_have_an_address(path: Path) -> None:
    for node in all_nodes(read(path)):
        models = {model["name"]: model for model in node["properties"].get("models", [])}
        for name in models:
            assert name in node["widgets_values"]
            assert re.fullmatch(
                r"https://huggingface\.co/[\w-]+/[\w.-]+/resolve/main/" + re.escape(name),
                models[name]["url"],
            )
            if name in CATALOGUE.by_name:
                hub = (
                    models[name]["url"]
                    .removeprefix("https://huggingface.co/")
                    .replace("/resolve/main", "")
                )
                assert f"hub:{hub}" in CATALOGUE.by_name[name].addresses
                assert models[name]["directory"] == CATALOGUE.by_name[name].folder
        for value in node.get("widgets_values", []):
            hub_has = value in CATALOGUE.by_name and any(
                address.startswith("hub:") for address in CATALOGUE.by_name[value].addresses
            )
            if hub_has or (node["type"] == "UpscaleModelLoader"):
                assert value in models, f"{value} of {node['type']} could be offered for download"


@each_workflow
def test_a_note_says_what_it_needs(path: Path) -> None:
    workflow = read(path)
    (note,) = [
        node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "MarkdownNote"
    ]
    assert note.startswith("## ")
    assert len(note.split()) < 400, "more than two minutes"
    for _, name in re.findall(r"`(\w+)/([\w.-]+\.(?:safetensors|pth|ckpt))`", note):
        assert name in CATALOGUE.by_name or name in json.dumps(workflow["nodes"])
    for node in workflow["nodes"]:
        for value in widgets(node).values():
            if isinstance(value, str) and re.search(r"\.(safetensors|pth|ckpt)$", value):
                assert value in note, f"{value} of {node['type']} is not told of"


def second_ways(workflow: dict[str, Any]) -> set[int]:
    """The nodes in frames whose number ends in b, such as 2b; the note tells of them."""
    frames = [group for group in workflow["groups"] if re.match(r"\d+b\. ", group["title"])]
    (note,) = [
        node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "MarkdownNote"
    ]
    assert all(f"*{frame['title'].partition('.')[0]}*" in note for frame in frames)
    return {
        node["id"]
        for node in workflow["nodes"]
        for x, y, width, height in [frame["bounding"] for frame in frames]
        if x < node["pos"][0] < x + width and y < node["pos"][1] < y + height
    }


@each_workflow
def test_nothing_in_it_is_of_one_machine_or_of_chance(path: Path) -> None:
    workflow = read(path)
    text = path.read_text(encoding="utf-8")
    assert not re.search(r'"(/|[A-Za-z]:\\\\|~/|file:)', text)
    for node in workflow["nodes"]:
        assert widgets(node).get("control_after_generate", "fixed") == "fixed"
        # Where there are two ways, one is passed over until a person takes it.
        assert node["mode"] == (PASSED_OVER if node["id"] in second_ways(workflow) else 0)


@each_workflow
def test_it_opens_readable_and_nothing_lies_on_anything(path: Path) -> None:
    workflow = read(path)
    scale, offset = workflow["extra"]["ds"]["scale"], workflow["extra"]["ds"]["offset"]
    assert READABLE < scale <= 1
    boxes = {}
    for node in workflow["nodes"]:
        (x, y), (width, height) = node["pos"], node["size"]
        boxes[node["id"]] = (x, y - TITLE, x + width, y + height)
    for (one, a), (other, b) in combinations(boxes.items(), 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, f"nodes {one} and {other} overlap"
    # Newer frontends have a sidebar of 59 px and bars of 93 px over the canvas.
    assert 60 < (min(box[0] for box in boxes.values()) + offset[0]) * scale < 120
    assert 94 < (min(box[1] for box in boxes.values()) + offset[1]) * scale < 120


@each_workflow
def test_its_picture_shows_something(path: Path) -> None:
    with Image.open(path.with_suffix(".jpg")) as picture:
        pixels = np.asarray(picture.convert("L"), dtype=float)
    # The template browser shows squares of 256 px.
    assert pixels.shape[0] == pixels.shape[1] >= 256
    assert pixels.std() > 15
    assert path.with_suffix(".jpg").stat().st_size < 150_000


@pytest.mark.parametrize(
    ("name", "chain", "inputs", "outputs"),
    [
        (
            "OSDFace",
            ["FaceDetectAlign", "OSDFaceVRE", "OSDFaceOneStep", "FacePasteBack"],
            {"image", "model", "vae", "detector", "select", "min_size", "strength", "mask_type"},
            ["image", "mask", "report"],
        ),
        (
            "OSEDiff",
            ["CLIPTextEncode", "OSEDiffUpscale"],
            {"image", "model", "clip", "vae", "text", "upscale", "tile", "color_match"},
            ["image"],
        ),
    ],
)
def test_a_blueprint_holds_the_chain_and_offers_its_ends(
    name: str, chain: list[str], inputs: set[str], outputs: list[str]
) -> None:
    workflow = read(ROOT / "subgraphs" / f"{name}.json")
    (node,), (graph,) = workflow["nodes"], workflow["definitions"]["subgraphs"]
    assert node["type"] == graph["id"]
    assert node["title"] == graph["name"] == name
    assert [inner["type"] for inner in graph["nodes"]] == chain
    assert {given["name"] for given in graph["inputs"]} == inputs
    assert [out["name"] for out in graph["outputs"]] == outputs
    for given, shown in zip(graph["inputs"], node["inputs"], strict=True):
        assert (given["name"], given["type"]) == (shown["name"], shown["type"])


@pytest.mark.host
@each_file
def test_values_fit_the_host(path: Path, host: Any, comfyui: Path, newer: bool) -> None:
    """Every widget is one that the host's node has, and its value is within what the node takes."""
    import nodes

    for extra in EXTRAS:
        if f"nodes_{extra}" not in _loaded:
            assert asyncio.run(
                nodes.load_custom_node(
                    str(comfyui / "comfy_extras" / f"nodes_{extra}.py"),
                    module_parent="comfy_extras",
                )
            )
            _loaded.add(f"nodes_{extra}")
    for node in all_nodes(read(path)):
        if node["type"] in ("MarkdownNote", "ImageStitch"):
            continue
        takes = host.nodes[node["type"]].INPUT_TYPES()
        optional = takes.get("optional", {})
        takes = takes["required"] | optional
        values = widgets(node)
        named = {given["name"] for given in node["inputs"]} - {"upload"}
        # Newer hosts' nodes may take more, which has a value of its own.
        assert named <= set(takes), node["type"]
        for name in set(takes) - named:
            assert newer, (node["type"], name)
            assert name in optional or "default" in takes[name][1], (node["type"], name)
        for name, value in values.items():
            if name == "control_after_generate":
                continue
            kind, *rest = takes[name]
            options = rest[0] if rest else {}
            menu = (
                kind
                if isinstance(kind, list)
                else options.get("options")
                if kind == "COMBO"
                # Newer hosts' menus whose options bring inputs with them.
                else [option["key"] for option in options["options"]]
                if kind == "COMFY_DYNAMICCOMBO_V3"
                else None
            )
            if menu is not None:
                assert (
                    value in menu
                    or value in CATALOGUE.by_name
                    or value in OWN_FILES
                    or node["type"] == "UpscaleModelLoader"
                ), (node["type"], name)
            elif kind in ("INT", "FLOAT"):
                assert options.get("min", -np.inf) <= value <= options.get("max", np.inf), (
                    node["type"],
                    name,
                    value,
                )
            else:
                assert isinstance(value, {"STRING": str, "BOOLEAN": bool}[kind]), (
                    node["type"],
                    name,
                    value,
                )


_loaded: set[str] = set()
