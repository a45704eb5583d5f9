"""Loads OSEDiff once, and OSDFace where faces are wanted, and enlarges pictures and frames."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..chunks import Progress
from ..devices import best_dtype
from ..diffusers.osediff import load_osediff
from ..diffusers.text import encode_text
from ..errors import OSDFaceError
from ..osediff.files import PICTURES, PICTURES_PICKLE
from ..osediff.upscale import UpscaleOptions, check, upscale
from ..osediff.weights import parse_weights
from ..sd21.files import BASE
from ..weights.catalogue import BUILTIN
from ..weights.reading import read_tensors
from . import restorer
from .restorer import DTYPES, Restorer, base_folder, ensure, given, settle_machine, store_in

# Where ComfyUI keeps CLIP's tokenizer, beside its models folder.
COMFYUI_TOKENIZER = "comfy/sd1_tokenizer"


def resolve(options: argparse.Namespace) -> argparse.Namespace:
    """The options with everything decided that depends on the machine, as restorer.resolve.

    Raises OSDFaceError for weights that are missing, and for the built-in model.
    """
    options = argparse.Namespace(**vars(options))
    wanted = UpscaleOptions(options.scale, options.tile, options.overlap, options.color_match)
    check(torch.zeros(0, 8, 8, 3), torch.zeros(0, 77, 1024), wanted)
    if options.model == BUILTIN:
        raise OSDFaceError(
            "--model is builtin, for which OSEDiff has no weights: name Stable Diffusion 2.1-base."
        )
    settle_machine(options)
    models = options.models_dir
    options.model = (
        given("model", options.model)
        if options.model
        else base_folder(models) or ensure(BASE, options, "")
    )
    if options.osediff:
        options.osediff = given("osediff", options.osediff)
    else:
        store = store_in(models)
        pickled = None if store.find(PICTURES) else store.find(PICTURES_PICKLE)
        options.osediff = str(pickled or ensure(PICTURES, options, ""))
    if options.tokenizer is None and (models.parent / COMFYUI_TOKENIZER).is_dir():
        options.tokenizer = models.parent / COMFYUI_TOKENIZER
    if options.tokenizer is not None:
        options.tokenizer = Path(given("tokenizer", str(options.tokenizer)))
    if options.faces:
        return restorer.resolve(options)
    best = best_dtype(torch.device(options.device))
    options.dtype = options.dtype or next(name for name, dtype in DTYPES.items() if dtype == best)
    return options


class Upscaler:
    """The networks, and the settings of a run.

    options: as `resolve` gives them. Raises OSDFaceError for weights that do not fit.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        device, file = torch.device(options.device), Path(options.osediff)
        self.settings = UpscaleOptions(
            options.scale, options.tile, options.overlap, options.color_match
        )
        self.prompts = encode_text(
            Path(options.model), options.prompt, tokenizer=options.tokenizer, device=device
        )
        self.backbone = load_osediff(
            Path(options.model),
            parse_weights(read_tensors(file), file.name),
            file.name,
            device=device,
            dtype=DTYPES[options.dtype],
        )
        self.restorer = None
        if options.faces:
            # --color-match is that of the enlarged picture.
            self.restorer = Restorer(argparse.Namespace(**vars(options) | {"color_match": "none"}))

    @torch.inference_mode()
    def enlarge(self, pictures: Tensor, progress: Progress | None = None) -> Tensor:
        """Pictures (B,H,W,C) in [0,1], enlarged. Raises OSDFaceError where NaN comes out."""
        result = upscale(pictures, self.prompts, self.backbone, self.settings, progress=progress)
        if result.failed:
            raise OSDFaceError(
                f"Picture {result.failed[0]} came out as NaN: add --dtype fp32, or look for the "
                "damage in the file."
            )
        return result.pictures

    def picture(
        self, pixels: Tensor, progress: Progress | None = None
    ) -> tuple[Tensor, Tensor, list[dict[str, Any]]]:
        """Enlarges a picture (H,W,C) in [0,1].

        Returns the result, a mask (h,w) of ones, and the faces for the report.
        """
        after = self.enlarge(pixels[None], progress)[0]
        faces: list[dict[str, Any]] = []
        if self.restorer is not None:
            after, _, faces = self.restorer.picture(after)
        return after, torch.ones(after.shape[:2]), faces
