"""Reads OSDFace's LoRA in every spelling, as data: module -> (down, up, scale).

The released `pytorch_lora_weights.safetensors` mixes two spellings (attention in one, the rest in
another), and ComfyUI's own loader drops the 128 attention modules of such a file with a log line.
Here every tensor lands on a weight or the file is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from ..errors import OSDFaceError

# Stable Diffusion 2.1's UNet
WIDTHS = (320, 640, 1280, 1280)
CONTEXT = 1024
TIME = 1280
BLOCKS = 2  # residual blocks a level on the way down, one more on the way up

_PREFIXES = (
    "base_model.model.unet.",
    "base_model.model.",
    "diffusion_model.",
    "unet.",
    "lora_unet_",
)
_PART = re.compile(
    r"^(?P<module>.+?)[._](?:"
    r"(?P<down>lora_A(?:\.\w+)?\.weight|lora\.down\.weight|lora_down\.weight)|"
    r"(?P<up>lora_B(?:\.\w+)?\.weight|lora\.up\.weight|lora_up\.weight)|"
    r"(?P<alpha>alpha))$"
)


@dataclass(frozen=True)
class LoraModule:
    """One adapted layer. down (r,in[,kH,kW]), up (out,r[,1,1]); the weight gains scale * up.down.

    diffusers and ldm: the base weight's name in the two layouts of the UNet, without the UNet's own
    prefix.
    """

    diffusers: str
    ldm: str
    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True)
class _Place:
    ldm: str
    shape: tuple[int, ...]


def _resnet(name: str, ldm: str, inside: int, out: int) -> Iterator[tuple[str, _Place]]:
    yield f"{name}.conv1", _Place(f"{ldm}.in_layers.2", (out, inside, 3, 3))
    yield f"{name}.conv2", _Place(f"{ldm}.out_layers.3", (out, out, 3, 3))
    yield f"{name}.time_emb_proj", _Place(f"{ldm}.emb_layers.1", (out, TIME))
    if inside != out:
        yield f"{name}.conv_shortcut", _Place(f"{ldm}.skip_connection", (out, inside, 1, 1))


def _transformer(name: str, ldm: str, width: int) -> Iterator[tuple[str, _Place]]:
    for layer in ("proj_in", "proj_out"):
        yield f"{name}.{layer}", _Place(f"{ldm}.{layer}", (width, width))
    inner = "transformer_blocks.0"
    for attention, context in (("attn1", width), ("attn2", CONTEXT)):
        for layer, inside in (
            ("to_q", width),
            ("to_k", context),
            ("to_v", context),
            ("to_out.0", width),
        ):
            yield (
                f"{name}.{inner}.{attention}.{layer}",
                _Place(f"{ldm}.{inner}.{attention}.{layer}", (width, inside)),
            )
    yield (
        f"{name}.{inner}.ff.net.0.proj",
        _Place(f"{ldm}.{inner}.ff.net.0.proj", (8 * width, width)),
    )
    yield f"{name}.{inner}.ff.net.2", _Place(f"{ldm}.{inner}.ff.net.2", (width, 4 * width))


@cache
def modules() -> dict[str, _Place]:
    """The 278 modules that OSDFace adapts: diffusers name -> LDM name and shape of the weight."""
    found: dict[str, _Place] = {}
    levels = len(WIDTHS)
    skips = [WIDTHS[0]]
    inside = WIDTHS[0]
    for i, width in enumerate(WIDTHS):
        for j in range(BLOCKS):
            slot = 1 + i * (BLOCKS + 1) + j
            found |= _resnet(
                f"down_blocks.{i}.resnets.{j}", f"input_blocks.{slot}.0", inside, width
            )
            if i < levels - 1:
                found |= _transformer(
                    f"down_blocks.{i}.attentions.{j}", f"input_blocks.{slot}.1", width
                )
            inside = width
            skips.append(width)
        if i < levels - 1:
            found[f"down_blocks.{i}.downsamplers.0.conv"] = _Place(
                f"input_blocks.{(i + 1) * (BLOCKS + 1)}.0.op", (width, width, 3, 3)
            )
            skips.append(width)
    found |= _resnet("mid_block.resnets.0", "middle_block.0", inside, inside)
    found |= _transformer("mid_block.attentions.0", "middle_block.1", inside)
    found |= _resnet("mid_block.resnets.1", "middle_block.2", inside, inside)
    for i, width in enumerate(reversed(WIDTHS)):
        for j in range(BLOCKS + 1):
            slot = i * (BLOCKS + 1) + j
            found |= _resnet(
                f"up_blocks.{i}.resnets.{j}", f"output_blocks.{slot}.0", inside + skips.pop(), width
            )
            if i > 0:
                found |= _transformer(
                    f"up_blocks.{i}.attentions.{j}", f"output_blocks.{slot}.1", width
                )
            inside = width
        if i < levels - 1:
            slot = i * (BLOCKS + 1) + BLOCKS
            found[f"up_blocks.{i}.upsamplers.0.conv"] = _Place(
                f"output_blocks.{slot}.{2 if i else 1}.conv", (width, width, 3, 3)
            )
    return found


@cache
def _spellings() -> dict[str, str]:
    """Every way a module's name is written -> its diffusers name: dotted or with kohya's
    underscores, diffusers or LDM.
    """
    names = {}
    for name, place in modules().items():
        for spelling in (name, place.ldm):
            names[spelling] = name
            names[spelling.replace(".", "_")] = name
    return names


def _split(key: str) -> tuple[str, str] | None:
    """(diffusers module, "down" | "up" | "alpha") of a tensor's name; None if it is not one of
    OSDFace's.
    """
    match = _PART.match(key)
    if match is None:
        return None
    module = match["module"]
    for prefix in _PREFIXES:
        if module.startswith(prefix):
            module = module.removeprefix(prefix)
            break
    name = _spellings().get(module)
    return (name, match.lastgroup or "") if name else None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def parse_lora(tensors: dict[str, Tensor], source: str = "the file") -> dict[str, LoraModule]:
    """OSDFace's 278 modules by their diffusers names, from the tensors of a LoRA file in any
    spelling.

    Accepted: `lora_A/lora_B` (peft), `lora.down/lora.up` (diffusers), `lora_down/lora_up` (kohya,
    with `lora_unet_` and underscores), mixed as they come, each with or without an `alpha` (scale
    alpha/rank, else 1). Raises OSDFaceError that names what is left over, missing, misshapen or not
    finite.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    left_over = []
    for key, tensor in tensors.items():
        found = _split(key)
        if found is None or found[1] in parts.get(found[0], {}):
            left_over.append(key)
        else:
            parts.setdefault(found[0], {})[found[1]] = tensor
    remedy = "load pytorch_lora_weights.safetensors of OSDFace."
    if not parts:
        raise OSDFaceError(
            f"{source} is not OSDFace's LoRA: none of its {len(tensors)} tensors belongs to it; "
            f"{remedy}"
        )
    if left_over:
        raise OSDFaceError(
            f"{source} is not OSDFace's LoRA: it has tensors that belong to no adapted layer "
            f"({_some(left_over)}); {remedy}"
        )
    missing = [
        f"{name} ({part})"
        for name in modules()
        for part in ("down", "up")
        if part not in parts.get(name, {})
    ]
    if missing:
        raise OSDFaceError(
            f"{source} is incomplete: OSDFace's LoRA also has {_some(missing)}; {remedy}"
        )
    return {name: _module(name, place, parts[name], source) for name, place in modules().items()}


