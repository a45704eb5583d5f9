"""Where tests find pictures, stand-in weights and a real ComfyUI; each is skipped over, with the
reason, where it is absent.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
# One of several that run the tests at once: `pytest -n 2`.
WORKER = os.environ.get("PYTEST_XDIST_WORKER")
THREADS, ASKED_THREADS = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
# Reasons for which a test may skip, as the table in CONTRIBUTING.md lists them.
REASONS = re.findall(
    r"^\| `([^`]+)` \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M
)
if os.environ.get("OSDFACE_TEST_FLOORS"):
    # What tests/floors.sh does without.
    REASONS += [
        "no diffusers: *",
        "no peft: *",
        "no PyAV: *",
        "no made-up device: *",
        "this torch has no convolutions in fp16 *",
    ]
if importlib.util.find_spec("hypothesis"):
    from hypothesis import HealthCheck, settings

    # How long a machine takes over an example is not what is tested.
    patient = [HealthCheck.too_slow]
    settings.register_profile("patient", deadline=None, suppress_health_check=patient)
    settings.load_profile("patient")
unlisted: set[str] = set()
# A real accelerator, such as "cuda", that the tests of the host and of the chain run on instead.
DEVICE = os.environ.get("OSDFACE_TEST_DEVICE")


def _has_fp16() -> bool:
    try:
        F.conv2d(torch.ones(1, 1, 4, 4).half(), torch.ones(1, 1, 3, 3).half())
    except RuntimeError:
        return False
    return True


def _computes_fp16() -> bool:
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return DEVICE is not None or any(on for name, on in has.items() if "fp16" in name)


FP16 = pytest.mark.skipif(not _has_fp16(), reason="this torch has no convolutions in fp16 on a CPU")
# Without such instructions a convolution takes hundreds of times as long.
FULL_SIZE_FP16 = pytest.mark.skipif(
    not _computes_fp16(), reason="this processor has no instructions for fp16"
)


# What `pytest -n 2` begins with, since it takes long. A file is one worker's, and so are all tests
# that LARGE names, for each holds full-size networks, in a server (11 GB) or in pytest (12 GB).
LARGE = (
    *("test_browser.py", "test_server.py", "test_host.py", "test_osediff_host.py"),
    "test_diffusers.py::test_the_released_code_s_numbers",
    "test_ldm.py::test_the_released_code_s_numbers",
    "test_osediff.py::test_diffusers_gives_the_released_numbers",
    "test_sd21.py::test_osediffs_numbers_come_out_of_the_same_parts",
    "test_builtin.py::test_it_does_not_go_with_a_real_model",
    "test_hold.py::test_our_lora_adds_to_one_that_is_already_on_the_model",
    "test_hold.py::test_a_checkpoint_in_fp8_with_our_lora",
    "test_other_device_host.py::test_half_precision_gives_what_fp32_gives_on_the_cpu",
    "test_training.py::test_a_full_size_step_of_stage_2_fits_in_20_gib",
)
FIRST = (*LARGE, "test_cli.py", "test_training.py")


def _turn(item: pytest.Item) -> int:
    return next((i for i, name in enumerate(FIRST) if name in item.nodeid), len(FIRST))


def _large(nodeid: str) -> bool:
    return any(name in nodeid for name in LARGE)


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "numprocesses", None):
        # Workers share the processor: threads that wait leave it to others.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """One worker has as many threads as there are, each other, and what it starts, one."""
    if not WORKER or ASKED_THREADS:
        return
    if _large(item.nodeid):
        os.environ.pop("OMP_NUM_THREADS", None)
        torch.set_num_threads(THREADS)
    else:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


def pytest_runtest_teardown(item: pytest.Item) -> None:
    if WORKER and _large(item.nodeid):
        give_memory_back()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "large" if _large(nodeid) else nodeid.partition("::")[0]

    # In the order of the tests, not by how many a file has.
    config.option.loadscopereorder = False
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if WORKER:
        items.sort(key=_turn)
    if DEVICE:
        reason = f"{DEVICE} is no device that tests can show a processor's way on"
        for item in items:
            if item.get_closest_marker("processor"):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not any(fnmatch(reason, known) for known in REASONS):
            unlisted.add(f"{report.nodeid}: {reason}")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        unlisted.add(f"{report.nodeid}: {reason}")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    unlisted.update(getattr(node, "workeroutput", {}).get("unlisted", ()))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if WORKER:
        session.config.workeroutput["unlisted"] = sorted(unlisted)  # type: ignore[attr-defined]
    if unlisted and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for line in sorted(unlisted):
        terminalreporter.write_line(f"SKIPPED for a reason that is not listed: {line}", red=True)


def _folder(variable: str, default: Path, what: str) -> Path:
    folder = Path(os.environ.get(variable, default))
    if not folder.is_dir():
        pytest.skip(f"no {what}: set {variable} to their folder")
    return folder


GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def data() -> Path:
    """More photographs, films and the real small detector, which are not part of the project."""
    return _folder("OSDFACE_TEST_DATA", ROOT.parent / "shared" / "data", "test pictures")


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pictures of tests/photographs.py, as PNG files."""
    from tests import photographs

    return photographs.write(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="session")
