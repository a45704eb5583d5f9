"""The networks in plain torch: diffusers' and the released code's numbers, and nothing of whoever
lent the weights touched.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.amp import autocast

from osdface_core.errors import OSDFaceError
from osdface_core.ldm.backbone import LdmBackbone
from osdface_core.ldm.loading import SD21
from osdface_core.ldm.networks import Autoencoder, UNet
from osdface_core.sd21.adapters import Adapter, Lora
from osdface_core.sd21.base_model import UNET_PREFIX, V_WITNESS, VAE_PREFIX
from tests.conftest import FP16
from tests.small_sd21 import SMALL, small_checkpoint, small_osdface, small_osediff

CPU = torch.device("cpu")
# Sides of pictures: a square, and one whose latents cannot be halved three times.
SIZES = [(64, 64), (72, 104)]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ldm") / "small.safetensors"
    save_file(small_checkpoint(), path)
    return path


@pytest.fixture(scope="module")
def folder(file: Path, small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in diffusers' layout, by its own converter."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import (
        convert_ldm_unet_checkpoint,
        convert_ldm_vae_checkpoint,
    )

    folder = tmp_path_factory.mktemp("ldm_folder")
    (folder / "scheduler").symlink_to(small_model / "scheduler")
    tensors = load_file(file)
    parts: list[Any] = [
        ("unet", UNET_PREFIX, UNet2DConditionModel, convert_ldm_unet_checkpoint),
        ("vae", VAE_PREFIX, AutoencoderKL, convert_ldm_vae_checkpoint),
    ]
    for part, prefix, network, convert in parts:
        config = network.load_config(small_model / part)
        made = network.from_config(config)
        own = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        made.load_state_dict(convert(own, dict(config)))
        made.save_pretrained(folder / part)
    return folder


def tensors_of(file: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint's tensors by LDM names: of the UNet, and of the autoencoder."""
    tensors = load_file(file)
    unet, vae = (
        {k.removeprefix(p): t for k, t in tensors.items() if k.startswith(p)}
        for p in (UNET_PREFIX, VAE_PREFIX)
    )
    return unet, vae


def theirs(folder: Path, lora: Lora | None = None, strength: float = 1.0) -> Any:
    from osdface_core.diffusers.backbone import DiffusersBackbone

    return DiffusersBackbone.from_files(folder, lora, strength, device=CPU, dtype=torch.float32)


def from_file(path: Path, *lora: Any, **options: Any) -> LdmBackbone:
    options = {"device": CPU, "dtype": torch.float32, "shapes": SMALL} | options
    return LdmBackbone.from_file(path, *lora, **options)


def from_tensors(unet: Any, vae: Any, *lora: Any, **options: Any) -> LdmBackbone:
    options = {"device": CPU, "dtype": torch.float32, "shapes": SMALL} | options
    return LdmBackbone.from_tensors(unet, vae, "the host's model", *lora, **options)


