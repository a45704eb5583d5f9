"""install.py as users and hosts run it, against a server that plays hub and release pages."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import install
from osdface_core.catalogue import CATALOGUE
from osdface_core.errors import OSDFaceError
from osdface_core.faces.retinaface import RetinaFace
from osdface_core.osdface.vre import build_embedder, read_embedder
from osdface_core.weights.fetching import sha256_of
from osdface_core.weights.store import Store
from tests.weight_server import PROXIES, Server, running, stall

ROOT = Path(install.__file__).parent
HUB = "alecccdd/OSDFace"
VRE, LORA, KOHYA = (
    "osdface_vre.safetensors",
    "pytorch_lora_weights.safetensors",
    "osdface_lora_kohya.safetensors",
)
BIG, PROJECTOR = "associate_2.ckpt", "embedding_change_weights.pth"
SMALL = "detection_mobilenet0.25_Final.pth"


@pytest.fixture(scope="session")
def released(seeded: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OSDFace's three files as released, from the stand-in weights."""
    folder = tmp_path_factory.mktemp("released")
    torch.save(seeded.vre_checkpoint(), folder / BIG)
    torch.save(seeded.embedding_change(), folder / PROJECTOR)
    save_file(seeded.lora(), folder / LORA)
    return folder


@pytest.fixture
def untrained_detector(tmp_path: Path) -> Path:
    """A file with the layout of facexlib's small detector, which sees no face anywhere."""
    torch.manual_seed(0)
    network = RetinaFace("mobilenet0.25")
    for head in network.ClassHead:
        head.get_parameter("conv1x1.bias").data.copy_(torch.tensor([9.0, -9.0, 9.0, -9.0]))
    torch.save(network.state_dict(), path := tmp_path / "untrained.pth")
    return path


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for variable in (*PROXIES, *install.MANAGER_VARIABLES):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with running() as state:
        monkeypatch.setenv("HF_ENDPOINT", state.url)
        monkeypatch.setenv("OSDFACE_RELEASES", state.url)
        yield state


