"""OSDFaceRestore: the whole way in one node, by the functions of the four."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from comfy_api.latest import io
from torch import Tensor

from ..osdface_core.errors import OSDFaceError
from ..osdface_core.faces.choose import Choice
from ..osdface_core.faces.face import Faces, check_pictures
from ..osdface_core.faces.paste import check
from ..osdface_core.faces.preview import before_after
from ..osdface_core.osdface.restore import Restored, restore
from ..osdface_core.osdface.vre import embedder_files
from ..osdface_core.weights.catalogue import FACES, LORAS, OSDFACE
from .comfy import host
from .face_detect_align import DETECTORS, FaceDetectAlign, detected
from .face_paste_back import PARSER, FacePasteBack, parse, pasted
from .osdface_one_step import AGAINST_NAN, OSDFaceOneStep, backbone, raise_if_all_failed
from .osdface_vre import OSDFaceVRE, prompt_options, visual_prompts

T = TypeVar("T")

# Of the bar, in percent: the time of each stage for a face of a common photograph, rounded.
SHARES = {"detect": 10, "prompts": 15, "step": 70, "paste": 5}


class OSDFaceRestore(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        nodes = FaceDetectAlign, OSDFaceVRE, OSDFaceOneStep, FacePasteBack
        detect, prompts, step, paste = (
            {item.id: item for item in node.define_schema().inputs} for node in nodes
        )
        schema = io.Schema(
            node_id="OSDFaceRestore",
            display_name="OSDFace Restore (all in one)",
            category="OSDFace",
            description="Finds the faces of a picture, restores them and puts them back. The "
            "frames of a batch are taken as a video.",
            inputs=[
                detect["image"],
                step["model"],
                step["vae"],
                prompts["vre_name"],
                step["lora_name"],
                *(
                    detect[name]
                    for name in ("detector", "select", "order", "indices", "max_faces", "min_size")
                ),
                *(detect[name] for name in ("confidence", "any_angle", "crop_size", "smoothing")),
                *(
                    paste[name]
                    for name in ("strength", "mask_type", "feather", "color_match", "keep")
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="image",
                    tooltip="The picture with the restored faces; without a face, the picture "
                    "itself.",
                ),
                io.Mask.Output(
                    display_name="mask",
                    tooltip="How much of each pixel was replaced, at the picture's size.",
                ),
                io.Image.Output(
                    display_name="before_after",
                    tooltip="Before and after: left and right, or above and below where the "
                    "picture is wider than high. "
                    "The frames of a video are made small.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="What was found, chosen and restored, and why the rest was not.",
                ),
            ],
        )
        return host.with_extras(
            schema,
            search=(
                "face restoration",
                "restore faces",
                "enhance faces",
                "fix faces",
                "GFPGAN",
                "CodeFormer",
                "face detailer",
            ),
            advanced=("order", "smoothing", "feather"),
            shows=True,
        )

    @classmethod
    def fingerprint_inputs(
        cls,
        vre_name: str | None = None,
        lora_name: str | None = None,
        detector: str | None = None,
        mask_type: str | None = None,
        **_: Any,
    ) -> str:
        return "\n".join(
            (
                host.state_of(DETECTORS.get(detector or ""), FACES),
                host.state_of(vre_name, OSDFACE, embedder_files),
                host.state_of(lora_name, LORAS),
                host.state_of(PARSER if mask_type == "parsing" else None, FACES),
            )
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
        model: Any,
        vae: Any,
        vre_name: str,
        lora_name: str,
        detector: str,
        select: str,
        order: str,
        indices: str,
        max_faces: int,
        min_size: int,
        confidence: float,
        any_angle: bool,
        crop_size: int,
        smoothing: float,
        strength: float,
        mask_type: str,
        feather: float,
        color_match: str,
        keep: Tensor | None = None,
    ) -> io.NodeOutput:
        check_pictures(image)
        stage = host.stages(**SHARES)
        choice = Choice(select, order, indices, max_faces, min_size)
        looking = (detector, confidence, choice, any_angle, crop_size, smoothing)
        seen = host.state_of(DETECTORS[detector], FACES), looking
        found = _once(
            image, "found", seen, lambda: detected(image, *looking, stage("detect", len(image)))
        )
        faces, report = found.faces, found.report
        result = faces.crops
        if len(faces) and strength > 0:
            # What would stop the job after minutes stops it now.
            check(image, faces, faces.crops, mask_type, color_match, keep, parse)
            _check_crops(faces)
            if mask_type == "parsing":
                with host.naming("mask_type"):
                    host.find(PARSER)

            def restored() -> Restored:
                networks = backbone(model, vae, lora_name, 1.0, prompt_options(vre_name))
                prompts = visual_prompts(faces.crops, vre_name, stage("prompts", len(faces)))
                return restore(faces.crops, prompts, networks, progress=stage("step", len(faces)))

            files = (
                host.state_of(vre_name, OSDFACE, embedder_files),
                host.state_of(lora_name, LORAS),
            )
            # What is no MODEL is told of where it is used.
            models = weakref.ref(model), getattr(model, "patches_uuid", None), weakref.ref(vae)
            step = _once(image, "restored", (seen, vre_name, lora_name, files, models), restored)
            raise_if_all_failed(step)
            result, report = step.crops, report + _notes(faces, step)
        progress = stage("paste", len(faces))
        after, mask = pasted(
            image, faces, result, strength, mask_type, feather, color_match, keep, 0.0, progress
        )
        return io.NodeOutput(
            after, mask, before_after(image, after, progress), report, ui=host.shown(report)
        )


_kept: dict[int, dict[str, list[tuple[object, Any]]]] = {}
# Several of these nodes may look at one picture.
MOST_KEPT = 4


def _once(image: Tensor, stage: str, key: object, make: Callable[[], T]) -> T:
    """What `make` gave for this very picture under the same `key`, else what it gives now.

    So a turned widget runs anew what depends on it and no more, as in the graph of four nodes. It
    is kept as long as the host keeps the picture.
    """
    if id(image) not in _kept:
        _kept[id(image)] = {}
        weakref.finalize(image, _kept.pop, id(image), None)
    # A node before this one may have written into the picture that it handed on.
    rows, columns = (
        image.sum(axes, dtype=torch.float32).numpy(force=True).tobytes()
        for axes in ((2, 3), (1, 3))
    )
    key = key, rows, columns
    kept = _kept[id(image)].setdefault(stage, [])
    for known, value in kept:
        if known == key:
            return value
    value = make()
    kept[:] = [*kept[-MOST_KEPT + 1 :], (key, value)]
    return value


def _check_crops(faces: Faces) -> None:
    for face, crop in zip(faces.faces, faces.crops, strict=True):
        if not bool(crop.isfinite().all()):
            raise OSDFaceError(
                f"`image` number {face.frame} holds values that are not numbers (NaN or infinite) "
                f"at face {face.number}; finite values "
                "in [0,1] are wanted: look for the node before this one that makes them."
            )


def _notes(faces: Faces, step: Restored) -> str:
    return "".join(
        f"\npicture {faces.faces[i].frame}, face {faces.faces[i].number} came out as NaN {then}"
        for which, then in (
            (step.again, "in half precision and was computed again in fp32"),
            (step.failed, f"and is left as it was: {AGAINST_NAN}"),
        )
        for i in which
    )
