"""Refuses a MODEL or VAE that is not Stable Diffusion 2.1-base's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.model_sampling

from ...osdface_core.errors import OSDFaceError
from ...osdface_core.osdface import builtin
from ...osdface_core.osdface.restore import TIMESTEP
from ...osdface_core.sd21 import base_model
from ...osdface_core.sd21.backbone import LATENT_CHANNELS
from ...osdface_core.sd21.base_model import BaseFacts, check_autoencoder, check_base
from ...osdface_core.sd21.modules import WIDTHS
from ...osdface_core.weights.catalogue import BUILTIN

# The attribute that marks the built-in model's networks, and the option that marks its prompts.
BUILTIN_MARK = "osdface_builtin"
CHECKPOINT = (
    "load Stable Diffusion 2.1-base (v2-1_512-ema-pruned.safetensors) with Load Checkpoint."
)


def check_model(model: Any, timestep: int = TIMESTEP) -> None:
    """Raises OSDFaceError unless MODEL is Stable Diffusion 2.1-base, sampled as it was trained.

    A fine-tune of it is accepted. timestep: the method's own.
    """
    network = getattr(model, "model", None)
    config = getattr(network, "model_config", None)
    unet = getattr(config, "unet_config", None) or {}
    given = f"`model` is {type(config if config is not None else model).__name__}"
    named, width = given, unet.get("model_channels")
    other_width = width != (builtin.WIDTHS if is_builtin(network) else WIDTHS)[0]
    if other_width:
        named += f" with a UNet of width {'unknown' if width is None else width}"
    is_variant = (
        other_width
        or unet.get("adm_in_channels") is not None
        or not unet.get("use_linear_in_transformer")
        or bool(unet.get("use_temporal_attention"))
    )
    facts = BaseFacts(named, unet.get("context_dim"), unet.get("in_channels"), is_variant)
    channels = builtin.CHANNELS if is_builtin(network) else LATENT_CHANNELS
    check_base(facts, CHECKPOINT, channels)
    sampling = model.get_model_object("model_sampling")
    # The checkpoint's own sampling, or what a node in between has patched in.
    remedy = f"take away the node that patches it, or {CHECKPOINT}"
    check_base(replace(facts, prediction=_prediction(sampling)), remedy, channels)
    base_model.check_schedule(given, getattr(sampling, "sigmas", None), timestep, remedy)


def _prediction(sampling: Any) -> str:
    """What a model predicts, according to the host's class that samples it."""
    kinds = comfy.model_sampling
    # Before EPS, of which these are subclasses.
    for name in ("V_PREDICTION", "X0", "EDM"):
        if hasattr(kinds, name) and isinstance(sampling, getattr(kinds, name)):
            return {"V_PREDICTION": "v"}.get(name, name)
    return "epsilon" if isinstance(sampling, kinds.EPS) else "something else"


def check_vae(vae: Any) -> None:
    """Raises OSDFaceError unless VAE makes 4 latent channels at an eighth of the size, or is the
    built-in model's.
    """
    network = getattr(vae, "first_stage_model", None)
    if network is None:
        raise OSDFaceError(
            "`vae` holds no autoencoder; the one of Stable Diffusion 2.1-base is wanted: "
            f"{CHECKPOINT}"
        )
    check_autoencoder(
        "`vae`",
        vae.latent_channels,
        vae.spacial_compression_encode(),
        CHECKPOINT,
        builtin.CHANNELS if is_builtin(network) else LATENT_CHANNELS,
    )


def is_builtin(network: Any) -> bool:
    """Whether a network is one of the built-in model's."""
    return bool(getattr(network, BUILTIN_MARK, False))


def check_together(model: Any, vae: Any, builtin_prompts: bool, lora: bool) -> None:
    """Raises OSDFaceError if the built-in model's parts are mixed with others, or with a LoRA."""
    of = {
        "`model`": is_builtin(model.model),
        "`vae`": is_builtin(vae.first_stage_model),
        "`conditioning`": builtin_prompts,
    }
    ours, others = ([name for name, known in of.items() if known == kind] for kind in (True, False))
    remedy = (
        "take model and vae from OSDFace Built-in Model with `builtin` as vre_name and `none` as "
        "lora_name, or none of these."
    )
    if ours and others:
        raise OSDFaceError(
            f"{' and '.join(ours)} of the small built-in model cannot go with another "
            f"{' and '.join(others)}: {remedy}"
        )
    if ours and lora:
        raise OSDFaceError(
            f"`lora_name` names OSDFace's LoRA, and the small built-in `model` takes none: {remedy}"
        )


def prompt_options(vre_name: str) -> dict[str, Any]:
    """The options of a CONDITIONING of visual prompts: the built-in model's are marked."""
    return {BUILTIN_MARK: True} if vre_name == BUILTIN else {}
