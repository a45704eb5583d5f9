"""A device that the machine does not have: its tensors hold CPU data and refuse to mix with the
CPU's, so that a forgotten `.to` raises where it stands, as on a GPU.

It counts what a GPU would have to be waited for. Rounding, kernels, streams and timing it cannot
show.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

NAME = "elsewhere"


class _Module(_DummyBackendModule):
    def is_available(self) -> bool:
        """To whoever looks for an accelerator, such as the command line, there is none."""
        return False


_setup_privateuseone_for_python_backend(NAME, _Module())
DEVICE = torch.device(NAME, 0)

aten = torch.ops.aten
# The operators that may take tensors of two devices: copies, and an index on the CPU.
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
# Those whose result a program on the CPU has to wait for.
WAITS = {
    aten._local_scalar_dense.default: "item",
    aten.equal.default: "equal",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.is_nonzero.default: "item",
}


DECOMPOSED: set[Any] = set()


class Elsewhere(torch.Tensor):
    """A tensor of the device, around the CPU's `held`."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Elsewhere:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:
        return f"elsewhere({self.held!r})"

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"a tensor on {DEVICE} is no array of the CPU's: copy it there first")


class _Device(TorchDispatchMode):
    """Makes what is asked for on the device; counts copies and waits."""

    def __init__(self, forbidden: dict[Any, str | Exception]) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.forbidden = forbidden

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DECOMPOSED or func._can_decompose():
            # In inference mode torch hands on what it would else have taken apart.
            DECOMPOSED.add(func)
            with self:
                return func.decompose(*args, **kwargs)
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        there = any(isinstance(x, Elsewhere) for x in given)
        target = kwargs.get("device")
        if there and func in self.forbidden:
            told = self.forbidden[func]
            raise told if isinstance(told, Exception) else NotImplementedError(told)
        if func in COPIES:
            source = isinstance(args[1 if func is aten.copy_.default else 0], Elsewhere)
            result = (
                isinstance(args[0], Elsewhere)
                if func is aten.copy_.default
                else source
                if target is None
                else torch.device(target).type == NAME
            )
            if source != result:
                self.counts["up" if result else "down"] += 1
                values = args[1 if func is aten.copy_.default else 0].numel()
                self.counts["values up" if result else "values down"] += values
        elif there:
            if func in WAITS:
                self.counts["wait"] += 1
            indices = args[1] if func in INDEXED else ()
            if any(isinstance(i, Elsewhere) and i.dtype == torch.bool for i in indices or ()):
                self.counts["wait"] += 1
        return _run(func, args, kwargs)


class _FromValues(TorchFunctionMode):
    """Tensors made of Python's values: torch writes these without asking a dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == NAME:
            return func(*args, **kwargs | {"device": "cpu"}).to(DEVICE)
        if func is torch.Tensor.new_tensor and isinstance(args[0], Elsewhere):
            given = {"dtype": args[0].dtype} | kwargs
            return torch.tensor(args[1], **given).to(DEVICE)
        if func is torch.Tensor.numpy and isinstance(args[0], Elsewhere) and kwargs.get("force"):
            return args[0].cpu().numpy()
        if func is torch.Tensor.__getitem__ and isinstance(args[0], Elsewhere):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            lists = tuple(torch.tensor(i).to(DEVICE) if isinstance(i, list) else i for i in index)
            return func(args[0], lists)
        return func(*args, **kwargs)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """The CPU's kernel on what the tensors hold; its results are on the device if they were."""
    flat = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    there = [x for x in flat if isinstance(x, Elsewhere)]
    target = kwargs.get("device")
    to_device = bool(there) if target is None else torch.device(target).type == NAME
    if func is aten._has_compatible_shallow_copy_type.default and len(there) == 1:
        # Whether a module may move its weights without new parameters.
        return False
    if there and func not in COPIES:
        left_over = [
            x
            for x in flat
            if not isinstance(x, Elsewhere)
            and x.ndim
            and not (func in INDEXED and any(x is i for i in args[1]))
        ]
        if left_over:
            raise RuntimeError(
                f"{func}: expected all tensors on one device, found {DEVICE} and the CPU "
                f"({[tuple(x.shape) for x in flat]})"
            )
    if target is not None and to_device:
        kwargs = kwargs | {"device": torch.device("cpu")}
    wrappers = {id(x.held): x for x in there}
    result = func(
        *tree_map_only(Elsewhere, lambda x: x.held, args),
        **tree_map_only(Elsewhere, lambda x: x.held, kwargs),
    )
    if func is aten.copy_.default:
        return args[0]
    if func is aten._to_copy.default and any(result is x.held for x in there):
        result = result.clone()

    def wrap(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not to_device:
            return x
        known = wrappers.get(id(x))
        return Elsewhere(x) if known is None else known

    return tree_map(wrap, result)


@contextmanager
def elsewhere(forbidden: dict[Any, str | Exception] | None = None) -> Iterator[Counter[str]]:
    """A context in which the device is there. Gives the counts of copies up and down, of the values
    copied, and of waits.

    forbidden: operators that raise an error, or NotImplementedError with a message, as on another
        device.
    """
    mode = _Device(forbidden or {})
    with mode, _FromValues():
        yield mode.counts
