"""LoRA adapters on a clone of the MODEL."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_management as mm
import torch
from torch import Tensor

from ...osdface_core.cpu import has_bf16
from ...osdface_core.errors import OSDFaceError
from ...osdface_core.osdface.lora import parse_lora
from ...osdface_core.sd21.adapters import Lora, kohya_tensors
from ...osdface_core.weights.reading import read_tensors
from .base_model import CHECKPOINT
from .files import cached, fingerprint, naming_input

log = logging.getLogger(__name__)


def with_lora(model: Any, path: Path, strength: float) -> Any:
    """A clone of MODEL with OSDFace's LoRA on all of its 278 layers.

    MODEL's own patches stay. Raises OSDFaceError if a tensor of the file, or a weight of the model,
    is left over.
    """

    def make() -> Any:
        with naming_input("lora_name"):
            lora = cached("lora", (path,), lambda: parse_lora(read_tensors(path), path.name))
        return merge_lora(model, lora, path.name, strength)

    return kept_clone(model, "osdface_clone", (fingerprint(path), strength), make)


def kept_clone(patcher: Any, slot: str, state: object, make: Callable[[], Any]) -> Any:
    """The clone of a ModelPatcher that `make` gives, kept with it until `state` or its own patches
    change.

    So the clone lives as long as the patcher: ComfyUI then keeps the merged weights from run to
    run, and finds the patches when it has to merge a part of them again. slot: the attribute that
    it is kept in, a method's own.
    """
    state = state, patcher.patches_uuid
    known = getattr(patcher, slot, None)
    if known is None or known[0] != state:
        clone = make()
        # When a clone is deleted, ComfyUI hands its loaded weights to its parent. The oldest clone
        # outlives all that share them.
        while clone.parent is not None and clone.parent.parent is not None:
            clone.parent = clone.parent.parent
        known = state, clone
        setattr(patcher, slot, known)
    return known[1]


def merge_lora(
    model: Any,
    lora: Lora,
    source: str,
    strength: float,
    replaced: Mapping[str, Tensor] | None = None,
) -> Any:
    """A clone of MODEL with a LoRA's patches on its UNet. Further calls add further LoRAs.

    Raises OSDFaceError that names a weight that the model lacks.

    model: the host's MODEL.
    lora: adapters by the UNet's layers.
    source: the LoRA's name, for the log and for errors.
    strength: factor of all of them.
    replaced: tensors that take the place of the model's own, before the LoRA, by name.
    """
    targets = {name: f"diffusion_model.{adapter.ldm}.weight" for name, adapter in lora.items()}
    if present := set(targets.values()) & set(model.patches):
        log.warning(
            "`model` already holds another LoRA on %d of the %d layers of %s: if that is "
            "OSDFace's own, choose `none` as lora_name.",
            len(present),
            len(targets),
            source,
        )
    clone = model.clone()
    if _casts_bf16(model):
        # As newer hosts' own set_model_compute_dtype does.
        clone.add_object_patch("manual_cast_dtype", torch.bfloat16)
    own = {name: ("set", (tensor,)) for name, tensor in (replaced or {}).items()}
    if left_over := set(own) - set(clone.add_patches(own)):
        raise OSDFaceError(f"`model` has no weight {min(left_over)} for {source}: {CHECKPOINT}")
    add_lora(clone, lora, targets, strength, f"`model` has no weight for {{}} of {source}")
    return clone


def add_lora(
    patcher: Any,
    lora: Lora,
    targets: Mapping[str, str],
    strength: float,
    refusal: str,
) -> None:
    """Adds a LoRA's patches to a ModelPatcher.

    Raises OSDFaceError if it lacks a weight for one of them.

    patcher: a clone.
    lora: adapters by layers.
    targets: the names of the patcher's weights by those layers.
    strength: factor of all of them.
    refusal: the error's sentence, with {} for which layers found no weight.
    """
    patches = comfy.lora.load_lora(kohya_tensors(lora, str), dict(targets))
    left_over = sorted(set(targets.values()) - set(patcher.add_patches(patches, strength)))
    if left_over:
        which = f"{len(left_over)} of the {len(targets)} layers (such as {left_over[0]})"
        raise OSDFaceError(f"{refusal.format(which)}: {CHECKPOINT}")


def _casts_bf16(model: Any) -> bool:
    """Whether the user asked for bf16 (--bf16-unet) on a CPU that computes in it.

    ComfyUI would cast every weight to fp32 there.
    """
    base = model.model
    is_bf16 = base.get_dtype() == torch.bfloat16 and base.manual_cast_dtype is not None
    return is_bf16 and mm.is_device_cpu(model.load_device) and has_bf16()
