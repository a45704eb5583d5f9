"""Reads DiffIR's weights from a released file, or from one that install.py made of it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from ..errors import OSDFaceError
from ..weights.reading import read_tensors
from ..weights.signature import shapes
from .network import REMEDY, STEPS, posterior

# What the files put before a network's names: PyTorch Lightning's, BasicSR's averaged weights,
# which inference uses, its plain ones, and none. A network trained on several GPUs adds "module.".
PREFIXES = ("generator.", "params_ema.", "params.", "")
WRAPPER = "module."
PARTS = ("G.", "condition.", "denoise.")
FIRST = "G.patch_embed.proj.weight"
# The schedule, and the same modules once more, under the diffusion that holds them.
DIFFUSION = "diffusion."
COPIES = {"diffusion.condition.": "condition.", "diffusion.model.": "denoise."}
ENDS = "posterior_mean_coef1", "posterior_mean_coef2"


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a network by their plain names, on the CPU; nothing else of the file is read.

    Raises OSDFaceError for a file without them, of stage 1, or whose diffusion is another one.
    """
    if not path.is_file():
        return read_tensors(path)
    prefix = _prefix(_names(path), path.name)
    wanted = tuple(prefix + part for part in (*PARTS, DIFFUSION))
    held = {
        name.removeprefix(prefix): tensor for name, tensor in read_tensors(path, wanted).items()
    }
    for part, plain in COPIES.items():
        for name, tensor in held.items():
            if name.startswith(part):
                twin = held.get(plain + name[len(part) :])
                if twin is None or not torch.equal(twin, tensor):
                    raise OSDFaceError(
                        f"{path.name} holds two different {name[len(DIFFUSION) :]}, which are one "
                        f"in a file that training wrote: fetch the file again."
                    )
    for axis, end in enumerate(ENDS):
        given = held.get(f"{DIFFUSION}{end}")
        known = torch.tensor([posterior(step)[axis] for step in range(STEPS)])
        if given is not None and not (
            given.shape == known.shape and torch.allclose(given.float(), known, atol=1e-5)
        ):
            raise OSDFaceError(
                f"{path.name} was trained with another diffusion than the released {STEPS} steps "
                f"({end} differs): {REMEDY}"
            )
    return {name: tensor for name, tensor in held.items() if name.startswith(PARTS)}


def is_diffir(path: Path) -> bool:
    """Whether the file holds a network of DiffIR's second stage, by names alone."""
    try:
        _prefix(_names(path), path.name)
    except (OSDFaceError, OSError):
        return False
    return True


def _names(path: Path) -> Collection[str]:
    try:
        return shapes(path).keys()
    except OSError as error:
        raise OSDFaceError(
            f"{path} cannot be read ({error.strerror or error}): check the disk and the file's "
            "permissions."
        ) from error


def _prefix(names: Collection[str], source: str) -> str:
    """What stands before the names of the network that inference uses."""
    for start in PREFIXES:
        for prefix in (start, start + WRAPPER):
            if prefix + FIRST not in names:
                continue
            if any(name.startswith(f"{prefix}condition.") for name in names):
                return prefix
            raise OSDFaceError(
                f"{source} is of DiffIR's first stage, which wants to see the picture that it is "
                f"to make: {REMEDY}"
            )
    raise OSDFaceError(
        f"{source} does not hold DiffIR's weights ({min(names, default='nothing')} and "
        f"{max(0, len(names) - 1)} more are of something else): {REMEDY}"
    )