@pytest.fixture
def full(server: Server, released: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server with every file; the catalogue knows the stand-ins of the face networks as it
    knows the real ones.
    """
    for path in released.iterdir():
        server.hub(HUB, path.name, path.read_bytes())
    for entry in CATALOGUE.files:
        if entry.sha256 is not None and entry.needed:
            content = entry.name.encode() * 1000
            address = server.release(
                entry.addresses[0].removeprefix("https://github.com/"), content
            )
            probe = released.parent / "probe"
            probe.write_bytes(server.files[address])
            monkeypatch.setitem(entry.__dict__, "sha256", sha256_of(probe))
            monkeypatch.setitem(entry.__dict__, "size", len(content))
    return server


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "ComfyUI" / "models"
    folder.mkdir(parents=True)
    return folder


def held(models: Path) -> set[str]:
    return {
        path.name
        for path in models.rglob("*")
        if path.is_file() and path.suffix not in (".sha256", ".lock")
    }


def test_a_full_install_then_nothing_to_do(
    full: Server, models: Path, released: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--models-dir", str(models)]
    assert install.main([*arguments, "--check"]) == 1
    assert full.gets == [] and held(models) == set()
    assert install.main([*arguments, "--dry-run"]) == 0
    assert full.gets == [] and held(models) == set()
    assert install.main(arguments) == 0
    needed = {entry.name for entry in CATALOGUE.files if entry.needed}
    assert held(models) == needed
    asked = len(full.gets)
    assert install.main(arguments) == 0
    assert install.main([*arguments, "--check"]) == 0
    assert len(full.gets) == asked
    with safe_open(models / "osdface" / VRE, framework="pt") as file:
        assert file.metadata()[f"sha256 of {BIG}"] == sha256_of(released / BIG)
    # The real reader takes the converted file, and it holds the same numbers as the released pair.
    embedder = build_embedder(read_embedder(models / "osdface" / VRE))
    for name, tensor in build_embedder(read_embedder(released / BIG)).state_dict().items():
        assert torch.equal(embedder.state_dict()[name], tensor)
    capsys.readouterr()
    damaged = models / "osdface" / LORA
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"\0\0\0\1")
    assert install.main([*arguments, "--check"]) == 1
    assert "no longer the one recorded" in capsys.readouterr().out
    assert install.main(arguments) == 0
    assert install.main([*arguments, "--check"]) == 0


def test_what_was_downloaded_to_be_converted_is_kept_when_asked(full: Server, models: Path) -> None:
    assert install.main(["--models-dir", str(models), "--only", VRE, "--keep-original"]) == 0
    assert held(models) == {VRE, BIG, PROJECTOR}


def test_what_the_user_put_there_is_used_and_stays(
    server: Server, models: Path, released: Path
) -> None:
    (models / "osdface").mkdir()
    for name in (BIG, PROJECTOR):
        shutil.copyfile(released / name, models / "osdface" / name)
    assert install.main(["--models-dir", str(models), "--only", VRE, "--offline"]) == 0
    assert held(models) == {VRE, BIG, PROJECTOR} and server.gets == []


def test_files_downloaded_by_hand_are_known_by_content(
    server: Server,
    models: Path,
    released: Path,
    untrained_detector: Path,
    tmp_path: Path,
) -> None:
    downloads = tmp_path / "Downloads"
    downloads.mkdir()
    for number, path in enumerate([*released.iterdir(), untrained_detector]):
        shutil.copyfile(path, downloads / f"download ({number})")
    (downloads / "page.html").write_text("<html>")
    chosen = [argument for name in (VRE, LORA, KOHYA, SMALL) for argument in ("--only", name)]
    assert (
        install.main(["--models-dir", str(models), "--from", str(downloads), "--offline", *chosen])
        == 0
    )
    assert held(models) == {VRE, LORA, KOHYA, SMALL} and server.gets == []
    assert len(list(downloads.iterdir())) == 5


def test_the_wrong_detector_is_told_from_one_that_works(
    server: Server, models: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--models-dir", str(models), "--only", SMALL, "--check"]
    (models / "facedetection").mkdir()
    shutil.copyfile(data / "weights" / SMALL, models / "facedetection" / SMALL)
    assert install.main(arguments) == 0
    out = capsys.readouterr().out
    assert "accepted" in out and "not the official file" in out and "finds one face" in out
    shutil.copyfile(
        data / "weights" / "wrong_anchors_mobilenet0.25_Final.pth", models / "facedetection" / SMALL
    )
    assert install.main(arguments) == 1
    out = capsys.readouterr().out
    assert "wrong" in out and "other anchors" in out


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {
        name: value
        for name, value in os.environ.items()
        if "PROXY" not in name.upper() and not name.startswith("COMFYUI")
    }
    command = [sys.executable, str(ROOT / "install.py"), *arguments]
    return subprocess.run(
        command,
        env=clean | environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
        timeout=120,
        cwd="/",
    )


def test_with_nothing_reachable_one_paragraph_says_what_to_do(models: Path) -> None:
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "OSDFACE_RELEASES": "http://127.0.0.1:9"}
    done = run("--models-dir", str(models), **nowhere)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    paragraph = done.stderr.strip().splitlines()[-1]
    for name in (BIG, PROJECTOR, LORA, SMALL, "parsing_parsenet.pth"):
        assert name in paragraph
    assert (
        str(models / "osdface") in paragraph
        and "Google Drive" in paragraph
        and "--from" in paragraph
    )
    assert held(models) == set()


def test_offline_asks_nobody(server: Server, models: Path) -> None:
    assert install.main(["--models-dir", str(models), "--offline"]) == 2
    assert server.gets == [] and held(models) == set()


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to another process")
def test_ctrl_c_in_the_middle_then_a_second_run(
    server: Server, models: Path, released: Path
) -> None:
    content = (released / LORA).read_bytes()
    path = server.hub(HUB, LORA, content)
    server.answers[path] = [stall]
    arguments = ["--models-dir", str(models), "--only", LORA]
    environment = {name: value for name, value in os.environ.items() if "PROXY" not in name.upper()}
    # A shell that runs the tests in the background has the signal ignored, which children inherit;
    # a handler they do not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    first = subprocess.Popen(
        [sys.executable, str(ROOT / "install.py"), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    signal.signal(signal.SIGINT, before)
    part = models / "osdface" / ".incomplete"
    for _ in range(600):
        if any(file.stat().st_size > 10_000_000 for file in part.glob("*.part")):
            break
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=30)
    assert (
        first.returncode == install.INTERRUPTED
        and "Traceback" not in errors
        and "run this again" in errors
    )
    assert held(models) - {file.name for file in part.iterdir()} == set()
    assert install.main(arguments) == 0
    assert (models / "osdface" / LORA).read_bytes() == content
    assert server.gets[-1][1] is not None, "the second run began anew"
    assert held(models) == {LORA}


def test_a_digest_that_nobody_states_is_no_record_but_on_the_user_s_word(
    server: Server, models: Path, released: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = server.hub(HUB, LORA, (released / LORA).read_bytes())
    server.etags[path] = '"5f2a-1"'
    arguments = ["--models-dir", str(models), "--only", LORA]
    record = models / "osdface" / (LORA + ".sha256")
    assert install.main([*arguments, "--from", str(released), "--offline"]) == 0
    assert not record.exists()
    (models / "osdface" / LORA).unlink()
    assert install.main(arguments) == 0
    assert "names and shapes of its tensors were checked" in capsys.readouterr().out
    assert not record.exists()
    (models / "osdface" / LORA).unlink()
    assert install.main([*arguments, "--trust-first-download"]) == 0
    assert "were checked" not in capsys.readouterr().out
    assert record.is_file()


def test_two_at_once_fetch_a_file_once(server: Server, models: Path, released: Path) -> None:
    server.hub(HUB, LORA, (released / LORA).read_bytes())
    arguments = [
        sys.executable,
        str(ROOT / "install.py"),
        "--models-dir",
        str(models),
        "--only",
        LORA,
    ]
    both = [
        subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(2)
    ]
    assert [process.wait(60) for process in both] == [0, 0]
    assert len(server.gets) == 1
    assert (models / "osdface" / LORA).read_bytes() == (released / LORA).read_bytes()


OSEDIFF = ("osediff", "osediff_face")


def test_osediff_is_fetched_from_its_authors_and_converted(
    server: Server, models: Path, osediff_pickle: Path
) -> None:
    content = osediff_pickle.read_bytes()
    for name in OSEDIFF:
        server.release(f"cswry/OSEDiff/raw/main/preset/models/{name}.pkl", content)
    # Beside what --osediff adds, one file alone, so that the others are not asked for.
    arguments = ["--models-dir", str(models), "--osediff", "--only", "osediff.safetensors"]
    assert install.main(arguments) == 0
    assert held(models) == {f"{name}.safetensors" for name in OSEDIFF}
    for name in OSEDIFF:
        with safe_open(models / "osediff" / f"{name}.safetensors", framework="pt") as file:
            assert file.metadata()[f"sha256 of {name}.pkl"] == sha256_of(osediff_pickle)
    asked = len(server.gets)
    assert install.main([*arguments, "--check"]) == 0
    assert install.main(arguments) == 0
    assert len(server.gets) == asked


def test_osediff_by_hand_is_known_by_name_and_a_page_in_its_place_is_told(
    server: Server,
    models: Path,
    osediff_pickle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    downloads = tmp_path / "Downloads"
    downloads.mkdir()
    shutil.copyfile(osediff_pickle, downloads / "osediff_face.pkl")
    (downloads / "osediff.pkl").write_text("<!DOCTYPE html><html></html>")
    only = ["--only", "osediff_face.safetensors", "--offline", "--from", str(downloads)]
    assert install.main(["--models-dir", str(models), *only]) == 0
    assert held(models) == {"osediff_face.safetensors"} and server.gets == []
    (models / "osediff" / "osediff.pkl").write_text("<!DOCTYPE html><html></html>")
    assert install.main(["--models-dir", str(models), "--only", "osediff.safetensors"]) == 1
    assert "osediff.pkl is a web page and no checkpoint" in capsys.readouterr().err
    assert held(models) == {"osediff_face.safetensors", "osediff.pkl"}


# Run by a host


def webui(folder: Path) -> dict[str, str]:
    (folder / "launch.py").write_text("")
    return {"PYTHONPATH": str(folder)}


def manager(folder: Path) -> dict[str, str]:
    return {"COMFYUI_PATH": str(folder), "COMFYUI_FOLDERS_BASE_PATH": str(folder)}


def extension(webui: Path) -> Path:
    """install.py of this checkout, linked into a WebUI's extensions."""
    (webui / "launch.py").write_text("")
    (webui / "extensions").mkdir()
    (webui / "extensions" / "osdface").symlink_to(ROOT)
    for name in ("Stable-diffusion", "Lora", "GFPGAN"):
        (webui / "models" / name).mkdir()
    return webui / "extensions" / "osdface" / "install.py"


def test_in_a_webui_s_extensions_a_run_by_hand_fills_that_webui_s_folders(
    full: Server, models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(install, "SCRIPT", extension(models.parent))
    # A ComfyUI that the user has beside it gets nothing.
    comfyui = tmp_path / "other"
    (comfyui / "models").mkdir(parents=True)
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui))
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": staticmethod(lambda: True)}))
    there = models / "GFPGAN" / "parsing_parsenet.pth"
    there.write_bytes(b"parsing_parsenet.pth" * 1000)
    assert install.main([]) == 0
    needed = {entry.name for entry in CATALOGUE.files if entry.needed} - {KOHYA}
    assert held(models / "osdface") == needed - {there.name}
    assert held(models) == needed and held(comfyui) == set()


