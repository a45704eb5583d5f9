# ruff: noqa: F811  (fixtures of tests/test_training.py are arguments here)
"""OSEDiff's training, at a size that a processor does in seconds and, once, at its own."""

from __future__ import annotations

import json
import logging
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip(
    "accelerate", reason="training needs accelerate: pip install -r requirements-dev.txt"
)

from osdface_core.cpu import has_bf16
from osdface_core.osediff.weights import adapted_layers, parse_weights
from osdface_core.sd21.modules import vae_encoder_layers
from osdface_core.training.config import read_config
from osdface_core.training.data import read_square
from osdface_core.training.loop import checkpoints
from osdface_core.training.networks import UNetConfig, VaeConfig, load_unet, load_vae
from osdface_core.training.osediff import (
    OSEDiffConfig,
    adapted_in_encoder,
    adapted_in_unet,
    distillation,
)
from tests.test_training import (  # noqa: F401
    CONFIGS,
    DEGRADATION,
    QUIET,
    ROOT,
    SIDE,
    UNET,
    VAE,
    faces,
    fresh,
    logged,
    run,
    weights,
    write,
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder with a text encoder of one narrow layer, and a tokenizer of two letters."""
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path_factory.mktemp("text")
    torch.manual_seed(0)
    shape = {"intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 16}
    CLIPTextModel(CLIPTextConfig(vocab_size=49408, hidden_size=1024, **shape)).save_pretrained(
        folder / "text_encoder"
    )
    (folder / "tokenizer").mkdir()
    words = {"<|startoftext|>": 49406, "<|endoftext|>": 49407, "a</w>": 320, "b</w>": 321}
    words |= {"a": 64, "b": 65}
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(words))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "unk_token": "<|endoftext|>"})
    )
    return folder


@pytest.fixture(scope="module")
def vae(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder with a small autoencoder that knows the eight pictures, for its decoder is
    not trained.
    """
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    network: Any = AutoencoderKL(**VAE)
    pictures = torch.stack([read_square(path, SIDE) for path in sorted(faces.iterdir())])
    pixels = pictures.float() / 127.5 - 1
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(120):
        latents = network.encode(pixels).latent_dist.mode()
        loss = (network.decode(latents).sample - pixels).square().mean()
        loss = loss + 0.01 * latents.square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    network.save_pretrained(folder / "vae")
    return folder


def osediff(faces: Path, text: Path, folder: Path, **changes: Any) -> Path:
    return write(
        folder / "osediff.yaml",
        {
            "run": {"folder": str(folder / "run"), "steps": 4, "batch": 2, **QUIET},
            "data": {"folder": str(faces), "size": SIDE},
            "unet": {"config": UNET},
            "vae": {"kind": "kl", "config": VAE},
            "text": str(text),
            "negative": "b",
            "optimiser": {"learning_rate": 3e-3},
            "losses": {"lpips": {"weight": 0}},
            "degradation": DEGRADATION,
            **changes,
        },
    )


def test_every_layer_that_the_released_files_adapt_is_adapted() -> None:
    """At Stable Diffusion 2.1's own size: 258 of the UNet and 32 of the encoder."""
    from osdface_core.diffusers.loading import UNET_CONFIG, VAE_CONFIG

    with torch.device("meta"):
        unet = load_unet(UNetConfig(config=dict(UNET_CONFIG)))
        vae: Any = load_vae(VaeConfig(config=dict(VAE_CONFIG)), torch.float32)
    assert sorted(adapted_in_unet(unet)) == sorted(adapted_layers())
    assert len(adapted_layers()) == 258
    assert sorted(adapted_in_encoder(vae.vae)) == sorted(vae_encoder_layers())
    assert len(vae_encoder_layers()) == 32


def test_it_learns_eight_pictures_by_heart(
    faces: Path,
    text: Path,
    vae: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    # A teacher of random weights knows no pictures, so that it is hardly listened to.
    losses_of = {"lpips": {"weight": 0}, "vsd": 0.01}
    folder = run(
        osediff(faces, text, tmp_path, rank=16, vae={"folder": str(vae)}, losses=losses_of),
        "osediff",
        *("run.steps=80", "run.batch=8", "run.log_every=10", "run.samples=4"),
        "optimiser.learning_rate=1e-3",
    )
    losses = logged(caplog, "mse")
    assert losses[-1] < losses[0] / 2
    assert logged(caplog, "regulariser")[-1] < logged(caplog, "regulariser")[0]
    assert (folder / "samples" / "0000080.png").is_file()


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(
    faces: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    config = osediff(faces, text, tmp_path)
    extra = ("run.accumulate=2", "run.checkpoint_every=2")
    whole = weights(run(config, "osediff", f"run.folder={tmp_path / 'whole'}", *extra))
    stopped = run(config, "osediff", f"run.folder={tmp_path / 'stopped'}", *extra)
    checkpoints(stopped)[-1].unlink()
    again = weights(run(config, "osediff", f"run.folder={stopped}", *extra))
    assert whole.keys() == again.keys()
    assert any("regulariser" in name for name in whole)
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []


def test_what_is_trained_is_what_the_released_code_trains(
    faces: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    config = osediff(faces, text, tmp_path)
    made = run(config, "osediff", "run.steps=2")
    state = torch.load(checkpoints(made)[-1], weights_only=True)["networks"]
    names = list(state["generator"])
    assert {name for name in names if ".lora_" not in name} == {
        "unet.conv_in.base_layer.weight",
        "unet.conv_in.base_layer.bias",
    }
    assert not any("decoder" in name and name.startswith("vae") for name in names)
    assert all(".lora_" in name for name in state["regulariser"])
    tensors = load_file(made / "osediff.safetensors")
    ups = [t for name, t in tensors.items() if name.endswith("lora_up.weight")]
    assert all(bool(up.any()) for up in ups)
    assert float(tensors["vae.quant_conv.alpha"]) == 8


def test_texts_beside_the_pictures_lead_the_training(
    faces: Path,
    text: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    described = tmp_path / "described"
    described.mkdir()
    for i, path in enumerate(sorted(faces.iterdir())):
        (described / path.name).symlink_to(path)
        if i % 2:
            (described / path.name).with_suffix(".txt").write_text("a\n")
    for folder in (faces, described, faces):
        run(
            osediff(folder, text, tmp_path, guidance=1.0),
            "osediff",
            *("run.steps=1", "run.batch=8", f"run.folder={tmp_path / str(len(caplog.records))}"),
        )
    plain, led, again = logged(caplog, "mse")
    assert plain == again
    assert plain != led


# Variational score distillation


def predicting(noise: Tensor) -> Any:
    return lambda noisy, steps: noise


def test_distillation_is_still_where_both_networks_agree() -> None:
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    steps = torch.tensor([100, 900])
    said = predicting(torch.randn(2, 4, 8, 8))
    assert distillation(latents, noise, steps, said, said) == 0


def test_distillation_has_the_released_codes_gradient() -> None:
    """(x0 of the regulariser - x0 of the teacher) / mean |latents - x0 of the teacher|, by the
    schedule written out anew.
    """
    torch.manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, requires_grad=True)
    noise, own, teacher = (torch.randn(2, 4, 8, 8) for _ in range(3))
    steps = torch.tensor([20, 979])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = (1 - betas).cumprod(0)[steps].view(-1, 1, 1, 1)
    noisy = abar.sqrt() * latents.detach() + (1 - abar).sqrt() * noise
    likely, right = ((noisy - (1 - abar).sqrt() * eps) / abar.sqrt() for eps in (own, teacher))
    weight = (latents.detach() - right).abs().mean((1, 2, 3), keepdim=True)
    wanted = 2 * (likely - right) / weight / latents.numel()
    loss = distillation(latents, noise, steps, predicting(own), predicting(teacher))
    loss.backward()
    assert latents.grad is not None
    torch.testing.assert_close(latents.grad.double(), wanted, atol=1e-6, rtol=1e-3)


# Mistakes


def test_configurations_at_their_own_size_are_read() -> None:
    for name in ("osediff", "osediff_face"):
        config = read_config(OSEDiffConfig, CONFIGS / f"{name}.yaml")
        assert (config.rank, config.guidance, config.optimiser.learning_rate) == (4, 7.5, 5e-5)
        assert (config.losses.mse, config.losses.lpips.weight, config.losses.vsd) == (1, 2, 1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("vae.train=decoder", "`vae` is of kind kl with train decoder; kl and none are wanted"),
        ("unet.config.in_channels=8", "`unet` takes 8 channels; 4 are wanted"),
    ],
)
def test_a_mistake_is_one_sentence(
    change: str,
    says: str,
    faces: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from osdface_core.training.__main__ import main

    assert main(["osediff", "--config", str(osediff(faces, text, tmp_path)), change]) == 1
    assert says in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.repeat
def test_a_full_size_step_fits_in_20_gib(
    stand_ins: Path, text: Path, photographs: Path, tmp_path: Path
) -> None:
    base = stand_ins / "sd21-diffusers"
    if not base.is_dir():
        pytest.skip("no sd21-diffusers among the stand-in weights: make_weights.py writes it")
    command = [sys.executable, "-m", "osdface_core.training", "osediff"]
    command += ["--config", str(CONFIGS / "osediff.yaml"), f"data.folder={photographs}"]
    command += [f"unet.folder={base}", f"vae.folder={base}", f"text={text}", "negative=b"]
    command += [f"run.folder={tmp_path}", "run.steps=1", "run.batch=1", "run.cpu=true"]
    command += ["run.workers=0", "run.samples=0", "gradient_checkpointing=true"]
    command += ["run.precision=" + ("bf16" if has_bf16() else "no")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    gibibytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"peak {gibibytes:.1f} GiB\n{done.stderr}")  # noqa: T201
    assert gibibytes < 20
    found = parse_weights(load_file(tmp_path / "osediff.safetensors"), "osediff.safetensors")
    assert (len(found.unet), len(found.encoder)) == (258, 32)
    assert all(bool(adapter.up.any()) for adapter in found.unet.values())