def golden() -> Path:
    """The makers of the stand-in weights, and what the released code gives on them."""
    return GOLDEN


@pytest.fixture(scope="session")
def more_golden() -> Path:
    """More of the released codes' outputs than the project holds."""
    return _folder("OSDFACE_TEST_GOLDEN", ROOT.parent / "shared" / "golden", "golden outputs")


@pytest.fixture(scope="session")
def osediff_pickle(
    golden: Path, seeded: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A stand-in for the released osediff.pkl: its layout, and numbers drawn from a seed."""
    content = json.loads((golden / "osediff_names.json").read_text())
    for part in ("unet", "vae"):
        shapes = content[f"state_dict_{part}"]
        content[f"state_dict_{part}"] = {
            name: (0.15 if "lora_B" in name else 1.0)
            * seeded.seeded_tensor(f"osediff.{part}.{name}", shape)
            for name, shape in shapes.items()
        }
    path = tmp_path_factory.mktemp("osediff_pickle") / "osediff.pkl"
    torch.save(content, path)
    return path


@pytest.fixture(scope="session")
def diffir_maker(more_golden: Path) -> ModuleType:
    """The maker of DiffIR's stand-in weights, beside the golden outputs."""
    import importlib.util

    path = more_golden / "diffir" / "make_weights.py"
    spec = importlib.util.spec_from_file_location("diffir_make_weights", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def picture(path: Path) -> torch.Tensor:
    """(1,H,W,3) in [0,1], as ComfyUI's Load Image gives it."""
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).float()[None] / 255


@pytest.fixture(scope="session")
def load_picture() -> Callable[[Path], torch.Tensor]:
    return picture


@pytest.fixture(scope="session")
def seeded(golden: Path) -> ModuleType:
    """The maker of the stand-in weights, beside the golden outputs."""
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
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if WORKER else base) / "stand_ins"
    script = str(golden / "make_weights.py")
    command = [sys.executable, script, "--out", str(folder), "--only", "checkpoint", "osdface"]
    with FileLock(f"{folder}.lock"):
        if not (done := Path(f"{folder}.done")).exists():
            subprocess.run(command, check=True)
            done.touch()
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


NEWER = (0, 33)


@pytest.fixture(scope="session")
def newer(comfyui: Path) -> bool:
    """Whether the ComfyUI is one of the newer ones that the project is tested with."""
    text = (comfyui / "comfyui_version.py").read_text(encoding="utf-8")
    version = re.search(r'"(\d+)\.(\d+)', text)
    assert version
    return (int(version[1]), int(version[2])) >= NEWER


@pytest.fixture(scope="session")
def newer_only(newer: bool) -> None:
    if not newer:
        pytest.skip("an older ComfyUI: set COMFYUI_PATH to one of 0.33.0 or later")


