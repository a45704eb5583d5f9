"""The built-in model: the whole pipeline at small size, for where no weights are found. A stand-in
to try the pack with, not OSDFace.

    backbone(device, dtype)   a Backbone on diffusers' UNet and our small autoencoder
    unet(), vae()             its two networks, in the manner of diffusers'
    autoencoder(operations)   the autoencoder alone, tensors in and out
    embedder(operations)      the VisualEmbedder: crops -> (B,77,1024) prompts
    detector(operations)      the face detector, to be called as retinaface.RetinaFace is
    ANNOUNCEMENT              a sentence for the log where nobody asked for the built-in model

Each reads its file of this folder, a few megabytes of fp16, and gives a network in fp32 on the CPU,
ready to run. Nothing is fetched. Latents have about unit variance: what a latent is scaled by is 1.
docs/builtin.md tells how the files were made.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ...faces.retinaface import RetinaFace, build_retinaface
from ...layers import Operations, filled
from ...sd21.backbone import LATENT_CHANNELS
from ..vre import VisualEmbedder, build_embedder
from ..vre.embedder import WIDTH
from .autoencoder import Autoencoder

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from ...diffusers.backbone import DiffusersBackbone

NAME = "builtin"
FOLDER = Path(__file__).parent
AUTOENCODER, UNET, VRE, DETECTOR = (
    FOLDER / f"{part}.safetensors" for part in ("autoencoder", "unet", "vre", "detector")
)
ANNOUNCEMENT = (
    "Using the small built-in model, a stand-in that needs no download; for OSDFace's own quality "
    "get its weights with `python install.py`."
)

SCALING = 1.0
HEAD = 32
WIDTHS = (64, 64, 128)
UNET_CONFIG: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "layers_per_block": 1,
    "block_out_channels": WIDTHS,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": WIDTH,
    # diffusers' name for the number of heads
    "attention_head_dim": tuple(width // HEAD for width in WIDTHS),
    "use_linear_projection": True,
}


def _read(path: Path, make: Any) -> Any:
    return filled(
        make,
        load_file(path),
        f"{path.name} of the built-in model does not fit",
        "install this pack anew.",
    )


def autoencoder(operations: Operations = nn) -> Autoencoder:
    network: Autoencoder = _read(AUTOENCODER, lambda: Autoencoder(operations))
    return network


def embedder(operations: Operations = nn) -> VisualEmbedder:
    return build_embedder(load_file(VRE), operations, VRE.name)


def detector(operations: Operations = nn) -> RetinaFace:
    return build_retinaface(load_file(DETECTOR), operations)


def unet() -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    network: UNet2DConditionModel = _read(UNET, lambda: UNet2DConditionModel(**UNET_CONFIG))
    return network


class DiffusersAutoencoder(Autoencoder):
    """The autoencoder in the manner of diffusers' AutoencoderTiny."""

    config = SimpleNamespace(
        scaling_factor=SCALING,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(1, 1, 1, 1),
        shift_factor=None,
    )

    def encode(self, pixels: Tensor) -> Any:
        return SimpleNamespace(latents=super().encode(pixels))

    def decode(self, latents: Tensor) -> Any:
        return SimpleNamespace(sample=super().decode(latents))


def vae() -> DiffusersAutoencoder:
    network: DiffusersAutoencoder = _read(AUTOENCODER, DiffusersAutoencoder)
    return network


def backbone(
    device: torch.device | None = None, dtype: torch.dtype | None = None
) -> DiffusersBackbone:
    """A Backbone for osdface_core.one_step.restore; where None is given, on the device and in the
    type that suit the machine.
    """
    from ...diffusers.backbone import DiffusersBackbone

    return DiffusersBackbone(unet(), vae(), device=device, dtype=dtype)
