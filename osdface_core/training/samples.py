"""Restored held-out samples: as a picture, and measured."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .data import Samples
from .loop import grid
from .losses import mean_of_each, measures


def show_restored(
    restore: Callable[[dict[str, Tensor]], Tensor],
    held_out: Samples,
    count: int,
    device: torch.device,
) -> tuple[Tensor, dict[str, float]]:
    """Rows: degraded, restored, original. Whole pictures are measured; `lq_` are the degraded
    ones' figures.

    restore: a sample as a batch of one -> the restored picture (1,3,H,W).
    held_out: the samples.
    count: how many of them are shown.
    device: where `restore` computes.
    """
    rows: list[list[Tensor]] = [[], [], []]
    figures = []
    for n in range(len(held_out)):
        sample = {key: value[None].to(device) for key, value in held_out[n].items()}
        restored = restore(sample).clamp(0, 1)
        of_lq = measures(sample["lq"], sample["hq"])
        figures.append(
            measures(restored, sample["hq"]) | {f"lq_{key}": value for key, value in of_lq.items()}
        )
        if n < count:
            for row, picture in zip(rows, (sample["lq"], restored, sample["hq"]), strict=True):
                row.append(picture)
    return grid([torch.cat(row) for row in rows]), mean_of_each(figures)
