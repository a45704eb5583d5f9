"""Deterministic stand-in weights with the exact names and shapes of the real files.

The real weights (Stable Diffusion 2.1-base, OSDFace) are gigabytes and cannot be kept with the
code. Here every tensor is drawn from a generator seeded by its own name, so any machine remakes the
same numbers in any order, and the outputs that the paper's released code gives on them
(golden.safetensors) are enough to check an implementation. They exercise the whole computation at
full size; they do not make a good picture.

    python make_weights.py --out DIR            # all of them, about 4 GB, under a minute
"""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path

import torch

HERE = Path(__file__).parent


def seeded_tensor(name: str, shape, salt: str = "") -> torch.Tensor:
    """fp32 tensor for parameter `name`: fan-in-scaled normal for weights, N(0, 0.02) for biases, 1
    + N(0, 0.02) for norm scales.
    """
    g = torch.Generator().manual_seed(zlib.crc32((salt + name).encode()))
    x = torch.randn(tuple(shape), generator=g)
    if name.endswith("bias"):
        return 0.02 * x
    if len(shape) == 1:
        return 1.0 + 0.02 * x
    fan_in = 1
    for s in shape[1:]:
        fan_in *= s
    return x * fan_in**-0.5


def sd21_base(salt: str = "") -> tuple[dict, dict, dict]:
    """(LDM checkpoint, diffusers UNet, diffusers VAE) state dicts of one SD 2.1-base shaped model;
    no text encoder.
    """
    ldm, unet, vae = {}, {}, {}
    for ldm_name, (name, shape, ldm_shape) in json.loads(
        (HERE / "sd21_names.json").read_text()
    ).items():
        t = seeded_tensor(name, shape, salt)
        if name == "vae.quant_conv.bias":  # keep the posterior narrow, as a trained SD VAE's is
            t[4:] = -12.0
        if name == "vae.quant_conv.weight":
            t[4:] *= 0.05
        part, key = name.split(".", 1)
        (unet if part == "unet" else vae)[key] = t
        ldm[ldm_name] = t.reshape(ldm_shape)
    return ldm, unet, vae


def vre_checkpoint(salt: str = "") -> dict:
    """associate_2.ckpt: a Lightning checkpoint holding the LQ VQVAE under `vqvae_LQ.`, and much
    that inference must ignore.
    """
    sd = {
        "vqvae_LQ." + k: seeded_tensor("vre." + k, s, salt)
        for k, s in json.loads((HERE / "vre_shapes.json").read_text()).items()
    }
    book = "vqvae_LQ.quantize.embedding.weight"
    sd[book] = sd[book] * (
        512**0.5 * 0.6
    )  # entries where the features lie, so that many codes are chosen
    sd["vqvae_LQ.decoder.conv_in.weight"] = seeded_tensor("vre.decoder", [512, 512, 3, 3], salt)
    sd["vqvae_LQ.post_quant_conv.weight"] = seeded_tensor("vre.post", [512, 512, 1, 1], salt)
    sd["vqvae.quantize.embedding.weight"] = seeded_tensor("vre.hq", [1024, 512], salt)
    return {"state_dict": sd, "epoch": 9, "global_step": 123, "pytorch-lightning_version": "1.0.8"}


def embedding_change(salt: str = "") -> dict:
    """embedding_change_weights.pth: the 512 -> 256 -> 1024 projector of the visual prompt."""
    shapes = {
        "conv1.weight": [256, 512, 1],
        "conv1.bias": [256],
        "conv2.weight": [1024, 256, 1],
        "conv2.bias": [1024],
    }
    return {k: seeded_tensor("embedding_change." + k, s, salt) for k, s in shapes.items()}


def lora(rank: int = 16, salt: str = "", attention_style: str = "lora.down/up") -> dict:
    """pytorch_lora_weights.safetensors: 278 UNet modules in the two spellings that diffusers writes
    into one file.

    Attention projections are `.lora.down/.lora.up` (or `.lora_A/.lora_B` with
    attention_style="lora_A/B"), the rest `.lora_A/.lora_B`.
    """
    out = {}
    for module, shape in json.loads((HERE / "lora_modules.json").read_text()).items():
        a = [rank, *shape[1:]]
        b = [shape[0], rank] if len(shape) == 2 else [shape[0], rank, 1, 1]
        down, up = ".lora_A.weight", ".lora_B.weight"
        if attention_style == "lora.down/up" and re.search(r"\.to_(q|k|v|out\.0)$", module):
            down, up = ".lora.down.weight", ".lora.up.weight"
        out["unet." + module + down] = seeded_tensor("lora_A." + module, a, salt)
        out["unet." + module + up] = 0.3 * seeded_tensor("lora_B." + module, b, salt)
    return out
