"""What a host supplies: the VAE and UNet of Stable Diffusion 2.1-base."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

LATENT_CHANNELS = 4
# Pixels a side: of a latent, and of the pictures that the model was trained on.
STRIDE = 8
SIDE = 512
# Tokens of a prompt, and the width of each.
TOKENS = 77
TEXT_WIDTH = 1024
# CLIP's marks of a text's beginning and end; what follows the end is 0 in Stable Diffusion 2.
BEGIN, END, PAD = 49406, 49407, 0
# Of one head of the text encoder's attention.
TEXT_HEAD_WIDTH = 64
# SiLU's minimum: no value of a visual prompt is below it, and some value of any text prompt is.
VISUAL_MINIMUM = -0.28


class Backbone(Protocol):
    """The networks of one diffusion step. Tensors are fp32 on a device of the host's choice.

    Each method loads what it needs and may raise the error that `out_of_memory` recognises, after
    which a smaller batch is tried.
    """

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels (B,3,H,W) in [0,1] -> the posterior's mean (B,4,H/8,W/8), scaled by 0.18215.

        H and W are multiples of 8.
        """

    def denoise(self, latents: Tensor, prompts: Tensor, timestep: int) -> Tensor:
        """latents (B,4,h,w) scaled, no noise added, prompts (B,77,1024) -> x0 (B,4,h,w) scaled."""

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B,4,h,w) scaled -> (B,3,8h,8w) in [0,1]."""

    def max_batch(self, height: int, width: int) -> int:
        """How many pictures of height x width px the free memory takes at once; at least 1."""

    def fp32_fallback(self) -> AbstractContextManager[bool]:
        """A context in which what can overflow in half precision computes in fp32.

        Gives whether anything computed in half precision before. Where memory runs out on the way
        in, everything is as before.
        """

    def out_of_memory(self, error: BaseException) -> bool:
        """Whether `error` says that memory ran out."""
