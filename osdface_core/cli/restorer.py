"""Loads the networks once and restores pictures and frames of videos with them."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..catalogue import CATALOGUE
from ..chunks import Progress
from ..devices import best_device, best_dtype
from ..diffusers.backbone import DiffusersBackbone
from ..errors import OSDFaceError
from ..faces import find
from ..faces.align import crop_faces
from ..faces.choose import Choice, describe_faces, parse_indices
from ..faces.detect import DetectOptions, detect
from ..faces.detector_check import build_detector
from ..faces.face import Face, Faces
from ..faces.face_parser import build_parser, parse_faces
from ..faces.files import (
    BUILTIN_DETECTOR,
    BUILTIN_PARSER,
    BUILTIN_PARSER_USED,
    DETECTORS,
    PARSER,
)
from ..faces.paste import PasteOptions, paste
from ..faces.retinaface import RetinaFace, build_retinaface
from ..ldm.builtin import load_backbone
from ..osdface import builtin
from ..osdface.files import LORA, VRE, VRE_CHECKPOINT
from ..osdface.lora import parse_lora
from ..osdface.restore import restore
from ..osdface.vre import build_embedder, embed, read_embedder
from ..sd21.backbone import Backbone
from ..sd21.files import BASE
from ..sd21.one_step import Restored
from ..weights.catalogue import BUILTIN, NONE, WeightFile
from ..weights.reading import read_tensors
from ..weights.store import Store
from .pictures import read_mask

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DIFFUSERS_FOLDERS = ("diffusers/stable-diffusion-2-1-base", "checkpoints/stable-diffusion-2-1-base")
# Faces that the embedder takes at once on an accelerator, at 450 MB each.
EMBEDDED_AT_ONCE = 4


# Finding weights


def models_dir(given: Path | None) -> Path:
    """The folder that holds the weights' folders: the given one, ComfyUI's, or ~/.cache/osdface.

    Raises OSDFaceError for a given one that does not exist.
    """
    if given is not None:
        if not given.is_dir():
            raise OSDFaceError(
                f"--models-dir is {given}, which is no folder; one that holds checkpoints, "
                "osdface and facedetection is wanted."
            )
        return given
    root = Path(__file__).absolute().parents[2]
    hosts = [Path(os.environ["COMFYUI_PATH"])] if os.environ.get("COMFYUI_PATH") else []
    hosts += [root.parent.parent] if root.parent.name in ("custom_nodes", "extensions") else []
    return next(
        (host / "models" for host in hosts if (host / "models").is_dir()),
        Path.home() / ".cache" / "osdface",
    )


def store_in(models: Path) -> Store:
    """The catalogue's files in a models folder."""
    return Store(CATALOGUE, {name: [models / name] for name in CATALOGUE.folders})


def settle_machine(options: argparse.Namespace) -> None:
    """Decides the device and the models folder. Raises OSDFaceError for those that are none."""
    try:
        device = torch.device(options.device) if options.device else best_device()
        if device.index is not None and (options.workers > 1 or options.ray_address):
            raise OSDFaceError(
                f"--device is {device}, but workers are given a device each: name {device.type} "
                "alone."
            )
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OSDFaceError(
            f"--device {options.device} cannot be used here ({str(error).splitlines()[0]}): leave "
            "it out."
        ) from error
    options.device = str(device)
    # Absolute, since workers may be started in another folder.
    options.models_dir = models_dir(options.models_dir).absolute()


def ensure(
    entry: WeightFile,
    options: argparse.Namespace,
    otherwise: str = ", or take the small built-in model by --model builtin",
) -> str:
    """The path of a file of the catalogue, fetched first if it is missing and --download is given.

    Raises OSDFaceError that says how to get it. otherwise: what else can be done.
    """
    store = store_in(options.models_dir)
    bar = _download_bar() if options.download and store.find(entry) is None else None
    try:
        return str(store.ensure(entry.name, allow_download=options.download, progress=bar))
    except OSDFaceError as error:
        if options.download:
            raise
        raise OSDFaceError(
            f"{entry.name} ({entry.purpose}) is missing in {store.target(entry).parent}: add "
            f"--download, put it there{otherwise}."
        ) from error


def given(name: str, path: str) -> str:
    """The absolute path that an option names. Raises OSDFaceError for one that does not exist."""
    if not Path(path).exists():
        raise OSDFaceError(f"--{name} is {path}, which does not exist.")
    return str(Path(path).absolute())


