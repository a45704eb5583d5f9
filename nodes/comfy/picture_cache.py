"""Keeps results made from a picture as long as the host keeps the picture.

When a widget of a node that does the whole job changes, only what depends on it runs again, as in a
graph of single nodes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# Results of one stage kept for one picture, since several nodes may work on it.
MAX_KEPT = 4

_cache: dict[int, dict[str, list[tuple[object, Any]]]] = {}


def cached_for_picture(image: Tensor, stage: str, key: object, make: Callable[[], T]) -> T:
    """The result of `make` for this very tensor and key, kept from an earlier call if possible.

    image: (B,H,W,C).
    stage: name of the result.
    key: all else that the result depends on.
    make: makes it.
    """
    if id(image) not in _cache:
        _cache[id(image)] = {}
        weakref.finalize(image, _cache.pop, id(image), None)
    # Sums over rows and columns, in case an earlier node has written into the picture since.
    rows, columns = (
        image.sum(axes, dtype=torch.float32).numpy(force=True).tobytes()
        for axes in ((2, 3), (1, 3))
    )
    key = key, rows, columns
    kept = _cache[id(image)].setdefault(stage, [])
    for known, value in kept:
        if known == key:
            return value
    value = make()
    kept[:] = [*kept[-MAX_KEPT + 1 :], (key, value)]
    return value
