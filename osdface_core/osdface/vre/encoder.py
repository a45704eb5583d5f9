"""The convolutional encoder of the Visual Representation Embedder.

A VQGAN encoder (Esser et al. 2021) in the shape that OSDFace trained: 512 px in, 16 x 16 features
of 512 channels out, self-attention at the last level. Parameters have the names of
`associate_2.ckpt`, so that its tensors load strictly.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ...layers import Operations

GRID = 16
NORM_GROUPS = 32


@dataclass(frozen=True)
class Shape:
    """Widths of an embedder's networks; the defaults are OSDFace's.

    Every level but the last halves the size, and 16 x 16 positions remain.

    channels: of the first layer.
    multipliers: of each level's width, in `channels`.
    features: of a code.
    codes: in the code book.
    hidden: channels between the projector's layers.
    """

    channels: int = 64
    multipliers: tuple[int, ...] = (1, 2, 2, 2, 4, 8)
    features: int = 512
    codes: int = 1024
    hidden: int = 256

    @property
    def side(self) -> int:
        """Pixels a side of the picture that the encoder takes."""
        return GRID << (len(self.multipliers) - 1)


FULL = Shape()


def _norm(channels: int, operations: Operations) -> nn.Module:
    return operations.GroupNorm(NORM_GROUPS, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """(B,C,H,W) -> (B,out,H,W): two convolutions after group norm and SiLU each, and a shortcut.

    The shortcut is a 1x1 convolution where the width changes.
    """

    def __init__(self, channels: int, out: int, operations: Operations) -> None:
        super().__init__()
        self.norm1 = _norm(channels, operations)
        self.conv1 = operations.Conv2d(channels, out, 3, padding=1)
        self.norm2 = _norm(out, operations)
        self.conv2 = operations.Conv2d(out, out, 3, padding=1)
        if channels != out:
            self.nin_shortcut = operations.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    """(B,C,H,W) -> (B,C,H,W): one head over all positions, with a residual."""

    def __init__(self, channels: int, operations: Operations) -> None:
        super().__init__()
        self.norm1 = _norm(channels, operations)
        self.norm2 = _norm(
            channels, operations
        )  # in the checkpoint, for a second input that inference never uses
        self.q = operations.Conv2d(channels, channels, 1)
        self.k = operations.Conv2d(channels, channels, 1)
        self.v = operations.Conv2d(channels, channels, 1)
        self.proj_out = operations.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (
            rearrange(layer(h), "b c h w -> b (h w) c") for layer in (self.q, self.k, self.v)
        )
        h = rearrange(F.scaled_dot_product_attention(q, k, v), "b (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """(B,C,H,W) -> (B,C,H/2,W/2): stride 2, padded by one row below and one column to the right."""

    def __init__(self, channels: int, operations: Operations) -> None:
        super().__init__()
        self.conv = operations.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """One resolution: two blocks, then a downsampling.

    The last level has attention after each block instead of the downsampling.
    """

    def __init__(self, channels: int, out: int, last: bool, operations: Operations) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            [ResnetBlock(channels, out, operations), ResnetBlock(out, out, operations)]
        )
        self.attn = nn.ModuleList([Attention(out, operations) for _ in self.block] if last else [])
        if not last:
            self.downsample = Downsample(out, operations)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return self.downsample(x) if hasattr(self, "downsample") else x


class Middle(nn.Module):
    def __init__(self, channels: int, operations: Operations) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, operations)
        self.attn_1 = Attention(channels, operations)
        self.block_2 = ResnetBlock(channels, channels, operations)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """(B,3,side,side) -> (B,features,16,16); in OSDFace (B,3,512,512) -> (B,512,16,16)."""

    def __init__(self, operations: Operations = nn, shape: Shape = FULL) -> None:
        super().__init__()
        self.conv_in = operations.Conv2d(3, shape.channels, 3, padding=1)
        widths = [shape.channels, *(shape.channels * m for m in shape.multipliers)]
        self.down = nn.ModuleList(
            Level(a, b, last=i == len(shape.multipliers) - 1, operations=operations)
            for i, (a, b) in enumerate(pairwise(widths))
        )
        self.mid = Middle(widths[-1], operations)
        self.norm_out = _norm(widths[-1], operations)
        self.conv_out = operations.Conv2d(widths[-1], shape.features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))
