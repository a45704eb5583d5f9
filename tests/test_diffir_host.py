"""DiffIR's nodes inside a real ComfyUI, in this process, on full-size stand-in weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytestmark = [pytest.mark.host, pytest.mark.full]

ENHANCER, INPAINTER = "RealworldSR-DiffIRS2-GANx2.pth", "last.ckpt"
ENHANCE = {"diffir_name": f"DiffIRS2-GANx2/{ENHANCER}", "tile": 768, "overlap": 96, "seed": 0}
INPAINT = {
    "diffir_name": f"DiffIRS2-celeba/models/{INPAINTER}",
    "working_size": "picture",
    "feather": 0,
    "seed": 0,
}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    """ComfyUI runs every node so."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def released(more_golden: Path) -> dict[str, Tensor]:
    return load_file(more_golden / "diffir" / "golden.safetensors")


@pytest.fixture(scope="module", autouse=True)
def weights_files(host: Any, diffir_maker: ModuleType) -> Path:
    """As they were downloaded, which is enough: a Lightning pickle among them."""
    folder: Path = host.base / "models" / "diffir"
    for name in ("realsr_x2", "inpaint"):
        diffir_maker.FILES[name](folder, "")
    return folder


@pytest.fixture
def from_the_released_start(
    host: Any, released: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    for node, case in (("enhance", "x2_48x64"), ("inpaint", "inpaint_149x203_grey")):
        module = host.module(f"nodes.diffir_{node}")
        start = released[f"{case}.noise"]
        monkeypatch.setattr(module, "start_vector", lambda seed, start=start: start)


def enhance(host: Any, image: Tensor, **inputs: Any) -> Tensor:
    return host.nodes["DiffIREnhance"].execute(image=image, **ENHANCE | inputs).args[0]


def fill(host: Any, image: Tensor, mask: Tensor, **inputs: Any) -> Tensor:
    return host.nodes["DiffIRInpaint"].execute(image=image, mask=mask, **INPAINT | inputs).args[0]


def test_the_enhanced_picture_is_the_released_codes(
    host: Any, released: dict[str, Tensor], from_the_released_start: None
) -> None:
    image = released["x2_48x64.lq"][None].float() / 255
    found = enhance(host, image)[0].movedim(-1, 0)
    assert (found - released["x2_48x64.out"].clamp(0, 1)).abs().max() < 2e-5


def test_the_filled_picture_is_the_released_codes_in_the_hole_and_the_given_one_elsewhere(
    host: Any, released: dict[str, Tensor], from_the_released_start: None
) -> None:
    case = "inpaint_149x203_grey"
    image, mask = released[f"{case}.image"][None].float() / 255, released[f"{case}.mask"]
    found = fill(host, image, mask[None].float() / 255)[0]
    wanted = released[f"{case}.out"].clamp(0, 1).movedim(0, -1)
    assert (found - wanted)[mask > 0].abs().max() < 2e-5
    assert torch.equal(found[mask == 0], image[0][mask == 0])


def test_pictures_at_once_are_each_alone_and_again_the_same(host: Any) -> None:
    tiny = torch.rand(2, 40, 48, 4, generator=torch.Generator().manual_seed(0))
    together = enhance(host, tiny)
    assert together.shape == (2, 80, 96, 4)
    for i in range(2):
        assert torch.equal(enhance(host, tiny[i : i + 1])[0], together[i])
    host.comfy.model_management.unload_all_models()
    assert torch.equal(enhance(host, tiny), together)


def test_the_network_is_the_hosts_to_keep_and_to_unload(host: Any) -> None:
    management = host.comfy.model_management
    management.unload_all_models()
    enhance(host, torch.rand(1, 16, 16, 3))
    (loaded,) = management.loaded_models()
    assert type(loaded.model).__name__ == "DiffIR"
    enhance(host, torch.rand(1, 16, 16, 3))
    assert [patcher.model for patcher in management.loaded_models()] == [loaded.model]
    management.unload_all_models()
    assert not management.loaded_models()


def test_an_interrupt_stops_within_a_tile(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    management = host.comfy.model_management
    block, ran = host.module("osdface_core.diffir.network").Block, []
    usual = block.forward

    def forward(self: Any, *inputs: Any) -> Tensor:
        ran.append(1)
        if len(ran) == 3:
            management.interrupt_current_processing(True)
        return usual(self, *inputs)

    monkeypatch.setattr(block, "forward", forward)
    try:
        with pytest.raises(management.InterruptProcessingException):
            enhance(host, torch.rand(1, 16, 16, 3))
    finally:
        management.interrupt_current_processing(False)
    assert len(ran) == 3


def test_memory_that_runs_out_halves_the_tile(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    network = host.module("osdface_core.diffir.network").DiffIR
    usual, sizes = network.restore, []

    def restore(self: Any, lq: Tensor, *rest: Any) -> Tensor:
        sizes.append(tuple(lq.shape[2:]))
        if lq.shape[3] > 64:
            raise host.comfy.model_management.OOM_EXCEPTION("out of memory")
        return usual(self, lq, *rest)

    monkeypatch.setattr(network, "restore", restore)
    found = enhance(host, torch.rand(1, 64, 96, 3), overlap=0)
    assert found.shape == (1, 128, 192, 3)
    assert found.isfinite().all()
    assert sizes[0] == (64, 96)
    assert all(columns <= 64 for _, columns in sizes[1:])


def test_without_a_hole_no_file_is_wanted(host: Any) -> None:
    image = torch.rand(1, 40, 50, 3)
    found = fill(host, image, torch.zeros(1, 64, 64), diffir_name="not_there.safetensors")
    assert torch.equal(found, image)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "DiffIRS2-GANx4-V2.safetensors",
            "`diffir_name`: DiffIRS2-GANx4-V2.safetensors is missing:"
            " download it from https://drive.google.com/drive/folders/1H4DU",
        ),
        ("notes.safetensors", "`diffir_name`: notes.safetensors .*: it is another file|fetch"),
        (INPAINT["diffir_name"], "The file holds a network that fills holes"),
    ],
)
def test_wrong_files_are_refused(host: Any, weights_files: Path, name: str, says: str) -> None:
    (weights_files / "notes.safetensors").write_text("downloaded on Sunday")
    with pytest.raises(host.error, match=says):
        enhance(host, torch.rand(1, 16, 16, 3), diffir_name=name)


def test_a_changed_file_runs_the_node_again(host: Any, weights_files: Path) -> None:
    node = host.nodes["DiffIREnhance"]
    before = node.fingerprint_inputs(diffir_name=ENHANCE["diffir_name"])
    path = weights_files / str(ENHANCE["diffir_name"])
    path.touch()
    assert node.fingerprint_inputs(diffir_name=ENHANCE["diffir_name"]) != before
    assert node.fingerprint_inputs(diffir_name="not_there.safetensors") == ""
