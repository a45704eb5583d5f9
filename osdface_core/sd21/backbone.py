"""What a host supplies: Stable Diffusion 2.1-base's VAE and UNet, wherever it keeps them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

TIMESTEP = 399
TIMESTEPS = 1000
LATENT_CHANNELS = 4
STRIDE = 8


class Backbone(Protocol):
    """The three networks of one restoration step. Tensors are fp32 on a device of the host's
    choice; B may be any number.

    Each method loads what it needs and may raise the error that `out_of_memory` knows, after which
    a smaller batch is tried.
    """

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels (B,3,H,W) in [0,1], sides multiples of 8 -> the mean of the posterior, scaled by
        0.18215, (B,4,H/8,W/8).
        """

    def denoise(self, latents: Tensor, prompts: Tensor, timestep: int) -> Tensor:
        """latents (B,4,h,w) scaled and without noise added, prompts (B,77,1024) -> x0 (B,4,h,w),
        scaled.
        """

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B,4,h,w) scaled -> (B,3,8h,8w) in [0,1]."""

    def faces_that_fit(self, height: int, width: int) -> int:
        """How many crops of this size the free memory takes at once; at least 1."""

    def precisely(self) -> AbstractContextManager[bool]:
        """Within, what can overflow in half precision computes in fp32. Gives whether that is
        another way than before.
        """

    def out_of_memory(self, error: BaseException) -> bool:
        """Whether `error` says that memory ran out."""


def alphas_cumprod() -> Tensor:
    """Stable Diffusion's schedule (scaled linear, 0.00085 to 0.012), (1000,) fp64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)
