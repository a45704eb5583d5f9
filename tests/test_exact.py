"""Where a network of ours computes, cuDNN's TF32 is off, and afterwards as it was."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

from osdface_core.diffusers.builtin import load_backbone
from osdface_core.faces.detect import detect
from osdface_core.faces.face_parser import ParseNet, parse_faces
from osdface_core.faces.files import BUILTIN_DETECTOR
from osdface_core.faces.retinaface import build_retinaface
from osdface_core.osdface import builtin
from osdface_core.osdface.restore import restore
from osdface_core.osdface.vre import embed
from osdface_core.weights.reading import read_tensors

CPU = torch.device("cpu")


@pytest.fixture(params=[True, False])
def before(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", request.param)
    with torch.inference_mode():
        yield request.param


@pytest.fixture
def seen() -> Any:
    """The flag at each convolution that runs."""
    flags: list[bool] = []

    def look(module: nn.Module, *_: Any) -> None:
        if isinstance(module, nn.Conv2d):
            flags.append(torch.backends.cudnn.allow_tf32)

    handle = nn.modules.module.register_module_forward_pre_hook(look)
    yield flags
    handle.remove()


@pytest.mark.parametrize("job", ["detect", "parse", "embed and restore"])
def test_tf32_is_off_in_our_networks_and_then_as_it_was(
    job: str, before: bool, seen: list[bool]
) -> None:
    crops = torch.rand(1, 64, 64, 3)
    if job == "detect":
        with torch.inference_mode(False):
            network = build_retinaface(read_tensors(BUILTIN_DETECTOR))
        detect(crops, network)
    elif job == "parse":
        with torch.inference_mode(False):
            network = ParseNet().eval()
        parse_faces(crops, network)
    else:
        with torch.inference_mode(False):
            embedder = builtin.embedder()
        prompts = embed(crops, lambda _: (embedder, CPU), at_once=1)
        restore(crops, prompts, load_backbone(CPU, torch.float32))
    assert seen and not any(seen)
    assert torch.backends.cudnn.allow_tf32 is before


def test_it_comes_back_when_the_work_fails(before: bool) -> None:
    from osdface_core.cpu import exact

    with pytest.raises(RuntimeError, match="no"), exact():
        assert not torch.backends.cudnn.allow_tf32
        raise RuntimeError("no")
    assert torch.backends.cudnn.allow_tf32 is before


def test_it_stays_off_until_the_last_of_several_threads_is_done(before: bool) -> None:
    """The first to begin is the first to end, as with the workers of a host."""
    from osdface_core.cpu import exact

    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))
    seen: list[bool] = []

    def first() -> None:
        with exact():
            first_is_in.set()
            assert second_is_in.wait(10)
        first_is_out.set()

    def second() -> None:
        assert first_is_in.wait(10)
        with exact():
            second_is_in.set()
            assert first_is_out.wait(10)
            seen.append(torch.backends.cudnn.allow_tf32)

    workers = [threading.Thread(target=work) for work in (first, second)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32 is before
