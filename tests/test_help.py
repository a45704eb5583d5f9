"""The help pages: one for each node, true to its schema and to the errors that users see, with
pictures that are there.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "web" / "docs"
INTERFACES = json.loads((ROOT / "tests" / "interfaces.json").read_text(encoding="utf-8"))
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in DOCS.glob("*.md")}
LARGEST_PICTURE = 150_000


def listed(page: str, heading: str) -> dict[str, str]:
    """The entries of a section's list, by the name in front."""
    section = page.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return dict(re.findall(r"^- `(\w+)`(.*)$", section, re.M))


def pictures(page: str) -> list[tuple[str, str]]:
    return re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page)


def messages() -> list[str]:
    """Every text that the pack's code holds, where something is put in a line break."""
    found = []
    for folder in ("nodes", "osdface_core"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.append(
                        "".join(
                            part.value if isinstance(part, ast.Constant) else "\n"
                            for part in node.values
                        )
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def test_every_node_has_a_page_and_no_page_is_left_over() -> None:
    assert set(PAGES) == set(INTERFACES)


@pytest.mark.parametrize("node", INTERFACES)
def test_a_page_lists_the_nodes_inputs_and_outputs(node: str) -> None:
    inputs, outputs = INTERFACES[node]
    page = PAGES[node]
    assert list(listed(page, "Inputs")) == inputs
    assert list(listed(page, "Outputs")) == [name for name, _ in outputs]
    assert "\n## What can go wrong\n" in page


@pytest.mark.parametrize("node", INTERFACES)
def test_pictures_are_there_small_and_described(node: str) -> None:
    shown = pictures(PAGES[node])
    assert shown
    for description, name in shown:
        assert len(description) > 20
        # A name alone is taken from /extensions/<folder>/docs/, whatever the folder is called.
        assert re.fullmatch(r"[a-z_]+\.(webp|png|jpg)", name)
        assert (DOCS / name).stat().st_size < LARGEST_PICTURE
        with Image.open(DOCS / name) as picture:
            picture.load()
            assert 600 <= picture.width <= 1000, "readable in the side bar, small to fetch"


def test_no_picture_is_left_over() -> None:
    used = {name for page in PAGES.values() for _, name in pictures(page)}
    assert {path.name for path in DOCS.iterdir() if path.suffix != ".md"} == used


@pytest.mark.parametrize("node", INTERFACES)
def test_errors_are_quoted_as_the_code_says_them(node: str) -> None:
    said = messages()
    quoted = re.findall(r'^- \*\*"([^"]+)"\*\*', PAGES[node], re.M)
    assert not [quote for quote in quoted if not any(quote in message for message in said)]


@pytest.mark.parametrize("node", INTERFACES)
def test_nodes_are_called_by_their_names(node: str) -> None:
    english = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    names = {entry["display_name"] for entry in english.values()}
    assert PAGES[node].splitlines()[0].removeprefix("# ") in names
    # What looks like one of our nodes' names is one.
    for mentioned in re.findall(r"\*((?:OSDFace|Face) [A-Z][^*]+)\*", PAGES[node]):
        assert any(name == mentioned or name.startswith(f"{mentioned} (") for name in names), (
            mentioned
        )


@pytest.mark.host
@pytest.mark.parametrize("node", INTERFACES)
def test_defaults_and_menus_are_the_schemas(host: Any, node: str) -> None:
    entries = listed(PAGES[node], "Inputs")
    assert PAGES[node].startswith(f"# {host.nodes[node].define_schema().display_name}\n")
    for item in host.nodes[node].define_schema().inputs:
        text = entries[item.id]
        default = getattr(item, "default", None)
        if default is not None:
            shown = (
                {True: "on", False: "off"}[default] if isinstance(default, bool) else str(default)
            )
            assert text.startswith(f" ({shown}): "), (item.id, default)
        else:
            assert text.startswith(": ")
        assert ("Optional." in text) == bool(item.optional), item.id
        if item.io_type == "COMBO" and not item.id.endswith("_name"):
            missing = [
                option for option in item.options if f"*{option}*" not in text and option != default
            ]
            assert not missing, (item.id, missing)
