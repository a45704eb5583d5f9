"""The work on one picture, by the functions that the nodes and the command line call."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from osdface_core.errors import OSDFaceError
from osdface_core.faces.choose import ORDER, SELECT, Choice, describe_faces
from osdface_core.faces.detect import DetectOptions
from osdface_core.faces.files import DETECTORS
from osdface_core.faces.find import Found, find_faces
from osdface_core.faces.paste import MASK_TYPES, PasteOptions, paste
from osdface_core.faces.preview import draw_faces
from osdface_core.osdface.restore import restore
from osdface_core.osdface.whole import restore_whole
from osdface_core.pictures.color import COLOR_MATCHES
from osdface_core.sd21.one_step import Restored

from . import backbone, files, host, networks

log = logging.getLogger(__name__)

MENUS = {
    "detector": (host.AUTOMATIC, *DETECTORS),
    "select": SELECT,
    "order": ORDER,
    "mask_type": (host.AUTOMATIC, *MASK_TYPES),
    "color_match": COLOR_MATCHES,
}


@dataclass(frozen=True)
class Options:
    """The options of the node OSDFace Restore, under its names; see Choice, DetectOptions and
    PasteOptions.

    detector: one of DETECTORS, or automatic: the best whose file is there.
    mask_type: one of MASK_TYPES, or automatic: parsing, or ellipse where the parser's file is
        missing. Parsing itself then takes the small built-in parser.
    """

    detector: str = host.AUTOMATIC
    confidence: float = 0.9
    select: str = SELECT[0]
    order: str = ORDER[0]
    indices: str = "0"
    max_faces: int = 0
    min_size: int = 24
    max_size: int = 0
    any_angle: bool = False
    crop_size: int = 512
    strength: float = 1.0
    mask_type: str = host.AUTOMATIC
    feather: float = 0.1
    color_match: str = COLOR_MATCHES[0]
    keep_detail: float = 0.0

    def __post_init__(self) -> None:
        for name, menu in MENUS.items():
            if getattr(self, name) not in menu:
                raise OSDFaceError(
                    f"`{name}` is {getattr(self, name)!r}; one of {', '.join(menu)} is wanted."
                )

    @property
    def detection(self) -> DetectOptions:
        return DetectOptions(
            self.confidence,
            self.any_angle,
            Choice(
                self.select,
                self.order,
                self.indices,
                self.max_faces,
                self.min_size,
                self.max_size,
            ),
            self.crop_size,
        )

    @property
    def pasting(self) -> PasteOptions:
        mask_type = files.mask_type(self.mask_type)
        return PasteOptions(
            self.strength, mask_type, self.feather, self.color_match, self.keep_detail
        )


DEFAULT = Options()
NAMES = tuple(field.name for field in fields(Options))


@dataclass(frozen=True)
class Result:
    """A picture that was worked on.

    image: of the mode and size that were given; the very picture where no face was restored.
    mask: how much of each pixel was replaced, mode L.
    report: what was found, chosen and restored, and with which networks.
    faces: what `describe_faces` tells.
    source: the networks in words; empty where none were needed.
    """

    image: Image.Image
    mask: Image.Image
    report: str
    faces: list[dict[str, Any]]
    source: str = ""


@torch.inference_mode()
def restore_picture(
    image: Image.Image,
    options: Options = DEFAULT,
    keep: Image.Image | None = None,
    aligned: bool = False,
) -> Result:
    """Restores the faces of a picture. Mode, size and transparency stay.

    Raises OSDFaceError for what cannot be understood, Stopped when the user asks to stop.

    image: of 8 bits, any mode.
    options: which faces, and how.
    keep: white where pixels must stay as they are; of another size, it is resized.
    aligned: the picture is a face crop already: nobody is looked for, and all of it is restored.
    """
    try:
        image = readable(image)
        pixels = to_tensor(image)[None]
        stays = None if keep is None else to_tensor(keep.convert("L"))[None, ..., 0]
        if aligned:
            return _aligned(image, pixels, options, stays)
        found = find(pixels, options)
        notes: dict[tuple[int, int], str] = {}
        source = ""
        after, mask = pixels, torch.zeros(pixels.shape[:3])
        if len(found.faces) and options.strength > 0:
            given = backbone.source()
            source = given.words
            restored = _restored(found.faces.crops, given)
            notes = _notes(found, restored)
            after, mask = paste(
                pixels,
                found.faces,
                restored.pictures,
                options.pasting,
                keep=stays,
                parser=networks.parse_crops,
                device=host.device(),
                progress=host.stop_if_asked,
            )
        lines = [found.report, *(f"face {face}: {note}" for (_, face), note in notes.items())]
        lines += [f"Restored with {source}."] if source else []
        return Result(
            image if after is pixels else to_image(after[0], image.mode),
            to_image(mask[0, ..., None], "L"),
            "\n".join(lines),
            describe_faces(found.everyone, found.verdicts, notes),
            source,
        )
    finally:
        networks.release()


@torch.inference_mode()
def look(image: Image.Image, options: Options = DEFAULT) -> Result:
    """Finds the faces of a picture; `image` of the result has them drawn with their numbers."""
    try:
        pixels = to_tensor(readable(image))[None]
        found = find(pixels, options)
        drawn = draw_faces(pixels, found.everyone, found.verdicts)[0]
        return Result(
            to_image(drawn, "RGB"),
            Image.new("L", image.size),
            found.report,
            describe_faces(found.everyone, found.verdicts, {}),
        )
    finally:
        networks.release()


def find(pixels: Tensor, options: Options) -> Found:
    """The faces of pictures (1,H,W,C) in [0,1]."""
    host.stop_if_asked()
    network = networks.detector(options.detector)
    return find_faces(pixels, network, options.detection, progress=host.stop_if_asked)


def _restored(crops: Tensor, source: backbone.Source) -> Restored:
    prompts = networks.embed_crops(crops, source.embedder)
    return restore(crops, prompts, source.backbone, progress=host.stop_if_asked)


def _aligned(image: Image.Image, pixels: Tensor, options: Options, keep: Tensor | None) -> Result:
    source = backbone.source()
    after, mask, notes = restore_whole(
        pixels, lambda crop: _restored(crop, source), options.pasting, keep
    )
    lines = ["A face crop, restored as a whole.", *notes.values(), f"Restored with {source.words}."]
    report = "\n".join(lines)
    mask_image = to_image(mask[0, ..., None], "L")
    return Result(to_image(after[0], image.mode), mask_image, report, [], source.words)


def _notes(found: Found, restored: Restored) -> dict[tuple[int, int], str]:
    fates = (
        (restored.recomputed, "came out as NaN and was computed again in fp32"),
        (restored.failed, "came out as NaN and is left as it was"),
        (restored.starved, "came out as NaN, with too little memory for fp32; left as it was"),
    )
    faces = found.faces.faces
    return {(faces[i].frame, faces[i].number): note for which, note in fates for i in which}


def readable(image: Image.Image) -> Image.Image:
    """The picture in one of the modes L, LA, RGB and RGBA. Raises OSDFaceError for 16 bits."""
    if image.mode in ("L", "LA", "RGB", "RGBA"):
        return image
    if image.mode.startswith(("I", "F")):
        raise OSDFaceError(
            f"The picture has the mode {image.mode}; one of 8 bits is wanted: save it as such, or "
            "use the command line, which keeps 16 bits."
        )
    is_transparent = image.mode in ("PA", "La", "RGBa") or "transparency" in image.info
    return image.convert("RGBA" if is_transparent else "RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """A picture as (H,W,C) in [0,1]."""
    values = np.array(image, dtype=np.float32)
    return torch.from_numpy(values if values.ndim == 3 else values[..., None]).div_(255)


def to_image(pixels: Tensor, mode: str) -> Image.Image:
    """(H,W,C) in [0,1] as a picture; what `to_tensor` read comes back bit by bit."""
    values = pixels.mul(255).round_().clamp_(0, 255).byte().cpu().numpy()
    return Image.fromarray(values[..., 0] if mode == "L" else values, mode)
