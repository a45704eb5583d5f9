"""The layers our networks are built of, and loading weights into a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .errors import OSDFaceError

# torch.nn, or a namespace of a host's own layers, which cast and page weights.
Operations = Any

Network = TypeVar("Network", bound=nn.Module)


class _NoInit(TorchFunctionMode):
    """Leaves out what torch.nn.init does."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return given["tensor"] if "tensor" in given else args[0]
        return func(*args, **given)


@contextmanager
def shapes_only() -> Iterator[None]:
    """A context in which networks are made without values, on the device "meta".

    To draw values there, as an embedding does, torch would import its compiler, which takes as long
    as two faces.
    """
    with torch.device("meta"), _NoInit():
        yield


def load_network(
    make: Callable[[], Network],
    tensors: dict[str, Tensor],
    misfit: str,
    remedy: str,
    *,
    spare: bool = False,
) -> Network:
    """A network in fp32, ready to run, whose parameters and buffers are the very tensors given.

    Raises OSDFaceError that names what is missing, misshapen, not finite or left over.

    make: creates the network.
    tensors: weights by the network's own names.
    misfit: the beginning of an error's sentence.
    remedy: its end.
    spare: whether tensors that have no place in the network are ignored.
    """
    with shapes_only():
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
