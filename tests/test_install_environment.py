"""What installing the pack does to a ComfyUI environment that holds opencv-python-headless:
nothing, and the pack loads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.frontend import over

ROOT = Path(__file__).resolve().parents[1]


def test_requirements_name_nothing_that_a_host_must_not_get() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.strip() and not line.strip().startswith("#")] == []


@pytest.mark.host
def test_installing_changes_no_package_and_the_pack_loads(comfyui: Path, tmp_path: Path) -> None:
    if "opencv-python-headless" not in {dist.metadata["Name"] for dist in metadata.distributions()}:
        pytest.skip("opencv-python-headless is not installed here")
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = str(
        next(
            path
            for path in (environment / "bin" / "python", environment / "Scripts" / "python.exe")
            if path.exists()
        )
    )
    # The packages at hand, seen as installed: what pip would add or replace would land in the new
    # environment before them.
    site = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[-1])"],
        check=True,
        capture_output=True,
        text=True,
    )
    at_hand = [path for path in sys.path if os.path.basename(path) == "site-packages"]
    (Path(site.stdout.strip()) / "host.pth").write_text("\n".join(at_hand))

    def packages() -> dict[str, str]:
        listed = subprocess.run(
            [python, "-m", "pip", "list", "--format=json"],
            check=True,
            capture_output=True,
            text=True,
        )
        return {package["name"]: package["version"] for package in json.loads(listed.stdout)}

    before = packages()
    assert {"torch", "numpy", "opencv-python-headless"} <= before.keys()

    base = tmp_path / "base"
    for folder in ("custom_nodes", "models", "input", "output", "user"):
        (base / folder).mkdir(parents=True)
    pack = base / "custom_nodes" / "osdface"
    pack.symlink_to(ROOT)
    for line in (pack / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if (wanted := line.split("#")[0].strip()) != "":
            subprocess.run([python, "-m", "pip", "install", wanted], check=True)
    subprocess.run(
        [python, "-m", "pip", "install", "-r", str(pack / "requirements.txt")], check=True
    )
    manager = os.environ | {"COMFYUI_PATH": str(base), "COMFYUI_FOLDERS_BASE_PATH": str(base)}
    done = subprocess.run(
        [python, "install.py"], check=True, capture_output=True, text=True, cwd=pack, env=manager
    )
    assert len(done.stdout.splitlines()) == 1

    assert packages() == before
    flavours = (
        "import importlib.metadata as m; "
        "print(sorted(d for d in m.packages_distributions()['cv2']))"
    )
    assert (
        "['opencv-python-headless']"
        in subprocess.run(
            [python, "-c", flavours], check=True, capture_output=True, text=True
        ).stdout
    )

    command = [python, "main.py", "--quick-test-for-ci", *over(base)]
    started = subprocess.run(
        command, capture_output=True, text=True, cwd=comfyui, check=False, timeout=180
    )
    log = started.stdout + started.stderr
    assert started.returncode == 0, log[-2000:]
    (line,) = [line for line in log.splitlines() if line.strip().endswith(str(pack))]
    assert "IMPORT FAILED" not in line, log[-3000:]