def test_what_a_webui_has_is_found_in_its_own_folders(models: Path) -> None:
    extension(models.parent)
    store = Store(CATALOGUE, install.model_folders(models))
    for folder, name in (
        ("Stable-diffusion", "v2-1_512-ema-pruned.safetensors"),
        ("Lora", LORA),
        ("GFPGAN", "detection_Resnet50_Final.pth"),
        ("osdface", VRE),
    ):
        (models / folder).mkdir(exist_ok=True)
        (models / folder / name).touch()
        assert store.find(CATALOGUE.by_name[name]) == models / folder / name


def test_at_a_webui_s_launch_one_line_tells_what_is_missing_and_nothing_is_fetched(
    server: Server, models: Path
) -> None:
    """As a WebUI runs it: anywhere, its own root on PYTHONPATH, nothing attached."""
    script = extension(models.parent)
    for folder, name in (("Lora", LORA), ("GFPGAN", "parsing_parsenet.pth")):
        (models / folder / name).touch()
    done = subprocess.run(
        f'"{sys.executable}" "{script}"',
        shell=True,
        env=os.environ
        | {"PYTHONPATH": f"{models.parent}{os.pathsep}/elsewhere", "HF_ENDPOINT": server.url},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=True,
        cwd=models,
    )
    assert len(done.stdout.splitlines()) == 1 and done.stderr == ""
    assert VRE in done.stdout and LORA not in done.stdout and KOHYA not in done.stdout
    assert "parsing_parsenet.pth" not in done.stdout
    # By the link, from which alone the WebUI is found.
    assert f"{script} --fetch" in done.stdout
    assert server.gets == []


