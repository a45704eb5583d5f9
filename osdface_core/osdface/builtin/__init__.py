"""The small built-in model: OSDFace's pipeline at small size, for use without weight files.

    autoencoder(operations)   pictures to latents and back
    embedder(operations)      the VisualEmbedder: crops -> (B,77,1024) prompts
    UNET, UNET_CONFIG         the UNet's file, and its configuration for diffusers
    ANNOUNCEMENT              a sentence for the log where the built-in model is taken unasked

Each function reads its file in this folder, a few megabytes of fp16, and gives a network in fp32 on
the CPU, ready to run. Nothing is downloaded. Latents have about unit variance, so their scale is 1.
docs/builtin.md tells how the files were made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from ...layers import Operations, load_network
from ...sd21.backbone import TEXT_WIDTH
from ..vre import VisualEmbedder, build_embedder
from .autoencoder import CHANNELS, Autoencoder

FOLDER = Path(__file__).parent
AUTOENCODER, UNET, VRE = (FOLDER / f"{part}.safetensors" for part in ("autoencoder", "unet", "vre"))
ANNOUNCEMENT = (
    "Using the small built-in model, a stand-in that needs no download; for OSDFace's own quality "
    "get its weights with `python install.py`."
)
REMEDY = "install this pack anew."

SCALING = 1.0
HEAD_WIDTH = 32
WIDTHS = (96, 96, 96)
ATTENDS = (False, False, True)
# Residual blocks a level on the way down, one more on the way up.
BLOCKS = 2
UNET_CONFIG: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "layers_per_block": BLOCKS,
    "block_out_channels": WIDTHS,
    "down_block_types": tuple(
        "CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in ATTENDS
    ),
    "up_block_types": tuple(
        "CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(ATTENDS)
    ),
    "cross_attention_dim": TEXT_WIDTH,
    # diffusers' name for the number of heads.
    "attention_head_dim": tuple(width // HEAD_WIDTH for width in WIDTHS),
    "use_linear_projection": True,
}


def misfit(path: Path) -> str:
    """The beginning of the error's sentence for a file that does not fit its network."""
    return f"{path.name} of the built-in model does not fit"


def autoencoder(operations: Operations = nn) -> Autoencoder:
    """The autoencoder, built of the layers in `operations`."""
    tensors = load_file(AUTOENCODER)
    return load_network(lambda: Autoencoder(operations), tensors, misfit(AUTOENCODER), REMEDY)


def embedder(operations: Operations = nn) -> VisualEmbedder:
    """The visual embedder, built of the layers in `operations`."""
    return build_embedder(load_file(VRE), operations, VRE.name)
