"""The device to compute on, the type to compute in, and the memory that is free there."""

from __future__ import annotations

from typing import Any

import torch

from .cpu import has_bf16

# Peak of the activations for a 512 px crop, reached in the decoder's last level, in values.
VALUES_PER_FACE = 600 * 1024**2
MAX_BATCH = 16


def best_device() -> torch.device:
    """The accelerator that this torch finds (CUDA or ROCm, XPU, MPS ...), else the CPU."""
    if not hasattr(torch, "accelerator"):  # before 2.6
        found = (name for name in ("cuda", "xpu", "mps") if _is_available(name))
        return torch.device(next(found, "cpu"))
    # torch 2.6 cannot check availability and name the device in one call.
    accelerator = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    return accelerator or torch.device("cpu")


def _is_available(name: str) -> bool:
    module: Any = getattr(torch.backends if name == "mps" else torch, name, None)
    return module is not None and bool(module.is_available())


def best_dtype(device: torch.device) -> torch.dtype:
    """Half precision where the device computes in it, else fp32.

    That is fp16 on an accelerator, bf16 on a CPU with instructions for it.
    """
    if device.type != "cpu":
        return torch.float16
    return torch.bfloat16 if has_bf16() else torch.float32


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a device, and those that torch has from it and does not use."""
    try:
        if device.type == "mps":
            return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
        older = not hasattr(torch, "get_device_module")  # before 2.5
        module = getattr(torch, device.type) if older else torch.get_device_module(device)
        free = module.mem_get_info(device)[0]
        return free + module.memory_reserved(device) - module.memory_allocated(device)
    except (AttributeError, RuntimeError):
        return 0


def max_batch(device: torch.device, dtype: torch.dtype, values: float) -> int:
    """How many items of `values` values each the free memory takes at once; at least 1."""
    # On a CPU two at once take more memory and no less time.
    if device.type == "cpu":
        return 1
    return max(1, min(MAX_BATCH, int(free_memory(device) / (values * dtype.itemsize))))
