"""Where Stable Diffusion 2.1 comes from: the host's checkpoint, a file beside it, or built in."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from osdface_core.errors import OSDFaceError
from osdface_core.ldm.backbone import LdmBackbone
from osdface_core.ldm.builtin import load_backbone
from osdface_core.osdface import builtin
from osdface_core.osdface.files import LORA
from osdface_core.osdface.lora import parse_lora
from osdface_core.sd21.backbone import Backbone
from osdface_core.sd21.base_model import UNET_PREFIX, VAE_PREFIX, check_checkpoint
from osdface_core.weights.reading import read_tensors

from . import files, host
from .networks import kept, state_of

log = logging.getLogger(__name__)

BUILTIN = "built-in (small)"


@dataclass(frozen=True)
class Source:
    """Where the networks of a job come from.

    words: for the report and the picture's parameters.
    backbone: the networks.
    embedder: the visual embedder's file; None for the built-in one.
    """

    words: str
    backbone: Backbone
    embedder: Path | None


def source() -> Source:
    """The networks for a job, by the setting of the base checkpoint.

    `automatic` takes the loaded checkpoint where it is of Stable Diffusion 2 and predicts noise,
    else Stable Diffusion 2.1-base under its usual name, else the built-in model. Raises
    OSDFaceError for a chosen file that is not there or not fit, and for weights of OSDFace that
    are half there.
    """
    chosen = host.option("base", host.AUTOMATIC) or host.AUTOMATIC
    if chosen == BUILTIN:
        return _builtin("as the settings ask for it")
    file = files.base() if chosen == host.AUTOMATIC else host.checkpoint(chosen)
    model = host.loaded_model()
    shares = _is_fit(model) and (chosen == host.AUTOMATIC or _file_of(model) == file)
    lacking = files.missing()
    if not shares and file is None:
        return _builtin("no Stable Diffusion 2.1-base is there", announce=True)
    if len(lacking) > 1 and not host.option("download", False):
        names = " and ".join(entry.name for entry in lacking)
        return _builtin(f"{names} are missing", announce=True)
    lora, embedder = files.ensure(LORA), files.ensure_embedder()
    options: dict[str, Any] = {
        "lora": kept("lora", state_of(lora), lambda: parse_lora(read_tensors(lora), lora.name)),
        "lora_name": lora.name,
        "device": host.device(),
        "dtype": host.dtype(),
    }
    if shares:
        name = getattr(getattr(model, "sd_checkpoint_info", None), "name", "the loaded checkpoint")
        # Not kept: a checkpoint that the user changes must be able to leave.
        backbone = LdmBackbone.from_tensors(*shared_networks(model), name, **options)
        return Source(f"{name}, as loaded", backbone, embedder)
    assert file is not None
    host.make_room(file.stat().st_size)
    state = state_of(file, lora), options["device"], options["dtype"]
    backbone = kept("backbone", state, lambda: LdmBackbone.from_file(file, **options))
    backbone.place(backbone.device)
    return Source(f"{file.name}, beside the loaded checkpoint", backbone, embedder)


def _builtin(why: str, announce: bool = False) -> Source:
    if announce:
        log.warning("%s (%s)", builtin.ANNOUNCEMENT, why)
    device = host.device()
    backbone = kept("backbone", device, lambda: load_backbone(device, torch.float32))
    backbone.place(device)
    return Source(f"the small built-in model, as {why}", backbone, None)


def _is_fit(model: Any) -> bool:
    """Whether the host's checkpoint is Stable Diffusion 2.1-base or a fine-tune of it."""
    if not getattr(model, "is_sd2", False):
        return False
    objects = getattr(model, "forge_objects_original", None)
    if objects is not None:
        predictor = getattr(objects.unet.model, "predictor", None)
        says = getattr(predictor, "prediction_type", "epsilon")
    else:
        says = getattr(model, "parameterization", None)
    if says not in ("epsilon", "eps"):
        return False
    unet, vae = shared_networks(model)
    tensors = {UNET_PREFIX + name: tensor for name, tensor in unet.items()}
    tensors |= {VAE_PREFIX + name: tensor for name, tensor in vae.items()}
    try:
        # Forge calls any Stable Diffusion 2 one that predicts noise; the weights know better.
        check_checkpoint(tensors, "The loaded checkpoint")
    except OSDFaceError as error:
        log.info("%s", error)
        return False
    return True


def _file_of(model: Any) -> Path | None:
    info = getattr(model, "sd_checkpoint_info", None)
    return Path(info.filename) if info is not None else None


def shared_networks(model: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The host's own tensors of UNet and autoencoder by their names in LDM, not copied.

    Weights that hold the LoRAs of a prompt are given as they were before.
    """
    objects = getattr(model, "forge_objects_original", None)
    if objects is not None:
        unet, vae = objects.unet.model, objects.vae.first_stage_model
        return (
            dict(originals(unet.diffusion_model)) | _backup(unet, "diffusion_model."),
            dict(originals(vae)) | _backup(vae, ""),
        )
    from modules import sd_vae

    # The checkpoint's own autoencoder, which the host keeps where the user has chosen another.
    own = sd_vae.get_base_vae(model) if getattr(sd_vae, "loaded_vae_file", None) else None
    return dict(originals(model.model.diffusion_model)), dict(
        own or originals(model.first_stage_model)
    )


def originals(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a network as they are without a prompt's LoRAs.

    AUTOMATIC1111 adds those to the weights, and keeps what was there beside them; of weights in
    fp8, those in fp16.
    """
    for path, module in network.named_modules():
        for name, tensor in module.named_parameters(recurse=False):
            beside = (
                getattr(module, attribute, None)
                for attribute in (
                    f"network_{name}s_backup",
                    f"network_{name}_backup",
                    f"fp16_{name}",
                )
            )
            found = (value for value in beside if isinstance(value, Tensor))
            yield f"{path}.{name}" if path else name, next(found, tensor)


def _backup(model: Any, prefix: str) -> dict[str, Tensor]:
    """What Forge keeps of the weights that it has merged a prompt's LoRAs into."""
    kept_by_host = getattr(getattr(model, "lora_loader", None), "backup", {})
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in kept_by_host.items()
        if name.startswith(prefix)
    }
