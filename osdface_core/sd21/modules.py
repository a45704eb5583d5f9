"""Names and shapes of the layers of Stable Diffusion 2.1's networks, in both layouts.

A LoRA names layers as diffusers does or as the original (LDM) code does; a host keeps one of the
two. tests/golden/sd21_names.json is the truth that these tables are held against.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from .backbone import LATENT_CHANNELS, TEXT_WIDTH

WIDTHS = (320, 640, 1280, 1280)
VAE_WIDTHS = (128, 256, 512, 512)
VAE_BLOCKS = 2


@dataclass(frozen=True)
class UNetShape:
    """A UNet built as Stable Diffusion 2.1's is.

    widths: channels of each level, the finest first.
    heads: of the attention in each level, and in the middle as in the last.
    attends: whether a level has attention; the middle has.
    blocks: residual blocks a level on the way down, one more on the way up.
    groups: of each group norm.
    channels: of the latents.
    """

    widths: tuple[int, ...] = WIDTHS
    heads: tuple[int, ...] = (5, 10, 20, 20)
    attends: tuple[bool, ...] = (True, True, True, False)
    blocks: int = 2
    groups: int = 32
    channels: int = LATENT_CHANNELS

    @property
    def time_width(self) -> int:
        return 4 * self.widths[0]


SD21_UNET = UNetShape()


@dataclass(frozen=True)
class Layer:
    """A layer with weights.

    ldm: its name in the LDM layout.
    shape: of its weight in diffusers.
    """

    ldm: str
    shape: tuple[int, ...]


@cache
def unet_layers(shape: UNetShape = SD21_UNET) -> dict[str, Layer]:
    """The UNet's linear and convolutional layers by their diffusers names."""
    widths, blocks, time = shape.widths, shape.blocks, shape.time_width
    found = {
        "conv_in": Layer("input_blocks.0.0", (widths[0], shape.channels, 3, 3)),
        "time_embedding.linear_1": Layer("time_embed.0", (time, widths[0])),
        "time_embedding.linear_2": Layer("time_embed.2", (time, time)),
    }
    levels = len(widths)
    skips = [widths[0]]
    inside = widths[0]
    for i, width in enumerate(widths):
        for j in range(blocks):
            slot = 1 + i * (blocks + 1) + j
            name = f"down_blocks.{i}.resnets.{j}"
            found |= _unet_resnet(name, f"input_blocks.{slot}.0", inside, width, time)
            if shape.attends[i]:
                name = f"down_blocks.{i}.attentions.{j}"
                found |= _transformer(name, f"input_blocks.{slot}.1", width)
            inside = width
            skips.append(width)
        if i < levels - 1:
            ldm = f"input_blocks.{(i + 1) * (blocks + 1)}.0.op"
            found[f"down_blocks.{i}.downsamplers.0.conv"] = Layer(ldm, (width, width, 3, 3))
            skips.append(width)
    found |= _unet_resnet("mid_block.resnets.0", "middle_block.0", inside, inside, time)
    found |= _transformer("mid_block.attentions.0", "middle_block.1", inside)
    found |= _unet_resnet("mid_block.resnets.1", "middle_block.2", inside, inside, time)
    for i, width in enumerate(reversed(widths)):
        attends = shape.attends[levels - 1 - i]
        for j in range(blocks + 1):
            slot = i * (blocks + 1) + j
            name = f"up_blocks.{i}.resnets.{j}"
            found |= _unet_resnet(
                name, f"output_blocks.{slot}.0", inside + skips.pop(), width, time
            )
            if attends:
                name = f"up_blocks.{i}.attentions.{j}"
                found |= _transformer(name, f"output_blocks.{slot}.1", width)
            inside = width
        if i < levels - 1:
            slot = i * (blocks + 1) + blocks
            ldm = f"output_blocks.{slot}.{2 if attends else 1}.conv"
            found[f"up_blocks.{i}.upsamplers.0.conv"] = Layer(ldm, (width, width, 3, 3))
    found["conv_out"] = Layer("out.2", (shape.channels, widths[0], 3, 3))
    return found


