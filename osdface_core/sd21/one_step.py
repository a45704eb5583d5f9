"""One diffusion step over a batch of pictures: encode, denoise once, decode."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chunks import Progress, in_chunks, no_progress
from ..errors import OSDFaceError
from ..pictures.picture import all_finite
from .backbone import STRIDE, Backbone
from .schedule import TIMESTEPS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Restored:
    """The result of one step.

    pictures: (N,H,W,C) in [0,1].
    failed: indices of the pictures that came out as NaN and are returned as they were.
    recomputed: indices of those that came out as NaN in half precision and were right when computed
        again in fp32.
    starved: indices of those of `failed` for which fp32 had too little memory.
    """

    pictures: Tensor
    failed: tuple[int, ...] = ()
    recomputed: tuple[int, ...] = ()
    starved: tuple[int, ...] = ()


def check_timestep(timestep: int, trained: int) -> None:
    """Raises OSDFaceError for a timestep that the schedule does not have."""
    if not 0 <= timestep < TIMESTEPS:
        raise OSDFaceError(
            f"`timestep` is {timestep}; a whole number from 0 to {TIMESTEPS - 1} is wanted: set it "
            f"to {trained}."
        )


def padded(pixels: Tensor) -> Tensor:
    """(B,3,H,W) -> (B,3,H',W'): the edge repeated below and to the right up to multiples of 8."""
    height, width = pixels.shape[-2:]
    # Contiguous: a picture arrives channels-last, in which torch's group norm on the CPU loses four
    # digits.
    return F.pad(pixels, (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate").contiguous()


def one_step(
    inputs: Callable[[slice], Tensor],
    prompts: Tensor,
    size: tuple[int, int],
    backbone: Backbone,
    *,
    timestep: int,
    batch: int = 0,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> Restored:
    """Takes each of N pictures through the step.

    inputs: gives the pictures of a slice of range(N) as (n,3,H',W') in [0,1], padded.
    prompts: (N,77,1024).
    size: height and width of a picture without its padding.
    backbone: the networks.
    timestep: 0..999.
    batch: pictures at once; 0 takes as many as fit.
    device: of the result.
    progress: called with 1 and the picture (3,H,W) for each one that is done, with 0 between the
        networks; what it raises ends the job.
    """
    height, width = size
    out = torch.empty(len(prompts), height, width, 3, device=device)
    report = progress or no_progress
    failed: list[int] = []

    def work(part: slice, done: int = 1) -> None:
        pixels = inputs(part)
        report(0)
        latents = backbone.encode(pixels)
        report(0)
        latents = backbone.denoise(latents, prompts[part], timestep)
        report(0)
        result = backbone.decode(latents)[:, :, :height, :width].to(out.device, out.dtype)
        out[part] = result.movedim(1, -1)
        # All at once: on an accelerator each answer waits for the work in its queue.
        for i, is_whole in enumerate(all_finite(result), start=part.start):
            if not is_whole:
                failed.append(i)
                out[i] = pixels[i - part.start, :, :height, :width].movedim(0, -1)
        for picture in result:
            report(done, picture)

    if len(out):
        in_chunks(
            len(out), batch or backbone.max_batch(height, width), work, backbone.out_of_memory
        )
    again, starved = retry_in_fp32(backbone, failed, lambda i: work(slice(i, i + 1), 0))
    for i in starved:
        out[i] = inputs(slice(i, i + 1))[0, :, :height, :width].movedim(0, -1)
    for i in failed:
        log.warning("Number %d of the batch came out as NaN and is left as it was.", i)
    return Restored(out, tuple(failed), tuple(i for i in again if i not in failed), starved)


def retry_in_fp32(
    backbone: Backbone, failed: list[int], work: Callable[[int], None]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Computes again in fp32 what came out as NaN in half precision.

    Returns those that were tried, and those of them for which there was too little memory: they
    stay among `failed`, and what is done already is not lost. Any other error passes through.

    backbone: the networks.
    failed: what came out as NaN; only those that still do are left in it.
    work: computes one, and adds it to `failed` if it is NaN again.
    """
    again: tuple[int, ...] = ()
    starved: list[int] = []
    started = False
    if failed:
        try:
            with backbone.fp32_fallback() as was_half:
                started = True
                if was_half:
                    again = tuple(failed)
                    failed.clear()
                    for i in again:
                        log.warning("Number %d came out as NaN and is computed again in fp32.", i)
                        try:
                            work(i)
                        except Exception as error:
                            if not backbone.out_of_memory(error):
                                raise
                            starved.append(i)
        except Exception as error:
            # What goes wrong on the way back would leave the networks as they must not be.
            if started or not backbone.out_of_memory(error):
                raise
            again, starved = tuple(failed), list(failed)
        failed[:] = sorted({*failed, *starved})
    for i in starved:
        log.warning("Memory is too short to compute number %d again in fp32.", i)
    return again, tuple(starved)
