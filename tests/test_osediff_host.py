"""OSEDiff Upscale inside a real ComfyUI, in this process, on full-size stand-in weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests import widgets
from tests.conftest import FULL_SIZE_FP16
from tests.test_osediff import golden_picture

pytestmark = [pytest.mark.host, pytest.mark.full]

NAME = "osediff.pkl"
SMALL = {"upscale": 1.0, "color_match": "none"}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    """ComfyUI runs every node so."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def truth_of(more_golden: Path) -> dict[str, Tensor]:
    return load_file(more_golden / "osediff" / "golden.safetensors")


@pytest.fixture(scope="module")
def weights_file(host: Any, osediff_pickle: Path) -> Path:
    folder = host.base / "models" / "osediff"
    folder.mkdir(exist_ok=True)
    path = folder / NAME
    if not path.exists():
        path.symlink_to(osediff_pickle)
    return path


@pytest.fixture
def given(
    host: Any, checkpoint: tuple[Any, Any], truth_of: dict[str, Tensor], weights_file: Path
) -> dict[str, Any]:
    """The node's inputs but the picture, with its widgets at their initial values."""
    model, vae = checkpoint
    conditioning = [[truth_of["prompt"], {"pooled_output": torch.zeros(1, 1024)}]]
    return widgets.UPSCALE | {
        "model": model,
        "vae": vae,
        "conditioning": conditioning,
        "osediff_name": NAME,
    }


def enlarge(host: Any, image: Tensor, **inputs: Any) -> Tensor:
    return host.nodes["OSEDiffUpscale"].execute(image=image, **inputs).args[0]


