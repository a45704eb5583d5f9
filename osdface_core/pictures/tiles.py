"""A picture in overlapping parts."""

from __future__ import annotations

import math


def tile_spans(length: int, tile: int, shared: int) -> list[tuple[int, int]]:
    """Evenly spread parts of range(length), each at most `tile` long, overlapping by `shared`."""
    if length <= tile:
        return [(0, length)]
    count = math.ceil((length - shared) / (tile - shared))
    starts = [round(i * (length - tile) / (count - 1)) for i in range(count)]
    return [(start, start + tile) for start in starts]
