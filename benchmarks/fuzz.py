"""Sends random graphs of our nodes to a real ComfyUI server, and judges what comes out.

    python -m benchmarks.fuzz [--count 2000] [--seed 0] [--comfyui DIR] [--only N ...]
                              [--replay FILE]

Each graph must end in a right result or in one sentence. The networks are the small built-in ones,
which OSEDiff Upscale takes only here (benchmarks/fuzz_nodes.py), and DiffIR's at small size with
random weights; the pictures are those of
tests/photographs.py. A graph is refused by the host's validation, ends in one of our sentences, or
is judged by nodes in the server (benchmarks/fuzz_nodes.py): shapes, finite values, pixels outside
of the mask bit for bit, the very picture where there is no face, inputs not written into. Anything
else is a violation: a raw Python error of a node of ours, a server that is gone or hangs. Prints a
table of the results and each violation's graph as JSON, for --replay; exits with 1 if there was
one. --only runs the graphs of these numbers.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import requests
import torch
import websocket
from PIL import Image
from safetensors.torch import save_file

from osdface_core.faces.face_parser import ParseNet
from tests import photographs
from tests.conftest import comfyui_path
from tests.frontend import server
from tests.test_diffir import small

ROOT = Path(__file__).resolve().parents[1]
Graph = dict[str, dict[str, Any]]
Link = list[Any]

OURS = (
    "FaceDetectAlign",
    "FaceSelect",
    "OSDFaceVRE",
    "OSDFaceOneStep",
    "FacePasteBack",
    "OSDFaceBuiltinModel",
    "OSDFaceRestore",
    "OSEDiffUpscale",
    "FaceMaskToCrops",
    "DiffIREnhance",
    "DiffIRInpaint",
)
# DiffIR's files that are there, by node: what each enlarges by.
DIFFIR = {
    "DiffIREnhance": {
        "DiffIRS2-GANx2-V2.safetensors": 2,
        "DiffIRS2-GANx1-V2.safetensors": 1,
        "DiffIRS2-deblur.safetensors": 1,
    },
    "DiffIRInpaint": {"DiffIRS2-celeba.safetensors": 1, "DiffIRS2-place.safetensors": 1},
}
SMALL_DIFFIR = {
    "x2": ("GANx2-V2",),
    "x1": ("GANx1-V2",),
    "deblur": ("deblur",),
    "inpaint": ("celeba", "place"),
}
# Seconds for a graph before the server counts as hanging, and the waits that they are divided into.
PATIENCE, WAITS = 240, 12
# Seconds for an answer to a request, which comes at once unless the machine was asleep.
ASLEEP = 1200
LONGEST_SENTENCE = 900
# Seconds for the server's start, on a machine with other work.
START = 900

SIDES = (1, 2, 3, 7, 8, 9, 15, 16, 33, 64, 100, 200, 257, 400)
LONG_SIDES = (1500, 2500, 4000)
VALUES = ("noise",) * 6 + (
    "flat",
    "flat",
    "nan spots",
    "inf spots",
    "all nan",
    "wide range",
    "huge",
)
HARMS = (
    *(
        "nan spots",
        "inf spots",
        "all nan",
        "wide range",
        "huge",
        "fp16",
        "bf16",
        "fp64",
        "uint8",
        "strided",
        "expanded",
        "no frame",
    ),
    *(
        "no height",
        "no width",
        "three dimensions",
        "five dimensions",
        "0 channels",
        "1 channels",
        "2 channels",
        "4 channels",
        "5 channels",
    ),
)
MASKS = (
    "noise",
    "noise",
    "zero",
    "one",
    "nan",
    "wide",
    "fp16",
    "bool",
    "two dimensions",
    "four dimensions",
)
FACE_HARMS = (
    *(
        "matrix",
        "tiny matrix",
        "large matrix",
        "mirrored",
        "landmarks",
        "box",
        "one spot",
        "frame",
        "score",
        "twice",
        "fewer crops",
    ),
    *("more crops", "nan crops", "size", "frames", "crop size", "none"),
)
CONDITIONINGS = (
    *(
        "text",
        "narrow text",
        "nothing",
        "nan",
        "inf",
        "no prompt",
        "fewer",
        "more",
        "unmarked",
        "fp16",
        "two",
        "two dimensions",
    ),
    *("no options", "no tensor", "area", "mask"),
)
MODELS = (
    "sd15",
    "sdxl",
    "sd20",
    "inpainting",
    "lotus",
    "taesd",
    "16 channels",
    "empty vae",
    "swapped",
)
INDICES = (
    *(
        "0",
        "",
        "0-3",
        "3-0",
        "a",
        "0,1,2",
        "-1",
        "9" * 5000,
        "0,,1",
        " 0 - 2 ",
        "1e3",
        "0\n1",
        "\uff11",
        "0-999999999999",
        "None",
        "0;1",
    ),
)
# Core nodes that change a MODEL's behaviour, and a CONDITIONING's options.
MODEL_PATCHES = (
    *(
        "FreeU",
        "FreeU_V2",
        "HyperTile",
        "TomePatchModel",
        "ModelSamplingDiscrete",
        "ModelSamplingContinuousEDM",
        "ModelSamplingSD3",
    ),
    *(
        "RescaleCFG",
        "ModelComputeDtype",
        "PatchModelAddDownscale",
        "SelfAttentionGuidance",
        "PerturbedAttentionGuidance",
        "Mahiro",
    ),
    *(
        "UNetSelfAttentionMultiply",
        "UNetCrossAttentionMultiply",
        "Epsilon Scaling",
        "RenormCFG",
        "CFGZeroStar",
        "FreSca",
        "APG",
        "TCFG",
    ),
    *(
        "ContextWindowsManual",
        "EasyCache",
        "LazyCache",
        "DifferentialDiffusion",
        "SkipLayerGuidanceDiT",
        "ModelSamplingContinuousV",
    ),
)
CONDITIONING_PATCHES = (
    *(
        "ConditioningSetArea",
        "ConditioningSetAreaPercentage",
        "ConditioningSetAreaStrength",
        "ConditioningSetMask",
    ),
    *(
        "ConditioningZeroOut",
        "ConditioningSetTimestepRange",
        "FluxGuidance",
        "ConditioningCombine",
        "ConditioningConcat",
    ),
    *("ConditioningAverage",),
)


@dataclass
class Made:
    """A graph, and whether it holds a value that the host's validation may refuse."""

    graph: Graph
    refusable: bool