def base_folder(models: Path) -> str | None:
    """The folder of Stable Diffusion 2.1-base in diffusers' layout; None where there is none."""
    return next(
        (str(models / name) for name in DIFFUSERS_FOLDERS if (models / name).is_dir()), None
    )


def resolve(options: argparse.Namespace) -> argparse.Namespace:
    """The options with everything decided that depends on the machine.

    That is device, dtype, and the path of each weight file. Logs a warning where a stand-in is
    taken. Raises OSDFaceError for weights that are missing.
    """
    options = argparse.Namespace(**vars(options))
    parse_indices(options.indices)
    settle_machine(options)
    device, models = torch.device(options.device), options.models_dir
    options.keep = options.keep and options.keep.absolute()
    store = store_in(models)
    base = base_folder(models)
    there = any(map(store.find, (BASE, LORA, VRE, VRE_CHECKPOINT)))
    if options.model is None and not (
        there or base or options.lora or options.vre or options.download
    ):
        log.warning("%s (none of them is in %s)", builtin.ANNOUNCEMENT, models)
        options.model = BUILTIN
    if options.model == BUILTIN:
        options.lora, options.vre = NONE, BUILTIN
    else:
        options.model = (
            given("model", options.model) if options.model else base or ensure(BASE, options)
        )
        if options.lora != NONE:
            options.lora = given("lora", options.lora) if options.lora else ensure(LORA, options)
        if options.vre is None:
            checkpoint = None if store.find(VRE) else store.find(VRE_CHECKPOINT)
            options.vre = str(checkpoint or ensure(VRE, options))
        elif options.vre != BUILTIN:
            options.vre = given("vre", options.vre)
    # The small model is fast in any type.
    best = torch.float32 if options.model == BUILTIN else best_dtype(device)
    options.dtype = options.dtype or next(name for name, dtype in DTYPES.items() if dtype == best)
    options.parser_file = options.detector_file = None
    if options.aligned:
        # Nobody is looked for, nothing pasted.
        return options
    if options.detector is None:
        files = {name: CATALOGUE.by_name.get(file) for name, file in DETECTORS.items()}
        found = next((name for name, entry in files.items() if entry and store.find(entry)), None)
        options.detector = found or (next(iter(DETECTORS)) if options.download else BUILTIN)
        if options.detector == BUILTIN and options.model != BUILTIN:
            log.warning(
                "Using the small built-in face detector, for RetinaFace's file is missing: fetch "
                "it with --download."
            )
    detector = DETECTORS[options.detector]
    options.detector_file = (
        BUILTIN if detector == BUILTIN else ensure(CATALOGUE.by_name[detector], options)
    )
    if options.mask_type is None:
        parser_there = options.download or store.find(PARSER)
        options.mask_type = "parsing" if parser_there else "ellipse"
        if not parser_there and options.model != BUILTIN:
            log.warning(
                "Pasting by an ellipse, for the face parser's file is missing: fetch it with "
                "--download, or choose --mask-type parsing for the small built-in parser."
            )
    if options.mask_type == "parsing":
        if options.download or store.find(PARSER):
            options.parser_file = ensure(PARSER, options)
        else:
            options.parser_file = BUILTIN
            if options.model != BUILTIN:
                log.warning("%s: fetch it with --download.", BUILTIN_PARSER_USED)
    return options


def _download_bar() -> Callable[[int, int], None]:
    from tqdm import tqdm

    bar = tqdm(unit="B", unit_scale=True, desc="weights", leave=False)

    def report(done: int, total: int) -> None:
        bar.total = total
        bar.n = done
        bar.refresh()

    return report


# Restoring


