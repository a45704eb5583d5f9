"""Keeps results made from a picture as long as the host keeps the picture.

When a widget of a node that does the whole job changes, only what depends on it runs again, as in a
graph of single nodes.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# Results of one stage kept for one picture, since several nodes may work on it.
MAX_KEPT = 4
# Bytes that all kept results may take, of all pictures: 85 crops of 512 px. The longest unused go
# first; one that is larger by itself is not kept.
MAX_BYTES = 256 * 1024**2

# By picture and stage: key, result, its bytes, and when it was last used.
_cache: dict[int, dict[str, list[tuple[object, Any, int, int]]]] = {}
_uses = itertools.count()


def cached_for_picture(
    image: Tensor, stage: str, key: object, make: Callable[[], T], size: Callable[[T], int | None]
) -> T:
    """The result of `make` for this very tensor and key, kept from an earlier call if possible.

    image: (B,H,W,C).
    stage: name of the result.
    key: all else that the result depends on.
    make: makes it.
    size: the bytes that a result holds; None for one that is not to be kept.
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
    for i, (known, value, held, _) in enumerate(kept):
        if known == key:
            kept[i] = known, value, held, next(_uses)
            return value
    value = make()
    taken = size(value)
    if taken is not None and taken <= MAX_BYTES:
        kept.append((key, value, taken, next(_uses)))
        if len(kept) > MAX_KEPT:
            del kept[min(range(len(kept)), key=lambda i: _last_used(kept[i]))]
        _make_room()
    return value


def _last_used(entry: tuple[object, Any, int, int]) -> int:
    return entry[3]


def _make_room() -> None:
    """Forgets what was unused the longest, until the rest is within MAX_BYTES."""
    lists = [kept for stages in _cache.values() for kept in stages.values()]
    while sum(held for kept in lists for _, _, held, _ in kept) > MAX_BYTES:
        oldest = min((kept for kept in lists if kept), key=lambda kept: min(map(_last_used, kept)))
        del oldest[min(range(len(oldest)), key=lambda i: _last_used(oldest[i]))]
