"""Pictures for looking at, made when somebody looks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class _OnDemand(Tensor):
    """A tensor of a known shape whose values are computed at its first use and then kept.

    Any function of torch, numpy or Python that takes it sees the computed tensor. Its shape and
    type are known without that. C++ that looks for its memory directly finds none and raises.
    """

    make: Callable[[], Tensor] | None
    made: Tensor | None

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _KNOWN:
            return super().__torch_function__(func, types, args, kwargs or {})
        args, given = tree_map_only(_OnDemand, _computed, (args, kwargs or {}))
        return func(*args, **given)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, given = tree_map_only(_OnDemand, _computed, (args, kwargs or {}))
        return func(*args, **given)


# What can be told before the values are there.
_KNOWN = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout")),
    *(getattr(Tensor, name).__get__ for name in ("is_cuda", "requires_grad", "itemsize", "nbytes")),
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "nelement", "element_size")),
    *(getattr(Tensor, name) for name in ("__len__", "is_floating_point", "get_device")),
}


def _computed(tensor: _OnDemand) -> Tensor:
    if tensor.made is None:
        assert tensor.make is not None
        made = tensor.make()
        assert made.shape == tensor.shape, (made.shape, tensor.shape)
        # The pictures that it is made of are no longer held.
        tensor.made, tensor.make = made, None
    return tensor.made


def on_demand(shape: Sequence[int], make: Callable[[], Tensor]) -> Tensor:
    """A tensor (fp32, on the CPU) of this shape whose values `make` computes when they are used.

    An output that nothing is linked to then costs neither time nor memory, and one that is linked
    later need not run its node again. What `make` holds must not be written into.
    """
    tensor: Any = Tensor._make_wrapper_subclass(_OnDemand, tuple(shape), dtype=torch.float32)
    tensor.make, tensor.made = make, None
    lazy: Tensor = tensor
    return lazy
