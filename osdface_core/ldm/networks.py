"""The UNet and the autoencoder of Stable Diffusion 2.1 (Rombach et al. 2022).

Their parts are named as in its checkpoint, after the prefixes `model.diffusion_model.` and
`first_stage_model.`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sd21.backbone import LATENT_CHANNELS, TEXT_WIDTH
from ..sd21.modules import SD21_UNET, VAE_BLOCKS, VAE_WIDTHS, UNetShape
from .layers import Conv2d, GroupNorm, LayerNorm, Linear

# Of the UNet's residual blocks, and of all other group norms.
UNET_EPS, EPS = 1e-5, 1e-6
MAX_PERIOD = 10000


def timestep_embedding(timestep: int, width: int, device: torch.device) -> Tensor:
    """(1,width) fp32: cosines, then sines (Vaswani et al. 2017, section 3.5)."""
    half = width // 2
    places = torch.arange(half, dtype=torch.float32, device=device)
    angles = timestep * torch.exp(-math.log(MAX_PERIOD) * places / half)
    return torch.cat([angles.cos(), angles.sin()])[None]


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """(B,n,C) of queries (B,n,C), keys and values (B,m,C), in `heads` equal shares of C."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class UNetResidual(nn.Module):
    """(B,inside,h,w) and the timestep's embedding (B,time) -> (B,out,h,w)."""

    def __init__(self, inside: int, out: int, shape: UNetShape) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            GroupNorm(shape.groups, inside, UNET_EPS), nn.SiLU(), Conv2d(inside, out, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), Linear(shape.time_width, out))
        self.out_layers = nn.Sequential(
            GroupNorm(shape.groups, out, UNET_EPS),
            nn.SiLU(),
            nn.Identity(),
            Conv2d(out, out, 3, padding=1),
        )
        self.skip_connection = Conv2d(inside, out, 1) if inside != out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(time)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    """Attention of (B,n,width) over itself, or over a context (B,m,context)."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = Linear(width, width, bias=False)
        self.to_k = Linear(context, width, bias=False)
        self.to_v = Linear(context, width, bias=False)
        self.to_out = nn.Sequential(Linear(width, width))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        return self.to_out(attention(q, k, v, self.heads))


class GEGLU(nn.Module):
    """A linear layer gated by the GELU of another (Shazeer 2020)."""

    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        self.proj = Linear(inside, 2 * out)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """(B,n,width) -> (B,n,width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """(B,n,width) and prompts (B,77,1024) -> (B,n,width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn1 = Attention(width, width, heads)
        self.norm2 = LayerNorm(width)
        self.attn2 = Attention(width, TEXT_WIDTH, heads)
        self.norm3 = LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, prompts: Tensor) -> Tensor:
        h = self.norm1(x)
        x = self.attn1(h, h) + x
        x = self.attn2(self.norm2(x), prompts) + x
        return self.ff(self.norm3(x)) + x


class Transformer(nn.Module):
    """(B,width,h,w) and prompts (B,77,1024) -> (B,width,h,w)."""

    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, width, EPS)
        self.proj_in = Linear(width, width)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, heads)])
        self.proj_out = Linear(width, width)

    def forward(self, x: Tensor, prompts: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        for block in self.transformer_blocks:
            h = block(h, prompts)
        h = self.proj_out(h)
        return h.transpose(1, 2).unflatten(2, (height, width)) + x


class Downsample(nn.Module):
    """(B,C,h,w) -> (B,C,h/2,w/2), rounded up."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """(B,C,h,w) -> (B,C,*size), about twice the size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, ...]) -> Tensor:
        return self.conv(F.interpolate(x, size, mode="nearest"))


class UNet(nn.Module):
    """Latents (B,C,h,w), a timestep and prompts (B,77,1024) -> the predicted noise (B,C,h,w)."""

    def __init__(self, shape: UNetShape = SD21_UNET) -> None:
        super().__init__()
        widths, blocks, levels = shape.widths, shape.blocks, len(shape.widths)
        self.width = inside = widths[0]
        self.time_embed = nn.Sequential(
            Linear(inside, shape.time_width), nn.SiLU(), Linear(shape.time_width, shape.time_width)
        )
        self.input_blocks = nn.ModuleList(
            [nn.ModuleList([Conv2d(shape.channels, inside, 3, padding=1)])]
        )
        skips = [inside]
        for i, width in enumerate(widths):
            for _ in range(blocks):
                block: list[nn.Module] = [UNetResidual(inside, width, shape)]
                if shape.attends[i]:
                    block.append(Transformer(width, shape.heads[i], shape.groups))
                self.input_blocks.append(nn.ModuleList(block))
                inside = width
                skips.append(width)
            if i < levels - 1:
                self.input_blocks.append(nn.ModuleList([Downsample(width)]))
                skips.append(width)
        self.middle_block = nn.ModuleList(
            [
                UNetResidual(inside, inside, shape),
                Transformer(inside, shape.heads[-1], shape.groups),
                UNetResidual(inside, inside, shape),
            ]
        )
        self.output_blocks = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            for j in range(blocks + 1):
                block = [UNetResidual(inside + skips.pop(), width, shape)]
                if shape.attends[i]:
                    block.append(Transformer(width, shape.heads[i], shape.groups))
                if i and j == blocks:
                    block.append(Upsample(width))
                self.output_blocks.append(nn.ModuleList(block))
                inside = width
        self.out = nn.Sequential(
            GroupNorm(shape.groups, inside, UNET_EPS),
            nn.SiLU(),
            Conv2d(inside, shape.channels, 3, padding=1),
        )

    def forward(self, latents: Tensor, timestep: int, prompts: Tensor) -> Tensor:
        embedding = timestep_embedding(timestep, self.width, latents.device).to(latents.dtype)
        time = self.time_embed(embedding.expand(len(latents), -1))
        x, skips = latents, []
        for block in self.input_blocks:
            x = self._run(block, x, time, prompts)
            skips.append(x)
        x = self._run(self.middle_block, x, time, prompts)
        for block in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            x = self._run(block, x, time, prompts, skips[-1].shape[-2:] if skips else ())
        return self.out(x)

    @staticmethod
    def _run(
        block: nn.Module, x: Tensor, time: Tensor, prompts: Tensor, size: tuple[int, ...] = ()
    ) -> Tensor:
        """size: of what is joined next, to which an Upsample enlarges."""
        for part in block.children():
            if isinstance(part, UNetResidual):
                x = part(x, time)
            elif isinstance(part, Transformer):
                x = part(x, prompts)
            elif isinstance(part, Upsample):
                x = part(x, size)
            else:
                x = part(x)
        return x