def given(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Two pictures and their prompts."""
    generator = torch.Generator().manual_seed(2)
    return (
        torch.rand(2, 3, height, width, generator=generator),
        torch.rand(2, 77, 1024, generator=generator),
    )


def results(backbone: Any, size: tuple[int, int] = (64, 64)) -> list[Tensor]:
    pixels, prompts = given(*size)
    latents = backbone.encode(pixels)
    x0 = backbone.denoise(latents, prompts, 399)
    return [latents, x0, backbone.decode(x0)]


def assert_same(found: list[Tensor], wanted: list[Tensor], within: float = 1e-5) -> None:
    for ours, other in zip(found, wanted, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - other).abs().max() < within


def test_the_tensors_have_the_checkpoint_s_names_and_shapes(golden: Path) -> None:
    with torch.device("meta"):
        parts = ((UNET_PREFIX, UNet()), (VAE_PREFIX, Autoencoder()))
    found = {
        prefix + name: [side for side in place.shape]
        for prefix, network in parts
        for name, place in network.named_parameters()
    }
    names = json.loads((golden / "sd21_names.json").read_text())
    # The VAE's attention is stored as 1 x 1 convolutions.
    wanted = {
        name: shape[:2] if ".attn_1." in name and shape[2:] == [1, 1] else shape
        for name, (_, _, shape) in names.items()
        if name.startswith((UNET_PREFIX, VAE_PREFIX))
    }
    assert found == wanted


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_a_checkpoint_a_folder_and_lent_tensors_give_diffusers_numbers(
    size: tuple[int, int], strength: float, file: Path, folder: Path
) -> None:
    lora = small_osdface()
    wanted = results(theirs(folder, lora if strength else None, strength), size)
    ours = [
        from_file(file, lora, strength),
        from_file(folder, lora, strength),
        from_tensors(*tensors_of(file), lora, strength),
    ]
    for backbone in ours:
        assert_same(results(backbone, size), wanted)


def test_a_lora_changes_the_result(file: Path) -> None:
    plain, adapted = (results(from_file(file, lora))[1] for lora in (None, small_osdface()))
    assert (plain - adapted).abs().max() > 0.01


def test_a_pickled_checkpoint_is_read(file: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "small.ckpt"
    torch.save({"state_dict": load_file(file)}, pickled)
    assert_same(results(from_file(pickled)), results(from_file(file)))


def test_a_folder_whose_vae_has_the_released_names_is_read(
    file: Path, folder: Path, tmp_path: Path
) -> None:
    """Those that diffusers gave the layers when Stable Diffusion 2.1-base was released."""
    for part in ("unet", "scheduler"):
        (tmp_path / part).symlink_to(folder / part)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").symlink_to(folder / "vae" / "config.json")
    released = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in load_file(folder / "vae/diffusion_pytorch_model.safetensors").items():
        new = next((new for new in released if f".attentions.0.{new}." in name), "")
        tensors[name.replace(f".{new}.", f".{released[new]}.") if new else name] = tensor
    assert sum("proj_attn" in name for name in tensors) == 4
    torch.save(tensors, tmp_path / "vae" / "diffusion_pytorch_model.bin")
    assert_same(results(from_file(tmp_path)), results(from_file(file)))


def test_lent_tensors_are_neither_copied_nor_changed(file: Path) -> None:
    unet, vae = tensors_of(file)
    before = {name: tensor.clone() for name, tensor in (unet | vae).items()}
    backbone = from_tensors(unet, vae, small_osdface())
    results(backbone)
    backbone.place(torch.device("meta"))
    with backbone.fp32_fallback():
        results(backbone)
    for tensors, network in ((unet, backbone.unet), (vae, backbone.autoencoder)):
        for name, place in network.named_parameters():
            assert place.data_ptr() == tensors[name].data_ptr(), name
    assert all(torch.equal(tensor, before[name]) for name, tensor in (unet | vae).items())
    assert backbone.nbytes == 0


def test_a_lender_s_network_stays_as_it_is_and_is_followed_where_it_goes(file: Path) -> None:
    """As hosts move their networks between devices and types while the backbone lives."""
    lender = nn.Module()
    lender.unet, lender.vae = UNet(SMALL.unet), Autoencoder(SMALL.vae, SMALL.vae_groups)
    for network, tensors in zip(lender.children(), tensors_of(file), strict=True):
        network.load_state_dict(tensors)
        network.requires_grad_(True)
    networks = (dict(network.named_parameters()) for network in lender.children())
    backbone = from_tensors(*networks, dtype=torch.float32)
    wanted = results(backbone)
    lender.half()
    found = results(backbone)
    assert next(backbone.unet.parameters()).dtype == torch.float16
    lender.float()
    assert_same(found, results(backbone))  # the rounded weights, in fp32
    assert 0 < (found[1] - wanted[1]).abs().max() < 0.05
    assert all(p.requires_grad and p.grad is None for p in lender.parameters())


def test_a_host_s_autocast_changes_nothing(file: Path) -> None:
    backbone = from_file(file)
    wanted = results(backbone)
    with autocast("cpu", dtype=torch.bfloat16):
        found = results(backbone)
    assert_same(found, wanted)


def test_patches_of_torch_s_layers_do_not_reach_the_networks(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a host's LoRAs of a prompt are patched in."""
    backbone = from_tensors(*tensors_of(file))
    wanted = results(backbone)

    def patched(*_: Any) -> None:
        raise AssertionError("torch's own layer was called")

    for layer in (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.MultiheadAttention):
        monkeypatch.setattr(layer, "forward", patched)
    assert_same(results(from_tensors(*tensors_of(file))), wanted)


@pytest.mark.parametrize("lent", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=FP16)])
def test_half_precision_stays_near_and_fp32_comes_back(
    dtype: torch.dtype, lent: bool, file: Path
) -> None:
    exact = results(from_file(file, small_osdface()))
    lora = small_osdface()
    backbone = (
        from_tensors(*tensors_of(file), lora, dtype=dtype)
        if lent
        else from_file(file, lora, dtype=dtype)
    )
    rough = results(backbone)
    for ours, other in zip(rough, exact, strict=True):
        assert ours.dtype == torch.float32
        assert 0 < (ours - other).abs().max() < 0.2
    with backbone.fp32_fallback() as was_half:
        assert was_half
        nearer = results(backbone)
    assert (nearer[1] - exact[1]).abs().max() < (rough[1] - exact[1]).abs().max()
    assert_same(results(backbone), rough)
    with from_file(file).fp32_fallback() as was_half:
        assert not was_half


