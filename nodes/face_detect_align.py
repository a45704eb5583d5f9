"""FaceDetectAlign: pictures -> the chosen faces, cut out upright."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..osdface_core.chunks import Progress
from ..osdface_core.faces.choose import ORDER, SELECT, Choice
from ..osdface_core.faces.detect import memory
from ..osdface_core.faces.detector_check import build_detector
from ..osdface_core.faces.find import Found, find_faces
from ..osdface_core.faces.preview import draw
from ..osdface_core.faces.retinaface import RetinaFace
from ..osdface_core.osdface import builtin
from ..osdface_core.weights import catalogue
from .comfy import host

DETECTORS = {
    "retinaface_resnet50": catalogue.DETECTOR.name,
    "retinaface_mobile0.25": catalogue.SMALL_DETECTOR.name,
    builtin.NAME: builtin.NAME,
}
FACES = io.Custom("OSDFACE_FACES")


def default_detector() -> str:
    """The best one; where no detector's file is and none may be fetched, the built-in one."""
    first, *others = (name for name in DETECTORS if name != builtin.NAME)
    return first if host.at_hand(*(DETECTORS[name] for name in (first, *others))) else builtin.NAME


def choice_inputs() -> dict[str, Any]:
    """The inputs that say which faces are meant, by name; Face Select has the same."""
    inputs = [
        io.Combo.Input(
            "select",
            options=list(SELECT),
            default=SELECT[0],
            tooltip="Which faces are meant, in each picture. If none is, nothing is restored.",
        ),
        io.Combo.Input(
            "order",
            options=list(ORDER),
            default=ORDER[0],
            tooltip="The order in which faces are numbered and max_faces counts them. Over a "
            "video a person keeps one number.",
        ),
        io.String.Input(
            "indices",
            default="0",
            tooltip='Numbers of the faces that are meant when select is "by index", as the '
            'preview shows them: "0", or "0,2-4".',
        ),
        io.Int.Input(
            "max_faces",
            default=0,
            min=0,
            max=1000,
            tooltip="At most so many faces in each picture; 0 is no limit.",
        ),
        io.Int.Input(
            "min_size",
            default=24,
            min=0,
            max=16384,
            tooltip="Faces smaller than this are left as they are: the shorter side of the face's "
            "box, in pixels of the picture.",
        ),
        io.Int.Input(
            "max_size",
            default=0,
            min=0,
            max=16384,
            tooltip="Faces larger than this are left as they are; 0 is no limit.",
        ),
    ]
    return {item.id: item for item in inputs}


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
                    min=512,
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
        return host.with_extras(
            schema,
            search=("detect faces", "crop faces", "face crop", "face alignment", "RetinaFace"),
            advanced=("max_size", "smoothing"),
        )

    @classmethod
    def fingerprint_inputs(cls, detector: str | None = None, **_: Any) -> str:
        return host.state_of(DETECTORS.get(detector or ""), catalogue.FACES)

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
        progress = host.progress(len(image))
        found = detected(
            image, detector, confidence, choice, any_angle, crop_size, smoothing, progress
        )
        preview = draw(image, found.everyone, found.verdicts, progress)
        host.shown(found.report)
        return io.NodeOutput(
            found.faces, found.faces.crops, preview, len(found.faces), found.report
        )


def detected(
    image: torch.Tensor,
    detector: str,
    confidence: float,
    choice: Choice,
    any_angle: bool,
    crop_size: int,
    smoothing: float,
    progress: Progress,
) -> Found:
    with host.naming("detector"):
        network = host.network(
            host.find(DETECTORS[detector]), build_detector, memory=memory(*image.shape[:3])
        )
    assert isinstance(network, RetinaFace)
    return find_faces(
        image,
        network,
        confidence=confidence,
        any_angle=any_angle,
        choice=choice,
        crop_size=crop_size,
        smoothing=smoothing,
        out_of_memory=host.out_of_memory,
        progress=progress,
    )
