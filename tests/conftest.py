"""Where tests find pictures, stand-in weights and a real ComfyUI; each is skipped over, with the
reason, where it is absent.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


def _folder(variable: str, default: Path, what: str) -> Path:
    folder = Path(os.environ.get(variable, default))
    if not folder.is_dir():
        pytest.skip(f"no {what}: set {variable} to their folder")
    return folder


@pytest.fixture(scope="session")
def data() -> Path:
    return _folder("OSDFACE_TEST_DATA", ROOT.parent / "shared" / "data", "test pictures")


@pytest.fixture(scope="session")
def golden() -> Path:
    return _folder("OSDFACE_TEST_GOLDEN", ROOT.parent / "shared" / "golden", "golden outputs")


@pytest.fixture(scope="session")
def golden_osediff() -> Path:
    default = ROOT.parent / "shared" / "golden" / "osediff"
    return _folder("OSDFACE_TEST_GOLDEN_OSEDIFF", default, "golden outputs of OSEDiff")


def picture(path: Path) -> torch.Tensor:
    """(1,H,W,3) in [0,1], as ComfyUI's Load Image gives it."""
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).float()[None] / 255


@pytest.fixture(scope="session")
def load_picture() -> Callable[[Path], torch.Tensor]:
    return picture


@pytest.fixture(scope="session")
def seeded(golden: Path) -> ModuleType:
    """The maker of the stand-in weights, beside the golden outputs."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("seeded", golden / "seeded.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def stand_ins(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Full-size stand-in weights: the checkpoint and OSDFace's three files, about 4 GB.
    OSDFACE_TEST_STAND_INS names ready ones.
    """
    if ready := os.environ.get("OSDFACE_TEST_STAND_INS"):
        return Path(ready)
    folder = tmp_path_factory.mktemp("stand_ins")
    script = str(golden / "make_weights.py")
    subprocess.run(
        [sys.executable, script, "--out", str(folder), "--only", "checkpoint", "osdface"],
        check=True,
    )
    return folder


def comfyui_path() -> Path | None:
    for candidate in (os.environ.get("COMFYUI_PATH"), Path.home() / "comfy" / "ComfyUI"):
        if candidate and (Path(candidate) / "main.py").is_file():
            return Path(candidate)
    return None


@pytest.fixture(scope="session")
def comfyui() -> Path:
    path = comfyui_path()
    if path is None:
        pytest.skip("no ComfyUI: set COMFYUI_PATH to its folder, or put it at ~/comfy/ComfyUI")
    return path


@pytest.fixture(scope="session")
def populate(stand_ins: Path, data: Path) -> Callable[[Path], None]:
    """Makes a folder a ComfyUI base directory with the pack, the stand-in weights and the real
    detector, all by link.
    """

    def fill(base: Path) -> None:
        models = base / "models"
        folders = [
            f"models/{name}" for name in ("checkpoints", "osdface", "loras", "facedetection")
        ]
        for name in (*folders, "custom_nodes", "input", "output", "user"):
            (base / name).mkdir(parents=True, exist_ok=True)
        (models / "checkpoints" / "v2-1_512-ema-pruned.safetensors").symlink_to(
            stand_ins / "v2-1_512-seeded.safetensors"
        )
        for file in (stand_ins / "osdface").iterdir():
            (models / "osdface" / file.name).symlink_to(file)
        detector = data / "weights" / "detection_mobilenet0.25_Final.pth"
        (models / "facedetection" / detector.name).symlink_to(detector)
        (base / "custom_nodes" / "osdface").symlink_to(ROOT)

    return fill


@pytest.fixture(scope="session")
def host(
    comfyui: Path, populate: Callable[[Path], None], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """ComfyUI in this process on the CPU, our pack loaded by its own loader: `comfy`, `nodes` by
    id, the modules of nodes/comfy by name, and any other by `module`.
    """
    base = tmp_path_factory.mktemp("comfyui")
    populate(base)
    argv, path = sys.argv, list(sys.path)
    sys.argv = [
        "main.py",
        "--cpu",
        "--base-directory",
        str(base),
        "--user-directory",
        str(base / "user"),
    ]
    # ComfyUI's own modules must win over the pack's folders of the same name.
    sys.path[:] = [str(comfyui), *(p for p in path if Path(p).resolve() != ROOT)]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sd
    import folder_paths

    import nodes

    sys.argv = argv
    pack = base / "custom_nodes" / "osdface"
    assert asyncio.run(nodes.load_custom_node(str(pack))), "ComfyUI could not load the pack"
    name = str(pack).replace(".", "_x_")
    classes = nodes.NODE_CLASS_MAPPINGS
    rooms = {
        room: sys.modules[f"{name}.nodes.comfy.{room}"]
        for room in ("files", "networks", "progress", "base_model", "lora", "backbone", "builtin")
    }
    yield SimpleNamespace(
        comfy=comfy,
        folder_paths=folder_paths,
        base=base,
        nodes=classes,
        error=sys.modules[f"{name}.osdface_core.errors"].OSDFaceError,
        module=lambda path: sys.modules[f"{name}.{path}"],
        **rooms,
    )
    sys.path[:] = path


@pytest.fixture(scope="session")
def small_server(
    comfyui: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A real ComfyUI server with the pack, its built-in model, the real small detector, and the
    fuzz's nodes and pictures, as Prompts.
    """
    from benchmarks.fuzz import populate
    from tests.frontend import server
    from tests.prompts import Prompts

    base = tmp_path_factory.mktemp("small_server")
    populate(base, data)
    with server(comfyui, base) as address:
        yield Prompts(address, base)


@pytest.fixture(scope="session")
def checkpoint(host: Any) -> tuple[Any, Any]:
    """(MODEL, VAE) of the full-size stand-in checkpoint, from ComfyUI's own loader."""
    path = host.folder_paths.get_full_path_or_raise(
        "checkpoints", "v2-1_512-ema-pruned.safetensors"
    )
    model, _, vae, _ = host.comfy.sd.load_checkpoint_guess_config(
        path, output_vae=True, output_clip=False
    )
    return model, vae


@pytest.fixture(scope="session")
def truth(golden: Path) -> dict[str, torch.Tensor]:
    """The released code's outputs."""
    from safetensors.torch import load_file

    return load_file(golden / "golden.safetensors")


@pytest.fixture(scope="session")
def crop(golden: Path) -> Callable[[str], torch.Tensor]:
    """The crops that they were made from, by name."""
    return lambda name: picture(golden / "inputs" / f"{name}.png")


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small random networks: a folder in diffusers' layout with Stable Diffusion 2.1's modules, and
    `vre.safetensors`.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from safetensors.torch import save_file

    from osdface_core.diffusers.loading import UNET_CONFIG, VAE_CONFIG
    from osdface_core.osdface.vre import Shape, VisualEmbedder

    folder = tmp_path_factory.mktemp("small_model")
    torch.manual_seed(0)
    narrow = {"block_out_channels": (8, 16, 32, 32), "norm_num_groups": 4}
    UNet2DConditionModel(**UNET_CONFIG | narrow | {"attention_head_dim": 2}).save_pretrained(
        folder / "unet"
    )
    AutoencoderKL(**VAE_CONFIG | narrow).save_pretrained(folder / "vae")
    schedule = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
    }
    DDIMScheduler(**schedule).save_pretrained(folder / "scheduler")
    save_file(
        VisualEmbedder(shape=Shape(32, (1, 1, 1), 32, 64, 32)).state_dict(),
        folder / "vre.safetensors",
    )
    return folder