@FP16
def test_what_overflows_in_half_precision_is_right_in_fp32(file: Path) -> None:
    unet, vae = tensors_of(file)
    unet["input_blocks.0.0.weight"] = unet["input_blocks.0.0.weight"] * 1e5
    backbone = from_tensors(unet, vae, dtype=torch.float16)
    latents, prompts = torch.rand(1, 4, 8, 8), torch.rand(1, 77, 1024)
    assert not backbone.denoise(latents, prompts, 399).isfinite().all()
    with backbone.fp32_fallback():
        found = backbone.denoise(latents, prompts, 399)
    wanted = from_tensors(unet, vae).denoise(latents, prompts, 399)
    assert (found / wanted - 1).abs().max() < 1e-3


def test_own_weights_take_the_bytes_of_their_type(file: Path) -> None:
    values = sum(tensor.numel() for part in tensors_of(file) for tensor in part.values())
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        assert from_file(file, dtype=dtype).nbytes == size * values


def test_a_layer_without_a_place_is_named(file: Path) -> None:
    lora = small_osdface()
    name = "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    lora[name] = Adapter(lora[name].ldm, torch.zeros(4, 7), torch.zeros(5, 4))
    for make in (
        lambda: from_file(file, lora, lora_name="mine"),
        lambda: from_tensors(*tensors_of(file), lora, lora_name="mine"),
    ):
        with pytest.raises(
            OSDFaceError, match=rf"no weight for 1 of the 278 layers of mine .{name}"
        ):
            make()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (8, 768)}, "width of 768"),
        ({"input_blocks.0.0.weight": (8, 9, 3, 3)}, "9 input channels"),
        ({"label_emb.0.0.weight": (1, 1)}, "another kind of model"),
        ({"input_blocks.0.0.weight": None}, "not a checkpoint of Stable Diffusion"),
        ({"out.2.weight": (4, 9, 3, 3)}, r"does not fit.*out\.2\.weight is \(4, 9, 3, 3\) instead"),
        ({"out.0.bias": None}, r"does not fit.*out\.0\.bias is missing"),
    ],
)
def test_a_wrong_base_is_refused(changes: dict[str, Any], says: str, file: Path) -> None:
    unet, vae = tensors_of(file)
    for name, shape in changes.items():
        unet.pop(name, None)
        if shape:
            unet[name] = torch.zeros(shape)
    with pytest.raises(OSDFaceError, match=f"the host's model.*{says}.*do so"):
        from_tensors(unet, vae, remedy="do so")


