"""The nodes in a real ComfyUI whose device is one that the machine does not have
(tests/fake_device.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests import widgets
from tests.conftest import DEVICE as REAL
from tests.conftest import FULL_SIZE_FP16
from tests.fake_device import DEVICE, elsewhere
from tests.test_diffir import small

pytestmark = [pytest.mark.host, pytest.mark.full]
if REAL:
    pytest.skip("a real device is tested elsewhere", allow_module_level=True)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    """ComfyUI runs every node so."""
    with torch.inference_mode():
        yield


@pytest.fixture
def device(host: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Any]]:
    """Makes the made-up device ComfyUI's, with 8 GiB free; gives its counts."""
    mm = host.comfy.model_management
    mm.unload_all_models()

    def begin(free: int = 2**33, forbidden: dict[Any, str] | None = None) -> Any:
        def memory(device: Any = None, torch_free_too: bool = False) -> Any:
            return (free, free) if torch_free_too else free

        monkeypatch.setattr(mm, "get_torch_device", lambda: DEVICE)
        for name in ("get_free_memory", "get_total_memory"):
            monkeypatch.setattr(mm, name, memory)
        monkeypatch.setattr(mm, "soft_empty_cache", lambda *_: None)
        monkeypatch.setattr(mm, "vram_state", mm.VRAMState.NORMAL_VRAM)
        # What was read for the other device stays with it.
        monkeypatch.setattr(host.files, "_cache", {})
        return elsewhere(forbidden)

    yield begin
    mm.unload_all_models()


def node(host: Any, name: str, **inputs: Any) -> Any:
    return host.nodes[name].execute(**inputs).args


def chain(host: Any, picture: Tensor) -> Any:
    """The nodes one by one, and the one node: what each gives."""
    model, vae = node(host, "OSDFaceBuiltinModel")
    faces, crops, *_ = node(
        host, "FaceDetectAlign", image=picture, **widgets.FIND | {"detector": "builtin"}
    )
    (conditioning,) = node(host, "OSDFaceVRE", crops=crops, vre_name="builtin")
    (restored,) = node(
        host,
        "OSDFaceOneStep",
        model=model,
        vae=vae,
        crops=crops,
        conditioning=conditioning,
        **widgets.STEP,
    )
    pasted, *_ = node(
        host, "FacePasteBack", image=picture, faces=faces, restored=restored, **widgets.PASTE
    )
    return [crops, conditioning[0][0], restored, pasted]


def one_node(host: Any, picture: Tensor) -> Any:
    given = widgets.RESTORE | {"detector": "builtin", "mask_type": "box", "color_match": "wavelet"}
    model, vae = node(host, "OSDFaceBuiltinModel")
    return node(host, "OSDFaceRestore", image=picture, model=model, vae=vae, **given)[:1]


def diffir(host: Any, picture: Tensor) -> Any:
    folder = host.base / "models" / "diffir"
    folder.mkdir(exist_ok=True)
    for kind in ("deblur", "inpaint"):
        save_file(small(kind).state_dict(), folder / f"small_{kind}.safetensors")
    mask = torch.zeros(picture.shape[:3])
    mask[:, 100:108, 80:500] = 1
    faces, crops, *_ = node(
        host, "FaceDetectAlign", image=picture, **widgets.FIND | {"detector": "builtin"}
    )
    (holes,) = node(host, "FaceMaskToCrops", faces=faces, mask=mask)
    given = {"diffir_name": "small_inpaint.safetensors", "working_size": "256", "feather": 0}
    (filled,) = node(host, "DiffIRInpaint", image=crops, mask=holes, seed=0, **given)
    given = {"diffir_name": "small_deblur.safetensors", "tile": 128, "overlap": 32}
    (sharp,) = node(host, "DiffIREnhance", image=picture, seed=0, **given)
    return [holes, filled, sharp]


def osediff(host: Any, picture: Tensor) -> Any:
    """OSEDiff Upscale in tiles, with the built-in networks as they are in place of the large ones,
    and a picture with alpha.
    """
    model, vae = node(host, "OSDFaceBuiltinModel")
    text = torch.randn(1, 77, 1024, generator=torch.Generator().manual_seed(1))
    given = widgets.UPSCALE | {"osediff_name": "small", "upscale": 2.0, "tile": 256, "overlap": 64}
    part = picture[:, 40:200, 200:380]
    inputs = {"model": model, "vae": vae, "conditioning": [[text, {}]]}
    image = torch.cat([part, part[..., :1]], -1)
    return node(host, "OSEDiffUpscale", image=image, **inputs, **given)


GRAPHS = {"chain": chain, "one node": one_node, "DiffIR": diffir, "OSEDiff": osediff}