class Restorer:
    """The networks, and the settings of a run.

    options: as `resolve` gives them. Raises OSDFaceError for weights that do not fit.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        dtype = DTYPES[options.dtype]
        self.keep = read_mask(options.keep) if options.keep else None
        choice = Choice(
            options.select,
            options.order,
            options.indices,
            options.max_faces,
            options.min_size,
            options.max_size,
        )
        self.detect_options = DetectOptions(
            options.confidence, options.any_angle, choice, options.crop_size, options.smoothing
        )
        self.paste_options = PasteOptions(
            options.strength,
            options.mask_type,
            options.feather,
            options.color_match,
            options.keep_detail,
        )
        vre = Path(options.vre)
        self.detector = None if options.aligned else self._detector()
        self.embedder = (
            builtin.embedder()
            if options.vre == BUILTIN
            else build_embedder(read_embedder(vre), source=vre.name)
        )
        self.embedder.to(self.device)
        self.parser = None
        if options.parser_file:
            file = BUILTIN_PARSER if options.parser_file == BUILTIN else Path(options.parser_file)
            self.parser = build_parser(read_tensors(file)).to(self.device)
        self.backbone: Backbone
        if options.model == BUILTIN:
            # In plain torch: to import diffusers takes as long as ten faces.
            self.backbone = load_backbone(self.device, dtype)
        else:
            strength = 0.0 if options.lora == NONE else options.lora_strength
            file = Path(options.lora)
            self.backbone = DiffusersBackbone.from_files(
                Path(options.model),
                parse_lora(read_tensors(file), file.name) if strength else None,
                strength,
                lora_name=file.name,
                device=self.device,
                dtype=dtype,
            )

    def _detector(self) -> RetinaFace:
        file = self.options.detector_file
        network = (
            build_retinaface(read_tensors(BUILTIN_DETECTOR))
            if file == BUILTIN
            else build_detector(read_tensors(Path(file)))
        )
        return network.to(self.device)

    @torch.inference_mode()
    def picture(
        self, pixels: Tensor, progress: Progress | None = None
    ) -> tuple[Tensor, Tensor, list[dict[str, Any]]]:
        """Restores a picture (H,W,C) in [0,1].

        Returns the result, the mask (H,W) of what was changed, and the faces for the report.
        """
        assert self.detector is not None
        found = find.find_faces(pixels[None], self.detector, self.detect_options)
        after, mask, notes = self.paste(pixels[None], found.faces, progress)
        return after[0], mask[0], describe_faces(found.everyone, found.verdicts, notes)

    @torch.inference_mode()
    def detect(self, frames: Tensor) -> list[Any]:
        """The detections in each frame (B,H,W,3) in [0,1], for `place_faces`."""
        assert self.detector is not None
        return detect(frames, self.detector, self.detect_options, faint=True)

    def place_faces(
        self, found: list[Any], small: Tensor, width: int, height: int
    ) -> tuple[tuple[Face, ...], tuple[str, ...]]:
        """All faces of a video, each with a verdict, from detections and thumbnails (B,3,24,24)."""
        return find.place_faces(found, small, width, height, self.detect_options)

    @torch.inference_mode()
    def frames(
        self, frames: Tensor, chosen: Sequence[Face]
    ) -> tuple[Tensor, Tensor, dict[tuple[int, int], str]]:
        """Restores frames (B,H,W,3) of a video, as `paste` does.

        chosen: the faces chosen in them, whose `frame` counts from the first of these.
        """
        count, height, width = frames.shape[:3]
        size = self.detect_options.crop_size
        crops = crop_faces(
            frames,
            [face.frame for face in chosen],
            [face.matrix for face in chosen],
            size,
            self.device,
        )
        return self.paste(frames, Faces(tuple(chosen), crops, count, height, width, size))

    @torch.inference_mode()
    def paste(
        self, images: Tensor, faces: Faces, progress: Progress | None = None
    ) -> tuple[Tensor, Tensor, dict[tuple[int, int], str]]:
        """Restores and pastes `faces` into pictures (B,H,W,C).

        Returns the pictures, the masks (B,H,W), and a note for each face that went wrong, by frame
        and number.
        """
        crops = faces.crops
        notes: dict[tuple[int, int], str] = {}
        if len(faces) and self.paste_options.strength > 0:
            result = self._restored(faces.crops, progress)
            crops = result.pictures
            for which, note in (
                (result.recomputed, "computed again in fp32"),
                (result.failed, "came out as NaN, left as it was"),
                (result.starved, "came out as NaN, too little memory for fp32, left as it was"),
            ):
                notes |= {(faces.faces[i].frame, faces.faces[i].number): note for i in which}
        after, mask = paste(
            images,
            faces,
            crops,
            self.paste_options,
            keep=self.keep,
            parser=None if self.parser is None else self._parse,
            device=self.device,
        )
        return after, mask, notes

    def _restored(self, crops: Tensor, progress: Progress | None) -> Restored:
        o = self.options
        at_once = 1 if self.device.type == "cpu" else EMBEDDED_AT_ONCE
        prompts = embed(
            crops,
            lambda faces: (self.embedder, self.device),
            at_once=at_once,
        )
        settings = {"timestep": o.timestep, "faces_per_batch": o.faces_per_batch}
        return restore(crops, prompts, self.backbone, progress=progress, **settings)

    def _parse(self, crops: Tensor) -> Tensor:
        assert self.parser is not None
        return parse_faces(crops, self.parser)


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that the results depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for name in ("osdface", "torch", "torchvision", "diffusers", "peft", "numpy", "Pillow", "av"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
