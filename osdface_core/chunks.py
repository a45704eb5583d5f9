"""Runs a long job in chunks: as many items at once as fit, fewer when memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

log = logging.getLogger(__name__)

T = TypeVar("T")

# torch has called it so since 2.5; before, it was CUDA's alone.
OUT_OF_MEMORY: type[BaseException] = getattr(
    torch, "OutOfMemoryError", getattr(torch.cuda, "OutOfMemoryError", MemoryError)
)

# Called with the number of items just finished and, optionally, a picture (C,H,W) in [0,1] to show.
# A host stops the job by raising from it.
Progress = Callable[..., None]


def no_progress(done: int = 1, picture: torch.Tensor | None = None) -> None:
    """A Progress that does nothing."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is torch's report that memory ran out.

    On an accelerator that is OutOfMemoryError; on MPS and on the CPU, a plain RuntimeError.
    """
    message = str(error)
    return isinstance(error, OUT_OF_MEMORY) or (
        isinstance(error, RuntimeError)
        and any(
            words in message
            for words in ("out of memory", "can't allocate memory", "not enough memory")
        )
    )


def on_first(
    devices: Sequence[torch.device],
    work: Callable[[torch.device], T],
    out_of_memory: Callable[[BaseException], bool] = is_out_of_memory,
) -> T:
    """What `work` gives on the first of `devices` that has the memory for it.

    The last one's error, and any other, passes through.
    """
    for device in devices[:-1]:
        try:
            return work(device)
        except Exception as error:
            if not out_of_memory(error):
                raise
        log.warning("Out of memory on %s; going on on %s.", device, devices[-1])
    return work(devices[-1])


def in_chunks(
    count: int,
    size: int,
    work: Callable[[slice], None],
    out_of_memory: Callable[[BaseException], bool] = is_out_of_memory,
) -> None:
    """Calls `work` with slices that cover range(count), each at most `size` long.

    A slice that runs out of memory is halved and tried again, and the rest goes on at the smaller
    size; at a size of one the error is raised. Any other error of `work` passes through.
    """
    start = 0
    while start < count:
        stop = min(start + size, count)
        try:
            work(slice(start, stop))
        except Exception as error:
            if stop - start == 1 or not out_of_memory(error):
                raise
            size = (stop - start) // 2
        else:
            start = stop
            continue
        # Outside of `except`, where the traceback would keep the failed chunk's tensors alive.
        log.warning("Out of memory with %d at once; going on with %d.", stop - start, size)