def _module(name: str, place: _Place, part: dict[str, Tensor], source: str) -> LoraModule:
    down, up = part["down"], part["up"]
    rank, (out, *inside) = down.shape[0] if down.ndim else 0, place.shape
    fits = rank > 0 and _is_shape(down, (rank, *inside)) and _is_shape(up, (out, rank))
    if not fits:
        raise OSDFaceError(
            f"{source} has a wrong shape at {name}: down {tuple(down.shape)} and up "
            f"{tuple(up.shape)} do not make the "
            f"{place.shape} of Stable Diffusion 2.1; load pytorch_lora_weights.safetensors of "
            f"OSDFace."
        )
    alpha = part.get("alpha")
    scale = 1.0 if alpha is None else float(alpha) / rank
    if not (down.isfinite().all() and up.isfinite().all() and math.isfinite(scale)):
        raise OSDFaceError(
            f"{source} has values that are not finite at {name}: fetch the file again."
        )
    return LoraModule(f"{name}.weight", f"{place.ldm}.weight", down, up, scale)


def _is_shape(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Equal but for trailing ones: a linear layer may be written as a 1x1 convolution and the other
    way round.
    """
    mine, wanted = list(tensor.shape), list(shape)
    for dims in (mine, wanted):
        while len(dims) > 2 and dims[-1] == 1:
            dims.pop()
    return mine == wanted
