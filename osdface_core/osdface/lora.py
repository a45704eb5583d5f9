"""OSDFace's LoRA, on 278 layers of the UNet."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from torch import Tensor

from ..sd21.adapters import Lora
from ..sd21.adapters import parse_lora as parse
from ..sd21.modules import Layer, unet_layers

# The layers of a diffusers UNet that OSDFace adapts, by the ends of their names: all linear and
# convolutional ones but the first, the last and the time embedding.
ADAPTED = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
    "proj_in",
    "proj_out",
    "conv1",
    "conv2",
    "conv_shortcut",
    "time_emb_proj",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
)


def is_adapted(name: str) -> bool:
    """Whether OSDFace adapts the layer of this diffusers name."""
    return name.endswith(tuple(f".{end}" for end in ADAPTED))


@cache
def adapted_layers() -> dict[str, Layer]:
    """The 278 layers of Stable Diffusion 2.1's UNet that OSDFace adapts."""
    return {name: layer for name, layer in unet_layers().items() if is_adapted(name)}


def parse_lora(tensors: Mapping[str, Tensor], source: str = "the file") -> Lora:
    """OSDFace's LoRA from the tensors of a file in any spelling.

    Raises OSDFaceError unless it is complete and nothing is left over. source: the file's name.
    """
    remedy = "load pytorch_lora_weights.safetensors of OSDFace."
    return parse(tensors, adapted_layers(), source, "OSDFace's LoRA", remedy)
