"""What the Comfy Registry gets: the archive, its metadata and its pictures."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pathspec import GitIgnoreSpec  # mypy brings it
from PIL import Image

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

from osdface_core.catalogue import CATALOGUE
from osdface_core.diffir.files import BUILTIN_INPAINTER
from osdface_core.faces.files import BUILTIN_DETECTOR, BUILTIN_PARSER
from osdface_core.osdface import builtin
from osdface_core.weights.catalogue import HUB

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
VERSION = PYPROJECT["project"]["version"]
# The built-in model is the largest part; the whole archive is fetched at every update.
LARGEST_FILE, LARGEST_ARCHIVE = 16 * 1024**2, 32 * 1024**2
WEIGHTS = {".ckpt", ".pth", ".pt", ".bin", ".onnx", ".pkl", ".pickle", ".npy", ".npz"}


def archive() -> list[str]:
    """The files of the archive as `comfy node pack` makes it: those that git tracks without those
    that .comfyignore names.
    """
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    patterns = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    try:
        tracked = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git checkout: the archive is made from the files that git tracks")
    for pattern in patterns:
        assert any(GitIgnoreSpec.from_lines([pattern]).match_files(tracked)), (
            f".comfyignore names {pattern}, which is not there"
        )
    ignored = set(GitIgnoreSpec.from_lines(patterns).match_files(tracked))
    return [path for path in tracked if path not in ignored and (ROOT / path).exists()]


def test_the_archive_holds_what_a_user_needs_and_no_more() -> None:
    files = archive()
    kept = {path.split("/")[0] for path in files}
    assert kept >= {
        "__init__.py",
        "nodes",
        "osdface_core",
        "web",
        "locales",
        "workflows",
        "docs",
        "install.py",
        "pyproject.toml",
    }
    assert kept >= {"LICENSE", "README.md", "CHANGELOG.md", "requirements.txt"}
    assert not kept & {"tests", "benchmarks", ".ci", ".github", "assets", "requirements-dev.txt"}
    sources = [
        str(path.relative_to(ROOT))
        for name in ("nodes", "osdface_core")
        for path in (ROOT / name).rglob("*.py")
    ]
    tracked = subprocess.run(
        ["git", "ls-files", *sources], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert not set(tracked) - set(files), "a module of the pack is left out"


def test_the_archive_is_small_and_holds_no_pickle_link_or_bytecode() -> None:
    files = [ROOT / path for path in archive()]
    sizes = {path: path.stat().st_size for path in files}
    assert not [path for path, size in sizes.items() if size > LARGEST_FILE]
    assert sum(sizes.values()) < LARGEST_ARCHIVE
    assert not [path for path in files if path.suffix in WEIGHTS | {".pyc"} or path.is_symlink()]


def test_the_built_in_model_is_part_of_the_archive() -> None:
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in (
            builtin.AUTOENCODER,
            builtin.UNET,
            builtin.VRE,
            BUILTIN_DETECTOR,
            BUILTIN_PARSER,
            BUILTIN_INPAINTER,
        )
    }
    assert not wanted - set(archive())


@pytest.mark.host
def test_a_server_loads_the_nodes_from_the_archive_alone(comfyui: Path, tmp_path: Path) -> None:
    pack = tmp_path / "custom_nodes" / "osdface"
    for path in archive():
        (pack / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, pack / path)
    (tmp_path / "user").mkdir()
    command = [
        sys.executable,
        "main.py",
        "--cpu",
        "--quick-test-for-ci",
        "--disable-api-nodes",
        "--base-directory",
        str(tmp_path),
    ]
    command += [
        "--user-directory",
        str(tmp_path / "user"),
        "--database-url",
        f"sqlite:///{tmp_path}/user/t.db",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        command,
        cwd=comfyui,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    loaded = [line for line in run.stderr.splitlines() if line.endswith(str(pack))]
    assert len(loaded) == 1 and "IMPORT FAILED" not in loaded[0], run.stderr
    assert "Traceback" not in run.stderr


def test_the_readme_shows_no_picture_that_the_archive_lacks() -> None:
    files = set(archive())
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text) + re.findall(
        r'<img[^>]+src="([^"]+)"', text
    )
    assert not [name for name in pictures if not name.startswith("https://") and name not in files]


def test_python_files_can_be_shown_on_windows() -> None:
    wrong = {}
    for path in ROOT.rglob("*.py"):
        if not any(part.startswith(".") for part in path.relative_to(ROOT).parts):
            try:
                path.read_text(encoding="utf-8").encode("cp1252")
            except UnicodeEncodeError as error:
                wrong[path.name] = error.object[error.start]
    assert not wrong


def test_devices_and_layers_are_the_hosts() -> None:
    """comfy-test's rules: devices, half precision and the layers of networks come from ComfyUI.
    Training, which it never runs, imports its layers by name.
    """
    forbidden = re.compile(
        r"\.cuda\s*\(|\.to\s*\(\s*[\"']cuda|torch\.(?:cuda\.)?(?:amp\.)?autocast"
        r"|(?<![\w.])(?:torch\.)?nn\.(?:Linear|Conv\w*|LayerNorm|GroupNorm|Embedding)\s*\("
    )
    for name in ("nodes", "osdface_core", "tests", "benchmarks"):
        for path in (ROOT / name).rglob("*.py"):
            lines = path.read_text(encoding="utf-8").splitlines()
            assert not [
                line
                for line in lines
                if forbidden.search(line) and not line.lstrip().startswith("#")
            ], path


def test_the_browser_extension_can_clash_with_no_other() -> None:
    for path in (ROOT / "web").glob("*.js"):
        names = re.findall(
            r'registerExtension\(\{\s*name: "([^"]+)"', path.read_text(encoding="utf-8")
        )
        assert names and all(name.startswith("osdface.") for name in names)


def test_one_version_everywhere() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", VERSION)
    newest = re.findall(
        r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$",
        (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        re.M,
    )
    assert newest[0] == VERSION
    assert newest == sorted(
        newest, key=lambda version: [int(n) for n in version.split(".")], reverse=True
    )


def _nodes(graph: Any) -> list[dict[str, Any]]:
    nodes = list(graph.get("nodes", []))
    for inner in graph.get("definitions", {}).get("subgraphs", []):
        nodes += _nodes(inner)
    return nodes


@pytest.mark.parametrize(
    "path",
    [p for name in ("workflows", "subgraphs") for p in sorted((ROOT / name).glob("*.json"))],
    ids=lambda path: path.stem,
)
def test_workflows_name_the_version_that_they_are_made_with(path: Path) -> None:
    versions = {
        node["properties"].get("ver")
        for node in _nodes(json.loads(path.read_text(encoding="utf-8")))
        if node.get("properties", {}).get("cnr_id") == PYPROJECT["project"]["name"]
    }
    assert versions == {VERSION}, f"set `ver` of our nodes to {VERSION}"


def test_metadata_that_the_registry_wants() -> None:
    project, comfy = PYPROJECT["project"], PYPROJECT["tool"]["comfy"]
    assert (
        re.fullmatch(r"[a-z][a-z0-9_-]{0,98}", project["name"]) and "comfy" not in project["name"]
    )
    assert (
        (ROOT / project["license"]["file"])
        .read_text(encoding="utf-8")
        .lstrip()
        .startswith("GNU GENERAL PUBLIC LICENSE")
    )
    assert project["dependencies"] == []
    assert comfy["PublisherId"] and comfy["DisplayName"]
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    # Beside WEB_DIRECTORY it would serve web/ twice.
    assert "web" not in comfy


def test_every_address_is_of_one_repository() -> None:
    repository = PYPROJECT["project"]["urls"]["Repository"]
    assert re.fullmatch(r"https://github\.com/[\w-]+/[\w.-]+", repository)
    assert all(url.startswith(repository) for url in PYPROJECT["project"]["urls"].values())
    raw = repository.replace("https://github.com/", "https://raw.githubusercontent.com/") + "/main/"
    for name in ("Icon", "Banner"):
        assert (ROOT / PYPROJECT["tool"]["comfy"][name].removeprefix(raw)).is_file()


def test_icon_and_banner_have_the_registrys_shape() -> None:
    with (
        Image.open(ROOT / "assets" / "icon.png") as icon,
        Image.open(ROOT / "assets" / "banner.png") as banner,
    ):
        assert icon.width == icon.height <= 400
        assert banner.width * 9 == banner.height * 21


def test_models_are_the_catalogues() -> None:
    for model in PYPROJECT["tool"]["comfy"]["Models"]:
        _, folder, name = model["location"].split("/")
        entry = CATALOGUE.by_name[name]
        assert folder == entry.folder
        owner, repository, file = (
            entry.addresses[0].removeprefix(HUB).split("/", 2)
            if entry.addresses[0].startswith(HUB)
            else ("", "", "")
        )
        hub = f"https://huggingface.co/{owner}/{repository}/resolve/main/{file}"
        assert model["model_url"] == (hub if owner else entry.addresses[0])


def test_publishing_stops_outside_of_the_named_repository() -> None:
    steps = (ROOT / ".github" / "workflows" / "publish_action.yml").read_text(encoding="utf-8")
    guard = re.search(r"run: (grep .+)", steps)
    assert guard and steps.index(guard[0]) < steps.index("publish-node-action")
    named = PYPROJECT["project"]["urls"]["Repository"].removeprefix("https://github.com/")
    for repository, code in ((named, 0), ("someone/else", 1)):
        assert (
            subprocess.run(
                ["bash", "-c", guard[1]],
                cwd=ROOT,
                env={"GITHUB_REPOSITORY": repository},
                check=False,
            ).returncode
            == code
        )


def test_tools_can_read_the_nodes_off_the_source() -> None:
    """comfy-test's coverage does, and whatever looks for the pack of a missing node without running
    it: by plain text.
    """
    text = (ROOT / "nodes" / "__init__.py").read_text(encoding="utf-8")
    table = re.search(r"^NODE_CLASS_MAPPINGS = \{([^}]*)\}", text, re.M)
    assert table
    named = dict(re.findall(r'"(\w+)": (\w+),', table[1]))
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "nodes").glob("*.py"))
    declared = re.findall(r'node_id="(\w+)"', sources)
    assert sorted(named) == sorted(declared)
    assert all(name == kind for name, kind in named.items())
    used = {
        node["type"]
        for path in (ROOT / "workflows").glob("*.json")
        for node in _nodes(json.loads(path.read_text(encoding="utf-8")))
    }
    assert set(named) <= used
    # In the root it would make ComfyUI take the pack for one of the old kind.
    assert "NODE_CLASS_MAPPINGS" not in (ROOT / "__init__.py").read_text(encoding="utf-8")
