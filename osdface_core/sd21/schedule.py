"""Stable Diffusion's noise schedule."""

from __future__ import annotations

import torch
from torch import Tensor

TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012


def alphas_cumprod() -> Tensor:
    """The scaled linear schedule (Rombach et al. 2022), (1000,) fp64."""
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TIMESTEPS, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


def x0_of(latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
    """x0 (B,4,h,w) fp32 of latents x_t and the predicted noise at timestep t.

    (x_t - sqrt(1 - abar_t) noise) / sqrt(abar_t) (DDIM, Song et al. 2021, equation 9), in fp64.
    """
    abar = alphas_cumprod()[timestep].to(latents.device)
    return ((latents.double() - (1 - abar).sqrt() * noise) / abar.sqrt()).float()