@pytest.fixture(scope="session")
def populate(stand_ins: Path) -> Callable[[Path], None]:
    """Makes a folder a ComfyUI base directory with the pack and the stand-in weights, by link, and
    the built-in detector under the name of facexlib's small one.
    """
    from tests import photographs

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
        photographs.write_detector(models / "facedetection")
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
        *(["--force-fp32"] if DEVICE else ["--cpu"]),
        "--base-directory",
        str(base),
        "--user-directory",
        str(base / "user"),
    ]
    # ComfyUI's own modules must win over the pack's folders of the same name.
    sys.path[:] = [str(comfyui), *(p for p in path if Path(p).resolve() != ROOT)]
    if DEVICE:
        # Truths are of fp32.
        torch.backends.cudnn.allow_tf32 = False
    import comfy.options

    comfy.options.enable_args_parsing()
    if importlib.util.find_spec("comfy_aimdo"):
        # Newer hosts load their pager before all else, and on a card alone; tests use it without.
        import comfy_aimdo.control

        comfy_aimdo.control.init()
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
def small_server(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real ComfyUI server with the pack, its built-in model, and the fuzz's nodes, as Prompts."""
    from benchmarks.fuzz import populate
    from tests.frontend import server
    from tests.prompts import Prompts

    base = tmp_path_factory.mktemp("small_server")
    populate(base)
    with server(comfyui, base) as address:
        yield Prompts(address, base)


@pytest.fixture
def group(photographs: Path, load_picture: Callable[[Path], torch.Tensor]) -> torch.Tensor:
    """Two faces side by side, at (1,270,640,3)."""
    picture = load_picture(photographs / "group.png")
    return (
        F.interpolate(picture[:, :540, :1280].movedim(-1, 1), scale_factor=0.5, mode="area")
        .movedim(1, -1)
        .contiguous()
    )


def give_memory_back() -> None:
    """Gives the system what was freed: tests that start a server want it, and glibc keeps it."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)


@pytest.fixture(scope="module")
def checkpoint(host: Any) -> Iterator[tuple[Any, Any]]:
    """(MODEL, VAE) of the full-size stand-in checkpoint, from ComfyUI's own loader; its gigabytes
    go with the module that wanted it.
    """
    path = host.folder_paths.get_full_path_or_raise(
        "checkpoints", "v2-1_512-ema-pruned.safetensors"
    )
    model, _, vae, _ = host.comfy.sd.load_checkpoint_guess_config(
        path, output_vae=True, output_clip=False
    )
    yield model, vae
    del model, vae
    host.comfy.model_management.unload_all_models()
    give_memory_back()


@pytest.fixture(scope="session")
def truth(golden: Path) -> Callable[[str], torch.Tensor]:
    """The released code's outputs, such as astronaut_lq.image; those that the project does not hold
    are looked for beside it.
    """
    from safetensors.torch import load_file

    kept: dict[Path, dict[str, torch.Tensor]] = {}

    def of(key: str) -> torch.Tensor:
        file = golden / f"{key.partition('.')[0]}.safetensors"
        if not file.is_file():
            default = ROOT.parent / "shared" / "golden"
            file = _folder("OSDFACE_TEST_GOLDEN", default, "golden outputs") / "golden.safetensors"
        if file not in kept:
            kept[file] = load_file(file)
        return kept[file][key]

    return of


@pytest.fixture(scope="session")
def crop(golden: Path) -> Callable[[str], torch.Tensor]:
    """The crops that they were made from, by name."""

    def of(name: str) -> torch.Tensor:
        file = golden / "inputs" / f"{name}.png"
        if not file.is_file():
            default = ROOT.parent / "shared" / "golden"
            file = _folder("OSDFACE_TEST_GOLDEN", default, "golden outputs") / "inputs" / file.name
        return picture(file)

    return of


@pytest.fixture
def away_from_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No weights of this machine's user are found."""
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small random networks: a folder in diffusers' layout with Stable Diffusion 2.1's modules, and
    `vre.safetensors`.
    """
    for package in ("diffusers", "peft"):
        reason = f"no {package}: pip install -r requirements-dev.txt"
        pytest.importorskip(package, reason=reason)
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
