"""Stable Diffusion 2.1's room, as any method uses it: layers, adapters on UNet and VAE, tiles."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from osdface_core.errors import OSDFaceError
from osdface_core.sd21.adapters import Adapter, Lora, parse_lora
from osdface_core.sd21.modules import Layer, unet_layers, vae_encoder_layers
from osdface_core.sd21.tiles import denoise_in_tiles, tile_starts, tile_weights

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# Layers


@pytest.mark.parametrize(
    ("part", "layers", "prefix"),
    [
        ("unet.", unet_layers(), "model.diffusion_model."),
        ("vae.", vae_encoder_layers(), "first_stage_model."),
    ],
)
def test_every_layer_has_the_name_and_shape_of_both_layouts(
    part: str, layers: dict[str, Layer], prefix: str, golden: Path
) -> None:
    names = json.loads((golden / "sd21_names.json").read_text())
    truth = {
        name.removeprefix(part).removesuffix(".weight"): (ldm, shape)
        for ldm, (name, shape, _) in names.items()
        if name.startswith(part) and name.endswith(".weight") and len(shape) > 1
    }
    if part == "vae.":
        truth = {n: of for n, of in truth.items() if n.startswith("encoder.") or n == "quant_conv"}
    found = {
        name: (f"{prefix}{layer.ldm}.weight", list(layer.shape)) for name, layer in layers.items()
    }
    assert found == truth


# Adapters


def tensors_of(layers: dict[str, Layer], adapter: str, rank: int = 2) -> dict[str, Tensor]:
    """As peft writes an adapter of this name."""
    generator = torch.Generator().manual_seed(len(layers))
    tensors = {}
    for name, layer in layers.items():
        out, *inside = layer.shape
        up = (out, rank, *(1,) * (len(inside) - 1))
        tensors[f"{name}.lora_A.{adapter}.weight"] = torch.randn(rank, *inside, generator=generator)
        tensors[f"{name}.lora_B.{adapter}.weight"] = torch.randn(up, generator=generator)
    return tensors


def some_layers(layers: dict[str, Layer], *starts: str) -> dict[str, Layer]:
    return {name: layer for name, layer in layers.items() if name.startswith(starts)}


def test_a_lora_of_other_layers_and_another_scale_is_read() -> None:
    layers = some_layers(unet_layers(), "conv_in", "mid_block.attentions")
    lora = parse_lora(tensors_of(layers, "default_others"), layers, "file", "mine", "load.", 2.0)
    assert lora.keys() == layers.keys()
    assert {adapter.scale for adapter in lora.values()} == {2.0}
    assert lora["conv_in"].ldm == "input_blocks.0.0"


def test_a_lora_of_the_encoder_is_read_and_one_layer_too_few_is_named() -> None:
    layers = vae_encoder_layers()
    tensors = tensors_of(layers, "default_encoder")
    attention = "encoder.mid_block.attentions.0.to_q"
    assert parse_lora(tensors, layers, "file", "mine", "load.")[attention].ldm == (
        "encoder.mid.attn_1.q"
    )
    del tensors[f"{attention}.lora_B.default_encoder.weight"]
    with pytest.raises(OSDFaceError, match=rf"file is incomplete: mine also has {attention} \(up"):
        parse_lora(tensors, layers, "file", "mine", "load.")


def test_several_loras_land_on_unet_and_encoder_and_nowhere_else(small_model: Path) -> None:
    pytest.importorskip("peft", reason="no peft: pip install -r requirements-dev.txt")
    from osdface_core.diffusers.loading import load
    from osdface_core.diffusers.lora import merge_lora

    def random(network: Any, names: list[str], seed: int) -> Lora:
        generator = torch.Generator().manual_seed(seed)
        lora = {}
        for name in names:
            weight = network.get_submodule(name).weight
            down = torch.randn(2, *weight.shape[1:], generator=generator)
            up = torch.randn(weight.shape[0], 2, generator=generator)
            lora[name] = Adapter("", down, up, 0.5)
        return lora

    unet, vae = load(small_model)
    first = ["conv_in", "down_blocks.0.resnets.0.conv1"]
    second = ["down_blocks.0.resnets.0.conv1", "mid_block.attentions.0.proj_in"]
    encoder = ["encoder.conv_in", "encoder.mid_block.attentions.0.to_q", "quant_conv"]
    loras = [
        (unet, random(unet, first, 1), 1.0),
        (unet, random(unet, second, 2), 0.7),
        (vae, random(vae, encoder, 3), 1.0),
    ]
    before = [{n: t.clone() for n, t in net.state_dict().items()} for net in (unet, vae)]
    for network, lora, strength in loras:
        merge_lora(network, lora, strength, "the LoRA")
    for network, plain in zip((unet, vae), before, strict=True):
        wanted = dict(plain)
        for of, lora, strength in loras:
            for name, adapter in lora.items() if of is network else ():
                added = torch.einsum("or,r...->o...", adapter.up, adapter.down)
                key = f"{name}.weight"
                wanted[key] = wanted[key] + strength * adapter.scale * added
        state = network.state_dict()
        assert state.keys() == plain.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-5)


# Tiles


class Pointwise:
    """A Backbone whose step sees no further than a latent; `sizes` says what it was given."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, ...]] = []

    def denoise(self, latents: Tensor, prompts: Tensor, timestep: int) -> Tensor:
        self.sizes.append(tuple(latents.shape[-2:]))
        return latents * 3 + timestep


