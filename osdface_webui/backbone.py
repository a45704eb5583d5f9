"""Where Stable Diffusion 2.1 comes from: the host's checkpoint, a file beside it, or built in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from osdface_core.errors import OSDFaceError
from osdface_core.ldm.backbone import LdmBackbone
from osdface_core.ldm.builtin import load_backbone
from osdface_core.ldm.loading import Tensors, check_tensors
from osdface_core.ldm.osediff import lend_osediff, load_osediff
from osdface_core.ldm.text import empty_text
from osdface_core.osdface import builtin
from osdface_core.osdface.files import LORA
from osdface_core.osdface.lora import parse_lora
from osdface_core.osediff.weights import parse_weights
from osdface_core.sd21.backbone import Backbone
from osdface_core.sd21.files import BASE
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


@dataclass(frozen=True)
class Base:
    """Stable Diffusion 2.1-base, lent by the host or in a file.

    name: of the checkpoint.
    file: its file; None where a lent one has none.
    model: the host's checkpoint whose tensors are used; None where the file is read aside.
    """

    name: str
    file: Path | None
    model: Any = None

    @property
    def words(self) -> str:
        where = "beside the loaded checkpoint" if self.model is None else "as loaded"
        return f"{self.name}, {where}"


def base() -> Base | None:
    """Stable Diffusion 2.1-base by the settings; None where it is not there, or not wanted.

    `automatic` takes the loaded checkpoint where it is of Stable Diffusion 2 and predicts noise,
    else Stable Diffusion 2.1-base under its usual name. Raises OSDFaceError for a chosen file that
    is not there.
    """
    chosen = _chosen()
    if chosen == BUILTIN:
        return None
    file = files.base() if chosen == host.AUTOMATIC else host.checkpoint(chosen)
    model = host.loaded_model()
    if _is_fit(model) and (chosen == host.AUTOMATIC or _file_of(model) == file):
        info = getattr(model, "sd_checkpoint_info", None)
        return Base(getattr(info, "name", "the loaded checkpoint"), _file_of(model), model)
    return None if file is None else Base(file.name, file)


def _chosen() -> str:
    chosen: str = host.option("base", host.AUTOMATIC) or host.AUTOMATIC
    return chosen


def source() -> Source:
    """The networks for restoring faces, by the setting of the base checkpoint.

    The built-in model is taken where it is asked for, and of `automatic` where there is no other.
    Raises OSDFaceError for a chosen file that is not there or not fit, and for weights of OSDFace
    that are half there.
    """
    if _chosen() == BUILTIN:
        return _builtin("as the settings ask for it")
    found = base()
    if found is None:
        return _builtin("no Stable Diffusion 2.1-base is there", announce=True)
    lacking = files.missing()
    if len(lacking) > 1 and not host.option("download", False):
        names = " and ".join(entry.name for entry in lacking)
        return _builtin(f"{names} are missing", announce=True)
    lora, embedder = files.ensure(LORA), files.ensure_embedder()
    options: dict[str, Any] = {
        "lora": kept("lora", state_of(lora), lambda: parse_lora(read_tensors(lora), lora.name)),
        "lora_name": lora.name,
        **_place(),
    }

    def lend(unet: Tensors, vae: Tensors) -> LdmBackbone:
        return LdmBackbone.from_tensors(unet, vae, found.name, **options)

    def read(file: Path) -> LdmBackbone:
        return LdmBackbone.from_file(file, **options)

    return Source(found.words, _backbone("backbone", found, lora, lend, read), embedder)


def osediff(file: Path) -> tuple[Backbone, Tensor, str]:
    """The networks of OSEDiff, the empty text (1,77,1024), and where they come from in words.

    Raises OSDFaceError where Stable Diffusion 2.1-base, its text encoder, or OSEDiff's weights are
    missing or not fit.

    file: OSEDiff's weights.
    """
    found = base()
    if found is None:
        raise OSDFaceError(
            "OSEDiff wants Stable Diffusion 2.1-base, and the setting is the built-in model, or no "
            f"checkpoint of it is there: load one, or put {BASE.name} into models/Stable-diffusion."
        )
    text = found.file
    if text is None or not text.is_file():
        raise OSDFaceError(
            f"{found.name} has no file here, from which OSEDiff's text is read: put {BASE.name} "
            "into models/Stable-diffusion and choose it under Settings, OSDFace."
        )
    prompts = kept("text", state_of(text), lambda: empty_text(text))
    weights = kept(
        "osediff weights", state_of(file), lambda: parse_weights(read_tensors(file), file.name)
    )

    def lend(unet: Tensors, vae: Tensors) -> LdmBackbone:
        return lend_osediff(unet, vae, found.name, weights, file.name, **_place())

    def read(model: Path) -> LdmBackbone:
        return load_osediff(model, weights, file.name, **_place())

    return _backbone("osediff", found, file, lend, read), prompts, f"{file.stem} on {found.words}"


def _place() -> dict[str, Any]:
    return {"device": host.device(), "dtype": host.dtype()}


def _backbone(
    what: str,
    found: Base,
    weights: Path,
    lend: Callable[[Tensors, Tensors], LdmBackbone],
    read: Callable[[Path], LdmBackbone],
) -> LdmBackbone:
    """The networks on the base's tensors, or read from its file and kept.

    what: for `kept`.
    found: the base.
    weights: the file of the method's own weights.
    lend: makes them of tensors of UNet and autoencoder.
    read: makes them of the file.
    """
    if found.model is not None:
        # Not kept: a checkpoint that the user changes must be able to leave.
        return lend(*shared_networks(found.model))
    file = found.file
    assert file is not None
    host.make_room(file.stat().st_size)
    state = state_of(file, weights), tuple(_place().values())
    backbone = kept(what, state, lambda: read(file))
    backbone.place(backbone.device)
    return backbone


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
    try:
        # Forge calls any Stable Diffusion 2 one that predicts noise; the weights know better.
        check_tensors(*shared_networks(model), "The loaded checkpoint")
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
