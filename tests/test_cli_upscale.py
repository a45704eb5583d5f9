"""`python -m osdface_core upscale`: pictures, folders and videos come out enlarged, with the text
encoder of the model's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

pytest.importorskip("diffusers", reason="no diffusers: pip install -r requirements-dev.txt")
pytest.importorskip("av", reason="no PyAV: pip install -r requirements-dev.txt")
pytest.importorskip("imagecodecs", reason="no imagecodecs: pip install -r requirements-dev.txt")
pytest.importorskip("tifffile", reason="no tifffile: pip install -r requirements-dev.txt")

import av

from osdface_core import cli
from osdface_core.cli import pictures, upscaler
from osdface_core.diffusers.text import encode_text, token_ids
from osdface_core.errors import OSDFaceError
from osdface_core.ldm.text import empty_text
from tests.photographs import write_detector
from tests.test_osediff import Pixels

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("away_from_home")
Run = Callable[..., int]


@pytest.fixture
def run(
    small_model: Path, osediff_pickle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Run:
    """The command on small random networks, which cannot hold OSEDiff's weights: these are read,
    and pixels pass OSEDiff as they are.
    """
    models = tmp_path / "models"
    (models / "facedetection").mkdir(parents=True)
    write_detector(models / "facedetection")

    def passing(model: Path, weights: Any, source: str, **how: Any) -> Pixels:
        assert (len(weights.unet), len(weights.encoder)) == (258, 32)
        return Pixels()

    text = torch.randn(1, 77, 1024, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(upscaler, "load_osediff", passing)
    monkeypatch.setattr(upscaler, "encode_text", lambda *_, **__: text)
    fixed = ["--model", small_model, "--osediff", osediff_pickle, "--models-dir", models]
    fixed += ["--lora", "none", "--vre", small_model / "vre.safetensors"]
    fixed += ["--dtype", "fp32", "--device", "cpu"]
    return lambda *given: cli.main(["upscale", *map(str, (*fixed, *given))])


@pytest.fixture(scope="module")
def portrait(photographs: Path) -> Image.Image:
    return Image.open(photographs / "astronaut.png").convert("RGB").crop((100, 0, 356, 256))


def test_a_folder_is_enlarged_and_every_kind_keeps_what_it_can(
    run: Run, portrait: Image.Image, tmp_path: Path
) -> None:
    given, out = tmp_path / "in", tmp_path / "out"
    (given / "deep").mkdir(parents=True)
    small = portrait.resize((41, 30))
    alpha = Image.linear_gradient("L").resize((41, 30))
    small.save(given / "deep" / "plain.jpg", dpi=(300, 300))
    small.convert("L").save(given / "grey.png")
    with_alpha = small.convert("RGBA")
    with_alpha.putalpha(alpha)
    with_alpha.save(given / "alpha.png")
    small.convert("CMYK").save(given / "ink.tif")
    deep = (np.asarray(small).astype(np.uint16) * 257)[..., 0]
    Image.fromarray(deep).save(given / "deep.png")
    (given / "broken.png").write_bytes(b"not a picture")
    report = tmp_path / "report.json"
    assert run(given, out, "--scale", "2", "--report", report) == 1
    done = sorted((path for path in out.rglob("*") if path.is_file()), key=str)
    assert [str(path.relative_to(out)) for path in done] == [
        "alpha.png",
        "deep.png",
        "deep/plain.jpg",
        "grey.png",
        "ink.tif",
    ]
    for path in done:
        read = pictures.read(path)
        assert read.pixels.shape[:2] == (60, 82), path
        assert read.depth == (16 if path.name == "deep.png" else 8)
        assert read.pixels.shape[2] == {"alpha.png": 4, "grey.png": 1, "deep.png": 1}.get(
            path.name, 3
        )
    wanted = np.asarray(alpha.resize((82, 60), Image.Resampling.BICUBIC), float)
    assert np.abs(np.asarray(Image.open(out / "alpha.png"), float)[..., 3] - wanted).max() < 1.5
    said = {entry["input"]: entry for entry in json.loads(report.read_text())["files"]}
    assert said[str(given / "grey.png")] == said[str(given / "grey.png")] | {
        "status": "done",
        "width": 82,
        "height": 60,
    }
    assert said[str(given / "broken.png")]["status"] == "failed"
    # Started again, nothing is done twice.
    times = {path: path.stat().st_mtime_ns for path in done}
    (given / "broken.png").unlink()
    assert run(given, out, "--scale", "2") == 0
    assert {path: path.stat().st_mtime_ns for path in done} == times


def test_with_faces_they_are_restored_in_the_enlarged_picture(
    run: Run, portrait: Image.Image, tmp_path: Path
) -> None:
    portrait.save(tmp_path / "a.png")
    for name, more in (("plain", ()), ("faces", ("--faces",))):
        report = tmp_path / f"{name}.json"
        given = (tmp_path / "a.png", tmp_path / f"{name}.png", "--scale", "1.5")
        assert run(*given, "--report", report, *more) == 0
    (entry,) = json.loads((tmp_path / "faces.json").read_text())["files"]
    (face,) = entry["faces"]
    plain, faces = (
        np.asarray(Image.open(tmp_path / f"{name}.png"), int) for name in ("plain", "faces")
    )
    assert plain.shape == faces.shape == (384, 384, 3)
    changed = (plain != faces).any(-1)
    x1, y1, x2, y2 = map(round, face["box"])
    assert changed[y1:y2, x1:x2].mean() > 0.6
    assert changed.mean() < 0.9
    wanted = np.asarray(portrait.resize((384, 384), Image.Resampling.BICUBIC), int)
    assert np.abs(plain - wanted).mean() < 8


@pytest.mark.parametrize("faces", [False, True])
def test_a_video_is_enlarged_with_its_times(
    faces: bool, run: Run, portrait: Image.Image, tmp_path: Path
) -> None:
    with av.open(str(tmp_path / "in.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(25))
        stream.width, stream.height, stream.pix_fmt = 258, 256, "yuv420p"
        for i in range(3):
            picture = portrait.resize((258, 256)).rotate(0, translate=(i, 0))
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    options = ("--scale", "1.5", "--report", tmp_path / "r.json", *["--faces"][: int(faces)])
    assert run(tmp_path / "in.mp4", tmp_path / "out.mp4", *options) == 0

    def frames(name: str) -> list[av.VideoFrame]:
        with av.open(str(tmp_path / name)) as container:
            return list(container.decode(video=0))

    before, after = frames("in.mp4"), frames("out.mp4")
    assert [f.time for f in after] == [f.time for f in before]
    # 387 px wide, which the encoder does not take.
    assert {(f.width, f.height) for f in after} == {(386, 384)}
    (entry,) = json.loads((tmp_path / "r.json").read_text())["files"]
    assert (entry["frames"], entry["width"], entry["height"]) == (3, 386, 384)
    assert len(entry["faces"]) == (3 if faces else 0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model", "builtin"], "--model is builtin, for which OSEDiff has no weights"),
        (["--osediff", "gone.pkl"], "--osediff is gone.pkl, which does not exist"),
        (["--tokenizer", "gone"], "--tokenizer is gone, which does not exist"),
        (["--tile", "100"], "`tile` is 100; 256 or more"),
        (["--osediff", "."], r"There is no file .*"),
    ],
)
def test_wrong_options_are_told_before_the_work(
    options: list[str],
    says: str,
    run: Run,
    portrait: Image.Image,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    portrait.save(tmp_path / "a.png")
    assert run(tmp_path / "a.png", tmp_path / "out.png", *options) == 2
    assert re.search(says, caplog.text)
    assert not (tmp_path / "out.png").exists()


def test_weights_that_are_missing_are_named_with_the_remedy(
    small_model: Path, portrait: Image.Image, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    portrait.save(tmp_path / "a.png")
    given = ["upscale", str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    assert cli.main([*given, "--model", str(small_model), "--models-dir", str(tmp_path)]) == 2
    assert "osediff.safetensors (OSEDiff's weights, converted) is missing in" in caplog.text
    assert "add --download, put it there." in caplog.text


# Text


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A model's folder with a text encoder of two layers and a tokenizer of a few words, and that
    encoder.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path_factory.mktemp("text_model")
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=2,
        num_attention_heads=16,
        hidden_act="gelu",
    )
    encoder = CLIPTextModel(config).eval()
    encoder.save_pretrained(folder / "text_encoder")
    (folder / "tokenizer").mkdir()
    # The words are those of CLIP's own vocabulary, at its own numbers.
    words = {"<|startoftext|>": 49406, "<|endoftext|>": 49407, "a</w>": 320, "cat</w>": 2368}
    letters = {chr(97 + i): 64 + i for i in range(26)} | {
        f"{chr(97 + i)}</w>": 320 + i for i in range(26)
    }
    pairs = [("c", "at</w>"), ("a", "t</w>")]
    words |= letters | {"at</w>": 536}
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(words))
    merges = "\n".join(" ".join(pair) for pair in reversed(pairs))
    (folder / "tokenizer" / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (folder / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "unk_token": "<|endoftext|>"})
    )
    return folder, encoder


def last_state(encoder: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return encoder(torch.tensor([ids + [0] * (77 - len(ids))]))[0]


def test_a_text_is_encoded_as_transformers_does_it(text_model: tuple[Path, Any]) -> None:
    folder, encoder = text_model
    assert token_ids("a cat", folder / "tokenizer")[0, :5].tolist() == [49406, 320, 2368, 49407, 0]
    for text, ids in (("", [49406, 49407]), ("a cat", [49406, 320, 2368, 49407])):
        found = encode_text(folder, text)
        assert found.shape == (1, 77, 1024)
        assert (found - last_state(encoder, ids)).abs().max() < 1e-5
    assert token_ids("a " * 200, folder / "tokenizer").shape == (1, 77)


def as_open_clip(encoder: Any) -> dict[str, Tensor]:
    """The encoder's tensors under the names of the original checkpoint, with a last block that
    Stable Diffusion 2 leaves out.
    """
    state = {name.removeprefix("text_model."): t for name, t in encoder.state_dict().items()}
    out = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
    }
    for i in range(3):
        mine, its = f"transformer.resblocks.{i}.", f"encoder.layers.{min(i, 1)}."
        for kind in ("weight", "bias"):
            parts = [state[f"{its}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            out[f"{mine}attn.in_proj_{kind}"] = torch.cat(parts)
            for name, theirs in (
                ("attn.out_proj", "self_attn.out_proj"),
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                out[f"{mine}{name}.{kind}"] = state[f"{its}{theirs}.{kind}"]
    return {f"cond_stage_model.model.{name}": t.contiguous() for name, t in out.items()}


def test_a_checkpoint_s_own_encoder_gives_the_same(
    text_model: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, encoder = text_model
    save_file(
        {name: t.clone() for name, t in as_open_clip(encoder).items()}, tmp_path / "a.safetensors"
    )
    wanted = last_state(encoder, [49406, 49407])
    # By transformers, and by the encoder in plain torch.
    for encode in (lambda path: encode_text(path, ""), empty_text):
        found = encode(tmp_path / "a.safetensors")
        assert found.shape == (1, 77, 1024)
        assert (found - wanted).abs().max() < 1e-5
    with pytest.raises(OSDFaceError, match="needs CLIP's tokenizer, and a checkpoint has no vocab"):
        encode_text(tmp_path / "a.safetensors", "a cat")
    words = encode_text(tmp_path / "a.safetensors", "a cat", tokenizer=folder / "tokenizer")
    assert torch.equal(words, encode_text(folder, "a cat"))


def test_a_model_without_its_text_encoder_is_named(small_model: Path, tmp_path: Path) -> None:
    with pytest.raises(OSDFaceError, match=r"text_encoder cannot be loaded"):
        encode_text(small_model, "")
    save_file({"model.diffusion_model.a": torch.zeros(1)}, tmp_path / "unet.safetensors")
    for encode in (lambda path: encode_text(path, ""), empty_text):
        with pytest.raises(OSDFaceError, match=r"unet\.safetensors has no text encoder"):
            encode(tmp_path / "unet.safetensors")