def test_a_webui_gets_our_option_and_loads_nothing_for_it() -> None:
    code = (
        "import sys; before = set(sys.modules); import argparse, preload\n"
        "parser = argparse.ArgumentParser(); preload.preload(parser)\n"
        "assert parser.parse_args([]).osdface_models_path is None\n"
        "assert parser.parse_args(['--osdface-models-path', 'x']).osdface_models_path == 'x'\n"
        "assert not {'torch', 'numpy', 'osdface_core'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("host", [webui, manager])
def test_a_host_s_installer_gets_one_line_and_no_download(
    host: Callable[[Path], dict[str, str]], server: Server, models: Path
) -> None:
    environment = host(models.parent) | {"HF_ENDPOINT": server.url, "OSDFACE_RELEASES": server.url}
    done = run(**environment)
    assert done.returncode == 0 and done.stderr == ""
    assert len(done.stdout.splitlines()) == 1
    assert server.gets == [] and held(models) == set()
    if host is manager:
        assert VRE in done.stdout and "install.py --fetch" in done.stdout
        for entry in CATALOGUE.files:
            (models / entry.folder).mkdir(exist_ok=True)
            (models / entry.folder / entry.name).touch()
        assert run(**environment).stdout.strip() == "OSDFace: all weights are there."


def test_a_host_is_not_failed_even_by_a_broken_configuration(models: Path) -> None:
    (models.parent / "extra_model_paths.yaml").write_text("a: [")
    done = run(**manager(models.parent))
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1 and done.stderr == ""


def test_a_run_by_a_host_loads_nothing_heavy(models: Path) -> None:
    code = (
        "import sys, install; install.main([]); "
        "print({'torch', 'numpy', 'huggingface_hub', 'safetensors'} & set(sys.modules))"
    )
    environment = os.environ | manager(models.parent)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout.splitlines()[-1] == "set()"


def test_comfyui_path_alone_in_a_terminal_is_a_run_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (*install.MANAGER_VARIABLES, "PYTHONPATH"):
        monkeypatch.delenv(variable, raising=False)
    assert not install.run_by_host([])
    monkeypatch.setenv("COMFYUI_PATH", "/anywhere")
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": staticmethod(lambda: True)}))
    assert not install.run_by_host([])
    monkeypatch.setattr("sys.stdin", type("Pipe", (), {"isatty": staticmethod(lambda: False)}))
    assert install.run_by_host([])
    assert not install.run_by_host(["--check"])


def test_extra_model_paths_are_searched_and_the_default_ones_filled(
    tmp_path: Path, models: Path
) -> None:
    shared, archive = tmp_path / "shared", tmp_path / "archive"
    (models.parent / "extra_model_paths.yaml").write_text(
        f"comfyui:\n  base_path: {shared}\n  is_default: true\n  osdface: weights/osdface\n  "
        f"loras: |\n    a\n    b\n"
        f"old:\n  facedetection: {archive}\n"
    )
    folders = install.model_folders(models)
    assert folders["osdface"] == [shared / "weights/osdface", models / "osdface"]
    assert folders["loras"] == [shared / "b", shared / "a", models / "loras"]
    assert folders["facedetection"] == [models / "facedetection", archive]
    archive.mkdir()
    (archive / SMALL).touch()
    assert Store(CATALOGUE, folders).find(CATALOGUE.by_name[SMALL]) == archive / SMALL


def test_an_empty_base_path_is_none(models: Path) -> None:
    (models.parent / "extra_model_paths.yaml").write_text(
        "comfyui:\n  base_path:\n  osdface: weights/osdface\n  loras:\n"
    )
    folders = install.model_folders(models)
    assert folders["osdface"] == [models / "osdface", models.parent / "weights" / "osdface"]
    assert folders["loras"] == [models / "loras"]


def test_a_console_without_a_path_s_letters_is_no_error(tmp_path: Path) -> None:
    models = tmp_path / "\u043c\u043e\u0434\u0435\u043b\u0438" / "models"
    models.mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, str(Path(install.__file__)), "--check", "--models-dir", str(models)],
        env=os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 1
    assert b"\\u043c\\u043e" in done.stdout
    assert b"Traceback" not in done.stderr


