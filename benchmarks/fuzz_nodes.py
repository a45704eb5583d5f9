"""Nodes for benchmarks/fuzz.py: odd inputs, and judges of the results.

Copied into a server's custom_nodes.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import random
import sys
from typing import Any, ClassVar

import comfy.model_management as mm
import folder_paths
import torch
from torch import Tensor

DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
    "uint8": torch.uint8,
}
FAR = (1e9, -1e9, 1e30, math.inf, math.nan)
# Checksums of pictures when they were made, to see whether a node has written into its input.
SEALS: dict[int, tuple[Tensor, int]] = {}


def short_of_memory(state: str) -> None:
    """Makes the host load models on the CPU as on a card with little video memory.

    On a CPU it takes neither --lowvram nor --novram. NO_VRAM: every layer's weights are cast as
    they are used, and patched then. LOW_VRAM: those beyond the first 128 MiB.
    """
    load = mm.load_models_gpu

    def loads(*given: Any, **named: Any) -> Any:
        known = mm.is_device_cpu, mm.vram_state, mm.get_free_memory
        mm.is_device_cpu, mm.vram_state = (lambda device: False), mm.VRAMState[state]
        mm.get_free_memory = lambda dev=None, torch_free_too=False: (0, 0) if torch_free_too else 0
        try:
            return load(*given, **named)
        finally:
            mm.is_device_cpu, mm.vram_state, mm.get_free_memory = known

    mm.load_models_gpu = loads


if os.environ.get("FUZZ_VRAM"):
    short_of_memory(os.environ["FUZZ_VRAM"])


class AnyType(str):
    """A type that fits every input, as the switches of many packs have it."""

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


class Node:
    CATEGORY, FUNCTION = "fuzz", "run"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ()
    INPUTS: ClassVar[dict[str, str]] = {}
    OPTIONAL: ClassVar[dict[str, str]] = {}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        wide = {"INT": {"default": 0, "min": -(2**31), "max": 2**31}}
        groups = ("required", cls.INPUTS), ("optional", cls.OPTIONAL)
        return {
            group: {name: (kind, wide.get(kind, {})) for name, kind in given.items()}
            for group, given in groups
        }


class Judge(Node):
    OUTPUT_NODE = True


def bits(picture: Tensor) -> Tensor:
    # The clone is needed: a picture of one channel that was expanded to three counts as contiguous
    # where a side is 1.
    return picture.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def checksum(picture: Tensor) -> int:
    return int(
        (bits(picture).flatten().to(torch.int64) * (torch.arange(picture.nbytes) % 251 + 1)).sum()
    )


class FuzzImage(Node):
    INPUTS: ClassVar = {
        "frames": "INT",
        "height": "INT",
        "width": "INT",
        "channels": "INT",
        "values": "STRING",
        "seed": "INT",
    }
    RETURN_TYPES = ("IMAGE",)

    def run(
        self,
        frames: int,
        height: int,
        width: int,
        channels: int,
        values: str,
        seed: int,
    ) -> tuple[Tensor]:
        rng = torch.Generator().manual_seed(seed)
        picture = torch.rand(frames, height, width, channels, generator=rng)
        if values == "flat":
            picture = torch.full_like(picture, 0.5)
        return (harmed(picture, values, rng),)


class FuzzHarm(Node):
    INPUTS: ClassVar = {"image": "IMAGE", "harm": "STRING", "seed": "INT"}
    RETURN_TYPES = ("IMAGE",)

    def run(self, image: Tensor, harm: str, seed: int) -> tuple[Tensor]:
        return (harmed(image, harm, torch.Generator().manual_seed(seed)),)


def harmed(picture: Tensor, harm: str, rng: torch.Generator) -> Tensor:
    spots = torch.rand(picture.shape, generator=rng) < 0.01
    if harm in ("nan spots", "inf spots"):
        return torch.where(spots, math.nan if harm == "nan spots" else math.inf, picture)
    if harm == "all nan":
        return torch.full_like(picture, math.nan)
    if harm == "wide range":
        return picture * 40 - 20
    if harm == "huge":
        return picture * 1e30
    if harm in DTYPES:
        return (picture * 255).to(torch.uint8) if harm == "uint8" else picture.to(DTYPES[harm])
    if harm.endswith("channels"):
        channels = int(harm.split(maxsplit=1)[0])
        return picture[..., torch.arange(channels) % max(picture.shape[-1], 1)].clone()
    if harm == "strided":
        return picture.transpose(1, 2).contiguous().transpose(1, 2)
    if harm == "expanded":
        return picture[:1].expand(3, *picture.shape[1:])
    if harm == "no frame":
        return picture[:0]
    if harm == "no height":
        return picture[:, :0]
    if harm == "no width":
        return picture[:, :, :0]
    if harm == "three dimensions":
        return picture[0] if len(picture) else picture.flatten(0, 1)
    if harm == "five dimensions":
        return picture[None]
    return picture


class FuzzSeal(Node):
    INPUTS: ClassVar = {"image": "IMAGE"}
    RETURN_TYPES = ("IMAGE",)

    def run(self, image: Tensor) -> tuple[Tensor]:
        if len(SEALS) > 50:
            SEALS.clear()
        SEALS[id(image)] = image, checksum(image)
        return (image,)


class FuzzMask(Node):
    INPUTS: ClassVar = {
        "frames": "INT",
        "height": "INT",
        "width": "INT",
        "values": "STRING",
        "seed": "INT",
    }
    RETURN_TYPES = ("MASK",)

    def run(
        self,
        frames: int,
        height: int,
        width: int,
        values: str,
        seed: int,
    ) -> tuple[Tensor]:
        rng = torch.Generator().manual_seed(seed)
        mask = torch.rand(frames, height, width, generator=rng)
        if values == "two dimensions":
            return (mask.flatten(0, 1),)
        if values == "four dimensions":
            return (mask[..., None],)
        if values == "bool":
            return (mask > 0.5,)
        others = {
            "zero": mask * 0,
            "one": mask * 0 + 1,
            "nan": mask * math.nan,
            "wide": mask * 20 - 10,
            "fp16": mask.half(),
        }
        return (others.get(values, mask),)


class FuzzFaces(Node):
    INPUTS: ClassVar = {"faces": "OSDFACE_FACES", "harm": "STRING", "seed": "INT"}
    RETURN_TYPES = ("OSDFACE_FACES",)

    def run(self, faces: Any, harm: str, seed: int) -> tuple[Any]:
        rng = random.Random(seed)
        types = next(
            module
            for name, module in sys.modules.items()
            if name.endswith("osdface.osdface_core.faces.face")
        )
        if not len(faces):
            plain = ((2.0, 0.0, 3.0), (0.0, 2.0, 4.0))
            points = tuple((float(10 * i), float(7 * i)) for i in range(5))
            made = tuple(
                types.Face(0, (1.0, 2.0, 40.0, 50.0), points, 0.9, i, plain)
                for i in range(2 if faces.frames else 0)
            )
            faces = dataclasses.replace(
                faces, faces=made, crops=torch.rand(len(made), faces.crop_size, faces.crop_size, 3)
            )
        members, far = list(faces.faces), rng.choice(FAR)

        def of(number: float) -> Any:
            return rng.choice(
                [
                    ((number, 0.0, 0.0), (0.0, number, 0.0)),
                    ((1.0, 0.0, number), (0.0, 1.0, number)),
                    ((0.0,) * 3,) * 2,
                ]
            )

        if harm == "matrix":
            members = [dataclasses.replace(face, matrix=of(far)) for face in members]
        elif harm == "tiny matrix":
            members = [
                dataclasses.replace(face, matrix=of(rng.choice([1e-3, 1e-9, 1e-30])))
                for face in members
            ]
        elif harm == "large matrix":
            members = [
                dataclasses.replace(face, matrix=of(rng.choice([1e2, 1e4]))) for face in members
            ]
        elif harm == "mirrored":
            members = [
                dataclasses.replace(face, matrix=((-5.0, 0.0, 400.0), (0.0, 5.0, -100.0)))
                for face in members
            ]
        elif harm == "landmarks":
            members = [
                dataclasses.replace(face, landmarks=((far, far),) * 5, box=(far, far, far, far))
                for face in members
            ]
        elif harm == "box":
            members = [dataclasses.replace(face, box=(5.0, 5.0, 1.0, far)) for face in members]
        elif harm == "one spot":
            members = [dataclasses.replace(face, landmarks=((3.0, 3.0),) * 5) for face in members]
        elif harm == "frame":
            members = [
                dataclasses.replace(face, frame=rng.choice([7, -1, 10**9])) for face in members
            ]
        elif harm == "score":
            members = [dataclasses.replace(face, score=far) for face in members]
        elif harm == "twice":
            members = members * 2
            faces = dataclasses.replace(faces, crops=torch.cat([faces.crops] * 2))
        elif harm == "fewer crops":
            faces = dataclasses.replace(faces, crops=faces.crops[1:])
        elif harm == "more crops":
            faces = dataclasses.replace(
                faces,
                crops=torch.cat([faces.crops, torch.rand(1, faces.crop_size, faces.crop_size, 3)]),
            )
        elif harm == "nan crops":
            faces = dataclasses.replace(faces, crops=faces.crops * math.nan)
        elif harm == "size":
            faces = dataclasses.replace(
                faces, height=rng.choice([0, 1, 10**9]), width=rng.choice([0, 1, 10**9])
            )
        elif harm == "frames":
            faces = dataclasses.replace(faces, frames=rng.choice([0, 7]))
        elif harm == "crop size":
            faces = dataclasses.replace(faces, crop_size=rng.choice([0, 1, 10**6]))
        return (dataclasses.replace(faces, faces=tuple(members)),)


class FuzzConditioning(Node):
    INPUTS: ClassVar = {"kind": "STRING", "count": "INT", "seed": "INT"}
    OPTIONAL: ClassVar = {"conditioning": "CONDITIONING"}
    RETURN_TYPES = ("CONDITIONING",)

    def run(self, kind: str, count: int, seed: int, conditioning: Any = None) -> tuple[Any]:
        with_small_networks()
        rng = torch.Generator().manual_seed(seed)
        text = torch.randn(max(count, 0), 77, 1024, generator=rng)
        given = conditioning or [[text.clamp(min=0), {}]]
        prompts, options = given[0]
        return (
            {
                "text": [[text, {"pooled_output": torch.randn(1, 1024, generator=rng)}]],
                "narrow text": [[text[..., :768], {}]],
                "nothing": [],
                "nan": [[prompts * math.nan, options]],
                "inf": [[prompts + math.inf, options]],
                "no prompt": [[prompts[:0], options]],
                "fewer": [[prompts[1:], options]],
                "more": [[torch.cat([prompts, prompts[:1]]), options]],
                "unmarked": [[prompts, {}]],
                "fp16": [[prompts.half(), options]],
                "two": [*given, *given],
                "two dimensions": [[prompts.flatten(0, 1), options]],
                "no options": [[prompts]],
                "no tensor": [[None, {}]],
                "area": [[prompts, options | {"area": (4, 4, 0, 0), "strength": 1.0}]],
                "mask": [[prompts, options | {"mask": torch.ones(1, 9, 9), "mask_strength": 0.5}]],
            }.get(kind, given),
        )


class FuzzModel(Node):
    INPUTS: ClassVar = {"model": "MODEL", "vae": "VAE", "kind": "STRING"}
    RETURN_TYPES = ("MODEL", "VAE")

    def run(self, model: Any, vae: Any, kind: str) -> tuple[Any, Any]:
        import comfy.model_base
        import comfy.model_detection
        import comfy.model_patcher
        import comfy.sd
        import comfy.taesd.taesd

        unet = {
            "image_size": 32,
            "use_spatial_transformer": True,
            "legacy": False,
            "num_classes": None,
            "adm_in_channels": None,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 320,
            "use_temporal_attention": False,
            "use_temporal_resblock": False,
        }
        others = {
            "sd15": {
                "context_dim": 768,
                "use_linear_in_transformer": False,
                "num_heads": 8,
                "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
            },
            "sdxl": {
                "context_dim": 2048,
                "use_linear_in_transformer": True,
                "adm_in_channels": 2816,
                "num_classes": "sequential",
                "transformer_depth": [0, 0, 2, 2, 10, 10],
            },
            "sd20": {"context_dim": 1024, "use_linear_in_transformer": True},
            "inpainting": {
                "context_dim": 1024,
                "use_linear_in_transformer": True,
                "in_channels": 9,
            },
            "lotus": {
                "context_dim": 1024,
                "use_linear_in_transformer": True,
                "adm_in_channels": 4,
                "num_classes": "sequential",
            },
        }
        if kind in others:
            config = comfy.model_detection.model_config_from_unet_config(unet | others[kind])
            config.unet_config["disable_unet_model_creation"] = True
            cpu = torch.device("cpu")
            base = comfy.model_base.BaseModel(config, comfy.model_base.ModelType.EPS, device=cpu)
            return comfy.model_patcher.ModelPatcher(base, cpu, cpu), vae
        if kind == "taesd":
            return model, comfy.sd.VAE(sd=comfy.taesd.taesd.TAESD(latent_channels=4).state_dict())
        if kind == "16 channels":
            vae = copy.copy(vae)
            vae.latent_channels = 16
        elif kind == "empty vae":
            vae = copy.copy(vae)
            vae.first_stage_model = None
        elif kind == "swapped":
            return vae, model
        return model, vae


class FuzzAnything(Node):
    """Gives what a switch of another pack may pass on."""

    INPUTS: ClassVar = {"kind": "STRING"}
    RETURN_TYPES = (AnyType("*"),)

    def run(self, kind: str) -> tuple[Any]:
        return (
            {
                "nothing": None,
                "text": "text",
                "list": [],
                "dictionary": {"samples": torch.zeros(1, 4, 8, 8)},
                "number": 7,
            }[kind],
        )


class FuzzKeep(Judge):
    """Writes a picture to a file, bit for bit."""

    INPUTS: ClassVar = {"image": "IMAGE", "name": "STRING"}

    def run(self, image: Tensor, name: str) -> Any:
        torch.save(image.clone(), os.path.join(folder_paths.get_output_directory(), name))
        return {"ui": {}}


# Judges: any error that they raise is a violation.


def judge(right: bool, wrong: str) -> None:
    if not right:
        raise AssertionError(wrong)


def sealed(image: Tensor) -> None:
    known = SEALS.get(id(image))
    judge(
        known is None or known[0] is not image or known[1] == checksum(image),
        "the picture was written into",
    )


class JudgePaste(Judge):
    INPUTS: ClassVar = {"image": "IMAGE", "after": "IMAGE", "mask": "MASK"}
    OPTIONAL: ClassVar = {
        "faces": "OSDFACE_FACES",
        "keep": "MASK",
        "report": "STRING",
        "both": "IMAGE",
    }

    def run(
        self,
        image: Tensor,
        after: Tensor,
        mask: Tensor,
        faces: Any = None,
        keep: Any = None,
        report: str = "",
        both: Any = None,
    ) -> Any:
        sealed(image)
        judge(
            after.shape == image.shape and after.dtype == image.dtype,
            f"{after.shape} {after.dtype} of {image.shape} {image.dtype}",
        )
        judge(
            mask.shape == image.shape[:3] and mask.dtype == torch.float32,
            f"mask {mask.shape} {mask.dtype} of {image.shape}",
        )
        judge(bool(((mask >= 0) & (mask <= 1)).all()), "the mask is not in [0,1]")
        known = image.isfinite()
        judge(bool((after.isfinite() | ~known).all()), "not finite where the picture is")
        judge(
            torch.equal(bits(after[mask == 0]), bits(image[mask == 0])),
            "a pixel outside of the mask has changed",
        )
        judge(torch.equal(bits(after[..., 3:]), bits(image[..., 3:])), "alpha has changed")
        if (
            keep is not None
            and keep.shape[1:] == image.shape[1:3]
            and keep.dtype.is_floating_point
            and bool(keep.isfinite().all())
        ):
            stays = keep.expand(mask.shape) >= 1
            judge(torch.equal(bits(after[stays]), bits(image[stays])), "a kept pixel has changed")
        nobody = (faces is not None and not len(faces)) or ", 0 chosen." in report
        if nobody:
            judge(
                not mask.any() and torch.equal(bits(after), bits(image)),
                "no face, and another picture",
            )
        if both is not None:
            judge(
                both.ndim == 4 and both.shape[3] == 3 and len(both) == len(image),
                f"before_after {both.shape} of {image.shape}",
            )
            judge(
                bool(both.isfinite().all()) and bool((both >= 0).all()) and bool((both <= 1).all()),
                "before_after is not in [0,1]",
            )
        return {
            "ui": {
                "verdict": [
                    "nobody" if nobody else "restored" if bool(mask.any()) else "nothing changed"
                ]
            }
        }


class JudgeFaces(Judge):
    INPUTS: ClassVar = {"faces": "OSDFACE_FACES", "crops": "IMAGE", "report": "STRING"}
    OPTIONAL: ClassVar = {
        "image": "IMAGE",
        "preview": "IMAGE",
        "count": "INT",
        "given": "OSDFACE_FACES",
        "rest": "OSDFACE_FACES",
        "rest_crops": "IMAGE",
    }

    def run(
        self,
        faces: Any,
        crops: Tensor,
        report: str,
        image: Any = None,
        preview: Any = None,
        count: Any = None,
        given: Any = None,
        rest: Any = None,
        rest_crops: Any = None,
    ) -> Any:
        judge(crops is faces.crops and len(crops) == len(faces), "crops are not the faces'")
        judge(isinstance(report, str) and bool(report), "no report")
        if image is not None:
            sealed(image)
            side = faces.crop_size
            judge(
                crops.shape == (len(faces), side, side, 3) and crops.dtype == torch.float32,
                f"crops {crops.shape} {crops.dtype}",
            )
            judge(
                (faces.frames, faces.height, faces.width) == tuple(image.shape[:3]),
                "size of the picture",
            )
            judge(count == len(faces), f"count {count} of {len(faces)}")
            judge(
                preview.ndim == 4 and len(preview) == len(image) and preview.shape[3] == 3,
                f"preview {preview.shape} of {image.shape}",
            )
            judge(
                bool(preview.isfinite().all())
                and bool((preview >= 0).all())
                and bool((preview <= 1).all()),
                "preview is not in [0,1]",
            )
            if bool(image.isfinite().all()):
                judge(bool(crops.isfinite().all()), "a crop is not finite")
            judge(
                all(math.isfinite(v) for face in faces.faces for row in face.matrix for v in row),
                "a matrix is not finite",
            )
        if rest is not None:
            judge(
                len(faces) + len(rest) == len(given), f"{len(faces)} + {len(rest)} of {len(given)}"
            )
            judge(len(rest_crops) == len(rest), "rest_crops are not the rest's")
        return {"ui": {"verdict": [f"{min(len(faces), 1)} found"]}}


class JudgeStep(Judge):
    INPUTS: ClassVar = {"crops": "IMAGE", "restored": "IMAGE"}

    def run(self, crops: Tensor, restored: Tensor) -> Any:
        height, width = crops.shape[1:3]
        size = (512, 512) if height == width < 512 else (height, width)
        judge(restored.shape == (len(crops), *size, 3), f"{restored.shape} of {crops.shape}")
        judge(bool(restored.isfinite().all()), "not finite")
        judge(bool((restored >= -0.001).all()) and bool((restored <= 1.001).all()), "not in [0,1]")
        return {"ui": {"verdict": ["step"]}}


class JudgePrompts(Judge):
    INPUTS: ClassVar = {"crops": "IMAGE", "conditioning": "CONDITIONING"}

    def run(self, crops: Tensor, conditioning: Any) -> Any:
        prompts = conditioning[0][0]
        judge(prompts.shape == (len(crops), 77, 1024), f"{prompts.shape} for {crops.shape}")
        judge(bool(prompts.isfinite().all()), "not finite")
        return {"ui": {"verdict": ["prompts"]}}


class JudgeUpscale(Judge):
    INPUTS: ClassVar = {"image": "IMAGE", "after": "IMAGE", "upscale": "FLOAT"}

    def run(self, image: Tensor, after: Tensor, upscale: float) -> Any:
        frames, height, width, channels = image.shape
        size = (max(1, round(height * upscale)), max(1, round(width * upscale)))
        judge(after.shape == (frames, *size, channels), f"{after.shape} of {image.shape}")
        judge(after.dtype == image.dtype, f"{after.dtype} of {image.dtype}")
        judge(bool(after.isfinite().all()), "not finite")
        colour = after[..., : 3 if channels > 2 else 1]
        judge(bool((colour >= 0).all()) and bool((colour <= 1).all()), "not in [0,1]")
        sealed(image)
        return {"ui": {"verdict": ["enlarged"]}}


class JudgeFill(Judge):
    INPUTS: ClassVar = {"image": "IMAGE", "mask": "MASK", "after": "IMAGE"}

    def run(self, image: Tensor, mask: Tensor, after: Tensor) -> Any:
        sealed(image)
        judge(
            after.shape == image.shape and after.dtype == image.dtype,
            f"{after.shape} {after.dtype} of {image.shape} {image.dtype}",
        )
        judge(bool(after.isfinite().all()), "not finite")
        holes = (mask if mask.ndim == 3 else mask[None]) != 0
        hole = bool(holes.any())
        # A mask of another size is refused where it has a hole.
        holes = holes.expand(image.shape[:3]) if hole else torch.zeros(image.shape[:3]).bool()
        judge(torch.equal(bits(after[~holes]), bits(image[~holes])), "outside of holes: changed")
        judge(torch.equal(bits(after[..., 3:]), bits(image[..., 3:])), "alpha has changed")
        return {"ui": {"verdict": ["filled" if hole and len(image) else "no hole"]}}


class JudgeMasks(Judge):
    INPUTS: ClassVar = {"faces": "OSDFACE_FACES", "mask": "MASK", "after": "MASK"}

    def run(self, faces: Any, mask: Tensor, after: Tensor) -> Any:
        side = faces.crop_size
        judge(
            after.shape == (len(faces), side, side) and after.dtype == torch.float32,
            f"{after.shape} {after.dtype} of {len(faces)} faces",
        )
        judge(bool(((after == 0) | (after == 1)).all()), "neither 0 nor 1")
        judge(bool((mask != 0).any()) or not after.any(), "a hole out of nothing")
        return {"ui": {"verdict": ["masks"]}}


def with_small_networks() -> None:
    """Lets OSEDiff Upscale take the built-in model, for which there are no weights, as
    osediff.safetensors. So what the node does around its networks is run.
    """
    node = next(
        (
            module
            for name, module in sys.modules.items()
            if name.endswith("osdface.nodes.osediff_upscale")
        ),
        None,
    )
    if node is None or hasattr(node, "fuzz"):
        return
    room = sys.modules[node.__name__.replace("osediff_upscale", "comfy.osediff")]
    real = node.OSEDiffBackbone

    class Small(real):  # type: ignore[misc,valid-type]
        def __init__(self, model: Any, vae: Any, options: Any, osediff_name: str) -> None:
            mark = {sys.modules[room.HostBackbone.__module__].BUILTIN_MARK: True}
            room.HostBackbone.__init__(
                self, model, vae, {**(options or {}), **mark}, timestep=room.TIMESTEP
            )
            self.encoder = vae

    def choose(model: Any, vae: Any, options: Any, osediff_name: str) -> Any:
        kind = Small if osediff_name == "osediff.safetensors" else real
        return kind(model, vae, options, osediff_name)

    node.OSEDiffBackbone, node.fuzz = choose, True


NODE_CLASS_MAPPINGS = {
    kind.__name__: kind
    for kind in (
        *(
            FuzzImage,
            FuzzHarm,
            FuzzSeal,
            FuzzMask,
            FuzzFaces,
            FuzzConditioning,
            FuzzModel,
            FuzzAnything,
            FuzzKeep,
        ),
        *(JudgePaste, JudgeFaces, JudgeStep, JudgePrompts, JudgeUpscale),
        *(JudgeFill, JudgeMasks),
    )
}