class VAEResidual(nn.Module):
    """(B,inside,H,W) -> (B,out,H,W)."""

    def __init__(self, inside: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, inside, EPS)
        self.conv1 = Conv2d(inside, out, 3, padding=1)
        self.norm2 = GroupNorm(groups, out, EPS)
        self.conv2 = Conv2d(out, out, 3, padding=1)
        self.nin_shortcut = Conv2d(inside, out, 1) if inside != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class VAEAttention(nn.Module):
    """Attention among the places of (B,C,h,w)."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels, EPS)
        self.q = Linear(channels, channels)
        self.k = Linear(channels, channels)
        self.v = Linear(channels, channels)
        self.proj_out = Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        h = self.norm(x).flatten(2).transpose(1, 2)
        h = self.proj_out(attention(self.q(h), self.k(h), self.v(h), 1))
        return x + h.transpose(1, 2).unflatten(2, (height, width))


class Middle(nn.Module):
    """(B,C,h,w) -> (B,C,h,w)."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = VAEResidual(channels, channels, groups)
        self.attn_1 = VAEAttention(channels, groups)
        self.block_2 = VAEResidual(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class VAEDownsample(nn.Module):
    """(B,C,H,W) -> (B,C,H/2,W/2), with zeros below and to the right alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class VAEUpsample(nn.Module):
    """(B,C,h,w) -> (B,C,2h,2w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one size, and what changes the size after them, by the names in LDM."""

    def __init__(self, inside: int, out: int, blocks: int, groups: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            VAEResidual(out if i else inside, out, groups) for i in range(blocks)
        )
        self.downsample: VAEDownsample | None = None
        self.upsample: VAEUpsample | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        change = self.downsample or self.upsample
        return change(x) if change else x


class Encoder(nn.Module):
    """(B,3,H,W) in [-1,1] -> (B,8,H/8,W/8)."""

    def __init__(self, widths: tuple[int, ...], groups: int) -> None:
        super().__init__()
        inside = widths[0]
        self.conv_in = Conv2d(3, inside, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(inside, width, VAE_BLOCKS, groups)
            if i < len(widths) - 1:
                level.downsample = VAEDownsample(width)
            self.down.append(level)
            inside = width
        self.mid = Middle(inside, groups)
        self.norm_out = GroupNorm(groups, inside, EPS)
        self.conv_out = Conv2d(inside, 2 * LATENT_CHANNELS, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """(B,4,h,w) -> (B,3,8h,8w) in [-1,1], or slightly beyond."""

    def __init__(self, widths: tuple[int, ...], groups: int) -> None:
        super().__init__()
        inside = widths[-1]
        self.conv_in = Conv2d(LATENT_CHANNELS, inside, 3, padding=1)
        self.mid = Middle(inside, groups)
        levels: list[Level] = []
        for i, width in reversed(list(enumerate(widths))):
            level = Level(inside, width, VAE_BLOCKS + 1, groups)
            if i:
                level.upsample = VAEUpsample(width)
            levels.append(level)
            inside = width
        # In the checkpoint the finest level is the first.
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = GroupNorm(groups, inside, EPS)
        self.conv_out = Conv2d(inside, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(list(self.up)):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Autoencoder(nn.Module):
    """encode: (B,3,H,W) in [-1,1] -> the posterior's mean (B,4,H/8,W/8); decode: back."""

    def __init__(self, widths: tuple[int, ...] = VAE_WIDTHS, groups: int = 32) -> None:
        super().__init__()
        self.encoder = Encoder(widths, groups)
        self.decoder = Decoder(widths, groups)
        self.quant_conv = Conv2d(2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, 1)
        self.post_quant_conv = Conv2d(LATENT_CHANNELS, LATENT_CHANNELS, 1)

    def encode(self, pixels: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(pixels))[:, :LATENT_CHANNELS]

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))
