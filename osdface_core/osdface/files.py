"""OSDFace's weight files."""

from __future__ import annotations

from pathlib import Path

from ..weights.catalogue import WeightFile

# Folders inside the host's models folder.
FOLDER, LORAS = "osdface", "loras"
SEARCHED: dict[str, tuple[str, ...]] = {FOLDER: (FOLDER,), LORAS: (LORAS,)}

# The embedder of degraded faces in OSDFace's checkpoint, and the names of its parts.
LQ_PREFIX = "vqvae_LQ."
ENCODER_PREFIXES = ("encoder.", "quant_conv.", "quantize.embedding.")
PROJECTOR_PREFIX = "projector."

_HUB_FOLDER = "hub:alecccdd/OSDFace/"
_BY_HAND = (
    "https://huggingface.co/alecccdd/OSDFace, or the Google Drive folder that "
    "https://github.com/jkwang28/OSDFace names"
)
_NO_LICENCE = "none stated by its authors (jkwang28/OSDFace)"


def _convert_vre(checkpoint: Path, projector: Path, target: Path) -> Path:
    from .convert import convert_vre

    return convert_vre(checkpoint, projector, target)


def _convert_lora(source: Path, target: Path) -> Path:
    from .convert import convert_lora

    return convert_lora(source, target)


VRE = WeightFile(
    name="osdface_vre.safetensors",
    purpose="OSDFace's visual embedder, converted",
    folder=FOLDER,
    licence=_NO_LICENCE,
    by_hand=_BY_HAND,
    about=118_300_000,
    made_from=("associate_2.ckpt", "embedding_change_weights.pth"),
    convert=_convert_vre,
    signature={
        "encoder.conv_in.weight": (64, 3, 3, 3),
        "quantize.embedding.weight": (1024, 512),
        "projector.conv2.weight": (1024, 256, 1),
    },
)
LORA = WeightFile(
    name="pytorch_lora_weights.safetensors",
    purpose="OSDFace's LoRA for the UNet",
    folder=FOLDER,
    licence=_NO_LICENCE,
    by_hand=_BY_HAND,
    about=67_853_000,
    addresses=(_HUB_FOLDER + "pytorch_lora_weights.safetensors",),
    signature={"unet.mid_block.resnets.0.conv1.lora_A.weight": (16, 1280, 3, 3)},
)
KOHYA_LORA = WeightFile(
    name="osdface_lora_kohya.safetensors",
    purpose="the same LoRA for ComfyUI's own Load LoRA node, converted",
    folder=LORAS,
    licence=_NO_LICENCE,
    by_hand=_BY_HAND,
    about=67_853_000,
    made_from=(LORA.name,),
    convert=_convert_lora,
    signature={"lora_unet_mid_block_resnets_0_conv1.lora_down.weight": (16, 1280, 3, 3)},
)
VRE_CHECKPOINT = WeightFile(
    name="associate_2.ckpt",
    purpose="the released checkpoint that holds the visual embedder's encoder and code book",
    folder=FOLDER,
    licence=_NO_LICENCE,
    by_hand=_BY_HAND,
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
    folder=FOLDER,
    licence=_NO_LICENCE,
    by_hand=_BY_HAND,
    about=1_580_000,
    addresses=(_HUB_FOLDER + "embedding_change_weights.pth",),
    signature={"conv1.weight": (256, 512, 1), "conv2.weight": (1024, 256, 1)},
    needed=False,
)
FILES = (VRE, LORA, KOHYA_LORA, VRE_CHECKPOINT, PROJECTOR)
