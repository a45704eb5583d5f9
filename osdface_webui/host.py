"""What a WebUI gives: options, folders, device, memory, and the user's wish to stop."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from modules import call_queue, devices, paths_internal, shared

from osdface_core.devices import best_dtype
from osdface_core.errors import OSDFaceError

NAME = "OSDFace"
AUTOMATIC = "automatic"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Stopped(Exception):
    """The user has asked to stop, or to skip the picture."""


def option(name: str, default: Any) -> Any:
    """The value of our setting `osdface_NAME`.

    Without the page the host never asks for our settings: then it is what a config.json holds, or
    the default.
    """
    return getattr(shared.opts, f"osdface_{name}", default)


def argument(name: str, default: Any = None) -> Any:
    """An argument of the command line, which not every host has."""
    return getattr(shared.cmd_opts, name, default)


def models() -> Path:
    """The host's models folder."""
    return Path(paths_internal.models_path)


def is_forge() -> bool:
    """Whether the host is of Forge's line, with a memory management of its own."""
    return "backend.memory_management" in sys.modules


def loads_sd2() -> bool:
    """Whether the host can load Stable Diffusion 2 as its checkpoint, which Forge-Neo cannot."""
    return not is_forge() or importlib.util.find_spec("backend.diffusion_engine.sd20") is not None


def device() -> torch.device:
    """The device that the host restores faces on."""
    return torch.device(devices.get_device_for(NAME.lower()))


def dtype() -> torch.dtype:
    """The precision that the settings ask for; of `automatic`, half where the device has it."""
    chosen = DTYPES.get(option("precision", AUTOMATIC))
    if chosen is not None:
        return chosen
    if argument("no_half", False) or argument("all_in_fp32", False):
        return torch.float32
    return best_dtype(device())


def make_room(size: int) -> None:
    """Lets the host's networks leave the device, as far as `size` bytes need it."""
    if device().type == "cpu":
        return
    if is_forge():
        from backend import memory_management

        memory_management.free_memory(size, device())
    elif shares_room():
        from modules import lowvram

        lowvram.send_everything_to_cpu()


def shares_room() -> bool:
    """Whether networks take turns on the device: --medvram, --lowvram, and Forge always."""
    low = any(argument(name, False) for name in ("medvram", "lowvram", "medvram_sdxl"))
    return low or is_forge()


def leaves_device() -> bool:
    """Whether our networks leave the device after each job.

    By the host's own setting, or because the host's networks need the room and cannot send ours
    away.
    """
    return bool(getattr(shared.opts, "face_restoration_unload", False)) or shares_room()


def collect() -> None:
    """Gives back memory that nothing uses."""
    devices.torch_gc()


@contextmanager
def own_job() -> Iterator[None]:
    """A job of ours alone, under the host's lock. A wish to stop an earlier one is over."""
    with call_queue.queue_lock:
        shared.state.begin(job=NAME)
        try:
            yield
        finally:
            shared.state.end()


def stop_if_asked(*_: Any) -> None:
    """Raises Stopped where the user has pressed Interrupt or Skip. It is a Progress too."""
    state = shared.state
    if getattr(state, "interrupted", False) or getattr(state, "skipped", False):
        raise Stopped


def job_start() -> Any:
    """When the host's present job began, which tells one job from another."""
    return getattr(shared.state, "time_start", None)


def loaded_model() -> Any:
    """The checkpoint that the host has loaded; None where there is none, and none is loaded."""
    from modules import sd_models

    return getattr(getattr(sd_models, "model_data", None), "sd_model", None)


def checkpoints() -> dict[str, Path]:
    """The host's checkpoint files by the names that its menus show."""
    from modules import sd_models

    return {
        info.title: Path(info.filename)
        for info in getattr(sd_models, "checkpoints_list", {}).values()
    }


def checkpoint(title: str) -> Path:
    """The file of a name in the menu. Raises OSDFaceError where it is no longer there."""
    from modules import sd_models

    # A title ends in a hash that the host may have computed since.
    info = sd_models.get_closet_checkpoint_match(title)
    if info is None or not Path(info.filename).is_file():
        raise OSDFaceError(
            f"The base checkpoint in the settings is {title}, which is not there; choose another "
            "under Settings, OSDFace."
        )
    return Path(info.filename)
