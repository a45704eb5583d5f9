"""Reads LoRA adapters in every spelling, as data: layer -> (down, up, scale).

Files mix spellings (attention in one, the rest in another), and common loaders drop what they do
not know with a line in the log. Here every tensor lands on a layer or the file is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OSDFaceError
from .modules import Layer

_PREFIXES = (
    "base_model.model.unet.",
    "base_model.model.",
    "diffusion_model.",
    "unet.",
    "lora_unet_",
)
# A tensor's name: its layer, and the part of the adapter. peft puts the adapter's own name between
# `lora_A` and `weight`.
_PART = re.compile(
    r"^(?P<layer>.+?)[._](?:"
    r"(?P<down>lora_A(?:\.\w+)?\.weight|lora\.down\.weight|lora_down\.weight)|"
    r"(?P<up>lora_B(?:\.\w+)?\.weight|lora\.up\.weight|lora_up\.weight)|"
    r"(?P<alpha>alpha))$"
)


@dataclass(frozen=True)
class Adapter:
    """The adapter of one layer: it adds scale * up @ down to the weight.

    ldm: the layer's name in the LDM layout.
    down: (r,in[,kH,kW]).
    up: (out,r[,1,1]).
    scale: alpha / r.
    """

    ldm: str
    down: Tensor
    up: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def alpha(self) -> float:
        return self.scale * self.rank


# Adapters by their layers' diffusers names. Each LoRA on a network is one of these.
Lora = dict[str, Adapter]


def parse_lora(
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, Layer],
    source: str,
    whose: str,
    remedy: str,
    default_scale: float = 1.0,
) -> Lora:
    """The adapters of exactly these layers, by their diffusers names.

    Accepted: `lora_A/lora_B` (peft, with an adapter's name or without), `lora.down/lora.up`
    (diffusers), `lora_down/lora_up` (kohya, with `lora_unet_` and underscores), in any mixture.
    Raises OSDFaceError that names what is left over, missing, misshapen or not finite.

    tensors: of the file, by name.
    layers: the layers that must each have an adapter; no other may.
    source: the file's name.
    whose: what the file should be, such as "OSDFace's LoRA".
    remedy: the end of an error's sentence.
    default_scale: of layers without an `alpha`; with one it is alpha / rank.
    """
    spellings = _spellings(layers)
    parts: dict[str, dict[str, Tensor]] = {}
    left_over = []
    for key, tensor in tensors.items():
        found = _split(key, spellings)
        if found is None or found[1] in parts.get(found[0], {}):
            left_over.append(key)
        else:
            parts.setdefault(found[0], {})[found[1]] = tensor
    if not parts:
        raise OSDFaceError(
            f"{source} is not {whose}: none of its {len(tensors)} tensors belongs to it; {remedy}"
        )
    if left_over:
        raise OSDFaceError(
            f"{source} is not {whose}: it has tensors that belong to no adapted layer "
            f"({some(left_over)}); {remedy}"
        )
    missing = [
        f"{name} ({part})"
        for name in layers
        for part in ("down", "up")
        if part not in parts.get(name, {})
    ]
    if missing:
        raise OSDFaceError(f"{source} is incomplete: {whose} also has {some(missing)}; {remedy}")
    lora = {}
    for name, layer in layers.items():
        down, up = parts[name]["down"], parts[name]["up"]
        rank = down.shape[0] if down.ndim else 0
        if not rank or not _fits(down, up, rank, layer.shape):
            raise OSDFaceError(
                f"{source} has a wrong shape at {name}: down {tuple(down.shape)} and up "
                f"{tuple(up.shape)} do not make the {layer.shape} of Stable Diffusion 2.1; {remedy}"
            )
        alpha = parts[name].get("alpha")
        scale = default_scale if alpha is None else float(alpha) / rank
        if not (down.isfinite().all() and up.isfinite().all() and math.isfinite(scale)):
            raise OSDFaceError(
                f"{source} has values that are not finite at {name}: fetch the file again."
            )
        lora[name] = Adapter(layer.ldm, down, up, scale)
    return lora


def kohya_tensors(lora: Lora, key: Callable[[str], str]) -> dict[str, Tensor]:
    """The LoRA's tensors in kohya's layout; `key` turns a diffusers name into a layer's key."""
    tensors = {}
    for name, adapter in lora.items():
        tensors[f"{key(name)}.lora_down.weight"] = adapter.down.contiguous()
        tensors[f"{key(name)}.lora_up.weight"] = adapter.up.contiguous()
        tensors[f"{key(name)}.alpha"] = torch.tensor(adapter.alpha)
    return tensors


def some(names: list[str]) -> str:
    """The first three names of a list and the number of the rest, for a sentence."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _spellings(layers: Mapping[str, Layer]) -> dict[str, str]:
    """Every spelling of a layer's name -> its diffusers name.

    diffusers' or LDM's names, with dots or with kohya's underscores.
    """
    names = {}
    for name, layer in layers.items():
        for spelling in (name, layer.ldm):
            names[spelling] = name
            names[spelling.replace(".", "_")] = name
    return names


def _split(key: str, spellings: Mapping[str, str]) -> tuple[str, str] | None:
    """(diffusers name, "down" | "up" | "alpha") of a tensor; None if it belongs to no layer."""
    match = _PART.match(key)
    if match is None:
        return None
    layer = match["layer"]
    for prefix in _PREFIXES:
        if layer.startswith(prefix):
            layer = layer.removeprefix(prefix)
            break
    name = spellings.get(layer)
    return (name, match.lastgroup or "") if name else None


def _fits(down: Tensor, up: Tensor, rank: int, shape: tuple[int, ...]) -> bool:
    out, *inside = shape
    return _is_shape(down, (rank, *inside)) and _is_shape(up, (out, rank))


def _is_shape(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether the shapes agree but for trailing ones: a linear layer may be stored as a 1x1 one."""
    mine, wanted = list(tensor.shape), list(shape)
    for dims in (mine, wanted):
        while len(dims) > 2 and dims[-1] == 1:
            dims.pop()
    return mine == wanted
