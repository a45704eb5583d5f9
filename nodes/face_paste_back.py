"""FacePasteBack: pastes restored crops into the picture, with all other pixels untouched."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from ..osdface_core.faces.face import Faces
from ..osdface_core.faces.files import FOLDER, PARSER
from ..osdface_core.faces.paste import MASK_TYPES, PasteOptions, paste
from ..osdface_core.pictures.color import COLOR_MATCHES
from .comfy import files, networks
from .comfy.progress import progress_bar
from .comfy.schema import with_newer_features
from .inputs import FACES


class FacePasteBack(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = io.Schema(
            node_id="FacePasteBack",
            display_name="Face Paste Back",
            category="OSDFace",
            description="Pastes restored faces back where they came from. Pixels outside of the "
            "mask keep their exact values.",
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="The picture the faces came from, or the same picture enlarged or "
                    "shrunk: the scale is taken from its size.",
                ),
                FACES.Input("faces", tooltip="From Face Detect & Align or Face Select."),
                io.Image.Input(
                    "restored",
                    lazy=True,
                    tooltip="The restored crops of these faces, in the same order. When there is "
                    "no face, nothing before this is run.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much of the restored face shows: 0 is the picture as it was, 1 "
                    "the restored face.",
                ),
                io.Combo.Input(
                    "mask_type",
                    options=list(MASK_TYPES),
                    default=MASK_TYPES[0],
                    tooltip="parsing: what a face parser takes for face or hair, so that hands, "
                    "microphones and hats in front of it stay as they are "
                    f"(by {PARSER.name}, or by a small built-in parser where that is missing). "
                    "ellipse: the face and what is close to it. box: the whole crop.",
                ),
                io.Float.Input(
                    "feather",
                    default=0.1,
                    min=0.0,
                    max=0.5,
                    step=0.01,
                    tooltip="Width of the mask's soft edge, as a fraction of the crop's side. It "
                    "lies inside of the mask.",
                ),
                io.Combo.Input(
                    "color_match",
                    options=list(COLOR_MATCHES),
                    default=COLOR_MATCHES[0],
                    tooltip="Gives the restored face the picture's colours. mean-std: its overall "
                    "colour and contrast. "
                    "wavelet: all but its detail, so that light and shadow stay too. "
                    "luminance: its colours stay, only light and dark are restored. "
                    "Black-and-white and sepia stay so with any of them.",
                ),
                io.Mask.Input(
                    "keep",
                    optional=True,
                    tooltip="Pixels that must stay as they are, such as a hand or a microphone.",
                ),
                io.Float.Input(
                    "keep_detail",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="For faces larger than the crop in a clean picture: how much of the "
                    "picture's own detail stays that is finer "
                    "than the crop can hold. Noise stays with it; a larger crop_size is the "
                    "better remedy.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="image", tooltip="The picture with the restored faces."
                ),
                io.Mask.Output(
                    display_name="mask",
                    tooltip="How much of each pixel was replaced, at the picture's size.",
                ),
            ],
        )
        return with_newer_features(
            schema,
            search=("paste face", "uncrop face", "stitch face", "merge face", "blend face"),
            advanced=("keep_detail",),
        )

    @classmethod
    def fingerprint_inputs(cls, mask_type: str | None = None, **_: object) -> str:
        return files.fingerprint_of(PARSER.name if mask_type == "parsing" else None, FOLDER)

    @classmethod
    def check_lazy_status(
        cls, faces: Faces, strength: float, restored: Tensor | None = None, **_: object
    ) -> list[str]:
        # `execute`, which runs next, refuses inputs of a wrong type.
        wanted = (
            isinstance(faces, Faces)
            and len(faces)
            and isinstance(strength, (int, float))
            and strength > 0
        )
        return ["restored"] if wanted and restored is None else []

    @classmethod
    def execute(
        cls,
        image: Tensor,
        faces: Faces,
        strength: float,
        mask_type: str,
        feather: float,
        color_match: str,
        restored: Tensor | None = None,
        keep: Tensor | None = None,
        keep_detail: float = 0.0,
    ) -> io.NodeOutput:
        options = PasteOptions(strength, mask_type, feather, color_match, keep_detail)
        after, mask = paste(
            image,
            faces,
            faces.crops if restored is None else restored,
            options,
            keep=keep,
            parser=networks.parse_crops,
            device=networks.device(),
            out_of_memory=networks.is_out_of_memory,
            progress=progress_bar(len(faces)),
        )
        return io.NodeOutput(after, mask)