@cache
def vae_encoder_layers(widths: tuple[int, ...] = VAE_WIDTHS) -> dict[str, Layer]:
    """The layers of the VAE from the picture to its latents, by their diffusers names."""
    found = {"encoder.conv_in": Layer("encoder.conv_in", (widths[0], 3, 3, 3))}
    inside = width = widths[0]
    for i, width in enumerate(widths):
        for j in range(VAE_BLOCKS):
            name = f"encoder.down_blocks.{i}.resnets.{j}"
            found |= _vae_resnet(name, f"encoder.down.{i}.block.{j}", inside, width)
            inside = width
        if i < len(widths) - 1:
            ldm = f"encoder.down.{i}.downsample.conv"
            found[f"encoder.down_blocks.{i}.downsamplers.0.conv"] = Layer(ldm, (width, width, 3, 3))
    found |= _vae_middle("encoder", width)
    # Mean and logarithm of the variance.
    out = 2 * LATENT_CHANNELS
    found["encoder.conv_out"] = Layer("encoder.conv_out", (out, width, 3, 3))
    found["quant_conv"] = Layer("quant_conv", (out, out, 1, 1))
    return found


@cache
def vae_decoder_layers(widths: tuple[int, ...] = VAE_WIDTHS) -> dict[str, Layer]:
    """The layers of the VAE from the latents to the picture, by their diffusers names."""
    inside, levels = widths[-1], len(widths)
    found = {
        "post_quant_conv": Layer("post_quant_conv", (LATENT_CHANNELS, LATENT_CHANNELS, 1, 1)),
        "decoder.conv_in": Layer("decoder.conv_in", (inside, LATENT_CHANNELS, 3, 3)),
    }
    found |= _vae_middle("decoder", inside)
    for i, width in enumerate(reversed(widths)):
        ldm = f"decoder.up.{levels - 1 - i}"
        for j in range(VAE_BLOCKS + 1):
            name = f"decoder.up_blocks.{i}.resnets.{j}"
            found |= _vae_resnet(name, f"{ldm}.block.{j}", inside, width)
            inside = width
        if i < levels - 1:
            found[f"decoder.up_blocks.{i}.upsamplers.0.conv"] = Layer(
                f"{ldm}.upsample.conv", (width, width, 3, 3)
            )
    found["decoder.conv_out"] = Layer("decoder.conv_out", (3, inside, 3, 3))
    return found


def ldm_names(layers: Mapping[str, Layer]) -> dict[str, str]:
    """The LDM names of these layers, and of the norms beside them, by their diffusers names."""
    names = {}
    for name, layer in layers.items():
        names[name] = layer.ldm
        place, _, last = name.rpartition(".")
        ldm, _, end = layer.ldm.rpartition(".")
        for norm, ldm_norm in _NORMS.get((last, end), ()):
            names[f"{place}.{norm}".lstrip(".")] = f"{ldm}.{ldm_norm}"
        if last in _FORMER and not ldm.endswith(("attn1", "attn2")):
            names[f"{place}.{_FORMER[last]}"] = layer.ldm
        if name.endswith(".to_out.0") and end == "proj_out":
            names[f"{place.removesuffix('.to_out')}.proj_attn"] = layer.ldm
    return names


# Of a layer, by the ends of its two names: the names of the norms beside it.
_NORMS = {
    ("conv1", "2"): [("norm1", "0")],
    ("conv2", "3"): [("norm2", "0")],
    ("conv1", "conv1"): [("norm1", "norm1")],
    ("conv2", "conv2"): [("norm2", "norm2")],
    ("proj_in", "proj_in"): [
        (name, name) for name in ("norm", *(f"transformer_blocks.0.norm{i}" for i in (1, 2, 3)))
    ],
    ("to_q", "q"): [("group_norm", "norm")],
    ("conv_out", "2"): [("conv_norm_out", "0")],
    ("conv_out", "conv_out"): [("conv_norm_out", "norm_out")],
}
# What diffusers called the VAE's attention when Stable Diffusion 2.1 was released.
_FORMER = {"to_q": "query", "to_k": "key", "to_v": "value"}


def _vae_middle(part: str, width: int) -> Iterator[tuple[str, Layer]]:
    name, ldm = f"{part}.mid_block", f"{part}.mid"
    yield from _vae_resnet(f"{name}.resnets.0", f"{ldm}.block_1", width, width)
    for layer, end in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        yield f"{name}.attentions.0.{layer}", Layer(f"{ldm}.attn_1.{end}", (width, width))
    yield from _vae_resnet(f"{name}.resnets.1", f"{ldm}.block_2", width, width)


def _unet_resnet(
    name: str, ldm: str, inside: int, out: int, time: int
) -> Iterator[tuple[str, Layer]]:
    yield f"{name}.conv1", Layer(f"{ldm}.in_layers.2", (out, inside, 3, 3))
    yield f"{name}.conv2", Layer(f"{ldm}.out_layers.3", (out, out, 3, 3))
    yield f"{name}.time_emb_proj", Layer(f"{ldm}.emb_layers.1", (out, time))
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
