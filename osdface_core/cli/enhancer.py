"""Loads a network of DiffIR once, and enlarges, deblurs or fills pictures and frames by it."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..chunks import Progress, no_progress
from ..diffir import enhance as enhancing
from ..diffir.enhance import EnhanceOptions, enhance
from ..diffir.files import BUILTIN_INPAINTER, FOLDER, missing
from ..diffir.inpaint import InpaintOptions, inpaint
from ..diffir.network import DEBLUR, INPAINT, build_network, start_vector
from ..diffir.weights import read_weights
from ..errors import OSDFaceError
from ..weights.catalogue import BUILTIN
from .pictures import EXTENSIONS, read_mask
from .restorer import given, settle_machine, store_in

log = logging.getLogger(__name__)

DIFFIR = "diffir"
# The file of each job that is taken where none is named.
DEBLURRER, INPAINTER = "DiffIRS2-deblur.safetensors", "DiffIRS2-celeba.safetensors"
ENLARGER = "DiffIRS2-GANx{:g}-V2.safetensors"
# What the names of masks have after those of their pictures.
MARK = "_mask"


def does(options: argparse.Namespace) -> bool:
    """Whether the options are of a command that DiffIR does."""
    return options.command in (DEBLUR, INPAINT) or getattr(options, "method", "") == DIFFIR


def resolve(options: argparse.Namespace) -> argparse.Namespace:
    """The options with everything decided that depends on the machine.

    Raises OSDFaceError for weights that are missing, and for options of another method.
    """
    options = argparse.Namespace(**vars(options))
    if options.command != INPAINT:
        settings = EnhanceOptions(options.tile, options.overlap)
        enhancing.check(torch.zeros(0, 8, 8, 3), settings)
    if options.faces:
        raise OSDFaceError(
            "--faces goes with --method osediff: leave it out, and run restore on the result."
        )
    settle_machine(options)
    if options.diffir == BUILTIN and options.command == INPAINT:
        pass
    elif options.diffir:
        options.diffir = given("diffir", options.diffir)
    else:
        names = {DEBLUR: DEBLURRER, INPAINT: INPAINTER}
        name = names.get(options.command) or ENLARGER.format(options.scale)
        path = store_in(options.models_dir).folders[FOLDER][0] / name
        if path.is_file():
            options.diffir = str(path)
        elif options.command == INPAINT:
            log.warning(
                "Filling by the small built-in network, for another is not there: %s", missing(name)
            )
            options.diffir = BUILTIN
        else:
            raise missing(name)
    if options.command == INPAINT:
        options.mask = Path(given("mask", str(options.mask)))
        # Masks lie as the pictures do, also for a worker that was started in another folder.
        options.input = options.input.absolute()
    return options


def masks_in(folder: Path) -> set[Path]:
    """The files below a folder of masks that are called so: they are no pictures to be done."""
    return {
        path.resolve()
        for path in folder.rglob(f"*{MARK}*")
        if path.suffix.lower() in EXTENSIONS and MARK in path.stem
    }


def mask_for(source: Path, base: Path, masks: Path) -> Path:
    """The mask of a file, in the folder of masks or where it lies below, as it does below `base`.

    It is called as the file is, or so with "_mask" and anything after it, as the released code has
    it. Raises OSDFaceError where there is none, or more than one.
    """
    below = source.absolute().parent.relative_to(base.absolute())
    folder, name = masks / below, source.stem
    found = sorted(
        path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.suffix.lower() in EXTENSIONS
        and (path.stem == name or path.stem.startswith(name + MARK))
        and path.absolute() != source.absolute()
    )
    if not found:
        raise OSDFaceError(
            f"{source} has no mask: put one into {folder}, called {name}.png or {name}{MARK}.png."
        )
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise OSDFaceError(
            f"{source} has {len(found)} masks in {folder} ({names}); one is wanted: take the "
            "others away."
        )
    return found[0]


class Enhancer:
    """The network, and the settings of a run.

    options: as `resolve` gives them, with the scale that the file has. Raises OSDFaceError for
    weights that do not fit the command.
    """

    # Nothing here looks for faces.
    restorer = None

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = argparse.Namespace(**vars(options))
        self.device, file = torch.device(options.device), Path(options.diffir)
        file = BUILTIN_INPAINTER if options.diffir == BUILTIN else file
        self.network = build_network(read_weights(file), source=file.name).to(self.device)
        job, wanted = self.network.shape.job, options.command
        # A network of scale 1 cleans, whatever it was trained for.
        if job != wanted and (INPAINT in (job, wanted) or wanted == DEBLUR):
            raise OSDFaceError(
                f"--diffir is {file.name}, which is of DiffIR's networks to {job}; one to {wanted} "
                "is wanted: name another file."
            )
        self.options.scale = float(self.network.shape.scale)
        self.start = start_vector(options.seed)
        is_one = wanted == INPAINT and not options.mask.is_dir()
        self.mask = read_mask(options.mask) if is_one else torch.zeros(1, 1, 1)

    def begin(self, source: Path) -> None:
        """Reads the mask of a file that is done next, where each has its own.

        Raises OSDFaceError for a mask that is missing.
        """
        options = self.options
        if options.command == INPAINT and options.mask.is_dir():
            base = options.input if options.input.is_dir() else options.input.parent
            self.mask = read_mask(mask_for(source, base, options.mask))

    @torch.inference_mode()
    def enlarge(self, pictures: Tensor, progress: Progress | None = None) -> Tensor:
        """Pictures (B,H,W,C) in [0,1], done. Raises OSDFaceError where NaN comes out."""
        shared: dict[str, Any] = {
            "start": self.start,
            "progress": lambda total: progress or no_progress,
        }
        if self.options.command == INPAINT:
            holes = InpaintOptions(self.options.working_size, self.options.feather)
            result = inpaint(pictures, self.mask, self._load, holes, **shared)
        else:
            tiles = EnhanceOptions(self.options.tile, self.options.overlap)
            result = enhance(pictures, self._load, tiles, **shared)
        if result.failed:
            raise OSDFaceError(
                f"Picture {result.failed[0]} came out as NaN: name another file with --diffir."
            )
        return result.pictures

    def picture(
        self, pixels: Tensor, progress: Progress | None = None
    ) -> tuple[Tensor, Tensor, list[dict[str, Any]]]:
        """Does a picture (H,W,C) in [0,1].

        Returns the result, a mask (h,w) of what has changed, and no faces for the report.
        """
        after = self.enlarge(pixels[None], progress)[0]
        is_filled = self.options.command == INPAINT
        return after, self.mask[0] if is_filled else torch.ones(after.shape[:2]), []

    def _load(self, memory: int) -> Any:
        return self.network, self.device
