"""Keeps results made from a picture as long as the host keeps the picture.

When a widget of a node that does the whole job changes, only what depends on it runs again, as in a
graph of single nodes.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
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

# By picture and stage: key, result and its bytes. The last used come last.
_cache: OrderedDict[tuple[int, str, object], tuple[Any, int]] = OrderedDict()


def cached_for_picture(
    image: Tensor, stage: str, key: object, make: Callable[[], T], size: Callable[[T], int]
) -> T:
    """The result of `make` for this very tensor and key, kept from an earlier call if possible.

    image: (B,H,W,C).
    stage: name of the result.
    key: all else that the result depends on.
    make: makes it.
    size: the bytes that a result holds.
    """
    if not any(owner == id(image) for owner, *_ in _cache):
        weakref.finalize(image, _forget, id(image))
    # Sums over rows and columns, in case an earlier node has written into the picture since.
    rows, columns = (
        image.sum(axes, dtype=torch.float32).numpy(force=True).tobytes()
        for axes in ((2, 3), (1, 3))
    )
    place = id(image), stage, (key, rows, columns)
    if place in _cache:
        _cache.move_to_end(place)
        return _cache[place][0]
    value = make()
    held = size(value)
    if held <= MAX_BYTES:
        _cache[place] = value, held
        of_stage = [known for known in _cache if known[:2] == place[:2]]
        for known in of_stage[:-MAX_KEPT]:
            del _cache[known]
        while sum(held for _, held in _cache.values()) > MAX_BYTES:
            _cache.popitem(last=False)
    return value


def _forget(owner: int) -> None:
    for place in [place for place in _cache if place[0] == owner]:
        del _cache[place]
