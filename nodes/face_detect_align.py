"""FaceDetectAlign: pictures -> the chosen faces, as upright crops."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from comfy_api.latest import io

from ..osdface_core.faces.choose import Choice
from ..osdface_core.faces.detect import DetectOptions
from ..osdface_core.faces.files import DETECTORS, FOLDER
from ..osdface_core.faces.find import find_faces
from ..osdface_core.faces.preview import draw_faces, drawn_size
from ..osdface_core.weights.catalogue import BUILTIN
from .comfy import files, networks
from .comfy.on_demand import on_demand
from .comfy.progress import progress_bar, show_text, stop_if_interrupted
from .comfy.schema import with_newer_features
from .inputs import FACES, choice_inputs


def default_detector() -> str:
    """The best detector; the built-in one where no other's file is there or may be downloaded."""
    fetched = [file for file in DETECTORS.values() if file != BUILTIN]
    return next(iter(DETECTORS)) if files.any_available(fetched, FOLDER) else BUILTIN


class FaceDetectAlign(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        choice = choice_inputs()
        schema = io.Schema(
            node_id="FaceDetectAlign",
            display_name="Face Detect & Align",
            category="OSDFace",
            description="Finds faces, chooses among them, and cuts each one out upright. The "
            "frames of a batch are taken as a video.",
            inputs=[
                io.Image.Input(
                    "image", tooltip="One picture, or the frames of a video as a batch."
                ),
                io.Combo.Input(
                    "detector",
                    options=list(DETECTORS),
                    default=default_detector(),
                    tooltip="resnet50 finds more; mobile0.25 is many times faster. Their files "
                    "belong in models/facedetection. "
                    "builtin is small, needs no file, and does for portraits and small groups.",
                ),
                io.Float.Input(
                    "confidence",
                    default=0.9,
                    min=0.05,
                    max=0.999,
                    step=0.01,
                    tooltip="How sure the detector must be, 0 to 1. Lower finds more faces, and "
                    "more that are none.",
                ),
                choice["select"],
                choice["order"],
                choice["indices"],
                choice["max_faces"],
                choice["min_size"],
                choice["max_size"],
                io.Boolean.Input(
                    "any_angle",
                    default=False,
                    tooltip="Also finds faces that lie or stand on their head, and cuts them out "
                    "upright. Six to twenty times as slow.",
                ),
                io.Int.Input(
                    "crop_size",
                    default=512,
                    min=256,
                    max=1024,
                    step=64,
                    tooltip="Side of the crops in pixels. OSDFace was trained at 512; larger ones "
                    "keep more of a large face but are slow.",
                ),
                io.Float.Input(
                    "smoothing",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much the place, size and tilt of each face are steadied over the "
                    "frames of a video. 0 leaves them.",
                ),
            ],
            outputs=[
                FACES.Output(
                    display_name="faces", tooltip="The chosen faces, for Face Paste Back."
                ),
                io.Image.Output(
                    display_name="crops",
                    tooltip="The chosen faces, upright; a batch of zero if there are none.",
                ),
                io.Image.Output(
                    display_name="preview",
                    tooltip="The pictures with boxes, landmarks and numbers; chosen faces in "
                    "green.",
                ),
                io.Int.Output(display_name="count", tooltip="How many faces were chosen."),
                io.String.Output(
                    display_name="report",
                    tooltip="What was found and chosen, and why the rest was not.",
                ),
            ],
        )
        return with_newer_features(
            schema,
            search=("detect faces", "crop faces", "face crop", "face alignment", "RetinaFace"),
            advanced=("max_size", "smoothing"),
        )

    @classmethod
    def fingerprint_inputs(cls, detector: str | None = None, **_: Any) -> str:
        return files.fingerprint_of(DETECTORS.get(detector or ""), FOLDER)

    @classmethod
    def execute(
        cls,
        image: torch.Tensor,
        detector: str,
        confidence: float,
        select: str,
        order: str,
        indices: str,
        max_faces: int,
        min_size: int,
        max_size: int,
        any_angle: bool,
        crop_size: int,
        smoothing: float,
    ) -> io.NodeOutput:
        choice = Choice(select, order, indices, max_faces, min_size, max_size)
        options = DetectOptions(confidence, any_angle, choice, crop_size, smoothing)
        progress = progress_bar(len(image))
        found = find_faces(
            image,
            networks.load_detector(detector, image),
            options,
            out_of_memory=networks.is_out_of_memory,
            progress=progress,
        )
        draw = partial(draw_faces, image, found.everyone, found.verdicts, stop_if_interrupted)
        preview = on_demand(drawn_size(image), draw)
        show_text(found.report)
        return io.NodeOutput(
            found.faces, found.faces.crops, preview, len(found.faces), found.report
        )
