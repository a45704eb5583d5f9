"""Refuses models that are not Stable Diffusion 2.1-base, in one sentence, for every host."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..errors import OSDFaceError
from .backbone import LATENT_CHANNELS, STRIDE, TEXT_WIDTH
from .schedule import TIMESTEPS, alphas_cumprod

WANTED = "Stable Diffusion 2.1-base (512 px, epsilon)"


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


def check_base(facts: BaseFacts, remedy: str) -> None:
    """Raises OSDFaceError unless a model is Stable Diffusion 2.1-base or a fine-tune of it.

    remedy: the end of the sentence: which file to load, and where.
    """
    if facts.text_width != TEXT_WIDTH:
        width = "unknown" if facts.text_width is None else facts.text_width
        raise refusal(facts.given, f"with a text width of {width} instead of {TEXT_WIDTH}", remedy)
    if facts.in_channels != LATENT_CHANNELS:
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


def check_autoencoder(given: str, channels: int, stride: int, remedy: str) -> None:
    """Raises OSDFaceError unless an autoencoder makes 4 channels at an eighth of the size."""
    if channels != LATENT_CHANNELS or stride != STRIDE:
        raise OSDFaceError(
            f"{given} makes latents of {channels} channels at 1/{stride} of the size; "
            f"{LATENT_CHANNELS} at 1/{STRIDE} are wanted, as the autoencoder of Stable Diffusion "
            f"2.1-base makes them: {remedy}"
        )


def refusal(given: str, what: str, remedy: str) -> OSDFaceError:
    """The error for a model that is not the one wanted."""
    return OSDFaceError(f"{given} {what}; {WANTED} is wanted: {remedy}")
