"""What our own networks share: whose layers they are made of, and how they get a file's weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .errors import OSDFaceError

# torch.nn, or a host's own classes that cast and page weights.
Operations = Any

Network = TypeVar("Network", bound=nn.Module)


def load_network(
    make: Callable[[], Network],
    tensors: dict[str, Tensor],
    misfit: str,
    remedy: str,
    *,
    spare: bool = False,
) -> Network:
    """The network that `make` gives, with the very tensors given as its parameters and buffers, in
    fp32 and ready to run.

    misfit, remedy: begin and end the sentence of an error. spare: tensors that the network has no
    place for are left aside. Raises OSDFaceError that names what is missing, misshapen, not finite
    or left over.
    """
    with torch.device("meta"):
        network = make()
    wanted = network.state_dict()
    faults = {name: _fault(tensors.get(name), place.shape) for name, place in wanted.items()}
    if not spare:
        faults |= {name: "left over" for name in tensors if name not in wanted}
    wrong = [f"{name} is {fault}" for name, fault in faults.items() if fault]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise OSDFaceError(f"{misfit} ({'; '.join(wrong[:3])}{more}): {remedy}")
    network.load_state_dict({name: tensors[name] for name in wanted}, assign=True)
    return network.float().eval().requires_grad_(False)


def _fault(tensor: Tensor | None, shape: torch.Size) -> str:
    if tensor is None:
        return "missing"
    if tensor.shape != shape:
        return f"{tuple(tensor.shape)} instead of {tuple(shape)}"
    return "" if bool(tensor.isfinite().all()) else "not finite"
