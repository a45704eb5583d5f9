"""Every spelling of OSDFace's LoRA gives the same 278 modules; anything else is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from osdface_core.errors import OSDFaceError
from osdface_core.osdface.lora import adapted_layers, parse_lora


def as_released(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors


def renamed(
    tensors: dict[str, Tensor], down: str, up: str, module: Callable[[str], str]
) -> dict[str, Tensor]:
    out = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("unet.")
        for old, new in (
            (".lora_A.weight", down),
            (".lora_B.weight", up),
            (".lora.down.weight", down),
            (".lora.up.weight", up),
        ):
            if name.endswith(old):
                out[module(name.removesuffix(old)) + new] = tensor
    assert len(out) == len(tensors)
    return out


def as_peft(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return renamed(tensors, ".lora_A.weight", ".lora_B.weight", lambda m: f"unet.{m}")


def as_raw_peft(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return renamed(
        tensors,
        ".lora_A.default.weight",
        ".lora_B.default.weight",
        lambda m: f"base_model.model.{m}",
    )


def as_diffusers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return renamed(tensors, ".lora.down.weight", ".lora.up.weight", lambda m: f"unet.{m}")


def as_kohya(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out = renamed(
        tensors,
        ".lora_down.weight",
        ".lora_up.weight",
        lambda m: "lora_unet_" + m.replace(".", "_"),
    )
    return out | {
        key.replace("lora_down.weight", "alpha"): torch.tensor(16.0)
        for key in out
        if "lora_down" in key
    }


def as_kohya_ldm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return renamed(
        tensors,
        ".lora_down.weight",
        ".lora_up.weight",
        lambda m: "lora_unet_" + adapted_layers()[m].ldm.replace(".", "_"),
    )


SPELLINGS = [as_released, as_peft, as_raw_peft, as_diffusers, as_kohya, as_kohya_ldm]


@pytest.fixture(scope="module")
def tensors(seeded: ModuleType) -> dict[str, Tensor]:
    return seeded.lora(rank=16)


def test_the_modules_are_those_of_the_released_file(golden: Path) -> None:
    truth = json.loads((golden / "lora_modules.json").read_text())
    assert {name: list(place.shape) for name, place in adapted_layers().items()} == truth
    assert len(truth) == 278


def test_each_module_belongs_to_the_weight_it_adapts(golden: Path) -> None:
    truth = {
        name: ldm
        for ldm, (name, *_) in json.loads((golden / "sd21_names.json").read_text()).items()
    }
    for name, place in adapted_layers().items():
        assert truth[f"unet.{name}.weight"] == f"model.diffusion_model.{place.ldm}.weight"


@pytest.mark.parametrize("spell", SPELLINGS)
def test_every_spelling_gives_the_same_modules(
    spell: Callable[[dict[str, Tensor]], dict[str, Tensor]], tensors: dict[str, Tensor]
) -> None:
    found = parse_lora(spell(tensors))
    assert len(found) == 278
    for name, module in found.items():
        attention = (
            ".lora.down.weight" if f"unet.{name}.lora.down.weight" in tensors else ".lora_A.weight"
        )
        down = tensors[f"unet.{name}{attention}"]
        up = tensors[f"unet.{name}{attention.replace('down', 'up').replace('lora_A', 'lora_B')}"]
        assert torch.equal(module.down, down)
        assert torch.equal(module.up, up)
        assert module.scale == 1.0


def test_alpha_over_rank_is_the_scale(tensors: dict[str, Tensor]) -> None:
    name = "mid_block.resnets.0.conv1"
    found = parse_lora(tensors | {f"unet.{name}.alpha": torch.tensor(4.0)})
    assert found[name].scale == 0.25
    assert found["mid_block.resnets.1.conv1"].scale == 1.0


def test_a_convolution_written_as_a_linear_layer_is_the_same(tensors: dict[str, Tensor]) -> None:
    key = "unet.down_blocks.0.attentions.0.proj_in.lora_A.weight"
    found = parse_lora(tensors | {key: tensors[key][:, :, None, None]})
    assert found["down_blocks.0.attentions.0.proj_in"].down.shape == (16, 320, 1, 1)


KEY = "unet.up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_v.lora.up.weight"


def test_a_tensor_too_many_is_named(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(
        OSDFaceError,
        match=r"it has tensors that belong to no adapted layer \(unet.conv_in.lora_A.weight\)",
    ):
        parse_lora(tensors | {"unet.conv_in.lora_A.weight": torch.zeros(16, 4, 3, 3)}, "file")


def test_the_same_tensor_twice_is_named(tensors: dict[str, Tensor]) -> None:
    twin = KEY.replace("lora.up", "lora_B")
    with pytest.raises(OSDFaceError, match=twin):
        parse_lora(tensors | {twin: tensors[KEY]})


def test_a_missing_tensor_is_named(tensors: dict[str, Tensor]) -> None:
    rest = {key: tensor for key, tensor in tensors.items() if key != KEY}
    with pytest.raises(
        OSDFaceError,
        match=r"incomplete: .* also has up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_v "
        r"\(up\)",
    ):
        parse_lora(rest)


def test_a_wrong_shape_is_named(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(
        OSDFaceError,
        match=r"wrong shape at up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_v: .*\(160, "
        r"16\)",
    ):
        parse_lora(tensors | {KEY: torch.zeros(160, 16)})


def test_a_value_that_is_no_number_is_named(tensors: dict[str, Tensor]) -> None:
    broken = tensors[KEY].clone()
    broken[3, 3] = torch.nan
    with pytest.raises(
        OSDFaceError,
        match=r"not finite at up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_v",
    ):
        parse_lora(tensors | {KEY: broken})


def test_another_lora_is_refused() -> None:
    with pytest.raises(
        OSDFaceError,
        match=r"style.safetensors is not OSDFace's LoRA: none of its 1 tensors belongs to it",
    ):
        parse_lora(
            {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(4, 768)},
            "style.safetensors",
        )