def test_a_model_that_predicts_v_is_refused(file: Path, tmp_path: Path) -> None:
    tensors = load_file(file)
    tensors[V_WITNESS] = torch.linspace(-0.3, 0.3, 8)
    file = tmp_path / "v2-1_768.safetensors"
    save_file(tensors, file)
    with pytest.raises(OSDFaceError, match=r"v2-1_768.safetensors is a model that predicts v"):
        from_file(file)


def test_osediff_s_weights_land_as_in_diffusers(file: Path, folder: Path) -> None:
    from osdface_core.diffusers.osediff import load_osediff as in_diffusers
    from osdface_core.ldm.osediff import lend_osediff, load_osediff

    weights = small_osediff()
    kept = weights.first_weight.clone()
    wanted = results(in_diffusers(folder, weights, device=CPU, dtype=torch.float32))
    ours = load_osediff(file, weights, device=CPU, dtype=torch.float32, shapes=SMALL)
    assert_same(results(ours), wanted)
    unet, vae = tensors_of(file)
    before = {name: tensor.clone() for name, tensor in (unet | vae).items()}
    options: dict[str, Any] = {"device": CPU, "dtype": torch.float32, "shapes": SMALL}
    lent = lend_osediff(unet, vae, "the host's model", weights, **options)
    assert_same(results(lent), wanted)
    assert lent.nbytes == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in (unet | vae).items())
    assert torch.equal(weights.first_weight, kept)
    del unet["out.0.bias"]
    with pytest.raises(OSDFaceError, match=r"the host's model.*out\.0\.bias is missing.*do so"):
        lend_osediff(unet, vae, "the host's model", weights, **options, remedy="do so")


def test_nothing_of_diffusers_is_imported() -> None:
    code = (
        "import sys; sys.modules.update(diffusers=None, peft=None, transformers=None)\n"
        "import torch, osdface_core.ldm.osediff\n"
        "from osdface_core.ldm.builtin import load_backbone\n"
        "backbone = load_backbone(torch.device('cpu'), torch.float32)\n"
        "backbone.denoise(backbone.encode(torch.zeros(1, 3, 64, 64)), torch.zeros(1, 77, 1024), 9)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_the_builtin_model_is_the_same_as_with_diffusers() -> None:
    pytest.importorskip("diffusers", reason="no diffusers: pip install -r requirements-dev.txt")
    from osdface_core.diffusers.builtin import load_backbone as in_diffusers
    from osdface_core.ldm.builtin import load_backbone

    for size in SIZES:
        wanted = results(in_diffusers(CPU, torch.float32), size)
        assert_same(results(load_backbone(CPU, torch.float32), size), wanted)


@pytest.mark.full
@pytest.mark.parametrize("lent", [pytest.param(False, marks=pytest.mark.repeat), True])
def test_the_released_code_s_numbers(
    lent: bool,
    stand_ins: Path,
    truth: Callable[[str], Tensor],
    crop: Callable[[str], Tensor],
) -> None:
    from osdface_core.ldm.loading import read
    from osdface_core.osdface.lora import parse_lora
    from osdface_core.osdface.restore import network_input
    from osdface_core.weights.reading import read_tensors

    file = stand_ins / "v2-1_512-seeded.safetensors"
    lora = parse_lora(read_tensors(stand_ins / "osdface" / "pytorch_lora_weights.safetensors"))
    options: dict[str, Any] = {"device": CPU, "dtype": torch.float32, "shapes": SD21}
    backbone = (
        from_tensors(*read(file), lora, **options) if lent else from_file(file, lora, **options)
    )
    latents = backbone.encode(network_input(crop("astronaut_lq")))
    assert (latents - truth("astronaut_lq.latent")).abs().max() < 1e-4
    x0 = backbone.denoise(latents, truth("astronaut_lq.prompt"), 399)
    assert (x0 - truth("astronaut_lq.x0")).abs().max() < 1e-4
    image = backbone.decode(truth("astronaut_lq.x0"))
    assert (image - truth("astronaut_lq.image")).abs().max() < 1e-4
