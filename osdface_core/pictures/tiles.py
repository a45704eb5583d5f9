"""Splits a picture into overlapping tiles."""

from __future__ import annotations

import math


def tile_spans(length: int, tile: int, shared: int) -> list[tuple[int, int]]:
    """(start, stop) of evenly spread parts of range(length).

    Each is at most `tile` long and overlaps the next by at least `shared`.
    """
    if length <= tile:
        return [(0, length)]
    count = math.ceil((length - shared) / (tile - shared))
    starts = [round(i * (length - tile) / (count - 1)) for i in range(count)]
    return [(start, start + tile) for start in starts]
