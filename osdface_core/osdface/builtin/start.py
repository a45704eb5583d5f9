"""Initial weights of the built-in UNet, with which the step gives back about the same latents.

    python -m osdface_core.osdface.builtin.start --out unet_start.safetensors

A small network that starts so has the degraded picture from its first training step on, and spends
its training on making it better. The group norm before the last layer takes away the mean and the
size of what passes. So each latent channel z passes it twice, in groups of two channels: beside a
strong texture t, as (z, t), and as (0, z + t), which lose the same. The difference of the groups'
first channels is z, at a scale set by t, whose own scale was set by the norm before it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ...sd21.backbone import LATENT_CHANNELS
from ...sd21.schedule import alphas_cumprod
from ..restore import TIMESTEP
from . import UNET_CONFIG

# Standard deviation of t, and the factor of conv2's weights that gives it.
TEXTURE, ENLARGED = 8.0, 33.0
# Weight and bias of the last group norm: about this level SiLU is close to the identity.
GAIN, LEVEL = 4.0, 6.0


@torch.no_grad()
def start(seed: int = 0) -> dict[str, torch.Tensor]:
    """The UNet's tensors by name, fp32."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    unet: Any = UNet2DConditionModel(**UNET_CONFIG)
    width = UNET_CONFIG["block_out_channels"][0]
    if width != 64:
        raise ValueError("groups of two channels are wanted: a width of 64")
    first, last = unet.conv_in, unet.up_blocks[-1].resnets[-1]
    norm, out = unet.conv_norm_out, unet.conv_out
    kept = list(range(4 * LATENT_CHANNELS))
    first.weight[kept] = 0
    first.bias[kept] = 0
    last.conv_shortcut.weight[kept] = 0
    last.conv_shortcut.bias[kept] = 0
    last.conv2.bias[kept] = 0
    out.weight *= 0.1
    out.weight[:, kept] = 0
    alpha = alphas_cumprod()[TIMESTEP]
    # x0 = (z - sqrt(1 - alpha) eps) / sqrt(alpha) is z where eps is this share of z.
    share = float((1 - alpha.sqrt()) / (1 - alpha).sqrt())
    weight = share * TEXTURE / 2**0.5 / GAIN
    for i in range(LATENT_CHANNELS):
        latent, texture, nothing, both = range(4 * i, 4 * i + 4)
        last.conv2.weight[texture] *= ENLARGED
        last.conv2.weight[both] = last.conv2.weight[texture]
        last.conv2.weight[[latent, nothing]] = 0
        for channel in (latent, both):
            first.weight[channel, i, 1, 1] = 1
            last.conv_shortcut.weight[channel, width + channel] = 1
        for channel, sign in ((latent, 1), (nothing, -1)):
            norm.weight[channel] = GAIN
            norm.bias[channel] = LEVEL
            out.weight[i, channel, 1, 1] = sign * weight
    return {name: tensor.contiguous() for name, tensor in unet.state_dict().items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    save_file(start(given.seed), given.out)


if __name__ == "__main__":
    main()