@pytest.mark.parametrize("size", [(40, 40), (30, 100), (97, 41), (33, 33), (64, 65)])
def test_tiles_cover_everything_and_show_no_seam(size: tuple[int, int]) -> None:
    latents = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))
    backbone: Any = Pointwise()
    calls: list[int] = []
    found = denoise_in_tiles(
        backbone, latents, torch.zeros(2, 77, 1024), 999, tile=32, overlap=8, progress=calls.append
    )
    torch.testing.assert_close(found, latents * 3 + 999, rtol=1e-5, atol=1e-4)
    assert set(backbone.sizes) == {(min(32, *size),) * 2}
    assert calls == [0] * len(backbone.sizes)


def test_what_one_tile_has_room_for_is_not_cut() -> None:
    backbone: Any = Pointwise()
    denoise_in_tiles(backbone, torch.zeros(1, 4, 80, 100), torch.zeros(1, 77, 1024), 999)
    assert backbone.sizes == [(80, 100)]


def test_tiles_begin_where_the_released_code_has_them() -> None:
    assert tile_starts(128, 80, 32) == [0, 48]
    assert tile_starts(80, 80, 32) == [0]
    assert tile_starts(200, 96, 32) == [0, 64, 104]
    weights = tile_weights(80, 80)
    assert weights.argmax() == 40 * 80 + 39, "half a latent below the middle, as released"


# Another method's released numbers


@pytest.mark.full
@pytest.mark.repeat
def test_osediffs_numbers_come_out_of_the_same_parts(
    more_golden: Path, seeded: ModuleType, stand_ins: Path
) -> None:
    """OSEDiff: LoRAs of 258 and of 32 layers, timestep 999, a text prompt, tiles."""
    pytest.importorskip("diffusers", reason="no diffusers: pip install -r requirements-dev.txt")
    from osdface_core.diffusers.backbone import DiffusersBackbone
    from osdface_core.diffusers.loading import load
    from osdface_core.diffusers.lora import merge_lora

    truth = load_file(more_golden / "osediff" / "golden.safetensors")
    released = checkpoint_of(more_golden / "osediff")
    unet, vae = load(stand_ins / "v2-1_512-seeded.safetensors")
    unet_tensors = released["state_dict_unet"]
    for part in ("weight", "bias"):
        unet.conv_in.get_parameter(part).copy_(unet_tensors.pop(f"conv_in.base_layer.{part}"))
    merged: list[tuple[Any, dict[str, Layer], dict[str, Tensor]]] = [
        (unet, unet_layers(), unet_tensors),
        (vae, vae_encoder_layers(), released["state_dict_vae"]),
    ]
    counts = []
    for network, layers, tensors in merged:
        layers = {n: layer for n, layer in layers.items() if adapted(n, tensors)}  # noqa: PLW2901
        lora = parse_lora(tensors, layers, "osediff.pkl", "OSEDiff's LoRA", "load it.", 2.0)
        counts.append(len(lora))
        merge_lora(network, lora, 1.0, "osediff.pkl")
    assert counts == [258, 32]
    backbone = DiffusersBackbone(unet, vae, device=CPU, dtype=torch.float32)
    pixels = truth["small.lq8"][None].float() / 255
    latents = backbone.encode(pixels)
    assert (latents - truth["small.latent"]).abs().max() < 1e-4
    for name in ("small", "tiled"):
        x0 = denoise_in_tiles(backbone, truth[f"{name}.latent"], truth["prompt"], 999)
        assert (x0 - truth[f"{name}.x0"]).abs().max() < 2e-3
    image = backbone.decode(truth["small.x0"])
    assert (image[0] - truth["small.image"]).abs().max() < 1e-4


def adapted(name: str, tensors: dict[str, Tensor]) -> bool:
    return any(key.startswith(f"{name}.lora_A.") for key in tensors)


def checkpoint_of(folder: Path) -> dict[str, Any]:
    """The stand-in for osediff.pkl, from its maker beside the golden outputs."""
    spec = importlib.util.spec_from_file_location("make_pkl", folder / "make_pkl.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    make: Callable[[], dict[str, Any]] = module.checkpoint
    return make()
