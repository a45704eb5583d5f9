"""Packs what benchmarks/on_gpu.sh needs on a machine that reaches nothing: into one ignored folder.

    python -m benchmarks.pack_for_gpu [--comfyui DIR] [--paper DIR] [--out .gpu]
                                      [--python 3.12]

--comfyui: a checkout of ComfyUI. --paper: a checkout of jkwang28/OSDFace; its comparison is left
out without one. --python: the version there. Of both checkouts only Python's and configuration
files are copied. The folder stays out of the repository: it holds other people's work.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What ComfyUI and the released code import and a machine for PyTorch may lack. All are small but
# PyAV, which nothing calls here and a stub stands for.
WHEELS = (
    *("annotated-types", "diffusers", "importlib-metadata", "pydantic", "pydantic-core"),
    *("pydantic-settings", "python-dotenv", "torchsde", "trampoline", "typing-inspection"),
)
COMFYUI = ("comfy", "comfy_api", "comfy_config", "comfy_execution", "app", "utils", "middleware")
KEPT = {".py", ".json", ".yaml", ".toml"}
# Vocabularies of text encoders, which are not loaded, are most of what is left.
LARGEST = 300_000
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
LIMIT = 20 * 1024**2

AV_STUB = '''"""Stands for PyAV: the host imports it, and nothing here reads a film."""

import sys
import types


class _Absent(types.ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


for _name in ("container", "subtitles", "subtitles.stream", "video", "audio", "error"):
    sys.modules[f"{__name__}.{_name}"] = _Absent(f"{__name__}.{_name}")


def __getattr__(name: str) -> object:
    if name.startswith("__"):
        raise AttributeError(name)
    return sys.modules.get(f"{__name__}.{name}") or type(name, (), {})
'''


def copy_sources(source: Path, out: Path, folders: tuple[str, ...] = ()) -> None:
    """Copies a checkout's small sources: of these folders and of its root; of all where none."""
    for path in sorted(source.rglob("*")):
        place = path.relative_to(source)
        inside = len(place.parts) == 1 or not folders or place.parts[0] in folders
        is_hidden = any(part.startswith(".") or part == "__pycache__" for part in place.parts)
        if not inside or is_hidden or not path.is_file() or path.suffix not in KEPT:
            continue
        if path.stat().st_size <= LARGEST:
            (out / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, out / place)


def download_wheels(out: Path, python: str) -> None:
    out.mkdir(parents=True)
    platforms = [flag for name in PLATFORMS for flag in ("--platform", name)]
    for name in WHEELS:
        try:
            wanted = f"{name}=={version(name)}"
        except PackageNotFoundError:
            wanted = name
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *platforms]
        command += ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
        subprocess.run([*command, "-d", str(out), wanted], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(os.environ.get("COMFYUI_PATH", Path.home() / "comfy" / "ComfyUI"))
    parser.add_argument("--comfyui", type=Path, default=default)
    parser.add_argument("--paper", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / ".gpu")
    parser.add_argument("--python", default="3.12")
    given = parser.parse_args()
    shutil.rmtree(given.out, ignore_errors=True)
    copy_sources(given.comfyui, given.out / "comfyui", COMFYUI)
    if given.paper:
        copy_sources(given.paper, given.out / "paper")
    (given.out / "stubs" / "av").mkdir(parents=True)
    (given.out / "stubs" / "av" / "__init__.py").write_text(AV_STUB)
    download_wheels(given.out / "wheels", given.python)
    size = sum(path.stat().st_size for path in given.out.rglob("*") if path.is_file())
    print(f"{given.out}: {size / 1024**2:.1f} MiB")
    if size > LIMIT:
        raise SystemExit(f"more than the {LIMIT / 1024**2:.0f} MiB that may travel")


if __name__ == "__main__":
    main()
