"""The nodes in a real ComfyUI whose device is one that the machine does not have
(tests/fake_device.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests import widgets
from tests.conftest import DEVICE as REAL
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


GRAPHS = {"chain": chain, "one node": one_node, "DiffIR": diffir}


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
