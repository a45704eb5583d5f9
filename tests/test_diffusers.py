"""diffusers as a Backbone: the LoRA on every module, the step's arithmetic, refusals, and the
released code's numbers.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import Linear

from osdface_core.errors import OSDFaceError
from osdface_core.osdface.lora import adapted_layers
from osdface_core.sd21.adapters import Adapter
from osdface_core.sd21.base_model import V_WITNESS

pytest.importorskip("diffusers", reason="no diffusers: pip install -r requirements-dev.txt")
pytest.importorskip("peft", reason="no peft: pip install -r requirements-dev.txt")

from osdface_core.chunks import is_out_of_memory
from osdface_core.diffusers import backbone as db
from osdface_core.diffusers import loading
from osdface_core.diffusers.lora import merge_lora

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def small(small_model: Path) -> db.DiffusersBackbone:
    return db.DiffusersBackbone.from_files(small_model, device=CPU, dtype=torch.float32)


def small_lora(unet: torch.nn.Module) -> dict[str, Adapter]:
    """A LoRA for all modules of OSDFace's, of several ranks and scales."""
    generator = torch.Generator().manual_seed(1)
    lora = {}
    for i, name in enumerate(adapted_layers()):
        weight = unet.get_submodule(name).weight
        rank, scale = (4, 1.0) if i % 5 else (2, 0.5)
        down = torch.randn(rank, *weight.shape[1:], generator=generator)
        up = torch.randn(weight.shape[0], rank, generator=generator)
        lora[name] = Adapter("", down, up, scale)
    return lora


