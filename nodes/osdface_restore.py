"""OSDFaceRestore: the whole job in one node, by the functions that the other nodes call."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..osdface_core.errors import OSDFaceError
from ..osdface_core.faces.choose import Choice
from ..osdface_core.faces.detect import DetectOptions
from ..osdface_core.faces.face import Faces
from ..osdface_core.faces.files import DETECTORS, PARSER
from ..osdface_core.faces.files import FOLDER as FACES
from ..osdface_core.faces.find import Found, find_faces
from ..osdface_core.faces.paste import PasteOptions, check, paste
from ..osdface_core.faces.preview import before_after, before_after_size
from ..osdface_core.osdface.files import FOLDER as OSDFACE
from ..osdface_core.osdface.files import LORAS
from ..osdface_core.osdface.restore import restore
from ..osdface_core.osdface.vre import embedder_files
from ..osdface_core.pictures.picture import all_finite, check_pictures
from ..osdface_core.sd21.one_step import Restored
from .comfy import backbone, files, networks
from .comfy.backbone import NAN_REMEDY, STARVED, check_restored, without_starved
from .comfy.base_model import prompt_options
from .comfy.on_demand import on_demand
from .comfy.picture_cache import cached_for_picture
from .comfy.progress import show_text, staged_progress, stop_if_interrupted
from .comfy.schema import with_newer_features
from .face_detect_align import FaceDetectAlign
from .face_paste_back import FacePasteBack
from .osdface_one_step import OSDFaceOneStep
from .osdface_vre import OSDFaceVRE

# Each stage's share of the progress bar, in percent: its time for a face of a common photograph.
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
        return with_newer_features(
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
    def validate_inputs(cls, vre_name: object = None, lora_name: object = None) -> bool:
        """Lets a name that the menu lacks through, such as one with another system's slashes."""
        return True

    @classmethod
    def fingerprint_inputs(
        cls,
        vre_name: str | None = None,
        lora_name: str | None = None,
        detector: str | None = None,
        mask_type: str | None = None,
        **_: Any,
    ) -> str:
        parser = PARSER.name if mask_type == "parsing" else None
        states = (
            files.fingerprint_of(DETECTORS.get(detector or ""), FACES),
            files.fingerprint_of(vre_name, OSDFACE, embedder_files),
            files.fingerprint_of(lora_name, LORAS),
            files.fingerprint_of(parser, FACES),
        )
        return "\n".join(states)

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
        stage = staged_progress(**SHARES)
        choice = Choice(select, order, indices, max_faces, min_size)
        detection = DetectOptions(confidence, any_angle, choice, crop_size, smoothing)
        pasting = PasteOptions(strength, mask_type, feather, color_match)

        def find() -> Found:
            return find_faces(
                image,
                networks.load_detector(detector, image),
                detection,
                out_of_memory=networks.is_out_of_memory,
                progress=stage("detect", len(image)),
            )

        found_by = files.fingerprint_of(DETECTORS[detector], FACES), detector, detection
        found = cached_for_picture(
            image, "found", found_by, find, lambda found: found.faces.crops.nbytes
        )
        faces, report = found.faces, found.report
        crops = faces.crops
        if len(faces) and strength > 0:
            # Errors that would end the job after minutes are raised now.
            check(image, faces, crops, pasting, keep, networks.parse_crops)
            _check_crops(faces)
            if mask_type == "parsing":
                with files.naming_input("mask_type"):
                    files.find_parser()

            def step() -> Restored:
                host = backbone.HostBackbone(model, vae, prompt_options(vre_name), lora_name)
                prompts = networks.embed_crops(faces.crops, vre_name, stage("prompts", len(faces)))
                progress = stage("step", len(faces))
                return restore(faces.crops, prompts, host, progress=progress)

            states = (
                files.fingerprint_of(vre_name, OSDFACE, embedder_files),
                files.fingerprint_of(lora_name, LORAS),
            )
            # Only a MODEL has patches_uuid; `step` refuses anything else.
            models = weakref.ref(model), getattr(model, "patches_uuid", None), weakref.ref(vae)
            restored_by = found_by, vre_name, lora_name, states, models
            restored = cached_for_picture(
                image,
                "restored",
                restored_by,
                step,
                # With more memory the same crops come out.
                lambda restored: None if restored.starved else restored.pictures.nbytes,
            )
            check_restored(restored)
            crops, report = restored.pictures, report + _notes(faces, restored)
        progress = stage("paste", len(faces))
        after, mask = paste(
            image,
            faces,
            crops,
            pasting,
            keep=keep,
            parser=networks.parse_crops,
            device=networks.device(),
            out_of_memory=networks.is_out_of_memory,
            progress=progress,
        )
        both = on_demand(
            before_after_size(image), partial(before_after, image, after, stop_if_interrupted)
        )
        return io.NodeOutput(after, mask, both, report, ui=show_text(report))


def _check_crops(faces: Faces) -> None:
    for face, is_finite in zip(faces.faces, all_finite(faces.crops), strict=True):
        if not is_finite:
            raise OSDFaceError(
                f"`image` number {face.frame} holds values that are not numbers (NaN or infinite) "
                f"at face {face.number}; finite values in [0,1] are wanted: look for the node "
                "before this one that makes them."
            )


def _notes(faces: Faces, restored: Restored) -> str:
    return "".join(
        f"\npicture {faces.faces[i].frame}, face {faces.faces[i].number} came out as NaN {fate}"
        for which, fate in (
            (restored.recomputed, "in half precision and was computed again in fp32"),
            (restored.starved, f"and is left as it was, as {STARVED}"),
            (without_starved(restored), f"and is left as it was: {NAN_REMEDY}"),
        )
        for i in which
    )
