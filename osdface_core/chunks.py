"""A long job in chunks: as many at once as fit, fewer when memory runs out, one report for each
that is done.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

log = logging.getLogger(__name__)

# Called with the number of items just finished and, when there is one, a picture (C,H,W) in [0,1]
# to show. It may raise: that is how a host stops the job.
Progress = Callable[..., None]


def in_chunks(
    count: int,
    size: int,
    work: Callable[[slice], None],
    out_of_memory: Callable[[BaseException], bool],
) -> None:
    """Calls `work` with slices that cover range(count), at most `size` long.

    A slice that runs out of memory is halved and tried again, and the rest goes on at the smaller
    size; at a size of one the error is raised. Whatever else `work` raises passes through.
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
        # Outside of `except`: the traceback would keep the failed chunk's tensors alive.
        log.warning("Out of memory with %d at once; going on with %d.", stop - start, size)
