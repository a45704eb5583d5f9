"""Merges LoRA adapters into a network of diffusers, through peft."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from ..errors import OSDFaceError
from ..sd21.adapters import Lora, some
from .loading import REMEDY

ADAPTER = "merged"


def merge_lora(network: nn.Module, lora: Lora, strength: float, source: str) -> None:
    """Merges a LoRA into the weights of a UNet or an autoencoder. Further calls add further LoRAs.

    Raises OSDFaceError that names the layers that have no place in the network.

    network: whose layers the LoRA's keys name.
    lora: adapters by the layers' names.
    strength: factor of all of them.
    source: the LoRA's name, for errors.
    """
    from peft import LoraConfig, LoraModel, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    layers = dict(network.named_modules())
    tensors, left_over = {}, []
    for name, adapter in lora.items():
        weight = getattr(layers.get(name), "weight", None)
        down, up, rank = adapter.down, adapter.up, adapter.rank
        size = (up.shape[0], down[0].numel())
        if weight is None or (weight.shape[0], weight[0].numel()) != size:
            left_over.append(name)
            continue
        tensors[f"{name}.lora_A.weight"] = down.reshape(rank, *weight.shape[1:])
        tensors[f"{name}.lora_B.weight"] = up.reshape(-1, rank, *(1,) * (weight.ndim - 2))
    if left_over:
        missing = f"{len(left_over)} of the {len(lora)} layers of {source} ({some(left_over)})"
        raise OSDFaceError(f"The network has no weight for {missing}; {REMEDY}")
    ranks = {name: adapter.rank for name, adapter in lora.items()}
    alphas = {name: adapter.alpha * strength for name, adapter in lora.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft says int and divides by the rank
        rank_pattern={name: value for name, value in ranks.items() if value != rank},
        alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
        target_modules=list(lora),
    )
    adapted: Any = LoraModel(network, config, ADAPTER)
    loaded: Any = set_peft_model_state_dict(network, tensors, ADAPTER)
    landed = [name for name, layer in network.named_modules() if isinstance(layer, LoraLayer)]
    missing_keys = (key for key in loaded.missing_keys if ".lora_" in key)
    wrong = [*loaded.unexpected_keys, *missing_keys, *(set(lora) ^ set(landed))]
    if wrong:
        raise OSDFaceError(
            f"peft did not put every layer of {source} into the network ({some(sorted(wrong))}): "
            "update peft and diffusers."
        )
    adapted.merge_and_unload()
    network.requires_grad_(False)
