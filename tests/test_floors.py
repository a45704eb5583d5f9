"""What older torch and Pillow lack is done without."""

from __future__ import annotations

import importlib

import pytest
import torch
from PIL import ImageFont

from osdface_core import chunks
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


def test_faces_are_numbered_by_a_pillow_whose_font_has_one_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual = ImageFont.load_default()
    monkeypatch.setattr(ImageFont, "load_default", lambda: usual)
    face = Face(
        0, (20, 30, 80, 90), ((30.0, 40.0),) * 5, 0.9, 7, ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
    )
    picture = torch.zeros(1, 120, 120, 3)
    assert bool((draw_faces(picture, (face,), ("chosen",)) > 0).any())
