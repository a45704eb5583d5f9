"""Writes the stand-in weights under the names and in the layouts of the real files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import seeded
import torch
from safetensors.torch import save_file

UNET_CONFIG = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
VAE_CONFIG = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
SCHEDULER_CONFIG = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument(
        "--only",
        nargs="*",
        choices=["checkpoint", "diffusers", "osdface"],
        default=["checkpoint", "diffusers", "osdface"],
    )
    ap.add_argument("--salt", default="")
    ap.add_argument("--rank", type=int, default=16)
    a = ap.parse_args()
    if {"checkpoint", "diffusers"} & set(a.only):
        ldm, unet, vae = seeded.sd21_base(a.salt)
        if "checkpoint" in a.only:
            a.out.mkdir(parents=True, exist_ok=True)
            save_file(ldm, a.out / "v2-1_512-seeded.safetensors")
        if "diffusers" in a.only:
            for name, sd, cfg in (("unet", unet, UNET_CONFIG), ("vae", vae, VAE_CONFIG)):
                d = a.out / "sd21-diffusers" / name
                d.mkdir(parents=True, exist_ok=True)
                save_file(sd, d / "diffusion_pytorch_model.safetensors")
                (d / "config.json").write_text(json.dumps(cfg, indent=1))
            d = a.out / "sd21-diffusers" / "scheduler"
            d.mkdir(parents=True, exist_ok=True)
            (d / "scheduler_config.json").write_text(json.dumps(SCHEDULER_CONFIG, indent=1))
    if "osdface" in a.only:
        d = a.out / "osdface"
        d.mkdir(parents=True, exist_ok=True)
        torch.save(seeded.vre_checkpoint(a.salt), d / "associate_2.ckpt")
        torch.save(seeded.embedding_change(a.salt), d / "embedding_change_weights.pth")
        save_file(seeded.lora(a.rank, a.salt), d / "pytorch_lora_weights.safetensors")


if __name__ == "__main__":
    main()
