"""ComfyUI's own manager installs the pack from git, lists it in a snapshot, takes it away and
brings it back from the snapshot, all without a network.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from tests.frontend import server

pytestmark = [pytest.mark.host, pytest.mark.full, pytest.mark.usefixtures("newer_only")]

ROOT = Path(__file__).resolve().parents[1]
# Addresses that no list of packs holds are installed where its user has allowed that.
CONFIG = """[default]
network_mode = offline
allow_git_url_install = True
use_uv = False
"""
ARGUMENTS = ["--enable-manager", "--enable-manager-legacy-ui"]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address that pyproject.toml names. git finds this checkout there."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout: the manager clones one")
    mirror = tmp_path / "mirror"
    subprocess.run(["git", "clone", "-q", "--depth", "1", ROOT.as_uri(), str(mirror)], check=True)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (address,) = re.findall(r'^Repository = "(.+)"', project, re.M)
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.{mirror.as_uri()}.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", address)
    return address


@pytest.fixture
def copy(comfyui: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ComfyUI of its own: its manager restores a snapshot into the folder that main.py is in, or
    that COMFYUI_PATH names.
    """
    if not importlib.util.find_spec("comfyui_manager"):
        pytest.skip("no ComfyUI-Manager: pip install comfyui-manager")
    folder = tmp_path / "ComfyUI"
    own = {"custom_nodes", "models", "input", "output", "temp", "user", ".git"}

    def left_out(at: str, names: list[str]) -> set[str]:
        return own if Path(at) == comfyui else {"__pycache__"}

    shutil.copytree(comfyui, folder, ignore=left_out)
    for name in ("custom_nodes", "models", "input", "output", "user/__manager"):
        (folder / name).mkdir(parents=True)
    monkeypatch.setenv("COMFYUI_PATH", str(folder))
    (folder / "user" / "__manager" / "config.ini").write_text(CONFIG)
    return folder


@contextmanager
def started(folder: Path) -> Iterator[str]:
    with server(folder, folder, arguments=ARGUMENTS) as address:
        yield f"{address}/v2"


def has_our_nodes(api: str) -> bool:
    answer = requests.get(f"{api.removesuffix('/v2')}/object_info/OSDFaceRestore", timeout=60)
    return "OSDFaceRestore" in answer.json()


def test_installing_a_snapshot_and_uninstalling(repository: str, copy: Path) -> None:
    name = repository.rsplit("/", 1)[1]
    pack = copy / "custom_nodes" / name
    with started(copy) as api:
        assert not has_our_nodes(api)
        install = f"{api}/customnode/install/git_url"
        assert requests.post(install, data=repository, timeout=120).ok
        installed = requests.get(f"{api}/customnode/installed", timeout=60).json()
        assert installed[name]["enabled"]
        assert requests.post(f"{api}/snapshot/save", timeout=60).ok
        (snapshot,) = requests.get(f"{api}/snapshot/getlist", timeout=60).json()["items"]
    # Our installer's one line, which asks for nothing and fetches nothing.
    log = (copy / "log.txt").read_text()
    assert log.count("OSDFace: ") == 1
    assert "install script failed" not in log
    file = copy / "user" / "__manager" / "snapshots" / f"{snapshot}.json"
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=pack, check=True, capture_output=True, text=True
    )
    kept = json.loads(file.read_text())["git_custom_nodes"]
    assert kept == {repository: {"hash": head.stdout.strip(), "disabled": False}}

    with started(copy) as api:
        assert has_our_nodes(api)
        gone = {"id": name, "ui_id": "1", "version": "unknown", "files": [repository]}
        batch = {"batch_id": "1", "uninstall": [gone]}
        answer = requests.post(f"{api}/manager/queue/batch", json=batch, timeout=60)
        assert answer.json() == {"failed": []}
        end = time.monotonic() + 60
        while pack.exists():
            assert time.monotonic() < end
            time.sleep(0.2)
        restore = f"{api}/snapshot/restore"
        assert requests.post(restore, params={"target": snapshot}, timeout=60).ok

    with started(copy) as api:
        assert pack.is_dir()
        assert has_our_nodes(api)
    assert "Restore snapshot done" in (copy / "log.txt").read_text()