@pytest.fixture(autouse=True)
def small_osediff(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets OSEDiff Upscale take the built-in networks, for which there are no weights of it."""
    room, upscale = host.module("nodes.comfy.osediff"), host.module("nodes.osediff_upscale")
    real = room.OSEDiffBackbone

    class Small(real):  # type: ignore[misc,valid-type]
        def __init__(self, model: Any, vae: Any, options: Any, name: str) -> None:
            marked = {**(options or {}), host.backbone.BUILTIN_MARK: True}
            host.backbone.HostBackbone.__init__(self, model, vae, marked, timestep=room.TIMESTEP)
            self.encoder = vae

    def choose(model: Any, vae: Any, options: Any, name: str) -> Any:
        return (Small if name == "small" else real)(model, vae, options, name)

    monkeypatch.setattr(upscale, "OSEDiffBackbone", choose)


@pytest.mark.parametrize("picture_is_there", [False, True])
@pytest.mark.parametrize("name", list(GRAPHS))
def test_a_graph_gives_what_it_gives_on_the_cpu(
    name: str,
    picture_is_there: bool,
    host: Any,
    group: Tensor,
    device: Callable[..., Any],
) -> None:
    """A picture is there where ComfyUI is told to keep everything on the device."""
    wanted = GRAPHS[name](host, group)
    assert len(wanted[0])
    with device() as counts:
        made = GRAPHS[name](host, group.to(DEVICE) if picture_is_there else group)
        made = [x.cpu() for x in made]
    assert counts["up"]
    assert counts["down"]
    for ours, theirs in zip(made, wanted, strict=True):
        assert (ours - theirs).abs().max() < 1e-3


@pytest.mark.parametrize("name", list(GRAPHS))
def test_little_memory_changes_nothing(
    name: str, host: Any, group: Tensor, device: Callable[..., Any]
) -> None:
    wanted = GRAPHS[name](host, group)
    with device(free=2**20):
        made = [x.cpu() for x in GRAPHS[name](host, group)]
    for ours, theirs in zip(made, wanted, strict=True):
        assert (ours - theirs).abs().max() < 1e-3


@pytest.mark.parametrize("name", list(GRAPHS))
def test_a_device_without_memory_is_told_and_the_next_graph_runs(
    name: str, host: Any, group: Tensor, device: Callable[..., Any]
) -> None:
    full = {torch.ops.aten.convolution.default: "elsewhere: out of memory"}
    with device(forbidden=full), pytest.raises(NotImplementedError, match="out of memory"):
        GRAPHS[name](host, group)
    with device():
        made = [x.cpu() for x in GRAPHS[name](host, group)]
    assert all(bool(x.isfinite().all()) for x in made)


OSEDIFF = "osediff.pkl"


@pytest.fixture
def full_size(
    host: Any, checkpoint: tuple[Any, Any], osediff_pickle: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[torch.dtype], tuple[Any, Any]]:
    """Loads the full-size stand-in checkpoint in a type, for the device that ComfyUI has now."""
    folder = host.base / "models" / "osediff"
    folder.mkdir(exist_ok=True)
    if not (folder / OSEDIFF).exists():
        (folder / OSEDIFF).symlink_to(osediff_pickle)
    # Pictures under 512 px are not made larger, so that full-size networks are quick.
    monkeypatch.setattr(host.module("osdface_core.osediff.upscale"), "SIDE", 8)
    path = host.folder_paths.get_full_path_or_raise(
        "checkpoints", "v2-1_512-ema-pruned.safetensors"
    )

    def load(dtype: torch.dtype) -> tuple[Any, Any]:
        model, *_ = host.comfy.sd.load_checkpoint_guess_config(
            path, output_vae=False, output_clip=False, model_options={"dtype": dtype}
        )
        tensors = checkpoint[1].get_sd()
        return model, host.comfy.sd.VAE(sd=dict(tensors), dtype=dtype)

    return load


def restored_crops(host: Any, model: Any, vae: Any, picture: Tensor) -> Tensor:
    """The crops restored with the embedder's prompts and OSDFace's LoRA."""
    (conditioning,) = node(host, "OSDFaceVRE", crops=picture, vre_name="associate_2.ckpt")
    given = widgets.STEP | {"lora_name": "pytorch_lora_weights.safetensors"}
    inputs = {"model": model, "vae": vae, "crops": picture, "conditioning": conditioning}
    return node(host, "OSDFaceOneStep", **inputs, **given)[0]


def upscaled(host: Any, model: Any, vae: Any, picture: Tensor) -> Tensor:
    """The picture in two tiles, by OSEDiff's weights on UNet and encoder."""
    text = torch.randn(1, 77, 1024, generator=torch.Generator().manual_seed(1))
    given = widgets.UPSCALE | {"osediff_name": OSEDIFF, "tile": 256, "overlap": 64}
    inputs = {"model": model, "vae": vae, "image": picture, "conditioning": [[text, {}]]}
    return node(host, "OSEDiffUpscale", **inputs, **given)[0]


@FULL_SIZE_FP16
@pytest.mark.once
def test_half_precision_gives_what_fp32_gives_on_the_cpu(
    host: Any,
    checkpoint: tuple[Any, Any],
    full_size: Callable[[torch.dtype], tuple[Any, Any]],
    device: Callable[..., Any],
) -> None:
    """Full-size networks with each method's weights added to them, on the device."""
    numbers = torch.Generator().manual_seed(0)
    crops = torch.rand(1, 64, 72, 3, generator=numbers)
    picture = torch.rand(1, 40, 72, 3, generator=numbers)
    runs = {restored_crops: crops, upscaled: picture}
    wanted = [run(host, *checkpoint, given) for run, given in runs.items()]
    host.comfy.model_management.unload_all_models()
    with device() as counts:
        model, vae = full_size(torch.float16)
        assert model.load_device == vae.device == DEVICE
        assert model.model.get_dtype() == vae.vae_dtype == torch.float16
        made = [
            restored_crops(host, model, vae, crops.to(DEVICE)).cpu(),
            upscaled(host, model, vae, picture).cpu(),
        ]
        host.comfy.model_management.unload_all_models()
    assert counts["up"]
    for ours, theirs in zip(made, wanted, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().mean() < 0.003
