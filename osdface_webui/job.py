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
from osdface_core.faces.stream import FaceStream
from osdface_core.osdface.restore import restore
from osdface_core.osdface.whole import restore_whole
from osdface_core.pictures.color import COLOR_MATCHES
from osdface_core.sd21.one_step import Restored

from . import backbone, files, host, networks

log = logging.getLogger(__name__)

# The largest value of 16 bits, and what a picture's report says of them.
MOST = 65535
FEWER_BITS = " The picture had 16 bits for each value and has 8 now."

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
    smoothing: float = 0.0
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
            self.smoothing,
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

    image: of the mode and size that were given, but of 8 bits; the very picture where no face was
        restored.
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
@networks.job
def restore_picture(
    image: Image.Image,
    options: Options = DEFAULT,
    keep: Image.Image | None = None,
    aligned: bool = False,
    stream: FaceStream | None = None,
) -> Result:
    """Restores the faces of a picture. Mode, size and transparency stay.

    Raises OSDFaceError for what cannot be understood, Stopped when the user asks to stop.

    image: of any mode; one of 16 bits comes back with 8.
    options: which faces, and how.
    keep: white where pixels must stay as they are; of another size, it is resized.
    aligned: the picture is a face crop already: nobody is looked for, and all of it is restored.
    stream: the video whose next frame the picture is.
    """
    given, image = image, readable(image)
    pixels = to_tensor(image)[None]
    stays = None if keep is None else to_tensor(readable(keep).convert("L"))[None, ..., 0]
    if aligned:
        return _aligned(given, image.mode, pixels, options, stays)
    found = find(pixels, options, stream)
    notes: dict[tuple[int, int], str] = {}
    source = ""
    after, mask = pixels, torch.zeros(pixels.shape[:3])
    if len(found.faces) and options.strength > 0:
        networks_of_it = backbone.source()
        source = networks_of_it.words
        restored = _restored(found.faces.crops, networks_of_it)
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
    first, *others = found.report.split("\n")
    if after is not pixels:
        first += _fewer_bits(given)
    lines = [first, *others, *(f"face {face}: {note}" for (_, face), note in notes.items())]
    lines += [f"Restored with {source}."] if source else []
    return Result(
        given if after is pixels else to_image(after[0], image.mode),
        to_image(mask[0, ..., None], "L"),
        "\n".join(lines),
        describe_faces(found.everyone, found.verdicts, notes),
        source,
    )


@torch.inference_mode()
@networks.job
def look(image: Image.Image, options: Options = DEFAULT) -> Result:
    """Finds the faces of a picture; `image` of the result has them drawn with their numbers."""
    pixels = to_tensor(readable(image))[None]
    found = find(pixels, options)
    drawn = draw_faces(pixels, found.everyone, found.verdicts)[0]
    return Result(
        to_image(drawn, "RGB"),
        Image.new("L", image.size),
        found.report,
        describe_faces(found.everyone, found.verdicts, {}),
    )


def find(pixels: Tensor, options: Options, stream: FaceStream | None = None) -> Found:
    """The faces of a picture (1,H,W,C) in [0,1], or of a video's next frame."""
    host.stop_if_asked()
    network = networks.detector(options.detector)
    if stream is not None:
        return stream.find(pixels, network, progress=host.stop_if_asked)
    return find_faces(pixels, network, options.detection, progress=host.stop_if_asked)


def _restored(crops: Tensor, source: backbone.Source) -> Restored:
    prompts = networks.embed_crops(crops, source.embedder)
    return restore(crops, prompts, source.backbone, progress=host.stop_if_asked)


def _fewer_bits(given: Image.Image) -> str:
    return FEWER_BITS if given.mode.startswith("I") else ""


def _aligned(
    given: Image.Image, mode: str, pixels: Tensor, options: Options, keep: Tensor | None
) -> Result:
    source = backbone.source()
    after, mask, notes = restore_whole(
        pixels, lambda crop: _restored(crop, source), options.pasting, keep
    )
    first = "A face crop, restored as a whole." + _fewer_bits(given)
    report = "\n".join([first, *notes.values(), f"Restored with {source.words}."])
    mask_image = to_image(mask[0, ..., None], "L")
    return Result(to_image(after[0], mode), mask_image, report, [], source.words)


def _notes(found: Found, restored: Restored) -> dict[tuple[int, int], str]:
    fates = (
        (restored.recomputed, "came out as NaN and was computed again in fp32"),
        (restored.failed, "came out as NaN and is left as it was"),
        (restored.starved, "came out as NaN, with too little memory for fp32; left as it was"),
    )
    faces = found.faces.faces
    return {(faces[i].frame, faces[i].number): note for which, note in fates for i in which}


def readable(image: Image.Image) -> Image.Image:
    """The picture in one of the modes L, LA, RGB and RGBA.

    One of 16 bits becomes one of 8, as the hosts save it. Raises OSDFaceError for other values.
    """
    if image.mode in ("L", "LA", "RGB", "RGBA"):
        return image
    if image.mode.startswith(("I", "F")):
        values = np.array(image)
        if image.mode == "F" or not 0 <= values.min() <= values.max() <= MOST:
            raise OSDFaceError(
                f"The picture has the mode {image.mode} and values of more than 16 bits, or with "
                "fractions; 8 or 16 bits are wanted: save it as such."
            )
        return Image.fromarray((values / MOST * 255).round().astype(np.uint8))
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
