"""Every training task at a size that a processor does in seconds, on drawn faces and on pictures
of scikit-image.
"""

from __future__ import annotations

import gc
import logging
import os
import resource
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from osdface_core.errors import OSDFaceError
from osdface_core.faces.detector_check import drawn_face

for needed in ("accelerate", "diffusers", "peft", "tensorboard"):
    pytest.importorskip(
        needed, reason=f"training needs {needed}: pip install -r requirements-dev.txt"
    )

from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402

from osdface_core.cpu import has_bf16  # noqa: E402
from osdface_core.faces.face_parser import build_parser, parse_faces  # noqa: E402
from osdface_core.faces.files import BUILTIN_DETECTOR, BUILTIN_PARSER  # noqa: E402
from osdface_core.faces.retinaface import build_retinaface  # noqa: E402
from osdface_core.osdface import builtin  # noqa: E402
from osdface_core.osdface.builtin.autoencoder import Autoencoder  # noqa: E402
from osdface_core.osdface.lora import parse_lora  # noqa: E402
from osdface_core.osdface.vre import build_embedder, read_embedder  # noqa: E402
from osdface_core.training import stage1 as training_stage1  # noqa: E402
from osdface_core.training import stage2 as training_stage2  # noqa: E402
from osdface_core.training.__main__ import main  # noqa: E402
from osdface_core.training.autoencoder import AutoencoderConfig  # noqa: E402
from osdface_core.training.config import read_config  # noqa: E402
from osdface_core.training.detector import DetectorConfig  # noqa: E402
from osdface_core.training.diffir import DiffIRConfig  # noqa: E402
from osdface_core.training.face_parser import ParserConfig  # noqa: E402
from osdface_core.training.loop import Run, accelerator_for, checkpoints  # noqa: E402
from osdface_core.training.networks import UNetConfig, load_unet  # noqa: E402
from osdface_core.training.osediff import OSEDiffConfig  # noqa: E402
from osdface_core.training.stage1 import Stage1Config  # noqa: E402
from osdface_core.training.stage2 import Stage2Config  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "osdface_core" / "training" / "configs"
KINDS = {
    "stage1": Stage1Config,
    "stage2": Stage2Config,
    "autoencoder": AutoencoderConfig,
    "detector": DetectorConfig,
    "parser": ParserConfig,
    "osediff": OSEDiffConfig,
    "diffir": DiffIRConfig,
}
SIDE = 64
QUIET = {"cpu": True, "workers": 0, "samples": 0, "log_every": 1, "ema": 0.9}

UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 1024,
    "attention_head_dim": 2,
    "use_linear_projection": True,
}
# For the built-in autoencoder.
BUILTIN_UNET = UNET | {"in_channels": builtin.CHANNELS, "out_channels": builtin.CHANNELS}
VAE = {
    "block_out_channels": [16, 16, 32, 32],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "scaling_factor": 1.0,
}
DEGRADATION = {
    "stages": [{"kernels": {"iso": 1}, "kernel_size": [5, 9], "sigma": [0.5, 2], "shrink": [1, 3]}]
}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate keeps the state of the last run in its classes."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures."""
    folder = tmp_path_factory.mktemp("faces")
    for i in range(8):
        pixels = drawn_face(22 + 4 * i, SIDE).roll((i % 3 - 1) * 5, dims=1) * torch.tensor(
            [1.0, 0.5 + i / 16, 1 - i / 16]
        )
        Image.fromarray((pixels * 255).byte().numpy()).save(folder / f"face_{i:03d}.png")
    return folder


def write(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(config))
    return path


def stage1(faces: Path, folder: Path, **changes: Any) -> Path:
    return write(
        folder / "stage1.yaml",
        {
            "part": "lq",
            "run": {"folder": str(folder / "run"), "steps": 4, "batch": 4, **QUIET},
            "data": {"folder": str(faces), "size": SIDE},
            "vre": {
                "channels": 32,
                "multipliers": [1, 1],
                "features": 32,
                "codes": 96,
                "hidden": 32,
            },
            "optimiser": {"learning_rate": 2e-3, "weight_decay": 0.0},
            "losses": {"gan": 0, "lpips": {"weight": 0}},
            "degradation": DEGRADATION,
            **changes,
        },
    )


