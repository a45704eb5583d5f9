"""What was made of a picture, kept as long as the host keeps the picture.

A changed widget of a node that does a whole job then runs anew only what depends on it, as in a
graph of single nodes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# Results of one stage that are kept for one picture: several nodes may work on it.
MAX_KEPT = 4

_cache: dict[int, dict[str, list[tuple[object, Any]]]] = {}


def cached_for_picture(image: Tensor, stage: str, key: object, make: Callable[[], T]) -> T:
    """What `make` gave for this very tensor and key before, else what it gives now.

    image: (B,H,W,C).
    stage: name of the result.
    key: all else that the result depends on.
    make: makes it.
    """
    if id(image) not in _cache:
        _cache[id(image)] = {}
        weakref.finalize(image, _cache.pop, id(image), None)
    # A node before this one may have written into the picture that it handed on.
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
