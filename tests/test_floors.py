"""What older torch and Pillow lack is done without."""

from __future__ import annotations

import importlib

import pytest
import torch
from PIL import ImageFont

from osdface_core import chunks, devices
from osdface_core.faces.face import Face
from osdface_core.faces.preview import draw_faces


def test_a_torch_without_its_own_name_for_it_runs_out_of_memory_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as older:
        older.delattr(torch, "OutOfMemoryError", raising=False)
        importlib.reload(chunks)
        assert chunks.is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA"))
        assert not chunks.is_out_of_memory(RuntimeError("another"))
        assert chunks.is_out_of_memory(RuntimeError("out of memory"))
    importlib.reload(chunks)


class Older:
    """torch's module of an accelerator, in a version before torch.accelerator."""

    def __init__(self, there: bool) -> None:
        self.is_available = lambda: there
        self.mem_get_info = lambda device: (6 * 2**30, 24 * 2**30)
        self.memory_reserved = self.memory_allocated = lambda device: 0


@pytest.mark.parametrize("name", ["cuda", "xpu", "mps"])
def test_a_torch_without_torch_accelerator_finds_the_card_and_its_memory(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for missing in ("accelerator", "get_device_module"):
        monkeypatch.delattr(torch, missing, raising=False)
    for other in ("cuda", "xpu"):
        monkeypatch.setattr(torch, other, Older(other == name), raising=False)
    monkeypatch.setattr(torch.backends, "mps", Older(name == "mps"), raising=False)
    assert devices.best_device() == torch.device(name)
    if name != "mps":
        assert devices.max_batch(torch.device(name), torch.float16, 2**30) == 3


def test_a_torch_without_torch_accelerator_takes_the_cpu_where_no_card_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(torch, "accelerator", raising=False)
    for other in ("cuda", "xpu"):
        monkeypatch.setattr(torch, other, Older(False), raising=False)
    monkeypatch.setattr(torch.backends, "mps", Older(False))
    assert devices.best_device() == torch.device("cpu")
    assert devices.max_batch(torch.device("cpu"), torch.float32, 2**40) == 1


def test_faces_are_numbered_by_a_pillow_whose_font_has_one_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual = ImageFont.load_default()
    monkeypatch.setattr(ImageFont, "load_default", lambda: usual)
    face = Face(
        0, (200, 300, 500, 700), ((350.0, 450.0),) * 5, 0.9, 7, ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
    )
    drawn = draw_faces(torch.zeros(1, 1000, 1000, 3), (face,), ("chosen",))[0, :298].mean(-1)
    rows, columns = drawn.nonzero().unbind(1)
    # The number stands above the box, and a page shows such a picture at half its size.
    height, width = rows.max() - rows.min(), columns.max() - columns.min()
    assert 28 <= height <= 60 and width <= 60
    digit = drawn[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] < 0.3
    assert 0.05 < float(digit.float().mean()) < 0.5