class Maker:
    """Makes one random graph."""

    def __init__(
        self, seed: str, info: dict[str, Any], pictures: list[str], faces: list[str]
    ) -> None:
        self.rng = random.Random(seed)
        self.info, self.pictures, self.faces = info, pictures, faces
        self.graph: Graph = {}
        self.refusable = False

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def pick(self, values: Iterable[Any]) -> Any:
        return self.rng.choice(tuple(values))

    def seed(self) -> int:
        return self.rng.randrange(2**31)

    def node(self, kind: str, /, **inputs: Any) -> str:
        name = f"{len(self.graph)}"
        self.graph[name] = {"class_type": kind, "inputs": inputs}
        return name

    def inputs(self, kind: str) -> dict[str, tuple[Any, dict[str, Any]]]:
        given = self.info[kind]["input"]
        return {
            name: (spec[0], spec[1] if len(spec) > 1 else {})
            for group in ("required", "optional")
            for name, spec in given.get(group, {}).items()
        }

    # Widgets

    def widget(self, kind: Any, limits: dict[str, Any]) -> Any:
        options = limits.get("options", kind if isinstance(kind, list) else None)
        if options is not None:
            return self.pick(options) if options else ""
        if kind == "BOOLEAN":
            return self.chance(0.5)
        if kind in ("INT", "FLOAT"):
            low, high = limits.get("min", 0), limits.get("max", 1)
            value = self.pick(
                (limits.get("default", low),) * 6
                + (low, high, self.rng.uniform(low, high), self.rng.uniform(low, high))
            )
            step = limits.get("step", 1)
            return low + (round(value) - low) // step * step if kind == "INT" else value
        return limits.get("default", "")

    def widgets(self, kind: str, **fixed: Any) -> dict[str, Any]:
        """Values for all widgets of a node; cheap ones are more frequent than expensive ones."""
        values: dict[str, Any] = {}
        for name, (of, limits) in self.inputs(kind).items():
            if isinstance(of, list) or of in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
                values[name] = self.widget(of, limits)
        dear = {
            "any_angle": lambda: self.chance(0.08),
            "crop_size": lambda: self.pick((512,) * 14 + (576, 1024)),
            "mask_type": lambda: self.pick(("ellipse",) * 8 + ("box",) * 8 + ("parsing",)),
            "detector": lambda: self.pick(
                ("builtin",) * 9 + ("retinaface_mobile0.25",) * 9 + ("retinaface_resnet50",)
            ),
            "vre_name": lambda: self.pick(("builtin",) * 19 + ("associate_2.ckpt",)),
            "lora_name": lambda: self.pick(("none",) * 19 + ("pytorch_lora_weights.safetensors",)),
            "indices": lambda: self.pick(("0",) * 12 + INDICES),
            "min_size": lambda: self.pick((24,) * 16 + (0, 0, 1, 60, 16384)),
            "max_size": lambda: self.pick((0,) * 16 + (1, 50, 16384)),
            "max_faces": lambda: self.pick((0,) * 6 + (1, 1, 2, 1000)),
            "select": lambda: self.pick(("all",) * 6 + ("largest", "most central", "by index")),
            "strength": lambda: self.pick((1.0,) * 6 + (0.0, 0.01, 0.5)),
            "upscale": lambda: self.pick((1.0,) * 12 + (1.25, 1.5, 2.0, 4.0)),
            "tile": lambda: self.pick((768,) * 6 + (512, 256, 64, 0)),
            "overlap": lambda: self.pick((256,) * 4 + (0, 64, 4096)),
            "osediff_name": lambda: self.pick(
                ("osediff.safetensors",) * 19 + ("osediff_face.safetensors",)
            ),
            "diffir_name": lambda: self.pick(
                (*DIFFIR[kind],) * 9
                + ("DiffIRS2-GANx4.safetensors", "DiffIRS2-celeba.safetensors", "notes.safetensors")
            ),
            "working_size": lambda: self.pick(("256",) * 4 + ("picture",) * 4 + ("512",)),
            "confidence": lambda: (
                self.pick((0.9,) * 8 + (0.5, 0.7, 0.999, 0.3)) if not self.chance(0.02) else 0.05
            ),
        }
        if kind in OURS:
            values |= {name: make() for name, make in dear.items() if name in values}
        return values | fixed

    def hostile(self, kind: str, values: dict[str, Any], share: float) -> dict[str, Any]:
        """The widgets' values, with a wrong one in a `share` of the cases.

        It is out of range, of another type, or fed by a link, whose value the host does not check.
        """
        names = [name for name in values if not isinstance(values[name], list)]
        if not names or not self.chance(share):
            return values
        name = self.pick(names)
        of, limits = self.inputs(kind)[name]
        low, high = limits.get("min", 0), limits.get("max", 1)
        numbers = (low - 1, high + 1, -1, 0, low - 1e6, high * 7 + 3)
        if of in ("INT", "FLOAT") and self.chance(0.6):
            number = self.pick(numbers)
            if of == "INT":
                feed = self.node("PrimitiveInt", value=round(number))
            else:
                text = self.pick((number, "nan", "inf", "-inf", 1e300))
                feed = self.node("PrimitiveFloat", value=text)
            self.refusable = True  # the source has its own limits
            return values | {name: [feed, 0]}
        self.refusable = True
        odd = (
            "",
            "x",
            None,
            [],
            {},
            True,
            10**40,
            "nan",
            -0.0,
            "9" * 400,
            {"__value__": [1, 2]},
            *numbers,
        )
        return values | {name: self.pick(odd)}

    # Pictures

    def picture(self) -> Link:
        kind = self.rng.random()
        if kind < 0.7 and self.faces:
            link: Link = [self.node("LoadImage", image=self.pick(self.faces)), 0]
        elif kind < 0.8:
            link = [self.node("LoadImage", image=self.pick(self.pictures)), 0]
        elif kind < 0.88:
            width, height = self.sides()
            link = [
                self.node(
                    "EmptyImage",
                    width=width,
                    height=height,
                    batch_size=self.pick((1, 1, 2, 5)),
                    color=self.seed() % 2**24,
                ),
                0,
            ]
        else:
            width, height = self.sides()
            made = {
                "frames": self.pick((0, 1, 1, 1, 2, 4)),
                "channels": self.pick((1, 2, 3, 3, 3, 4, 4, 5)),
                "values": self.pick(VALUES),
            }
            link = [self.node("FuzzImage", width=width, height=height, seed=self.seed(), **made), 0]
        for _ in range(self.pick((0, 0, 0, 0, 1, 1, 2, 3))):
            link = self.changed(link)
        if self.chance(0.15):
            link = [self.node("FuzzHarm", image=link, harm=self.pick(HARMS), seed=self.seed()), 0]
        return [self.node("FuzzSeal", image=link), 0]

    def sides(self) -> tuple[int, int]:
        if self.chance(0.05):
            sides = [self.pick(LONG_SIDES), self.pick((1, 2, 9, 100))]
            self.rng.shuffle(sides)
            return sides[0], sides[1]
        return self.pick(SIDES), self.pick(SIDES)

    def changed(self, link: Link) -> Link:
        """The picture after a core node."""
        width, height = (
            self.sides()
            if self.chance(0.5)
            else (self.pick((200, 257, 300)), self.pick((200, 257, 300)))
        )
        ways: dict[str, Callable[[], Link]] = {
            "ImageScale": lambda: [
                self.node(
                    "ImageScale",
                    **self.widgets("ImageScale", width=width, height=height),
                    image=link,
                ),
                0,
            ],
            "ImageScaleBy": lambda: [
                self.node(
                    "ImageScaleBy",
                    image=link,
                    upscale_method="area",
                    scale_by=self.pick((0.01, 0.5, 1.7)),
                ),
                0,
            ],
            "ImageInvert": lambda: [self.node("ImageInvert", image=link), 0],
            "ImageBatch": lambda: [self.node("ImageBatch", image1=link, image2=self.plain()), 0],
            "itself": lambda: [self.node("ImageBatch", image1=link, image2=link), 0],
            "RepeatImageBatch": lambda: [
                self.node("RepeatImageBatch", image=link, amount=self.pick((1, 2, 3))),
                0,
            ],
            "part": lambda: [
                self.node(
                    "ImageFromBatch",
                    image=link,
                    batch_index=self.pick((0, 1, 9)),
                    length=self.pick((1, 2)),
                ),
                0,
            ],
            "ImageCrop": lambda: [
                self.node(
                    "ImageCrop",
                    image=link,
                    width=width,
                    height=height,
                    x=self.pick((0, 30, 999)),
                    y=0,
                ),
                0,
            ],
            "ImageFlip": lambda: [
                self.node("ImageFlip", **self.widgets("ImageFlip"), image=link),
                0,
            ],
            "ImageRotate": lambda: [
                self.node("ImageRotate", **self.widgets("ImageRotate"), image=link),
                0,
            ],
            "noise": lambda: [
                self.node(
                    "ImageAddNoise",
                    image=link,
                    seed=self.seed(),
                    strength=self.pick((0.01, 0.1, 1.0)),
                ),
                0,
            ],
            "ImageQuantize": lambda: [
                self.node(
                    "ImageQuantize", image=link, colors=self.pick((1, 2, 256)), dither="none"
                ),
                0,
            ],
            "ImageBlur": lambda: [
                self.node("ImageBlur", image=link, blur_radius=self.pick((1, 4)), sigma=2.0),
                0,
            ],
            "pad": lambda: [
                self.node(
                    "ImagePadForOutpaint",
                    image=link,
                    left=8,
                    top=0,
                    right=self.pick((0, 160)),
                    bottom=40,
                    feathering=0,
                ),
                0,
            ],
            "alpha": lambda: [
                self.node("JoinImageWithAlpha", image=link, alpha=self.mask(link)),
                0,
            ],
            "no alpha": lambda: [self.node("SplitImageWithAlpha", image=link), 0],
            "grey": lambda: [
                self.node(
                    "MaskToImage", mask=[self.node("ImageToMask", image=link, channel="red"), 0]
                ),
                0,
            ],
            "stitch": lambda: [
                self.node(
                    "ImageStitch",
                    **self.widgets("ImageStitch", spacing_width=0),
                    image1=link,
                    image2=self.plain(),
                ),
                0,
            ],
            "RebatchImages": lambda: [
                self.node("RebatchImages", images=link, batch_size=self.pick((1, 2))),
                0,
            ],
        }
        return self.pick(ways.values())()

    def plain(self) -> Link:
        return [self.node("LoadImage", image=self.pick(self.faces or self.pictures)), 0]

    def mask(self, image: Link) -> Link:
        kind = self.rng.random()
        if kind < 0.35:
            return [
                self.node(
                    "ImageToMask", image=image, channel=self.pick(("red", "green", "blue", "alpha"))
                ),
                0,
            ]
        width, height = self.sides()
        if kind < 0.6:
            return [
                self.node(
                    "SolidMask", value=self.pick((0.0, 0.5, 1.0)), width=width, height=height
                ),
                0,
            ]
        if kind < 0.7:
            return [self.node("LoadImage", image=self.pick(self.pictures)), 1]
        made = {"frames": self.pick((0, 1, 1, 2, 3)), "values": self.pick(MASKS)}
        return [self.node("FuzzMask", width=width, height=height, seed=self.seed(), **made), 0]

    def holes(self, image: Link) -> Link:
        """A mask, most often of the picture's size and of some of its pixels."""
        if self.chance(0.4):
            return self.mask(image)
        mask = [self.node("ImageToMask", image=image, channel=self.pick(("red", "green"))), 0]
        return [self.node("ThresholdMask", mask=mask, value=self.pick((0.3, 0.7, 0.95))), 0]

    # Models

    def model(self) -> tuple[Link, Link]:
        builtin = self.node("OSDFaceBuiltinModel")
        model, vae = [builtin, 0], [builtin, 1]
        if self.chance(0.1):
            other = self.node("FuzzModel", model=model, vae=vae, kind=self.pick(MODELS))
            model, vae = [other, 0], [other, 1]
        if self.chance(0.15):
            kind = self.pick(MODEL_PATCHES)
            if kind in self.info:
                # Only axes that a latent has: an error about others would not be ours.
                axis = {"dim": self.pick((0, 0, 2, 3))} if kind == "ContextWindowsManual" else {}
                model = [self.node(kind, **self.widgets(kind, **axis), model=model), 0]
        return model, vae

    def conditioning(self, link: Link) -> Link:
        if self.chance(0.12):
            kind = self.pick(CONDITIONINGS)
            return [
                self.node(
                    "FuzzConditioning",
                    kind=kind,
                    count=self.pick((0, 1, 2)),
                    seed=self.seed(),
                    conditioning=link,
                ),
                0,
            ]
        if self.chance(0.1):
            kind = self.pick(CONDITIONING_PATCHES)
            links = {
                name: link for name, (of, _) in self.inputs(kind).items() if of == "CONDITIONING"
            }
            masks = {
                name: self.mask(self.plain())
                for name, (of, _) in self.inputs(kind).items()
                if of == "MASK"
            }
            return [self.node(kind, **self.widgets(kind), **links, **masks), 0]
        return link

    # Whole graphs

    def ours(self, kind: str, **links: Any) -> str:
        return self.node(kind, **self.hostile(kind, self.widgets(kind), 0.07), **links)

    def detected(self, image: Link) -> tuple[Link, Link]:
        """Faces and crops, perhaps chosen again or harmed."""
        found = self.ours("FaceDetectAlign", image=image)
        faces, crops = [found, 0], [found, 1]
        if self.chance(0.15):
            faces = [
                self.node("FuzzFaces", faces=faces, harm=self.pick(FACE_HARMS), seed=self.seed()),
                0,
            ]
        if self.chance(0.2):
            chosen = self.ours("FaceSelect", faces=faces)
            other = self.pick((0, 0, 2))
            faces, crops = [chosen, other], [chosen, other + 1]
        return faces, crops

    def step(self, crops: Link) -> Link:
        model, vae = self.model()
        prompts = self.conditioning([self.ours("OSDFaceVRE", crops=crops), 0])
        return [
            self.ours("OSDFaceOneStep", model=model, vae=vae, crops=crops, conditioning=prompts),
            0,
        ]

    def whole(self) -> None:
        image = self.picture()
        faces, crops = self.detected(image)
        if self.chance(0.3):
            masks = self.ours("FaceMaskToCrops", faces=faces, mask=self.holes(image))
            crops = [self.ours("DiffIRInpaint", image=crops, mask=[masks, 0]), 0]
        restored = self.step(crops)
        if self.chance(0.05):
            restored = self.changed(restored)
        self.pasted(image, faces, restored)

    def pasted(self, image: Link, faces: Link, restored: Link) -> None:
        if self.chance(0.12):
            image = [
                self.node(
                    "ImageScaleBy",
                    image=image,
                    upscale_method="area",
                    scale_by=self.pick((0.5, 2.0, 1.37, 0.03)),
                ),
                0,
            ]
        keep = {"keep": self.mask(image)} if self.chance(0.25) else {}
        self.ours("FacePasteBack", image=image, faces=faces, restored=restored, **keep)

    def one_node(self) -> None:
        image = self.picture()
        model, vae = self.model()
        keep = {"keep": self.mask(image)} if self.chance(0.25) else {}
        self.ours("OSDFaceRestore", image=image, model=model, vae=vae, **keep)

    def only_step(self) -> None:
        image = self.picture()
        width, height = (
            self.pick((1, 7, 8, 9, 40, 64, 100, 200)),
            self.pick((1, 7, 8, 12, 64, 100, 130)),
        )
        self.step(
            [
                self.node(
                    "ImageScale",
                    image=image,
                    upscale_method="bilinear",
                    width=width,
                    height=height,
                    crop="disabled",
                ),
                0,
            ]
        )

    def only_upscale(self) -> None:
        model, vae = self.model()
        text = self.node("FuzzConditioning", kind="text", count=1, seed=self.seed())
        self.ours(
            "OSEDiffUpscale",
            image=self.picture(),
            model=model,
            vae=vae,
            conditioning=self.conditioning([text, 0]),
        )

    def only_fill(self) -> None:
        image = self.picture()
        self.ours("DiffIRInpaint", image=image, mask=self.holes(image))

    def only_enhance(self) -> None:
        self.ours("DiffIREnhance", image=self.picture())

    def only_masks(self) -> None:
        image = self.picture()
        faces, _ = self.detected(image)
        self.ours("FaceMaskToCrops", faces=faces, mask=self.holes(image))

    def only_paste(self) -> None:
        image = self.picture()
        faces, crops = self.detected(image)
        ways = (
            lambda: crops,
            self.picture,
            lambda: [self.node("ImageInvert", image=crops), 0],
            lambda: self.changed(crops),
        )
        self.pasted(image, faces, self.pick(ways)())

    def only_find(self) -> None:
        faces, _ = self.detected(self.picture())
        self.ours("FaceSelect", faces=faces)

    def make(self) -> Made:
        self.pick(
            (self.whole,) * 5
            + (self.one_node,) * 5
            + (self.only_step,) * 3
            + (self.only_paste,) * 3
            + (self.only_find,) * 2
            + (self.only_upscale,) * 3
            + (self.only_fill,) * 3
            + (self.only_enhance,) * 2
            + (self.only_masks,)
        )()
        if self.chance(0.06):
            self.rewire()
        if self.chance(0.03):
            self.cut()
        self.judge()
        return Made(self.graph, self.refusable)

    def members(self) -> list[str]:
        return [name for name, node in self.graph.items() if node["class_type"] in OURS]

    def rewire(self) -> None:
        """Connects an input of one of our nodes to some other output, of the right type or not."""
        name = self.pick(self.members())
        links = [
            key for key, value in self.graph[name]["inputs"].items() if isinstance(value, list)
        ]
        if not links:
            return
        if self.chance(0.4):
            kind = self.pick(("nothing", "text", "list", "dictionary", "number"))
            source = [self.node("FuzzAnything", kind=kind), 0]
        else:
            # Only earlier ones, so that the graph has no cycle.
            other = self.pick(
                [
                    n
                    for n in self.graph
                    if int(n) < int(name) and self.info[self.graph[n]["class_type"]]["output"]
                ]
                or [name]
            )
            outputs = self.info[self.graph[other]["class_type"]]["output"]
            source = [other, self.rng.randrange(len(outputs)) if outputs else 0]
        self.graph[name]["inputs"][self.pick(links)] = source
        self.refusable = True

    def cut(self) -> None:
        name = self.pick(self.members())
        if inputs := self.graph[name]["inputs"]:
            del inputs[self.pick(inputs)]
            self.refusable = True

    def judge(self) -> None:
        """Adds a judge for each of our nodes, on what the node really got."""
        for name in self.members():
            kind, inputs = self.graph[name]["class_type"], self.graph[name]["inputs"]
            links = {
                key: value
                for key, value in inputs.items()
                if isinstance(value, list) and len(value) == 2
            }
            keep = {"keep": links["keep"]} if "keep" in links else {}
            if kind == "FaceDetectAlign" and "image" in links:
                self.node(
                    "JudgeFaces",
                    faces=[name, 0],
                    crops=[name, 1],
                    preview=[name, 2],
                    count=[name, 3],
                    report=[name, 4],
                    image=links["image"],
                )
            elif kind == "FaceSelect" and "faces" in links:
                self.node(
                    "JudgeFaces",
                    faces=[name, 0],
                    crops=[name, 1],
                    rest=[name, 2],
                    rest_crops=[name, 3],
                    report=[name, 4],
                    given=links["faces"],
                )
            elif kind == "OSDFaceVRE" and "crops" in links and not self.lazy(name):
                self.node("JudgePrompts", crops=links["crops"], conditioning=[name, 0])
            elif kind == "OSDFaceOneStep" and "crops" in links and not self.lazy(name):
                self.node("JudgeStep", crops=links["crops"], restored=[name, 0])
            elif kind == "OSEDiffUpscale" and "image" in links and "upscale" in inputs:
                self.node(
                    "JudgeUpscale",
                    image=links["image"],
                    after=[name, 0],
                    upscale=inputs["upscale"],
                )
            elif kind == "DiffIREnhance" and "image" in links:
                scale = DIFFIR[kind].get(str(inputs.get("diffir_name")), 1)
                self.node("JudgeUpscale", image=links["image"], after=[name, 0], upscale=scale)
            elif kind == "DiffIRInpaint" and {"image", "mask"} <= set(links):
                if not self.lazy(name):
                    self.node(
                        "JudgeFill", image=links["image"], mask=links["mask"], after=[name, 0]
                    )
            elif kind == "FaceMaskToCrops" and {"faces", "mask"} <= set(links):
                self.node("JudgeMasks", faces=links["faces"], mask=links["mask"], after=[name, 0])
            elif kind == "FacePasteBack" and {"image", "faces"} <= set(links):
                self.node(
                    "JudgePaste",
                    image=links["image"],
                    after=[name, 0],
                    mask=[name, 1],
                    faces=links["faces"],
                    **keep,
                )
            elif kind == "OSDFaceRestore" and "image" in links:
                self.node(
                    "JudgePaste",
                    image=links["image"],
                    after=[name, 0],
                    mask=[name, 1],
                    both=[name, 2],
                    report=[name, 3],
                    **keep,
                )
            else:
                self.node("PreviewAny", source=[name, 0])

    def lazy(self, name: str) -> bool:
        """Whether the networks run only where pasting asks for them: half of the pasting graphs."""
        return int(name) % 2 == 0 and any(
            node["class_type"] == "FacePasteBack" for node in self.graph.values()
        )


