"""What is kept between runs has a limit in bytes, and a network computes where the host says,
however little memory there is.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from osdface_core.faces.detect import DetectOptions, detect, memory_for
from tests import photographs
from tests.fake_device import DEVICE, elsewhere

MIB = 1024**2


def test_the_detector_asks_for_room_for_the_picture_itself() -> None:
    """64 megapixels are 768 MB in RGB, however small the copy that the network sees."""
    network_alone = memory_for(1, 1920, 1920)
    assert memory_for(1, 8000, 8000) - network_alone > 2 * 8000 * 8000 * 3 * 4 * 0.9
    assert memory_for(8, 1080, 1920) > memory_for(1, 1080, 1920)
    assert memory_for(1000, 1080, 1920) == memory_for(100, 1080, 1920), "a chunk at a time"


@pytest.mark.host
def test_results_kept_for_pictures_have_a_limit_in_bytes(host: Any) -> None:
    keep = host.module("nodes.comfy.picture_cache").cached_for_picture
    pictures = [torch.zeros(1, 4, 4, 3) for _ in range(2)]
    made: list[Any] = []

    def result(size: int) -> torch.Tensor:
        tensor = torch.empty(size * MIB, dtype=torch.uint8)
        made.append(weakref.ref(tensor))
        return tensor

    def ask(picture: torch.Tensor, key: int, size: int = 36) -> int:
        before = len(made)
        for stage in ("found", "restored"):
            keep(picture, stage, key, lambda: result(size), lambda tensor: tensor.nbytes)
        return len(made) - before

    def held() -> float:
        gc.collect()
        return sum(tensor().nbytes for tensor in made if tensor() is not None) / MIB

    for key in range(8):
        for picture in pictures:
            assert ask(picture, key) == 2
            assert held() <= 256
    assert ask(pictures[1], 7) == 0
    assert ask(pictures[0], 7) == 0, "what was used last stays"
    assert ask(pictures[0], 0) == 2
    assert ask(pictures[0], 100, 300) == 2
    assert held() <= 256, "one that is larger by itself is not kept"
    for _ in range(2):
        before = len(made)
        keep(pictures[0], "restored", "starved", lambda: result(1), lambda tensor: None)
        assert len(made) == before + 1, "what is not to be kept was"
    pictures.clear()
    del picture
    assert held() == 0


@pytest.mark.host
def test_latents_kept_with_a_vae_have_a_limit_in_bytes(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of a large picture are encoded too, and theirs are larger than a crop's."""
    backbone = host.backbone.HostBackbone.__new__(host.backbone.HostBackbone)

    class Vae:
        first_stage_model = object()
        patcher = type("Patcher", (), {"patches_uuid": 0})()

        def encode(self, pixels: torch.Tensor) -> torch.Tensor:
            return torch.zeros(1, 4, 256, 256)

    backbone.vae = Vae()
    for i in range(60):
        backbone._encode_cached(torch.full((1, 2, 2, 3), float(i)))
    cached = backbone.vae.osdface_latents.values()
    assert 1 < sum(latents.nbytes for latents in cached) / MIB <= 32


@pytest.mark.host
@pytest.mark.processor
def test_with_novram_the_detector_computes_on_the_device(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the host's own networks do, whose weights it hands over layer by layer."""
    management = host.comfy.model_management
    picture = torch.from_numpy(photographs.pixels(photographs.astronaut())).float()[None] / 255
    wanted = detect(picture, host.networks.load_detector("builtin", picture), DetectOptions())
    monkeypatch.setattr(management, "get_torch_device", lambda: DEVICE)
    monkeypatch.setattr(management, "unet_offload_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(
        management,
        "get_free_memory",
        lambda _=None, torch_free_too=False: (1e10, 1e10) if torch_free_too else 1e10,
    )
    monkeypatch.setattr(management, "vram_state", management.VRAMState.NO_VRAM)
    monkeypatch.setattr(host.files, "_cache", {})
    monkeypatch.setattr(management, "current_loaded_models", [])
    with elsewhere(), torch.inference_mode():
        network = host.networks.load_detector("builtin", picture)
        assert network.home == DEVICE
        assert any(p.device.type == "cpu" for p in network.parameters()), "it is not all moved"
        found = detect(picture, network, DetectOptions())
    assert len(found[0]) == len(wanted[0]) == 1
    for one, other in zip(found[0][0].landmarks, wanted[0][0].landmarks, strict=True):
        assert one == pytest.approx(other, abs=0.05)
