"""The shipped workflow is the graph that the server test runs, and names who made each node."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def as_api(workflow: dict[str, Any]) -> dict[str, Any]:
    """The API form of a workflow in the UI's format: inputs that are widgets hold their values in order, the others are links."""
    links = {link[0]: link for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        values = iter(node.get("widgets_values", []))
        inputs = {}
        for given in node["inputs"]:
            if given["type"] == "IMAGEUPLOAD":
                continue
            value = next(values) if "widget" in given else None
            if given["link"] is not None:
                _, source, slot, *_ = links[given["link"]]
                value = [str(source), slot]
            if value is not None:
                inputs[given["name"]] = value
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def test_the_basic_workflow_is_the_graph_that_is_tested() -> None:
    workflow = json.loads((ROOT / "workflows" / "osdface_basic.json").read_text())
    assert as_api(workflow) == json.loads((ROOT / "tests" / "osdface_basic_api.json").read_text())
    assert workflow["version"] == 0.4


def test_every_node_names_the_pack_that_brings_it() -> None:
    for path in (ROOT / "workflows").glob("*.json"):
        for node in json.loads(path.read_text())["nodes"]:
            if node["type"] != "MarkdownNote":
                assert node["properties"]["cnr_id"] in ("osdface", "comfy-core")
                assert node["properties"]["ver"]
