"""Splits a picture into overlapping tiles."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def tile_spans(length: int, tile: int, shared: int) -> list[tuple[int, int]]:
    """(start, stop) of evenly spread parts of range(length).

    Each is at most `tile` long and overlaps the next by at least `shared`.
    """
    if length <= tile:
        return [(0, length)]
    count = math.ceil((length - shared) / (tile - shared))
    starts = [round(i * (length - tile) / (count - 1)) for i in range(count)]
    return [(start, start + tile) for start in starts]


def tile_shares(spans: list[tuple[int, int]]) -> list[Tensor]:
    """How much each of the spans (start, stop) counts at each of its places; they add up to 1.

    Where two overlap, one fades out as the other fades in.
    """
    length = spans[-1][1]
    weights = []
    for i, (start, stop) in enumerate(spans):
        weight = torch.ones(stop - start)
        if i:
            shared = spans[i - 1][1] - start
            weight[:shared] *= (torch.arange(shared) + 0.5) / shared
        if i + 1 < len(spans):
            shared = stop - spans[i + 1][0]
            weight[stop - start - shared :] *= (torch.arange(shared).flip(0) + 0.5) / shared
        weights.append(weight)
    total = torch.zeros(length)
    for (start, stop), weight in zip(spans, weights, strict=True):
        total[start:stop] += weight
    return [
        weight / total[start:stop] for (start, stop), weight in zip(spans, weights, strict=True)
    ]
