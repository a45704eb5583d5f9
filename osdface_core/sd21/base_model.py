"""Refuses models that are not Stable Diffusion 2.1-base, in one sentence, for every host."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import OSDFaceError
from .backbone import LATENT_CHANNELS, STRIDE, TEXT_WIDTH
from .schedule import BETA_END, BETA_START, TIMESTEPS, alphas_cumprod

WANTED = "Stable Diffusion 2.1-base (512 px, epsilon)"
REMEDY = (
    "give the folder of stable-diffusion-2-1-base in diffusers' layout, or "
    "v2-1_512-ema-pruned.safetensors."
)
# Of the latents.
SCALING = 0.18215

UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
TEXT_PREFIX = "cond_stage_model.model."
# SD 2.1's 768-v checkpoint has the same names and shapes. As in ComfyUI, it is recognised by the
# standard deviation of this bias, which is far larger there.
V_WITNESS = UNET_PREFIX + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
V_DEVIATION = 0.09


@dataclass(frozen=True)
class BaseFacts:
    """What a host knows of a model.

    given: how the sentence names it, such as "`model` is SDXL".
    text_width: width of the prompts that its UNet takes; None where the host does not tell.
    in_channels: input channels of its UNet.
    is_variant: whether its UNet takes anything beside latents, timestep and prompts, or is built
        otherwise (unCLIP, video, SDXL, ...).
    prediction: what its UNet predicts, "epsilon" where it is right, "something else" where the host
        has no word for it.
    """

    given: str
    text_width: int | None
    in_channels: int | None
    is_variant: bool = False
    prediction: str = "epsilon"


def check_base(facts: BaseFacts, remedy: str, channels: int = LATENT_CHANNELS) -> None:
    """Raises OSDFaceError unless a model is Stable Diffusion 2.1-base or a fine-tune of it.

    remedy: the end of the sentence: which file to load, and where.
    channels: of the latents; the small built-in model has others.
    """
    if facts.text_width != TEXT_WIDTH:
        width = "unknown" if facts.text_width is None else facts.text_width
        raise refusal(facts.given, f"with a text width of {width} instead of {TEXT_WIDTH}", remedy)
    if facts.in_channels != channels:
        what = f"with {facts.in_channels} input channels, such as an inpainting or depth model has"
        raise refusal(facts.given, what, remedy)
    if facts.is_variant:
        what = "a variant with another UNet (unCLIP, upscaler, SDXL, video or the like)"
        raise refusal(facts.given + ",", what, remedy)
    if facts.prediction in ("v", "v_prediction"):
        what = "that predicts v, as Stable Diffusion 2.1 768-v does"
        raise refusal(facts.given, what, remedy)
    if facts.prediction != "epsilon":
        raise refusal(facts.given, f"that predicts {facts.prediction} and not noise", remedy)


def check_schedule(given: str, sigmas: object, timestep: int, remedy: str) -> None:
    """Raises OSDFaceError unless sigmas (1000,), sqrt((1 - abar) / abar), are the schedule's.

    given: as in BaseFacts.
    sigmas: what the host samples the model with.
    timestep: at which they are compared: the method's own.
    remedy: the end of the sentence.
    """
    if not isinstance(sigmas, Tensor) or len(sigmas) != TIMESTEPS:
        what = f"sampled without the {TIMESTEPS} discrete timesteps of Stable Diffusion"
        raise refusal(given, what, remedy)
    abar = alphas_cumprod()[timestep]
    sigma, wanted = float(sigmas[timestep]), float(((1 - abar) / abar) ** 0.5)
    if abs(sigma - wanted) > 1e-3:
        what = (
            f"with a changed noise schedule (sigma {sigma:.3f} at step {timestep} instead of "
            f"{wanted:.3f})"
        )
        raise refusal(given, what, remedy)


def check_autoencoder(
    given: str, channels: int, stride: int, remedy: str, wanted: int = LATENT_CHANNELS
) -> None:
    """Raises OSDFaceError unless an autoencoder makes 4 channels at an eighth of the size.

    wanted: channels, where it is the small built-in model's.
    """
    if channels != wanted or stride != STRIDE:
        raise OSDFaceError(
            f"{given} makes latents of {channels} channels at 1/{stride} of the size; "
            f"{wanted} at 1/{STRIDE} are wanted, as the autoencoder of Stable Diffusion "
            f"2.1-base makes them: {remedy}"
        )


def refusal(given: str, what: str, remedy: str) -> OSDFaceError:
    """The error for a model that is not the one wanted."""
    return OSDFaceError(f"{given} {what}; {WANTED} is wanted: {remedy}")


def check_folder(path: Path) -> None:
    """Raises OSDFaceError unless a folder in diffusers' layout is configured as the model is."""
    configs: dict[str, dict[str, Any]] = {}
    files = (("unet", "config"), ("vae", "config"), ("scheduler", "scheduler_config"))
    for part, name in files:
        file = f"{part}/{name}.json"
        try:
            configs[part] = json.loads((path / file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OSDFaceError(
                f"{path} is not a model in diffusers' layout ({file} cannot be read: {error}); "
                f"{REMEDY}"
            ) from error
    check_unet(configs["unet"], path.name, configs["scheduler"].get("prediction_type", "epsilon"))
    check_vae(configs["vae"], path.name)
    check_scheduler(configs["scheduler"], path.name)


def check_checkpoint(tensors: Mapping[str, Tensor], source: str, remedy: str = REMEDY) -> None:
    """Raises OSDFaceError unless a checkpoint's tensors are those of Stable Diffusion 2.1-base.

    tensors: in the LDM layout.
    source: the checkpoint's name.
    remedy: the end of the sentence.
    """
    first = tensors.get(UNET_PREFIX + "input_blocks.0.0.weight")
    text = tensors.get(UNET_PREFIX + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    if first is None:
        raise refusal(source, "is not a checkpoint of Stable Diffusion with its UNet", remedy)
    if any(name.startswith(UNET_PREFIX + "label_emb") for name in tensors) or text is None:
        raise refusal(source, "is another kind of model (SDXL, unCLIP or the like)", remedy)
    witness = tensors.get(V_WITNESS)
    is_v = witness is not None and float(witness.detach().float().std(correction=0)) > V_DEVIATION
    facts = BaseFacts(
        f"{source} is a model", text.shape[1], first.shape[1], prediction="v" if is_v else "epsilon"
    )
    check_base(facts, remedy)
    if not any(name.startswith(VAE_PREFIX) for name in tensors):
        raise refusal(source, "is a UNet without its autoencoder", remedy)


def check_unet(
    config: dict[str, Any],
    source: str,
    prediction: str = "epsilon",
    channels: int = LATENT_CHANNELS,
) -> None:
    """Raises OSDFaceError unless a UNet's configuration is that of Stable Diffusion 2.1-base.

    channels: as for check_base.
    """
    given = config.get("in_channels")
    extras = ("class_embed_type", "num_class_embeds", "addition_embed_type")
    facts = BaseFacts(
        f"{source} is a model",
        config.get("cross_attention_dim"),
        given,
        any(map(config.get, extras)) or config.get("out_channels", given) != given,
        prediction,
    )
    check_base(facts, REMEDY, channels)


def check_vae(config: dict[str, Any], source: str) -> None:
    """Raises OSDFaceError unless an autoencoder makes 4 channels at an eighth of the size."""
    stride = 2 ** (len(config.get("block_out_channels", ())) - 1)
    channels = config.get("latent_channels", 0)
    check_autoencoder(f"The autoencoder of {source}", channels, stride, REMEDY)
    if config.get("shift_factor"):
        raise refusal(source, "is a model whose autoencoder shifts its latents", REMEDY)


def check_scheduler(config: dict[str, Any], source: str) -> None:
    """Raises OSDFaceError unless a scheduler's configuration is Stable Diffusion's schedule."""
    names = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")
    given = tuple(map(config.get, names))
    if given != (TIMESTEPS, "scaled_linear", BETA_START, BETA_END):
        raise refusal(source, f"is a model with another noise schedule {given}", REMEDY)