@pytest.fixture(scope="module")
def vre(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an untrained stage 1 writes."""
    folder = tmp_path_factory.mktemp("vre")
    PartialState._reset_state()
    assert main(["stage1", "--config", str(stage1(faces, folder)), "run.steps=1"]) == 0
    return folder / "run" / "stage1_lq.safetensors"


def stage2(faces: Path, folder: Path, vre: Path, **changes: Any) -> Path:
    return write(
        folder / "stage2.yaml",
        {
            "run": {"folder": str(folder / "run"), "steps": 4, "batch": 4, **QUIET},
            "data": {"folder": str(faces), "size": SIDE},
            "vre": str(vre),
            "projector_hidden": 32,
            "train": "full",
            "unet": {"config": UNET},
            "vae": {"kind": "kl", "config": VAE, "train": "all"},
            "optimiser": {"learning_rate": 3e-3},
            "losses": {"ea_dists": {"weight": 0}, "identity": {"weight": 0}},
            "degradation": DEGRADATION,
            **changes,
        },
    )


def run(config: Path, stage: str, *changes: str) -> Path:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    assert main([stage, "--config", str(config), *changes]) == 0
    return Path(
        next(
            (c.partition("=")[2] for c in changes if c.startswith("run.folder=")),
            str(config.parent / "run"),
        )
    )


def logged(caplog: pytest.LogCaptureFixture, name: str) -> list[float]:
    """A loss of training, step by step, from the log."""
    lines = [
        r.getMessage()
        for r in caplog.records
        if r.getMessage().startswith("step ")
        and f" {name} " in r.getMessage()
        and "held out" not in r.getMessage()
    ]
    return [float(line.split(f" {name} ")[1].split(",")[0]) for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = torch.load(checkpoints(folder)[-1], weights_only=True)
    return {
        f"{name}.{key}": t
        for name, tensors in state["networks"].items()
        for key, t in tensors.items()
    } | {
        f"average.{name}.{i}": t
        for name, tensors in state["averages"].items()
        for i, t in enumerate(tensors)
    }


def test_stage_1_learns_eight_pictures_by_heart(
    faces: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = stage1(faces, tmp_path, restart_every=10, degradation={"stages": []})
    folder = run(
        config,
        "stage1",
        "run.steps=80",
        "run.batch=8",
        "run.log_every=10",
        "run.samples=4",
        "run.sample_every=80",
    )
    losses = logged(caplog, "lq_l1")
    assert losses[-1] < losses[0] / 3
    assert Image.open(folder / "samples" / "0000080.png").size == (4 * 32, 2 * 32)


def test_stage_2_learns_eight_pictures_by_heart(
    faces: Path, vre: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder = run(
        stage2(faces, tmp_path, vre),
        "stage2",
        "run.steps=60",
        "run.batch=8",
        "run.log_every=10",
        "run.samples=4",
    )
    losses = logged(caplog, "mse")
    assert losses[-1] < losses[0] / 4
    assert Image.open(folder / "samples" / "0000060.png").size == (4 * SIDE, 3 * SIDE)
    assert list((folder / "log").rglob("events.*")), "TensorBoard has nothing to show"


OFF = {"ea_dists": {"weight": 0}, "identity": {"weight": 0}}
PATCH_GAN = {**OFF, "gan": {"weight": 0.1, "discriminator": "patch", "channels": 8, "layers": 2}}
UNET_GAN = {
    **OFF,
    "gan": {"weight": 0.1, "discriminator": "unet", "network": {"config": UNET}, "lora_rank": 2},
}


@pytest.mark.parametrize("gan", [PATCH_GAN, UNET_GAN], ids=["patch", "unet"])
def test_stage_2_that_was_stopped_goes_on_to_the_same_bits(
    faces: Path, vre: Path, tmp_path: Path, gan: dict[str, Any]
) -> None:
    config = stage2(faces, tmp_path, vre, losses=gan, train="lora", lora={"rank": 4, "alpha": 4})
    extra = ("run.batch=2", "run.accumulate=2", "run.checkpoint_every=2")
    whole = weights(run(config, "stage2", f"run.folder={tmp_path / 'whole'}", *extra))
    # cosine and warm-up depend on the number of steps in all: the run is cut, not shortened
    stopped = run(config, "stage2", f"run.folder={tmp_path / 'stopped'}", *extra)
    checkpoints(stopped)[-1].unlink()
    assert [p.name for p in checkpoints(stopped)] == ["step_0000002.pt"]
    (stopped / "pytorch_lora_weights.safetensors").unlink()
    again = weights(run(config, "stage2", f"run.folder={stopped}", *extra))
    assert whole.keys() == again.keys()
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []
    assert (stopped / "pytorch_lora_weights.safetensors").is_file()


def test_stage_1_that_was_stopped_goes_on_to_the_same_bits(faces: Path, tmp_path: Path) -> None:
    config = stage1(
        faces,
        tmp_path,
        part="associate",
        restart_every=3,
        losses={"gan": 0.8, "gan_start": 1, "lpips": {"weight": 0}},
    )
    extra = (
        "run.batch=2",
        "run.accumulate=2",
        "run.checkpoint_every=2",
        "discriminator_channels=8",
        "discriminator_layers=2",
    )
    whole = weights(run(config, "stage1", f"run.folder={tmp_path / 'whole'}", *extra))
    stopped = run(config, "stage1", f"run.folder={tmp_path / 'stopped'}", *extra)
    checkpoints(stopped)[-1].unlink()
    again = weights(run(config, "stage1", f"run.folder={stopped}", *extra))
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []


def test_a_run_of_another_configuration_is_refused_and_its_own_stays_written(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = stage1(faces, tmp_path)
    folder = run(config, "stage1", "run.steps=1")
    before = (folder / "config.yaml").read_bytes()
    PartialState._reset_state()
    assert main(["stage1", "--config", str(config), "part=associate"]) == 1
    assert "give another run.folder" in capsys.readouterr().err
    assert (folder / "config.yaml").read_bytes() == before


def test_stage_1_keeps_only_the_faces_that_it_shows(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def measured(given: torch.Tensor, right: torch.Tensor) -> dict[str, float]:
        nonlocal most
        gc.collect()
        held.append(weakref.ref(given))
        most = max(most, sum(ref() is not None for ref in held))
        return {"psnr": float(len(held))}

    monkeypatch.setattr(training_stage1, "measures", measured)
    changes = ("run.steps=1", "run.samples=1", "run.sample_every=1", "data.held_out=[1,2,3,4,5,6]")
    run(stage1(faces, tmp_path), "stage1", *changes)
    assert len(held) == 6
    assert most <= 3, "the one shown, the one measured, and the one before it"


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_two_processes_give_what_one_gives(
    stage: str, faces: Path, vre: Path, tmp_path: Path
) -> None:
    if stage == "stage1":
        losses = {"gan": 0.8, "gan_start": 1, "lpips": {"weight": 0}}
        config = stage1(
            faces,
            tmp_path,
            part="associate",
            losses=losses,
            discriminator_channels=8,
            restart_every=2,
        )
    else:
        config = stage2(faces, tmp_path, vre, losses=UNET_GAN)
    # Adam makes a step of full size out of a gradient that is rounding alone; with a large epsilon
    # it does not.
    common = ("run.steps=3", "optimiser.eps=1e-3")
    one = weights(run(config, stage, *common, "run.batch=4", f"run.folder={tmp_path / 'one'}"))
    two = tmp_path / "two"
    # accelerate launch starts several processes on GPUs only; it takes torch's for the processor,
    # and so do we
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "osdface_core.training",
    ]
    command = [*launch, stage, "--config", str(config), *common, "run.batch=2", f"run.folder={two}"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.load(checkpoints(two)[-1], weights_only=True)["processes"] == 2
    both = weights(two)
    assert one.keys() == both.keys()
    assert {name for name in one if (one[name] - both[name]).abs().max() > 1e-5} == set()


def test_grain_alone_is_trained_where_nothing_else_is(
    faces: Path, vre: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    torch.manual_seed(0)
    start = Autoencoder()
    start.start(
        torch.stack(
            [
                torch.from_numpy(np.array(Image.open(p))).movedim(-1, 0) / 127.5 - 1
                for p in sorted(faces.iterdir())
            ]
        )
    )
    torch.nn.init.normal_(start.decoder.conv_grain.weight, std=1e-3)
    save_file(start.state_dict(), tmp_path / "start.safetensors")
    only = {"mse": 0.0, "charbonnier": 1.0, "differences": 1.0, **OFF}
    small = {"kind": "builtin", "weights": str(tmp_path / "start.safetensors"), "train": "grain"}
    config = stage2(
        faces,
        tmp_path,
        vre,
        train="none",
        unet={"config": BUILTIN_UNET},
        vae=small,
        losses=only,
        optimiser={"learning_rate": 1e-2},
    )
    folder = run(config, "stage2", "run.steps=30", "run.batch=8", "run.log_every=10")
    losses = logged(caplog, "total")
    assert losses[-1] < losses[0]
    end = load_file(folder / "autoencoder.safetensors")
    changed = {name for name, t in start.state_dict().items() if not torch.equal(t, end[name])}
    assert changed == {"decoder.conv_grain.weight", "decoder.conv_grain.bias"}


def test_a_trained_decoder_keeps_undegraded_pictures_where_it_is_asked_to(
    faces: Path, vre: Path, tmp_path: Path
) -> None:
    pictures = torch.stack(
        [
            torch.from_numpy(np.array(Image.open(p))).movedim(-1, 0) / 127.5 - 1
            for p in sorted(faces.iterdir())
        ]
    )
    file = ROOT / "osdface_core" / "osdface" / "builtin" / "autoencoder.safetensors"
    small = {"kind": "builtin", "weights": str(file), "train": "all"}
    # A degradation that leaves nothing: the decoder would learn that every picture is flat.
    flat = {"stages": [{"kernels": {"none": 1}, "shrink": [SIDE, SIDE], "jpeg_chance": 0.0}]}

    def error(weight: float) -> float:
        config = stage2(
            faces,
            tmp_path,
            vre,
            unet={"config": BUILTIN_UNET},
            vae=small,
            degradation=flat,
            losses={"mse": 1.0, "autoencoding": weight, **OFF},
        )
        folder = run(
            config,
            "stage2",
            "run.steps=20",
            "run.batch=8",
            "run.ema=0.0",
            f"run.folder={tmp_path / str(weight)}",
        )
        network = Autoencoder()
        network.load_state_dict(load_file(folder / "autoencoder.safetensors"))
        # All of it is trained, but for the denoiser, which has learned from more.
        start, end = load_file(file), network.state_dict()
        kept = {name for name in start if torch.equal(start[name].float(), end[name])}
        assert kept - {"decoder.grain"} == {name for name in start if ".denoiser." in name}
        with torch.no_grad():
            return float((network(pictures) - pictures).square().mean())

    assert error(1.0) < error(0.0) / 2


def test_dists_is_shown_parts_of_some_pictures_where_that_is_asked(
    faces: Path, vre: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []

    def measured(network: Any, given: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        assert given.shape == right.shape
        seen.append(tuple(given.shape))
        return (given - right).abs().mean()

    monkeypatch.setattr(training_stage2, "load_dists", lambda files: torch.nn.Identity())
    monkeypatch.setattr(training_stage2, "edge_aware_dists", measured)
    for own, shape in (
        ({}, (4, 3, SIDE, SIDE)),
        ({"seen": 16, "shown": 1}, (1, 3, 16, 16)),
        ({"seen": 4 * SIDE}, (4, 3, SIDE, SIDE)),
    ):
        losses = {**OFF, "ea_dists": {"weight": 1.0, "files": ["vgg16.pth"]}, **own}
        run(stage2(faces, tmp_path, vre, losses=losses), "stage2", f"run.folder={tmp_path / 'r'}")
        assert set(seen) == {shape}
        seen.clear()
        shutil.rmtree(tmp_path / "r")


@pytest.mark.parametrize(
    ("spoilt", "lean", "share"),
    [(0.0, 1, 1.0), (1e-9, 1, 2.0), (1e3, 1, 0.25), (1e-9, 3, 8.0), (1e3, 2, 0.0625)],
)
def test_what_eyes_judge_weighs_more_where_more_is_lost(
    spoilt: float,
    lean: float,
    share: float,
    faces: Path,
    vre: Path,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    gradients: list[torch.Tensor] = []
    forward = training_stage2.Generator.forward

    def watched(self: Any, *given: Any) -> Any:
        found = forward(self, *given)
        if found[0].requires_grad:
            found[0].register_hook(gradients.append)
        return found

    monkeypatch.setattr(training_stage2.Generator, "forward", watched)
    monkeypatch.setattr(training_stage2, "load_dists", lambda files: torch.nn.Identity())
    monkeypatch.setattr(
        training_stage2, "edge_aware_dists", lambda network, given, right: (given - right).sum()
    )
    judged = {"ea_dists": {"weight": 1.0, "files": ["vgg16.pth"]}, "mse": 0.0}
    judged |= {"spoilt": spoilt, "lean": lean}
    run(stage2(faces, tmp_path, vre, losses={**OFF, **judged}), "stage2", "run.steps=1")
    assert {float(x) for x in gradients[0].unique()} == {share}


@pytest.mark.parametrize("loss", ["tones", "weave"])
def test_shades_and_what_repeats_are_trained_where_nothing_else_is(
    loss: str, faces: Path, vre: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = stage2(faces, tmp_path, vre, losses={"mse": 0.0, loss: 10.0, **OFF})
    run(config, "stage2", "run.steps=30", "run.batch=8", "run.log_every=10")
    errors, totals = logged(caplog, loss), logged(caplog, "total")
    assert errors[-1] < errors[0]
    assert totals == pytest.approx([10 * error for error in errors], rel=1e-2)


def test_nothing_to_train_or_grain_of_another_autoencoder_is_refused(
    faces: Path, vre: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for changes, says in (
        (("train=none", "vae.train=none"), "name something to train"),
        (("vae.train=grain",), "which only the built-in autoencoder has"),
    ):
        PartialState._reset_state()
        assert main(["stage2", "--config", str(stage2(faces, tmp_path, vre)), *changes]) == 1
        assert says in capsys.readouterr().err


def test_what_is_written_is_read_by_the_embedder_and_by_peft(
    faces: Path, vre: Path, tmp_path: Path
) -> None:
    config = stage2(faces, tmp_path, vre, train="lora", lora={"rank": 4, "alpha": 8})
    folder = run(config, "stage2", "run.steps=2", "run.ema=0")
    embedder = build_embedder(read_embedder(folder / "osdface_vre.safetensors"))
    prompts = embedder(torch.rand(2, 3, SIDE, SIDE))
    assert prompts.shape == (2, 77, 1024)
    before = load_file(vre)
    assert torch.equal(
        embedder.state_dict()["encoder.conv_in.weight"], before["vqvae_LQ.encoder.conv_in.weight"]
    )
    state = torch.load(checkpoints(folder)[-1], weights_only=True)["networks"]["generator"]
    assert torch.equal(
        embedder.state_dict()["projector.conv1.weight"], state["projector.conv1.weight"]
    )
    lora = load_file(folder / "pytorch_lora_weights.safetensors")
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    assert torch.equal(
        lora[f"unet.{name}.lora.down.weight"], state[f"unet.{name}.lora_A.default.weight"]
    )
    assert torch.equal(
        lora[f"unet.{name}.lora.up.weight"], 2 * state[f"unet.{name}.lora_B.default.weight"]
    )
    assert "unet.down_blocks.0.resnets.0.conv1.lora_A.weight" in lora


@pytest.fixture(scope="module")
def portraits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One face of scikit-image's, in four sizes."""
    skimage_data = pytest.importorskip("skimage.data")
    folder = tmp_path_factory.mktemp("portraits")
    picture = Image.fromarray(skimage_data.astronaut())
    for i in range(4):
        border = 20 * i
        part = picture.crop((110 - border, 0, 340 + border, 230 + 2 * border))
        part.resize((256, 256)).save(folder / f"portrait_{i:03d}.png")
    return folder


SMALL = {
    "autoencoder": {
        "data": {"size": 128, "crop": 64, "held_out": [3]},
        "degradation": {"chance": 0.3, "stages": [{"kernels": {"none": 1}, "shrink": [2, 8]}]},
        "optimiser": {"learning_rate": 2e-3},
    },
    "detector": {
        "data": {"size": 256, "held_out": [3]},
        "teacher": str(BUILTIN_DETECTOR),
        "scenes": {"sizes": [[96, 3], [128, 2]], "windows": 1},
        "optimiser": {"learning_rate": 3e-3, "warmup": 4, "schedule": "cosine", "end": 0.01},
    },
    "parser": {
        "data": {"size": 256, "held_out": [3]},
        "optimiser": {"learning_rate": 3e-3, "warmup": 4},
    },
}


def small(task: str, portraits: Path, folder: Path, **changes: Any) -> Path:
    """The configuration of a small training of the built-in model's."""
    config = SMALL[task] | {
        "run": {"folder": str(folder / "run"), "steps": 4, "channels_last": True, **QUIET}
    }
    config["data"] = SMALL[task]["data"] | {"folder": str(portraits)}
    if task == "parser":
        config["masks"] = str(folder / "masks")
        (folder / "masks").mkdir(exist_ok=True)
        for path in portraits.glob("*.png"):
            mask = Image.new("L", (256, 256))
            ImageDraw.Draw(mask).ellipse((70, 40, 190, 220), fill=255)
            mask.save(folder / "masks" / path.name)
    return write(folder / f"{task}.yaml", config | changes)


@pytest.mark.parametrize(
    ("task", "less"), [("autoencoder", 0.7), ("detector", 0.7), ("parser", 0.8)]
)
def test_a_few_steps_lower_the_loss_and_the_export_is_read(
    task: str,
    less: float,
    portraits: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO)
    # Windows alone: the loss of other scenes depends on how many faces they show.
    own = {
        "autoencoder": ["run.batch=8"],
        "detector": ["scenes.windows=4", "scenes.windows_chance=1"],
        "parser": ["run.batch=3"],
    }[task]
    folder = run(
        small(task, portraits, tmp_path),
        task,
        "run.steps=40",
        "run.log_every=8",
        "run.samples=2",
        *own,
    )
    losses = logged(caplog, "total")
    assert losses[-1] < less * losses[0]
    shown = Image.open(folder / "samples" / "0000040.png").size
    assert (
        shown
        == {"autoencoder": (128, 2 * 128), "detector": (2 * 256, 256), "parser": (256, 3 * 256)}[
            task
        ]
    )
    tensors = load_file(folder / f"{task}.safetensors")
    assert {t.dtype for t in tensors.values()} <= {torch.float16, torch.int64}
    if task == "detector":
        _, confidences, _ = build_retinaface(tensors)(torch.zeros(1, 3, 64, 64))
        assert bool(confidences.isfinite().all())
    elif task == "parser":
        crop = torch.from_numpy(np.array(Image.open(portraits / "portrait_003.png"))) / 255
        face = parse_faces(crop[None], build_parser(tensors))[0]
        assert face[200:320, 200:320].mean() > face[:60].mean() + 0.2
    else:
        monkeypatch.setattr(builtin, "AUTOENCODER", folder / "autoencoder.safetensors")
        picture = torch.from_numpy(np.array(Image.open(portraits / "portrait_003.png")))
        pixels = picture.movedim(-1, 0)[None] / 127.5 - 1
        with torch.no_grad():
            assert float((builtin.autoencoder()(pixels) - pixels).abs().mean()) < 0.15


def test_the_denoiser_alone_is_trained_on_pictures_of_half_the_size(
    portraits: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.INFO)
    noisy = {"kernels": {"none": 1}, "shrink": [4, 4], "noise": [20, 20], "jpeg_chance": 0}
    config = small(
        "autoencoder",
        portraits,
        tmp_path,
        part="denoiser",
        model_size=256,
        start=str(builtin.AUTOENCODER),
        degradation={"stages": [noisy]},
        optimiser={"learning_rate": 1e-3},
    )
    extra = ("data.crop=0", "run.batch=6", "run.log_every=10", "run.samples=1", "run.ema=0.5")
    folder = run(config, "autoencoder", "run.steps=40", *extra)
    shares = logged(caplog, "share")
    assert shares[-1] < 0.95 * shares[0]
    assert Image.open(folder / "samples" / "0000040.png").size == (128, 3 * 128)
    before, after = load_file(builtin.AUTOENCODER), load_file(folder / "autoencoder.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert {name.rpartition(".")[0].split(".")[1] for name in changed} == {"denoiser"}
    for change, said in (("model_size=384", "set them"), ("start=null", "`start` is not given")):
        PartialState._reset_state()
        assert main(["autoencoder", "--config", str(config), "data.crop=0", change]) == 1
        assert said in capsys.readouterr().err


def test_the_autoencoders_training_leaves_its_denoiser_alone(
    portraits: Path, tmp_path: Path
) -> None:
    config = small("autoencoder", portraits, tmp_path, start=str(builtin.AUTOENCODER))
    folder = run(config, "autoencoder")
    before, after = load_file(builtin.AUTOENCODER), load_file(folder / "autoencoder.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"encoder.linear.weight", "decoder.conv_out.weight"} <= changed
    assert not [name for name in changed if ".denoiser." in name]


def test_a_denoisers_training_that_was_stopped_goes_on_to_the_same_bits(
    portraits: Path, tmp_path: Path
) -> None:
    config = small("autoencoder", portraits, tmp_path, start=str(builtin.AUTOENCODER))
    own = ("part=denoiser", "data.crop=0", "model_size=256", "run.checkpoint_every=2")
    whole = run(config, "autoencoder", f"run.folder={tmp_path / 'whole'}", *own)
    stopped = run(config, "autoencoder", f"run.folder={tmp_path / 'stopped'}", *own)
    checkpoints(stopped)[-1].unlink()
    (stopped / "autoencoder.safetensors").unlink()
    run(config, "autoencoder", f"run.folder={stopped}", *own)
    file = "autoencoder.safetensors"
    assert (whole / file).read_bytes() == (stopped / file).read_bytes()


@pytest.mark.parametrize("task", ["autoencoder", "detector", "parser"])
def test_a_training_that_was_stopped_goes_on_to_the_same_bits(
    task: str, portraits: Path, tmp_path: Path
) -> None:
    config = small(task, portraits, tmp_path)
    extra = ("run.checkpoint_every=2", "run.accumulate=2")
    whole = run(config, task, f"run.folder={tmp_path / 'whole'}", *extra)
    stopped = run(config, task, f"run.folder={tmp_path / 'stopped'}", *extra)
    checkpoints(stopped)[-1].unlink()
    (stopped / f"{task}.safetensors").unlink()
    run(config, task, f"run.folder={stopped}", *extra)
    before, after = weights(whole), weights(stopped)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    file = f"{task}.safetensors"
    assert (whole / file).read_bytes() == (stopped / file).read_bytes()


@pytest.mark.parametrize(
    ("task", "start"),
    [
        ("autoencoder", builtin.AUTOENCODER),
        ("detector", BUILTIN_DETECTOR),
        ("parser", BUILTIN_PARSER),
    ],
)
def test_a_training_starts_from_the_weights_given(
    task: str,
    start: Path,
    portraits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = small(task, portraits, tmp_path)
    changes = ("run.steps=1", "optimiser.learning_rate=0", "optimiser.warmup=0", "run.ema=0")
    folder = run(config, task, f"start={start}", *changes)
    given, after = load_file(start), load_file(folder / f"{task}.safetensors")
    assert given.keys() == after.keys()
    learned = [name for name in given if name.endswith(("weight", "bias"))]
    assert [name for name in learned if not torch.equal(given[name], after[name])] == []
    other = builtin.AUTOENCODER if task == "detector" else BUILTIN_DETECTOR
    PartialState._reset_state()
    assert main([task, "--config", str(config), f"start={other}"]) == 1
    said = "no file of" if task == "autoencoder" else "does not fit"
    assert said in capsys.readouterr().err


def test_a_larger_batch_of_the_detector_is_refused(
    portraits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small("detector", portraits, tmp_path)
    assert main(["detector", "--config", str(config), "run.batch=4"]) == 1
    assert "set run.batch=1" in capsys.readouterr().err


def test_the_built_in_unet_is_named_and_not_spelled_out(tmp_path: Path) -> None:
    unet = load_unet(UNetConfig(kind="builtin", weights=builtin.UNET))
    assert {key: unet.config[key] for key in builtin.UNET_CONFIG} == builtin.UNET_CONFIG
    given = load_file(builtin.UNET)
    assert all(torch.equal(t, given[name].float()) for name, t in unet.state_dict().items())
    with pytest.raises(OSDFaceError, match=r"`unet` cannot be loaded .* another `unet\.weights`"):
        load_unet(UNetConfig(kind="builtin", weights=builtin.AUTOENCODER))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configurations_are_read(path: Path) -> None:
    kind = KINDS[path.stem.partition("_")[0]]
    assert read_config(kind, path, ["run.steps=7"]).run.steps == 7


def test_no_as_yaml_reads_it_is_no_precision() -> None:
    assert (
        read_config(Stage2Config, CONFIGS / "stage2.yaml", ["run.precision=no"]).run.precision
        == "no"
    )


@pytest.mark.parametrize("has", [True, False])
def test_bf16_on_a_processor_without_it_is_warned_of(
    has: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("osdface_core.training.loop.has_bf16", lambda: has)
    accelerator_for(Run(tmp_path, steps=1, precision="bf16", cpu=True))
    assert ("no instructions for bf16" in caplog.text) is not has


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("run.stepps=3", r"key `stepps` in `run` is unknown; known are folder, steps"),
        ("lamda=3", r"key `lamda` in the configuration is unknown"),
        ("run.steps=many", r"`run.steps` is 'many'; int is wanted"),
        (
            "degradation.stages=[{shrimk: [1, 2]}]",
            r"key `shrimk` in `degradation.stages.0` is unknown",
        ),
        ("run.precision=fp8", r"`run.precision` is 'fp8'; no or bf16 or fp16 is wanted"),
        ("steps", r"write key=value"),
    ],
)
def test_a_mistake_in_the_configuration_is_one_sentence(change: str, says: str) -> None:
    with pytest.raises(OSDFaceError, match=says):
        read_config(Stage2Config, CONFIGS / "stage2.yaml", [change])


def test_losses_without_their_networks_are_off_and_the_log_says_so(
    faces: Path, vre: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = stage2(faces, tmp_path, vre, losses={"gan": {"weight": 1.0}})
    run(config, "stage2", "run.steps=1")
    said = [r.getMessage() for r in caplog.records if "switched off" in r.getMessage()]
    assert [line.split()[0] for line in said] == ["ea_dists", "lpips", "identity", "gan"]


@pytest.mark.full
@pytest.mark.parametrize("judge", ["", "unet"])
def test_a_full_size_step_of_stage_2_fits_in_20_gib(
    judge: str, stand_ins: Path, data: Path, tmp_path: Path
) -> None:
    """The whole command with the full-size configuration; with a discriminator over Stable
    Diffusion's own UNet, too.
    """
    base = stand_ins / "sd21-diffusers"
    if not base.is_dir():
        pytest.skip("no sd21-diffusers among the stand-in weights: make_weights.py writes it")
    command = [
        sys.executable,
        "-m",
        "osdface_core.training",
        "stage2",
        "--config",
        str(CONFIGS / "stage2.yaml"),
    ]
    command += [
        f"data.folder={data / 'images' / 'portraits'}",
        f"vre={stand_ins / 'osdface' / 'associate_2.ckpt'}",
    ]
    command += [
        f"unet.folder={base}",
        f"vae.folder={base}",
        f"lora.start={stand_ins / 'osdface' / 'pytorch_lora_weights.safetensors'}",
    ]
    command += [
        f"run.folder={tmp_path}",
        "run.steps=1",
        "run.batch=1",
        "run.cpu=true",
        "run.workers=0",
        "run.samples=0",
    ]
    command += [f"losses.gan.network.folder={base}"] if judge else []
    # Without instructions for bf16 a processor takes hours over it.
    command += [] if has_bf16() else ["run.precision=no", "frozen_precision=fp32"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    gibibytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"peak {gibibytes:.1f} GiB\n{done.stderr}")  # noqa: T201
    assert gibibytes < 20
    lora = parse_lora(load_file(tmp_path / "pytorch_lora_weights.safetensors"))
    before = parse_lora(load_file(stand_ins / "osdface" / "pytorch_lora_weights.safetensors"))
    assert len(lora) == 278
    assert all(
        not torch.equal(lora[name].up * lora[name].scale, before[name].up * before[name].scale)
        for name in lora
    )
    assert read_embedder(tmp_path / "osdface_vre.safetensors").keys() >= {
        "projector.conv1.weight",
        "encoder.conv_in.weight",
    }