@pytest.fixture
def tiny() -> Tensor:
    return torch.rand(2, 40, 48, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def at_their_size(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures under 512 px are not made larger, so that full-size networks are quick."""
    monkeypatch.setattr(host.module("osdface_core.osediff.upscale"), "SIDE", 8)


def test_the_picture_is_the_released_codes(
    host: Any, given: dict[str, Any], truth_of: dict[str, Tensor]
) -> None:
    image = (truth_of["small.lq8"].float() / 255).movedim(0, -1)[None]
    backbone = host.module("nodes.comfy.osediff").OSEDiffBackbone(
        given["model"], given["vae"], {}, NAME
    )
    latents = backbone.encode(image.movedim(-1, 1))
    assert (latents - truth_of["small.latent"]).abs().max() < 1e-4
    x0 = backbone.denoise(truth_of["small.latent"], truth_of["prompt"], 999)
    assert (x0 - truth_of["small.x0"]).abs().max() < 2e-3
    picture = backbone.decode(truth_of["small.x0"])[0]
    assert (picture - truth_of["small.image"]).abs().max() < 1e-4


def test_the_tiled_picture_is_the_released_codes(
    host: Any, given: dict[str, Any], truth_of: dict[str, Tensor], more_golden: Path
) -> None:
    image = golden_picture(more_golden, "portrait_256x160.png", 4)
    found = enlarge(host, image, **given | SMALL)[0].movedim(-1, 0)
    assert (found - truth_of["tiled.image"].float()).abs().max() < 1e-3


def test_tiles_meet_without_a_seam(
    host: Any, given: dict[str, Any], more_golden: Path, at_their_size: None
) -> None:
    """Against the whole, at the released share of overlap: what a tile's narrower view changes is
    as smooth where tiles begin and end as anywhere.
    """
    image = golden_picture(more_golden, "portrait_256x160.png", 2)[:, :, 60:444]
    options = given | SMALL | {"overlap": 88}
    whole, tiled = (enlarge(host, image, **options | {"tile": tile}) for tile in (0, 256))
    difference = (tiled - whole)[0]
    assert difference.abs().max() > 0, "it was not cut"
    jumps = (difference[:, 1:] - difference[:, :-1]).abs().mean((0, 2))
    # The decoder's own grid of 8 px may show; columns of the same place in it are compared.
    grid = jumps[7::8]
    for edge in (128, 256):
        assert jumps[edge - 1] < 1.5 * grid.median()


def test_pictures_at_once_are_each_alone_and_again_the_same(
    host: Any, given: dict[str, Any], tiny: Tensor, at_their_size: None
) -> None:
    together = enlarge(host, tiny, **given)
    assert together.shape == (2, 160, 192, 3)
    for i in range(2):
        assert (enlarge(host, tiny[i : i + 1], **given)[0] - together[i]).abs().max() < 1e-5
    host.comfy.model_management.unload_all_models()
    given["vae"].osediff_clone.osdface_latents.clear()
    assert torch.equal(enlarge(host, tiny, **given), together)


def test_model_and_vae_are_as_they_were(
    host: Any, given: dict[str, Any], tiny: Tensor, at_their_size: None
) -> None:
    model, vae = given["model"], given["vae"]
    host.comfy.model_management.unload_all_models()

    def state() -> dict[str, Tensor]:
        tensors = {**vae.get_sd(), **model.model.state_dict()}
        names = ("encoder.conv_in.weight", "quant_conv.weight", "decoder.conv_in.weight")
        first = "diffusion_model.input_blocks.0.0.weight", "diffusion_model.input_blocks.0.0.bias"
        return {name: tensors[name].clone() for name in (*names, *first)}

    before, patches = state(), (dict(model.patches), dict(vae.patcher.patches))
    latents = vae.encode(tiny)
    enlarge(host, tiny[:1], **given)
    assert (dict(model.patches), dict(vae.patcher.patches)) == patches
    assert torch.equal(vae.encode(tiny), latents)
    host.comfy.model_management.load_models_gpu([model])
    after = state()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_weights_land_on_258_and_32_layers_and_the_first_is_replaced(
    host: Any, given: dict[str, Any], weights_file: Path
) -> None:
    room = host.module("nodes.comfy.osediff")
    model, vae = given["model"], given["vae"]
    backbone = room.OSEDiffBackbone(model, vae, {}, NAME)
    assert len(backbone.model.patches) == 258 + 1, "the first layer's bias too"
    assert len(backbone.encoder.patcher.patches) == 32
    again = room.OSEDiffBackbone(model, vae, {}, NAME)
    assert again.model is backbone.model
    assert again.encoder is backbone.encoder
    released = torch.load(weights_file, weights_only=True)["state_dict_unet"]
    base = released["conv_in.base_layer.weight"]
    down, up = (released[f"conv_in.lora_{half}.default_encoder.weight"] for half in "AB")
    wanted = base + 2.0 * torch.einsum("orxy,rihw->oihw", up, down)
    key = "diffusion_model.input_blocks.0.0.weight"
    merged = host.comfy.lora.calculate_weight(
        backbone.model.patches[key], torch.zeros_like(base), key
    )
    assert (merged - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
def test_an_interrupt_stops_within_a_tile_and_leaves_the_vae_as_it_was(
    stage: str,
    host: Any,
    given: dict[str, Any],
    tiny: Tensor,
    at_their_size: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    management, vae = host.comfy.model_management, given["vae"]
    clean = vae.encode(tiny)
    kind = host.backbone.HostBackbone
    usual = getattr(kind, stage)

    def asked_while_it_works(backbone: Any, *inputs: Any) -> Tensor:
        network = backbone.model.model if stage == "denoise" else backbone.vae.first_stage_model
        layers = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
        ran: list[int] = []

        def ask(*_: Any) -> None:
            ran.append(1)
            if len(ran) == 3:
                management.interrupt_current_processing(True)

        hooks = [layer.register_forward_hook(ask) for layer in layers]
        try:
            return usual(backbone, *inputs)
        finally:
            for hook in hooks:
                hook.remove()
            assert len(ran) == 3, "it went on after the user had asked"

    monkeypatch.setattr(kind, stage, asked_while_it_works)
    if clone := vae.__dict__.get("osediff_clone"):
        clone.__dict__.pop("osdface_latents", None)
    try:
        with pytest.raises(management.InterruptProcessingException):
            enlarge(host, tiny[:1], **given)
    finally:
        management.interrupt_current_processing(False)
    monkeypatch.undo()
    assert not vae.patcher.backup, "the encoder's LoRA is still on the VAE's weights"
    assert torch.equal(vae.encode(tiny), clean)


def test_memory_that_runs_out_in_the_unet_halves_the_tile(
    host: Any, given: dict[str, Any], at_their_size: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = torch.rand(1, 264, 272, 3)
    usual, sizes = host.backbone.HostBackbone.denoise, []

    def denoise(backbone: Any, latents: Tensor, *rest: Any) -> Tensor:
        sizes.append(tuple(latents.shape[2:]))
        if latents.shape[3] > 32:
            raise host.comfy.model_management.OOM_EXCEPTION("out of memory")
        return usual(backbone, latents, *rest)

    monkeypatch.setattr(host.backbone.HostBackbone, "denoise", denoise)
    found = enlarge(host, image, **given | SMALL | {"overlap": 0})
    assert found.shape == image.shape
    assert found.isfinite().all()
    assert sizes == [(33, 34)] * 2 + [(32, 32)] * 4


def test_pictures_that_come_out_as_nan_are_told(
    host: Any,
    given: dict[str, Any],
    tiny: Tensor,
    at_their_size: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vae = given["vae"]
    decode, broken = vae.decode, [True, False]
    monkeypatch.setattr(
        vae, "decode", lambda latents: decode(latents) * (torch.nan if broken.pop(0) else 1)
    )
    result = host.nodes["OSEDiffUpscale"].execute(image=tiny, **given)
    assert result.args[0].isfinite().all()
    assert "Pictures 0 came out as NaN and are only enlarged" in result.ui.as_dict()["text"][0]
    broken[:] = [True, True]
    with pytest.raises(host.error, match=r"Every picture \(number 0, 1\) came out as NaN: start"):
        host.nodes["OSEDiffUpscale"].execute(image=tiny, **given)


@FULL_SIZE_FP16
@pytest.mark.once
def test_what_overflows_in_an_fp16_vae_is_done_again_in_fp32(
    host: Any, given: dict[str, Any], tiny: Tensor, at_their_size: None
) -> None:
    tensors = {name: tensor.clone() for name, tensor in given["vae"].get_sd().items()}
    tensors["decoder.conv_in.weight"] *= 65000 / tensors["decoder.conv_in.weight"].abs().max()
    wide, narrow = (
        host.comfy.sd.VAE(sd=dict(tensors), dtype=dtype) for dtype in (torch.float32, torch.float16)
    )
    result = host.nodes["OSEDiffUpscale"].execute(image=tiny[:1], **given | {"vae": narrow})
    exact = enlarge(host, tiny[:1], **given | {"vae": wide})
    assert (result.args[0] - exact).abs().max() < 0.05
    assert result.ui.as_dict()["text"][0].startswith("Pictures 0 came out as NaN in half precision")


def visual(host: Any) -> Any:
    return {"conditioning": [[torch.rand(1, 77, 1024), {}]]}


def combined(host: Any) -> Any:
    return {"conditioning": [[torch.randn(1, 77, 1024), {}]] * 2}


def of_another_width(host: Any) -> Any:
    return {"conditioning": [[torch.randn(1, 77, 768), {}]]}


def built_in(host: Any) -> Any:
    model, vae = host.nodes["OSDFaceBuiltinModel"].execute().args
    return {"model": model, "vae": vae}


def not_there(host: Any) -> Any:
    return {"osediff_name": "osediff_face.safetensors"}


def of_osdface(host: Any) -> Any:
    folder, lora = host.base / "models" / "osediff", "pytorch_lora_weights.safetensors"
    if not (folder / lora).exists():
        (folder / lora).symlink_to(host.files.find(lora, "loras"))
    return {"osediff_name": lora}


def patched(host: Any) -> Any:
    from tests.test_host import with_zero_terminal_snr

    return {"model": with_zero_terminal_snr(host)}


def small_autoencoder(host: Any) -> Any:
    import comfy.taesd.taesd

    return {"vae": host.comfy.sd.VAE(sd=comfy.taesd.taesd.TAESD(latent_channels=4).state_dict())}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (visual, "`conditioning` holds OSDFace's visual prompts and OSEDiff wants a text"),
        (combined, "`conditioning` holds 2 prompts that were combined"),
        (of_another_width, r"`conditioning` is \(1, 77, 768\); a text for Stable Diffusion 2.1"),
        (built_in, "`model` or `vae` is the small built-in one, for which OSEDiff has no weights"),
        (not_there, r"`osediff_name`: osediff_face\.safetensors is missing .*--only osediff_face"),
        (of_osdface, "`osediff_name`: pytorch_lora_weights.safetensors does not hold OSEDiff's"),
        (patched, "`model` is SD20 with a changed noise schedule .* at step 999"),
        (small_autoencoder, "`vae` has no weight for 32 of the 32 layers .* of osediff.pkl: load"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_wrong_inputs_are_refused(
    wrong: Callable[[Any], dict[str, Any]],
    says: str,
    host: Any,
    given: dict[str, Any],
    tiny: Tensor,
) -> None:
    started = time.perf_counter()
    with pytest.raises(host.error, match=f"^{says}"):
        enlarge(host, tiny[:1], **given | wrong(host))
    assert time.perf_counter() - started < 60, "the networks ran first"
