"""A small autoencoder whose latents, unlike Stable Diffusion's, keep nearly all of a picture.

They have 32 channels at an eighth of the size, a sixth of the picture's numbers, so that what the
UNet leaves alone comes back as it was. Most of the work is done at 1/8 and 1/4 of the size: a face
of 512 px costs 13 GMAC, where TAESD takes 140. A linear path, set to the principal components of
8 x 8 px blocks before training, runs beside the convolutions of both halves.

The encoder looks at the whole face at a quarter of its size first and takes away what is wrong
there: noise, JPEG's blocks and blotches of colour. That wants faces as a whole and many of them,
and is trained by itself, on pictures a sixteenth as large.

The first channel is 1 and the decoder divides the others by it, as homogeneous coordinates are. A
diffusion step divides latents by the schedule's signal and takes a share of the predicted noise
away; so a UNet that predicts none changes nothing, at any timestep, and what it predicts is the
restoration alone.

Detail that is too fine to be told from a poor picture, such as skin and single hairs, is added by
the decoder as grain, as in video decoders (AV1's film grain synthesis): a fixed tile of noise, in
an amount that the network predicts for each pixel.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...layers import Operations
from ...sd21.backbone import STRIDE

# Of the latents, the divisor among them.
CHANNELS = 32
CONTENT = CHANNELS - 1
BLOCK = 3 * STRIDE**2
# What the sides are divided by for the denoiser.
QUARTER = 4
# The least that the decoder divides by.
DIVISOR = 0.25
# Pixels after which the grain repeats. A part of a picture that begins at a multiple of it gets the
# same grain as in the whole.
GRAIN = 64


class Residual(nn.Module):
    """(B,C,H,W) -> (B,C,H,W): two convolutions beside the identity."""

    def __init__(self, channels: int, operations: Operations) -> None:
        super().__init__()
        self.conv1 = operations.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = operations.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Denoiser(nn.Module):
    """(B,3,h,w) in [-1,1] -> what to add to it, of the same shape: a U-Net of four levels, the
    first at half of the sides.
    """

    def __init__(self, operations: Operations, widths: tuple[int, ...] = (32, 64, 96, 96)) -> None:
        super().__init__()
        self.conv_in = operations.Conv2d(4 * 3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            nn.Sequential(*(Residual(width, operations) for _ in range(2 if level else 1)))
            for level, width in enumerate(widths)
        )
        pairs = tuple(pairwise(widths))
        self.shrink = nn.ModuleList(operations.Conv2d(a, b, 2, 2) for a, b in pairs)
        self.enlarge = nn.ModuleList(operations.Conv2d(b, 4 * a, 1) for a, b in pairs)
        self.up = nn.ModuleList(Residual(width, operations) for width in widths[:-1])
        self.conv_out = operations.Conv2d(widths[0], 4 * 3, 3, padding=1)
        # A new one changes nothing, as most training leaves it as it is.
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        side = 2 ** len(self.down)
        right, below = -width % side, -height % side
        if right or below:
            # In fp32, which every torch pads on every device.
            x = F.pad(x.float(), [0, right, 0, below], mode="replicate").to(x.dtype)
        h = self.conv_in(F.pixel_unshuffle(x, 2))
        passed = []
        for level, blocks in enumerate(self.down):
            h = blocks(h)
            if level < len(self.shrink):
                passed.append(h)
                h = self.shrink[level](h)
        for level in reversed(range(len(self.up))):
            h = self.up[level](F.pixel_shuffle(self.enlarge[level](h), 2) + passed[level])
        return F.pixel_shuffle(self.conv_out(h), 2)[..., :height, :width]


class Encoder(nn.Module):
    """(B,3,H,W) in [-1,1], sides multiples of 8 -> (B,32,H/8,W/8) of about unit variance."""

    def __init__(self, width: int, depth: int, operations: Operations) -> None:
        super().__init__()
        self.denoiser = Denoiser(operations)
        self.linear = operations.Conv2d(BLOCK, CONTENT, 1)
        self.conv_in = operations.Conv2d(BLOCK, width, 3, padding=1)
        self.blocks = nn.ModuleList(Residual(width, operations) for _ in range(depth))
        self.conv_out = operations.Conv2d(width, CONTENT, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        change = self.denoiser(F.avg_pool2d(x, QUARTER))
        x = x + F.interpolate(change, scale_factor=QUARTER, mode="bilinear")
        x = F.pixel_unshuffle(x, STRIDE)
        h = self.conv_in(x)
        for block in self.blocks:
            h = block(h)
        content = self.linear(x) + self.conv_out(F.relu(h))
        return torch.cat([torch.ones_like(content[:, :1]), content], dim=1)


class Decoder(nn.Module):
    """(B,32,h,w) -> (B,3,8h,8w) in [-1,1], or slightly beyond."""

    def __init__(
        self, width: int, depth: int, quarter: int, half: int, operations: Operations
    ) -> None:
        super().__init__()
        self.linear = operations.Conv2d(CONTENT, BLOCK, 1)
        self.conv_in = operations.Conv2d(CONTENT, width, 3, padding=1)
        self.blocks = nn.ModuleList(Residual(width, operations) for _ in range(depth))
        self.conv_4 = operations.Conv2d(width, 4 * quarter, 3, padding=1)
        self.blocks_4 = nn.ModuleList(Residual(quarter, operations) for _ in range(2))
        self.conv_2 = operations.Conv2d(quarter, 4 * half, 3, padding=1)
        self.block_2 = Residual(half, operations)
        self.conv_out = operations.Conv2d(half, 4 * 3, 3, padding=1)
        self.conv_grain = operations.Conv2d(half, 4, 3, padding=1)
        self.register_buffer("grain", torch.zeros(1, 1, GRAIN, GRAIN))
        self.grain: Tensor

    def forward(self, z: Tensor) -> Tensor:
        z = z[:, 1:] / z[:, :1].clamp(min=DIVISOR)
        h = self.conv_in(z)
        for block in self.blocks:
            h = block(h)
        h = F.pixel_shuffle(self.conv_4(F.relu(h)), 2)
        for block in self.blocks_4:
            h = block(h)
        h = F.relu(self.block_2(F.pixel_shuffle(self.conv_2(F.relu(h)), 2)))
        amount = F.pixel_shuffle(self.conv_grain(h), 2)
        height, width = amount.shape[-2:]
        grain = self.grain.to(amount).repeat(1, 1, -(-height // GRAIN), -(-width // GRAIN))[
            ..., :height, :width
        ]
        return (
            F.pixel_shuffle(self.linear(z), STRIDE)
            + F.pixel_shuffle(self.conv_out(h), 2)
            + amount * grain
        )


def blue_noise(generator: torch.Generator) -> Tensor:
    """Noise (1,1,GRAIN,GRAIN) of variance 1 whose opposite edges join: white noise less its blur.

    It is the grain that the eye sees least.
    """
    white = torch.randn(1, 1, GRAIN, GRAIN, generator=generator)
    taps = torch.tensor([1.0, 2.0, 1.0])
    noise = white - F.conv2d(
        F.pad(white, [1] * 4, mode="circular"), torch.outer(taps, taps)[None, None] / 16
    )
    return (noise - noise.mean()) / noise.std()


class Autoencoder(nn.Module):
    """encode: (B,3,H,W) in [-1,1] -> (B,32,H/8,W/8); decode: back. The latents' scale is 1."""

    def __init__(self, operations: Operations = nn, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        self.encoder = Encoder(96, 2, operations)
        self.decoder = Decoder(width, depth, 64, 32, operations)

    def encode(self, pixels: Tensor) -> Tensor:
        return self.encoder(pixels)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.decode(self.encode(pixels))

    @torch.no_grad()
    def start(self, pixels: Tensor) -> None:
        """Sets the weights from which training starts, by the blocks of pictures (B,3,H,W).

        The linear paths become the blocks' principal components. What is added to them becomes 0,
        but for a little grain, since a loss of detail has no slope at none.
        """
        blocks = F.pixel_unshuffle(pixels, STRIDE).movedim(1, -1).reshape(-1, BLOCK).double()
        mean = blocks.mean(0)
        values, vectors = torch.linalg.eigh((blocks - mean).T @ (blocks - mean) / len(blocks))
        scale = values[-CONTENT:].sqrt()
        vectors = vectors[:, -CONTENT:]
        down = (vectors / scale).T
        into, out = self.encoder.linear, self.decoder.linear
        into.weight.copy_(down[:, :, None, None])
        into.bias.copy_(-down @ mean)
        out.weight.copy_((vectors * scale)[:, :, None, None])
        out.bias.copy_(mean)
        for layer in (self.encoder.conv_out, self.decoder.conv_out, self.decoder.conv_grain):
            layer.weight.zero_()
            layer.bias.zero_()
        self.decoder.conv_grain.bias.fill_(0.02)
        self.decoder.grain.copy_(blue_noise(torch.Generator().manual_seed(0)))
