"""Names and shapes of the layers of Stable Diffusion 2.1's networks, in both layouts.

A LoRA names layers as diffusers does or as the original (LDM) code does; a host keeps one of the
two. tests/golden/sd21_names.json is the truth that these tables are held against.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from .backbone import LATENT_CHANNELS, TEXT_WIDTH

WIDTHS = (320, 640, 1280, 1280)
TIME_WIDTH = 1280
BLOCKS = 2  # residual blocks a level on the way down, one more on the way up
VAE_WIDTHS = (128, 256, 512, 512)


@dataclass(frozen=True)
class Layer:
    """A layer with weights.

    ldm: its name in the LDM layout.
    shape: of its weight in diffusers.
    """

    ldm: str
    shape: tuple[int, ...]


@cache
def unet_layers() -> dict[str, Layer]:
    """The UNet's linear and convolutional layers by their diffusers names."""
    found = {
        "conv_in": Layer("input_blocks.0.0", (WIDTHS[0], LATENT_CHANNELS, 3, 3)),
        "time_embedding.linear_1": Layer("time_embed.0", (TIME_WIDTH, WIDTHS[0])),
        "time_embedding.linear_2": Layer("time_embed.2", (TIME_WIDTH, TIME_WIDTH)),
    }
    levels = len(WIDTHS)
    skips = [WIDTHS[0]]
    inside = WIDTHS[0]
    for i, width in enumerate(WIDTHS):
        for j in range(BLOCKS):
            slot = 1 + i * (BLOCKS + 1) + j
            name = f"down_blocks.{i}.resnets.{j}"
            found |= _unet_resnet(name, f"input_blocks.{slot}.0", inside, width)
            if i < levels - 1:
                name = f"down_blocks.{i}.attentions.{j}"
                found |= _transformer(name, f"input_blocks.{slot}.1", width)
            inside = width
            skips.append(width)
        if i < levels - 1:
            ldm = f"input_blocks.{(i + 1) * (BLOCKS + 1)}.0.op"
            found[f"down_blocks.{i}.downsamplers.0.conv"] = Layer(ldm, (width, width, 3, 3))
            skips.append(width)
    found |= _unet_resnet("mid_block.resnets.0", "middle_block.0", inside, inside)
    found |= _transformer("mid_block.attentions.0", "middle_block.1", inside)
    found |= _unet_resnet("mid_block.resnets.1", "middle_block.2", inside, inside)
    for i, width in enumerate(reversed(WIDTHS)):
        for j in range(BLOCKS + 1):
            slot = i * (BLOCKS + 1) + j
            name = f"up_blocks.{i}.resnets.{j}"
            found |= _unet_resnet(name, f"output_blocks.{slot}.0", inside + skips.pop(), width)
            if i > 0:
                name = f"up_blocks.{i}.attentions.{j}"
                found |= _transformer(name, f"output_blocks.{slot}.1", width)
            inside = width
        if i < levels - 1:
            slot = i * (BLOCKS + 1) + BLOCKS
            ldm = f"output_blocks.{slot}.{2 if i else 1}.conv"
            found[f"up_blocks.{i}.upsamplers.0.conv"] = Layer(ldm, (width, width, 3, 3))
    found["conv_out"] = Layer("out.2", (LATENT_CHANNELS, WIDTHS[0], 3, 3))
    return found


@cache
def vae_encoder_layers() -> dict[str, Layer]:
    """The layers of the VAE from the picture to its latents, by their diffusers names."""
    found = {"encoder.conv_in": Layer("encoder.conv_in", (VAE_WIDTHS[0], 3, 3, 3))}
    inside = width = VAE_WIDTHS[0]
    for i, width in enumerate(VAE_WIDTHS):
        for j in range(BLOCKS):
            name = f"encoder.down_blocks.{i}.resnets.{j}"
            found |= _vae_resnet(name, f"encoder.down.{i}.block.{j}", inside, width)
            inside = width
        if i < len(VAE_WIDTHS) - 1:
            ldm = f"encoder.down.{i}.downsample.conv"
            found[f"encoder.down_blocks.{i}.downsamplers.0.conv"] = Layer(ldm, (width, width, 3, 3))
    found |= _vae_resnet("encoder.mid_block.resnets.0", "encoder.mid.block_1", width, width)
    for layer, ldm in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        name = f"encoder.mid_block.attentions.0.{layer}"
        found[name] = Layer(f"encoder.mid.attn_1.{ldm}", (width, width))
    found |= _vae_resnet("encoder.mid_block.resnets.1", "encoder.mid.block_2", width, width)
    # Mean and logarithm of the variance.
    out = 2 * LATENT_CHANNELS
    found["encoder.conv_out"] = Layer("encoder.conv_out", (out, width, 3, 3))
    found["quant_conv"] = Layer("quant_conv", (out, out, 1, 1))
    return found


def _unet_resnet(name: str, ldm: str, inside: int, out: int) -> Iterator[tuple[str, Layer]]:
    yield f"{name}.conv1", Layer(f"{ldm}.in_layers.2", (out, inside, 3, 3))
    yield f"{name}.conv2", Layer(f"{ldm}.out_layers.3", (out, out, 3, 3))
    yield f"{name}.time_emb_proj", Layer(f"{ldm}.emb_layers.1", (out, TIME_WIDTH))
    if inside != out:
        yield f"{name}.conv_shortcut", Layer(f"{ldm}.skip_connection", (out, inside, 1, 1))


def _vae_resnet(name: str, ldm: str, inside: int, out: int) -> Iterator[tuple[str, Layer]]:
    yield f"{name}.conv1", Layer(f"{ldm}.conv1", (out, inside, 3, 3))
    yield f"{name}.conv2", Layer(f"{ldm}.conv2", (out, out, 3, 3))
    if inside != out:
        yield f"{name}.conv_shortcut", Layer(f"{ldm}.nin_shortcut", (out, inside, 1, 1))


def _transformer(name: str, ldm: str, width: int) -> Iterator[tuple[str, Layer]]:
    for layer in ("proj_in", "proj_out"):
        yield f"{name}.{layer}", Layer(f"{ldm}.{layer}", (width, width))
    inner = "transformer_blocks.0"
    for attention, context in (("attn1", width), ("attn2", TEXT_WIDTH)):
        sizes = (("to_q", width), ("to_k", context), ("to_v", context), ("to_out.0", width))
        for layer, inside in sizes:
            path = f"{inner}.{attention}.{layer}"
            yield f"{name}.{path}", Layer(f"{ldm}.{path}", (width, inside))
    yield (
        f"{name}.{inner}.ff.net.0.proj",
        Layer(f"{ldm}.{inner}.ff.net.0.proj", (8 * width, width)),
    )
    yield f"{name}.{inner}.ff.net.2", Layer(f"{ldm}.{inner}.ff.net.2", (width, 4 * width))
