"""Discriminators: networks that tell restored faces from good ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Conv2d, GroupNorm, Linear

from ..sd21.backbone import TOKENS
from ..sd21.schedule import TIMESTEPS, alphas_cumprod

POOLED = 1280


class PatchDiscriminator(nn.Module):
    """(B,3,H,W) in [0,1] -> (B,1,h,w): pix2pix's (Isola et al. 2017), which judges patches of 70 px
    where `layers` is 3.

    With group norm instead of batch norm, so that the output for a picture depends neither on the
    rest of its batch nor on how many processes share it.
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        parts: list[nn.Module] = [Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        inside = channels
        for i in range(1, layers + 1):
            out = channels * min(2**i, 8)
            parts += [
                Conv2d(inside, out, 4, 2 if i < layers else 1, 1, bias=False),
                GroupNorm(8, out),
                nn.LeakyReLU(0.2),
            ]
            inside = out
        self.layers = nn.Sequential(*parts, Conv2d(inside, 1, 4, 1, 1))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.layers(pictures * 2 - 1)


class UNetDiscriminator(nn.Module):
    """OSDFace's: the down blocks and the middle of a diffusion UNet, on noised latents, conditioned
    on the face's codes.

    For an SDXL UNet (`addition_embed_type` text_time) two linear layers widen the codes to its two
    text encoders' 768 + 1280 and a third, 77*features -> 1280, makes its pooled embedding (an
    author's answer in issue 12 of jkwang28/OSDFace); for any other, one linear layer makes its
    context. The head after the middle is our choice: mean over positions, then two layers.
    """

    def __init__(self, unet: Any, features: int) -> None:
        """unet: a UNet2DConditionModel of diffusers; its up blocks are removed.

        features: width of the codes.
        """
        super().__init__()
        self.sdxl = unet.config.addition_embed_type == "text_time"
        width = unet.config.block_out_channels[-1]
        unet.up_blocks = nn.ModuleList()
        unet.conv_norm_out = unet.conv_out = None
        self.unet = unet
        context = unet.config.cross_attention_dim
        self.context = nn.ModuleList(
            Linear(features, part) for part in ((768, context - 768) if self.sdxl else (context,))
        )
        if self.sdxl:
            self.pooled = Linear(TOKENS * features, POOLED)
        self.head = nn.Sequential(
            Linear(width, width // 2), nn.LeakyReLU(0.2), Linear(width // 2, 1)
        )
        self.register_buffer("alphas", alphas_cumprod(), persistent=False)
        self.alphas: Tensor

    def forward(self, latents: Tensor, codes: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Latents and noise (B,4,h,w), codes (B,77,features), timesteps (B,) -> (B,1)."""
        alpha = self.alphas[timesteps].to(latents)[:, None, None, None]
        x = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        context = torch.cat([layer(codes) for layer in self.context], dim=-1)
        unet = self.unet
        time = unet.time_embedding(unet.get_time_embed(sample=x, timestep=timesteps))
        if self.sdxl:
            side = 8 * latents.shape[-1]
            sizes = torch.tensor([side, side, 0, 0, side, side], device=x.device).expand(len(x), -1)
            added = {"text_embeds": self.pooled(codes.flatten(1)), "time_ids": sizes}
            time = time + unet.get_aug_embed(
                emb=time, encoder_hidden_states=context, added_cond_kwargs=added
            )
        x = unet.conv_in(x)
        for block in unet.down_blocks:
            if getattr(block, "has_cross_attention", False):
                x, _ = block(hidden_states=x, temb=time, encoder_hidden_states=context)
            else:
                x, _ = block(hidden_states=x, temb=time)
        x = unet.mid_block(x, time, encoder_hidden_states=context)
        return self.head(x.mean((2, 3)))


def noise_for(generators: list[torch.Generator], like: Tensor) -> tuple[Tensor, Tensor]:
    """Timesteps (B,) and noise (B,4,h,w), each latent's from its own generator."""
    steps = torch.cat([torch.randint(0, TIMESTEPS, (1,), generator=g) for g in generators])
    noise = torch.stack([torch.randn(like.shape[1:], generator=g) for g in generators])
    return steps.to(like.device), noise.to(like)
