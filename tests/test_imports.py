"""The contracts of pyproject.toml on who imports whom: kept, and broken by what must not be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tests" / "lint_imports.sh"


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(SCRIPT), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PATH": path},
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in ("osdface_core", "nodes", "osdface_webui"):
        ignored = shutil.ignore_patterns("*.safetensors", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("__init__.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_the_contracts_are_kept() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("osdface_core/pictures/color.py", "from ..faces import face"),
        ("osdface_core/sd21/schedule.py", "from ..osdface import restore"),
        ("osdface_core/sd21/tiles.py", "from ..faces import paste"),
        ("osdface_core/weights/store.py", "from .. import catalogue"),
        ("osdface_core/faces/detect.py", "import folder_paths"),
        ("osdface_core/osdface/restore.py", "import diffusers"),
        ("osdface_core/cli/job.py", "from ...nodes import inputs"),
        ("nodes/comfy/files.py", "from ..inputs import FACES"),
        ("osdface_webui/job.py", "from osdface_core.cli import restorer"),
    ],
)
def test_an_import_that_goes_up_is_found(module: str, line: str, copy: Path) -> None:
    with (copy / module).open("a") as file:
        file.write(f"\n{line}\n")
    done = lint(copy)
    assert done.returncode != 0
    assert "BROKEN" in done.stdout