@pytest.mark.parametrize(("there", "wanted"), [(True, "xpu"), (False, "cpu")])
def test_the_accelerator_is_found_by_torch_2_6_too(
    there: bool, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Neither function of that version takes anything, and the second names what torch was built
    # for, be it there or not.
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    assert db.best_device() == torch.device(wanted)


def test_the_lora_lands_on_every_module_and_nowhere_else(small: db.DiffusersBackbone) -> None:
    before = {name: tensor.clone() for name, tensor in small.unet.state_dict().items()}
    lora = small_lora(small.unet)
    assert len(lora) == 278
    merge_lora(small.unet, lora, 0.7, "the LoRA")
    after = small.unet.state_dict()
    assert after.keys() == before.keys(), "the adapters are still there"
    for name, tensor in before.items():
        module = lora.get(name.removesuffix(".weight"))
        if module is None:
            assert torch.equal(after[name], tensor), name
        else:
            wanted = tensor + 0.7 * module.scale * torch.einsum(
                "or,r...->o...", module.up, module.down
            )
            torch.testing.assert_close(after[name], wanted, rtol=1e-4, atol=1e-5)


def test_a_module_without_a_place_is_named(small: db.DiffusersBackbone) -> None:
    lora = small_lora(small.unet)
    place = small.unet.up_blocks[1].attentions[0].transformer_blocks[0].attn2
    place.to_k = Linear(7, 5)
    with pytest.raises(
        OSDFaceError,
        match=r"no weight for 1 of the 278 layers of mine "
        r".up_blocks\.1\.attentions\.0.*attn2\.to_k",
    ):
        merge_lora(small.unet, lora, 1.0, "mine")


def test_the_step_is_the_scheduler_s_prediction_of_x0(
    small: db.DiffusersBackbone, small_model: Path
) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_pretrained(small_model / "scheduler")
    scheduler.set_timesteps(1000)
    generator = torch.Generator().manual_seed(2)
    latents, prompts = (
        torch.randn(3, 4, 8, 8, generator=generator),
        torch.rand(3, 1024, 77, generator=generator).transpose(1, 2),
    )
    for timestep in (399, 100):
        noise = small.unet(latents, timestep, encoder_hidden_states=prompts).sample
        wanted = scheduler.step(noise, timestep, latents).pred_original_sample
        torch.testing.assert_close(
            small.denoise(latents, prompts, timestep), wanted, rtol=1e-5, atol=1e-5
        )


def test_pictures_go_in_and_come_out_between_0_and_1(small: db.DiffusersBackbone) -> None:
    pixels = torch.rand(2, 3, 64, 72, generator=torch.Generator().manual_seed(3))
    latents = small.encode(pixels)
    torch.testing.assert_close(latents, small.vae.encode(pixels * 2 - 1).latent_dist.mean * 0.18215)
    decoded = small.decode(latents)
    torch.testing.assert_close(
        decoded, (small.vae.decode(latents / 0.18215).sample / 2 + 0.5).clamp(0, 1)
    )
    assert decoded.shape == pixels.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_and_fp32_comes_back(
    small: db.DiffusersBackbone, dtype: torch.dtype
) -> None:
    pixels, prompts = torch.rand(1, 3, 64, 64), torch.rand(1, 77, 1024)
    exact = small.denoise(small.encode(pixels), prompts, 399)
    small.to(dtype)
    rough = small.denoise(small.encode(pixels), prompts, 399)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.1
    with small.fp32_fallback():
        assert small.dtype == torch.float32
    assert small.dtype == next(small.unet.parameters()).dtype == dtype


def test_what_torch_holds_and_does_not_use_counts_as_free(
    small: db.DiffusersBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After one large batch torch has most of the memory, and the next may have it again."""
    memory = {"mem_get_info": (2 * 2**30, 24 * 2**30)}
    memory |= {"memory_reserved": 20 * 2**30, "memory_allocated": 4 * 2**30}
    device = SimpleNamespace(
        **{name: lambda device, value=value: value for name, value in memory.items()}
    )
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    monkeypatch.setattr(small, "device", torch.device("cuda"))
    monkeypatch.setattr(small, "dtype", torch.float16)
    assert small.max_batch(512, 512) == 15  # 18 GiB free at 1.17 GiB a face


@pytest.mark.parametrize("after", [1, 20, 60])
def test_where_memory_ends_on_the_way_to_fp32_all_goes_back(
    small: db.DiffusersBackbone, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a UNet in fp32 beside a VAE in fp16 would fail at every later picture."""
    small.to(torch.float16)
    pixels, prompts = torch.rand(1, 3, 64, 64), torch.rand(1, 77, 1024)
    wanted = small.denoise(small.encode(pixels), prompts, 399)
    apply, moved = torch.nn.Module._apply, 0

    def runs_out(module: torch.nn.Module, work: Any, *rest: Any) -> torch.nn.Module:
        nonlocal moved
        moved += 1
        if moved == after:
            raise torch.OutOfMemoryError("out of memory")
        return apply(module, work, *rest)

    monkeypatch.setattr(torch.nn.Module, "_apply", runs_out)
    with pytest.raises(torch.OutOfMemoryError), small.fp32_fallback():
        pass
    for network in (small.unet, small.vae):
        assert {p.dtype for p in network.parameters()} == {torch.float16}
    assert small.dtype == torch.float16
    assert torch.equal(small.denoise(small.encode(pixels), prompts, 399), wanted)


@pytest.mark.parametrize("times", [2, 3])
def test_where_memory_does_not_do_for_the_way_back_either_it_is_tried_again_or_told(
    small: db.DiffusersBackbone, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.to(torch.float16)
    to, tried = small.to, 0

    def runs_out(dtype: torch.dtype) -> None:
        nonlocal tried
        tried += 1
        if tried <= times:
            raise torch.OutOfMemoryError("out of memory")
        to(dtype)

    monkeypatch.setattr(small, "to", runs_out)
    error, says = (
        (torch.OutOfMemoryError, "out of memory")
        if times == 2
        else (OSDFaceError, "start again, in fp32")
    )
    with pytest.raises(error, match=says), small.fp32_fallback():
        pass
    assert tried == 3


def rewritten(folder: Path, part: str, file: str, **changes: Any) -> None:
    path = folder / part / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("part", "changes", "says"),
    [
        ("unet", {"cross_attention_dim": 768}, "text width of 768"),
        (
            "unet",
            {"cross_attention_dim": 2048, "addition_embed_type": "text_time"},
            "text width of 2048",
        ),
        ("unet", {"in_channels": 9}, "9 input channels"),
        ("unet", {"class_embed_type": "projection"}, "another UNet"),
        ("vae", {"latent_channels": 16}, "16 channels at 1/8"),
        ("vae", {"shift_factor": 0.1}, "autoencoder shifts its latents"),
        ("scheduler", {"prediction_type": "v_prediction"}, "predicts v"),
        ("scheduler", {"beta_end": 0.02}, "another noise schedule"),
    ],
)
def test_a_wrong_base_is_refused(
    part: str,
    changes: dict[str, Any],
    says: str,
    small_model: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(small_model, folder)
    rewritten(
        folder, part, "scheduler_config.json" if part == "scheduler" else "config.json", **changes
    )
    with pytest.raises(OSDFaceError, match=f"base .*{says}.*Stable Diffusion 2.1-base"):
        loading.load(folder)


def test_a_folder_with_missing_weights_is_refused(small_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = tmp_path / "base"
    shutil.copytree(small_model, folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["mid_block.resnets.0.conv1.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(OSDFaceError, match=r"mid_block\.resnets\.0\.conv1\.weight"):
        loading.load(folder)
    with pytest.raises(OSDFaceError, match="not a model in diffusers' layout"):
        loading.load(tmp_path)


UNET, FIRST, TEXT = (
    "model.diffusion_model.",
    "input_blocks.0.0.weight",
    "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
)
SD21 = {
    UNET + FIRST: (320, 4, 3, 3),
    UNET + TEXT: (320, 1024),
    "first_stage_model.decoder.conv_in.weight": (1,),
}


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        (SD21 | {UNET + TEXT: (320, 768)}, "text width of 768"),
        (SD21 | {UNET + FIRST: (320, 9, 3, 3)}, "9 input channels"),
        (SD21 | {UNET + "label_emb.0.0.weight": (1, 1)}, "another kind of model"),
        ({UNET + FIRST: (320, 4, 3, 3), "first_stage_model.x": (1,)}, "another kind of model"),
        (
            {UNET + "double_blocks.0.img_mod.lin.weight": (4, 4)},
            "not a checkpoint of Stable Diffusion",
        ),
        (
            {name: shape for name, shape in SD21.items() if name.startswith(UNET)},
            "without its autoencoder",
        ),
    ],
)
def test_a_wrong_checkpoint_is_refused(
    shapes: dict[str, tuple[int, ...]], says: str, tmp_path: Path
) -> None:
    file = tmp_path / "base.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, file)
    with pytest.raises(OSDFaceError, match=f"base.safetensors is .*{says}"):
        loading.load(file)


def test_a_checkpoint_that_predicts_v_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "v2-1_768-ema-pruned.safetensors"
    bias = torch.linspace(-0.3, 0.3, 320)
    save_file({name: torch.zeros(shape) for name, shape in SD21.items()} | {V_WITNESS: bias}, file)
    with pytest.raises(OSDFaceError, match="predicts v"):
        loading.load(file)


def test_running_out_of_memory_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_bf16_is_chosen_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, wanted in (
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"avx512_f": True, "avx512_bf16": False}, torch.float32),
    ):
        monkeypatch.setattr(
            torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False
        )
        assert db.best_dtype(CPU) == wanted
    assert db.best_dtype(torch.device("cuda")) == torch.float16


def test_neither_diffusers_nor_peft_is_imported_before_it_is_used() -> None:
    code = (
        "import sys, osdface_core.diffusers.backbone, osdface_core.cli.options; "
        "assert not {'diffusers', 'peft'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.full
@pytest.mark.parametrize(
    "model",
    [
        pytest.param("sd21-diffusers", marks=pytest.mark.repeat),
        "v2-1_512-seeded.safetensors",
    ],
)
def test_the_released_code_s_numbers(
    model: str,
    stand_ins: Path,
    truth: Callable[[str], torch.Tensor],
    crop: Callable[[str], torch.Tensor],
) -> None:
    from osdface_core.osdface.lora import parse_lora
    from osdface_core.osdface.restore import network_input, restore
    from osdface_core.osdface.vre import build_embedder, embed, read_embedder
    from osdface_core.weights.reading import read_tensors

    if not (stand_ins / model).exists():
        pytest.skip(f"no {model} among the stand-in weights: make_weights.py writes it")
    osdface = stand_ins / "osdface"
    backbone = db.DiffusersBackbone.from_files(
        stand_ins / model,
        parse_lora(read_tensors(osdface / "pytorch_lora_weights.safetensors")),
        device=CPU,
        dtype=torch.float32,
    )
    embedder = build_embedder(read_embedder(osdface / "associate_2.ckpt"))
    for name in ("astronaut_lq", "many_codes"):
        latents = backbone.encode(network_input(crop(name)))
        assert (latents - truth(f"{name}.latent")).abs().max() < 1e-4
        x0 = backbone.denoise(latents, truth(f"{name}.prompt"), 399)
        assert (x0 - truth(f"{name}.x0")).abs().max() < 1e-4
    given = crop("astronaut_lq")
    restored = restore(
        given, embed(given, lambda faces: (embedder, CPU)), backbone
    ).pictures.movedim(-1, 1)
    assert (restored - truth("astronaut_lq.image")).abs().max() < 1e-4