# Pictures


def write_pictures(folder: Path) -> tuple[list[str], list[str]]:
    """Writes files of many kinds; returns the names of those without faces and those with."""
    rng = np.random.default_rng(0)
    noise = (rng.random((90, 120, 4)) * 255).astype(np.uint8)
    rgb = Image.fromarray(noise[..., :3])
    rgb.save(folder / "rgb.png")
    Image.fromarray(noise).save(folder / "rgba.png")
    Image.fromarray(noise[..., 0]).save(folder / "grey.png")
    Image.fromarray(noise[..., :2], "LA").save(folder / "grey_alpha.png")
    rgb.convert("P").save(folder / "palette.png", transparency=3)
    rgb.convert("1").save(folder / "bits.png")
    Image.fromarray((rng.random((40, 50)) * 65535).astype(np.uint16)).save(folder / "deep.png")
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    turned = Image.Exif()
    turned[0x0112] = 6
    rgb.save(folder / "turned.jpg", exif=turned)
    rgb.save(folder / "frames.gif", save_all=True, append_images=[rgb.rotate(90), rgb.rotate(180)])
    for width, height in ((1, 1), (1, 300), (700, 2), (2048, 12)):
        Image.new("RGB", (width, height), (90, 140, 20)).save(folder / f"{width}x{height}.png")
    plain = sorted(path.name for path in folder.iterdir())
    astronaut, group = photographs.astronaut(), photographs.group()
    made = {
        "astronaut.png": astronaut.resize((256, 256)),
        "astronaut.webp": astronaut.resize((384, 384)),
        "two.png": group.crop((0, 0, 1280, 540)).resize((512, 216)),
        "wide.png": group.crop((0, 0, 1920, 540)).resize((600, 170)),
        "close.png": astronaut.crop((150, 20, 310, 220)),
        "lying.png": astronaut.resize((256, 256)).rotate(90),
        "grey_face.png": astronaut.resize((256, 256)).convert("L"),
        "face_alpha.png": astronaut.resize((200, 220)).convert("RGBA"),
    }
    for i in range(4):
        cell = group.crop((i % 3 * 640, i // 3 * 540, (i % 3 + 1) * 640, (i // 3 + 1) * 540))
        made[f"person_{i}.jpg"] = cell.resize((300, 253))
    for name, picture in made.items():
        picture.save(folder / name)
    shifted = [
        Image.fromarray(np.roll(np.asarray(made["astronaut.png"]), step, 1)) for step in (0, 4, 8)
    ]
    shifted[0].save(folder / "video.webp", save_all=True, append_images=shifted[1:], lossless=True)
    turned[0x0112] = 8
    made["astronaut.png"].rotate(270).save(folder / "face_turned.jpg", exif=turned)
    return plain, [*made, "video.webp", "face_turned.jpg"]


def populate(base: Path) -> tuple[list[str], list[str]]:
    """Makes `base` a ComfyUI base directory with the pack, and what the fuzz needs.

    That is its nodes, its pictures, and a face parser of noise. Returns as `write_pictures`.
    """
    for name in (
        "models/osdface",
        "models/facedetection",
        "models/loras",
        "models/diffir",
        "custom_nodes/fuzz",
        "input",
        "output",
        "user",
    ):
        (base / name).mkdir(parents=True, exist_ok=True)
    (base / "custom_nodes" / "osdface").symlink_to(ROOT)
    shutil.copy(
        Path(__file__).with_name("fuzz_nodes.py"), base / "custom_nodes" / "fuzz" / "__init__.py"
    )
    photographs.write_detector(base / "models" / "facedetection")
    torch.manual_seed(0)
    torch.save(ParseNet().state_dict(), base / "models" / "facedetection" / "parsing_parsenet.pth")
    for kind, files in SMALL_DIFFIR.items():
        for name in files:
            file = base / "models" / "diffir" / f"DiffIRS2-{name}.safetensors"
            save_file(small(kind).state_dict(), file)
    (base / "models" / "diffir" / "notes.safetensors").write_text("no tensors")
    return write_pictures(base / "input")


# Runs


@dataclass
class Tally:
    """The results of the graphs.

    kinds: how often each result came.
    sentences: how often each error sentence came.
    violations: what was wrong, the graph's number, and the graph.
    slowest: seconds and the graph's number.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    sentences: Counter[str] = field(default_factory=Counter)
    violations: list[tuple[str, int, Graph]] = field(default_factory=list)
    slowest: list[tuple[float, int]] = field(default_factory=list)


def stem(sentence: str) -> str:
    """A sentence without its numbers, for counting."""
    return re.sub(r"\d[\d.e+-]*", "#", sentence)[:110]


def outcome(
    address: str,
    link: websocket.WebSocket,
    client: str,
    made: Made,
    tally: Tally,
) -> tuple[str, bool]:
    """The result of a graph, and whether it is a violation.

    address: of the server.
    link: its websocket.
    client: our id on the websocket.
    made: the graph.
    tally: counts sentences.
    """
    answer = requests.post(
        f"{address}/prompt", json={"prompt": made.graph, "client_id": client}, timeout=ASLEEP
    )
    if answer.status_code == 400:
        body = answer.json()
        errors = [error for node in body["node_errors"].values() for error in node["errors"]] or [
            body["error"]
        ]
        kinds = sorted({error["type"] for error in errors})
        inner = [error for error in errors if error["type"].startswith("exception")]
        if inner or not made.refusable:
            return f"refused: {json.dumps(errors)[:600]}", True
        return f"refused by the host's validation: {kinds[0]}", False
    if not answer.ok:
        # The host itself fails on a link to an output that does not exist, and the like.
        return f"HTTP {answer.status_code}: {answer.text[:300]}", True
    mine, verdicts, waits = answer.json()["prompt_id"], [], 0
    link.settimeout(PATIENCE / WAITS)
    while True:
        try:
            message = link.recv()
        except websocket.WebSocketTimeoutException:
            # One wait may time out because this machine was busy or asleep, but not all of them.
            waits += 1
            if waits == WAITS:
                raise
            continue
        if isinstance(message, bytes):
            continue
        event = json.loads(message)
        given = event["data"]
        if given.get("prompt_id") != mine:
            continue
        if event["type"] == "executed" and given.get("output"):
            verdicts += given["output"].get("verdict", [])
        if event["type"] == "execution_error":
            return judged(given, tally)
        if event["type"] == "execution_success":
            for verdict in (
                "restored",
                "nothing changed",
                "nobody",
                "step",
                "enlarged",
                "filled",
                "no hole",
                "masks",
                "1 found",
                "0 found",
                "prompts",
            ):
                if verdict in verdicts:
                    return f"right: {RIGHT[verdict]}", False
            return "right: nothing of ours was asked for", False


RIGHT = {
    "restored": "faces restored, the rest of the picture bit for bit",
    "nobody": "no face, the very picture",
    "nothing changed": "faces, and nothing to be changed",
    "step": "crops restored",
    "enlarged": "pictures enlarged",
    "filled": "holes filled, the rest of the picture bit for bit",
    "no hole": "no hole, the very picture",
    "masks": "masks carried into crops",
    "1 found": "faces found",
    "0 found": "no face found",
    "prompts": "prompts made",
}


def judged(given: dict[str, Any], tally: Tally) -> tuple[str, bool]:
    """The result of a graph that ended in an error, and whether it is a violation."""
    node, kind, says = (
        given["node_type"],
        given["exception_type"],
        given["exception_message"].strip(),
    )
    if node not in OURS:
        if node.startswith(("Judge", "Fuzz")):
            return f"{node}: {kind}: {says[:300]}", True
        return f"another node's own error: {node}: {kind}", False
    if not kind.endswith("OSDFaceError"):
        place = next((line for line in reversed(given["traceback"]) if "osdface" in line), "")
        if not place:
            # For example an empty list of pictures, which the host would take one by one.
            return f"the host's own error before a node of ours was called: {kind}", False
        return f"{node}: {kind}: {says[:300]} {place.strip()[:300]}", True
    if "\n" in says or len(says) > LONGEST_SENTENCE or not says.endswith("."):
        return f"{node}: not one sentence: {says[:1200]}", True
    tally.sentences[f"{node}: {stem(says)}"] += 1
    return f"one sentence of {node}", False


def run(
    address: str,
    graphs: Iterator[tuple[int, Made]],
    tally: Tally,
    say: Callable[[str], None] = print,
) -> None:
    """Runs the graphs one after the other.

    A graph that the server does not survive or answer is a violation and ends the run.
    """
    client = str(uuid.uuid4())
    link = websocket.create_connection(
        f"{address.replace('http', 'ws')}/ws?clientId={client}", timeout=60
    )
    try:
        for number, made in graphs:
            start = time.monotonic()
            gone = False
            try:
                kind, violation = outcome(address, link, client, made, tally)
            except (OSError, requests.RequestException, websocket.WebSocketException) as error:
                kind, violation, gone = (
                    f"the server is gone or hangs: {type(error).__name__}: {error}",
                    True,
                    True,
                )
            tally.slowest = sorted(
                [*tally.slowest, (time.monotonic() - start, number)], reverse=True
            )[:8]
            tally.kinds[f"VIOLATION {stem(kind)}" if violation else kind] += 1
            if violation:
                tally.violations.append((kind, number, made.graph))
                say(f"VIOLATION in graph {number}: {kind}\n{json.dumps(made.graph)}")
            done = sum(tally.kinds.values())
            if done % 100 == 0:
                say(f"{done} graphs, {len(tally.violations)} violations")
            if gone:
                return
    except KeyboardInterrupt:
        say("Stopped: the table is of the graphs until here.")
    finally:
        link.close()


def graphs(
    count: Iterable[int],
    seed: int,
    info: dict[str, Any],
    pictures: list[str],
    faces: list[str],
) -> Iterator[tuple[int, Made]]:
    """The random graphs of these numbers, each the same for the same seed.

    count: the numbers.
    seed: of all graphs.
    info: the server's object_info.
    pictures: files without faces.
    faces: files with faces.
    """
    for number in count:
        yield number, Maker(f"{seed}/{number}", info, pictures, faces).make()


def table(tally: Tally, seconds: float) -> str:
    total = sum(tally.kinds.values())
    lines = ["| what became of it | graphs |", "|---|---|"]
    ranked = sorted(tally.kinds.items(), key=lambda item: (item[0][:9], -item[1]))
    lines += [f"| {kind.replace('|', '/')} | {number} |" for kind, number in ranked]
    lines += [
        f"| all | {total} |",
        "",
        f"{total} graphs in {seconds:.0f} s; {len(tally.sentences)} different sentences; "
        f"{len(tally.violations)} violations. Slowest: "
        + ", ".join(f"{s:.1f} s (number {n})" for s, n in tally.slowest),
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--comfyui", type=Path, default=comfyui_path())
    parser.add_argument("--only", type=int, nargs="*", help="numbers of graphs")
    parser.add_argument("--replay", type=Path, help="a graph as it was printed")
    parser.add_argument(
        "--sentences", action="store_true", help="also print how often each sentence came"
    )
    given = parser.parse_args()
    if given.comfyui is None:
        parser.error("no ComfyUI: give --comfyui")
    tally, start = Tally(), time.monotonic()
    numbers = iter(given.only or range(given.count))
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pictures, faces = populate(base)
        left: Iterator[tuple[int, Made]] = iter(())
        while True:
            before = len(tally.violations)
            with server(given.comfyui, base, START) as address:
                info = requests.get(f"{address}/object_info", timeout=120).json()
                if given.replay:
                    left = iter([(0, Made(json.loads(given.replay.read_text()), True))])
                else:
                    left = graphs(numbers, given.seed, info, pictures, faces)
                run(address, left, tally, lambda text: print(text, flush=True))
            if (
                len(tally.violations) == before
                or "the server is gone" not in tally.violations[-1][0]
                or given.replay
            ):
                break
    print(table(tally, time.monotonic() - start))
    if given.sentences:
        for sentence, number in tally.sentences.most_common():
            print(f"{number:5} {sentence}")
    return 1 if tally.violations else 0


if __name__ == "__main__":
    sys.exit(main())