def test_no_host_in_sight_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "hosts", lambda: iter(()))
    assert install.main(["--check"]) == 2
    assert "--models-dir" in capsys.readouterr().err


# Run by the nodes


def store_of(models: Path) -> Store:
    names = ("osdface", "facedetection", "loras", "checkpoints")
    return Store(CATALOGUE, {name: [models / name] for name in names})


def test_a_missing_file_is_one_sentence_unless_downloads_are_allowed(
    full: Server, models: Path
) -> None:
    for name in (VRE, SMALL):
        with pytest.raises(OSDFaceError, match=rf"install\.py --only {name}") as raised:
            store_of(models).ensure(name)
        assert "OSDFACE_DOWNLOAD=1" in str(raised.value)
    assert full.gets == []
    seen = []
    path = store_of(models).ensure(
        VRE,
        allow_download=True,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert path == models / "osdface" / VRE and path.is_file() and seen
    assert held(models) == {VRE}
    with pytest.raises(OSDFaceError, match="put it there"):
        store_of(models).ensure("unknown.pth", allow_download=True)


# The stock node

STOCK = """
import sys, json
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import torch, comfy.lora, comfy.lora_convert, comfy.model_base, comfy.model_patcher, comfy.sd
import comfy.supported_models, comfy.utils
config = comfy.supported_models.SD20({
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4], "transformer_depth": [1] * 6 + [0] * 2,
    "transformer_depth_output": [1] * 9 + [0] * 3,
    "transformer_depth_middle": 1, "context_dim": 1024, "use_linear_in_transformer": True,
    "num_head_channels": 64, "adm_in_channels": None,
    "use_temporal_attention": False, "use_spatial_transformer": True, "legacy": False,
    "num_heads": -1, "use_checkpoint": False,
    "dtype": torch.float32,
})
with torch.device("meta"):
    model = comfy.model_base.BaseModel(config, device=None)
patcher = comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
results = {}
for path in sys.stdin.read().split("\\n"):
    lora = comfy.utils.load_torch_file(path, safe_load=True)
    patched, _ = comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0.0)
    def scale(w): return float(w[2]) / w[1].shape[0] if w[2] is not None else 1.0
    results[path] = {name: [scale(p[1].weights) for p in patches]
                     for name, patches in patched.patches.items()}
print(json.dumps(results))
"""


@pytest.mark.host
def test_comfyui_s_own_load_lora_applies_all_of_the_converted_file(
    comfyui: Path, server: Server, models: Path, released: Path
) -> None:
    assert (
        install.main(
            [
                "--models-dir",
                str(models),
                "--from",
                str(released),
                "--offline",
                "--only",
                LORA,
                "--only",
                KOHYA,
            ]
        )
        == 0
    )
    original, converted = models / "osdface" / LORA, models / "loras" / KOHYA
    paths = f"{original}\n{converted}"
    done = subprocess.run(
        [sys.executable, "-c", STOCK],
        input=paths,
        capture_output=True,
        text=True,
        check=False,
        cwd=comfyui,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results[str(original)]) == 150, (
        "ComfyUI now reads the released spelling: the converted copy is no longer needed"
    )
    assert len(results[str(converted)]) == 278
    assert all(scales == [1.0] for scales in results[str(converted)].values())
