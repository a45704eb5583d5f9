"""The translations are complete, say what the schemas say, and can be read by the frontend."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = ("en", "zh", "ja", "ko", "fr", "de", "es")
TRANSLATIONS = LANGUAGES[1:]
INTERFACES = json.loads((ROOT / "tests" / "interfaces.json").read_text(encoding="utf-8"))
# Words of the widgets' menus, which the frontend does not translate.
OPTIONS = (
    "parsing",
    "ellipse",
    "box",
    "mean-std",
    "wavelet",
    "none",
    "builtin",
    "resnet50",
    "mobile0.25",
)


def read(language: str, name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(
        (ROOT / "locales" / language / f"{name}.json").read_text(encoding="utf-8")
    )
    return loaded


def texts(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from texts(inner, (*path, key))
    else:
        yield path, value


def shape(value: Any) -> set[tuple[str, ...]]:
    return {path for path, _ in texts(value)}


def test_there_is_a_folder_for_each_language() -> None:
    assert {path.name for path in (ROOT / "locales").iterdir()} == set(LANGUAGES)
    for language in LANGUAGES:
        assert {path.name for path in (ROOT / "locales" / language).iterdir()} == {
            "nodeDefs.json",
            "main.json",
            "settings.json",
        }


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_input_and_output_is_there_and_no_other(language: str) -> None:
    wanted: set[tuple[str, ...]] = set()
    for node, (inputs, outputs) in INTERFACES.items():
        wanted |= {(node, "display_name"), (node, "description")}
        wanted |= {(node, "inputs", name, part) for name in inputs for part in ("name", "tooltip")}
        wanted |= {
            (node, "outputs", str(i), part)
            for i in range(len(outputs))
            for part in ("name", "tooltip")
        }
    assert shape(read(language, "nodeDefs")) == wanted


@pytest.mark.parametrize("language", LANGUAGES)
def test_texts_are_whole_and_plain(language: str) -> None:
    for name in ("nodeDefs", "main", "settings"):
        for path, text in texts(read(language, name)):
            assert text and text == text.strip(), path
            # The frontend's messages give these a meaning: placeholders, links and plurals.
            assert not set(text) & set("{}@|"), path
            assert "\ufffd" not in text, path


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_labels_of_one_node_differ(language: str) -> None:
    for node, entry in read(language, "nodeDefs").items():
        for side in ("inputs", "outputs"):
            labels = [slot["name"] for slot in entry.get(side, {}).values()]
            assert len(labels) == len(set(labels)), node


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_translations_keep_numbers_files_options_and_names(language: str) -> None:
    english, own = read("en", "nodeDefs"), read(language, "nodeDefs")
    names = {english[node]["display_name"]: own[node]["display_name"] for node in english}
    translated = dict(texts(own))
    for path, source in texts(english):
        text = translated[path]
        if path[-1] == "name":
            continue
        assert text != source, path
        if path[-1] == "display_name":
            assert ("OSDFace" in text) == ("OSDFace" in source), path
            continue
        kept = set(re.findall(r"(?<![\w.])\d+(?:[.,-]\d+)*", source)) | set(
            re.findall(r'"([^"]+)"', source)
        )
        kept |= set(re.findall(r"\w+/\w+|\w+\.(?:pth|safetensors)", source))
        kept |= {
            option
            for option in OPTIONS
            if re.search(rf"(?:^|[.;] ){re.escape(option)}\b[: ]|; {option} ", source)
        }
        kept |= {names[name] for name in names if name in source}
        # An input that the text names goes by the label which is on the screen.
        inputs = own[path[0]].get("inputs", {})
        kept |= {
            inputs[name]["name"]
            for name in inputs
            if "_" in name and re.search(rf"\b{name}\b", source)
        }
        missing = sorted(part for part in kept if part not in text)
        assert not missing, (path, missing)


def _settings() -> dict[str, dict[str, str]]:
    """What web/osdface.js gives the frontend, by id."""
    source = (ROOT / "web" / "osdface.js").read_text(encoding="utf-8")
    found = {}
    for block in re.findall(r"\{\s*id: \"[^}]+\}", source):
        fields = dict(re.findall(r'^\s*(\w+): "([^"]*)"', block, re.M))
        found[fields["id"]] = fields | {
            "categories": re.search(r"category: \[([^\]]*)\]", block)[1]
        }  # type: ignore[index]
    return found


def test_the_setting_is_named_in_every_language() -> None:
    settings = _settings()
    wanted = {
        id.replace(".", "_"): {part: fields[part] for part in ("name", "tooltip")}
        for id, fields in settings.items()
    }
    assert read("en", "settings") == wanted
    for language in TRANSLATIONS:
        assert shape(read(language, "settings")) == shape(wanted)
        for path, text in texts(read(language, "settings")):
            assert text != wanted[path[0]][path[1]]
            assert all(
                kept in text
                for kept in ("SHA-256", "install.py")
                if kept in wanted[path[0]][path[1]]
            )


@pytest.mark.parametrize("language", LANGUAGES)
def test_categories_are_named(language: str) -> None:
    main = read(language, "main")
    assert shape(main) == shape(read("en", "main"))
    for fields in _settings().values():
        # The last part of a category is the place of the setting itself, which is not shown.
        assert set(json.loads(f"[{fields['categories']}]")[:-1]) == set(main["settingsCategories"])
    # ComfyUI-Manager installs into a folder of the project's name, which is what the template
    # browser shows.
    assert f'name = "{next(iter(main["templateWorkflows"]["category"]))}"' in (
        ROOT / "pyproject.toml"
    ).read_text(encoding="utf-8")


@pytest.mark.host
def test_english_is_what_the_schemas_say(host: Any) -> None:
    english = {}
    for node in INTERFACES:
        schema = host.nodes[node].define_schema()
        english[node] = {"display_name": schema.display_name, "description": schema.description}
        if schema.inputs:
            english[node]["inputs"] = {
                item.id: {"name": item.id, "tooltip": item.tooltip} for item in schema.inputs
            }
        english[node]["outputs"] = {
            str(i): {"name": output.display_name, "tooltip": output.tooltip}
            for i, output in enumerate(schema.outputs)
        }
        assert schema.category in read("en", "main")["nodeCategories"]
    assert all(text for _, text in texts(english)), "every input and output has a tooltip"
    assert read("en", "nodeDefs") == english


@pytest.mark.host
def test_every_node_of_the_pack_is_known_to_the_translations(host: Any) -> None:
    ours = {
        name
        for name, node in host.nodes.items()
        if getattr(node, "RELATIVE_PYTHON_MODULE", "") == "custom_nodes.osdface"
    }
    assert ours == set(INTERFACES)
