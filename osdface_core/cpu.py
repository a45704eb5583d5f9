"""Runs convolutional networks faster on a CPU, without touching the networks.

Within `optimized`, the layers of any network are computed in another way, with the same results to
the last digits of their type.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Group norm: pixels summed in fp32 before the sums are added in fp64; values that fit the CPU's
# cache.
ROWS, CACHED = 256, 2**18


class _TF32:
    """cuDNN's switch for TF32, which is one for all threads: off while any of them needs it so."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users, self.before = 0, True

    def off(self) -> bool:
        """Turns it off, or keeps it so. False where torch does not let it be turned."""
        with self.lock:
            if not self.users:
                try:
                    self.before = torch.backends.cudnn.allow_tf32
                    torch.backends.cudnn.allow_tf32 = False
                except RuntimeError:
                    # Whoever has set torch's newer switches has decided: the two do not mix.
                    return False
            self.users += 1
            return True

    def back(self) -> None:
        """The last one that needed it off leaves it as the first one found it."""
        with self.lock:
            self.users -= 1
            if not self.users:
                torch.backends.cudnn.allow_tf32 = self.before


_tf32 = _TF32()


@contextmanager
def exact() -> Iterator[None]:
    """A context, or decorator, in which cuDNN computes fp32 in fp32, and not in TF32's 10 bits.

    TF32 is torch's default for convolutions on NVIDIA's cards. Half precision is not concerned.
    Where several threads are within, it comes back when the last one leaves.
    """
    is_off = _tf32.off()
    try:
        yield
    finally:
        if is_off:
            _tf32.back()


@contextmanager
def optimized(device: torch.device, *networks: nn.Module) -> Iterator[Any]:
    """A context in which a network's convolutions run faster on a CPU, and exactly on a GPU.

    On a CPU they run channels-last, and a 3 x 3 convolution of a picture enlarged by 2 runs on the
    small picture, unless torch has no oneDNN or one of the networks is compiled, since the compiled
    code was made for torch's own way. For another device see `exact`.
    """
    usual = (
        device.type != "cpu"
        or not torch.backends.mkldnn.is_available()
        or any(hasattr(module, "_orig_mod") for network in networks for module in network.modules())
    )
    with exact(), nullcontext() if usual else _Optimized() as mode:
        yield mode


def has_bf16() -> bool:
    """Whether the CPU has instructions for bf16."""
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16"))


class _Optimized(TorchFunctionMode):
    """Replaces torch's interpolate, conv2d and group norm while a network calls them."""

    def __init__(self) -> None:
        super().__init__()
        # The last picture that was doubled and its result, in case the next convolution takes it.
        self.enlarged: tuple[Tensor, weakref.ref[Tensor]] | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if func is F.interpolate:
            result, x = func(*args, **given), args[0] if args else given["input"]
            self.enlarged = (
                (x, weakref.ref(result)) if _is_nearest_doubling(x, result, args, given) else None
            )
            return result
        if func is torch.conv2d:
            return self._convolution(*args, **given)
        if func is F.group_norm:
            return _group_norm(*args, **given)
        return func(*args, **given)

    def _convolution(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        x = input
        (small, enlarged), self.enlarged = self.enlarged or (x, None), None
        if x.ndim != 4:
            return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
        plain = (
            _equals(stride, 1)
            and _equals(padding, 1)
            and _equals(dilation, 1)
            and groups == 1
            and weight.shape[2:] == (3, 3)
        )
        if enlarged is not None and enlarged() is x and plain:
            return upsampled_convolution(small, weight, bias)
        return torch.conv2d(
            x.contiguous(memory_format=torch.channels_last),
            weight,
            bias,
            stride,
            padding,
            dilation,
            groups,
        )


def _equals(given: Any, value: int) -> bool:
    return given in (value, (value,), (value, value), [value, value])


def _is_nearest_doubling(
    x: Tensor, result: Tensor, args: tuple[Any, ...], given: dict[str, Any]
) -> bool:
    """Whether F.interpolate, called so, repeated every pixel of x (B,C,H,W) twice both ways."""
    mode = args[3] if len(args) > 3 else given.get("mode", "nearest")
    return (
        mode == "nearest" and x.ndim == 4 and result.shape[2:] == (2 * x.shape[2], 2 * x.shape[3])
    )


def upsampled_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 3 x 3 convolution with a border of zeros of x (B,C,H,W) enlarged to twice its size.

    weight (K,C,3,3) -> (B,K,2H,2W). Enlarging repeats pixels, so of the nine weights those that
    meet the same pixel are added first: 2 x 2 are left for each of the four places of an enlarged
    pixel, 4/9 of the products (Shi et al. 2016, "Is the deconvolution layer the same ...").
    """
    height, width = x.shape[2:]
    padded = F.pad(x, (1, 1, 1, 1)).contiguous(memory_format=torch.channels_last)
    size = x.shape[0], weight.shape[0], 2 * height, 2 * width
    result = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    for row in (0, 1):
        for column in (0, 1):
            kernel = _fold_taps(_fold_taps(weight.float(), row, 2), column, 3).to(weight.dtype)
            part = padded[:, :, row : row + height + 1, column : column + width + 1]
            result[:, :, row::2, column::2] = F.conv2d(part, kernel, bias)
    return result


def _fold_taps(weight: Tensor, place: int, axis: int) -> Tensor:
    """Folds three taps along `axis` into two, for the first (0) or second (1) equal pixel."""
    first, middle, last = weight.unbind(axis)
    return torch.stack((first + middle, last) if place else (first, middle + last), axis)


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    # torch's own loses four digits in this order (6e-5 instead of 4e-7); only fp32 has digits to
    # lose, half precision has three.
    last = (
        input.ndim == 4
        and input.is_contiguous(memory_format=torch.channels_last)
        and not input.is_contiguous()
    )
    if not last or input.dtype != torch.float32:
        return F.group_norm(input, num_groups, weight, bias, eps)
    return group_norm(input, num_groups, weight, bias, eps)


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Group norm of x (B,C,H,W) fp32 in channels-last order, its sums in fp64.

    x: (B,C,H,W) fp32, channels-last.
    groups: into how many the channels are divided.
    weight: (C,), None for ones.
    bias: (C,), None for zeros.
    eps: added to the variance.
    """
    batch, channels, height, width = x.shape
    pixels = x.movedim(1, -1).reshape(batch, height * width, channels)

    def mean(of: Callable[[Tensor], Tensor]) -> Tensor:
        """A group's mean (B,groups,1) fp64 of what `of` sums over axis 2 of (B,n,rows,C)."""
        sums = torch.zeros(batch, channels, dtype=torch.float64)
        # In pieces that stay in the CPU's cache.
        for piece in pixels.split(ROWS * max(1, CACHED // (ROWS * channels)), 1):
            whole = piece.shape[1] // ROWS * ROWS
            for rows in (piece[:, :whole].unflatten(1, (-1, ROWS)), piece[:, None, whole:]):
                sums += of(rows).double().sum(1)
        return sums.view(batch, groups, -1).mean(2, keepdim=True) / (height * width)

    def each(of_groups: Tensor) -> Tensor:
        return of_groups.expand(-1, -1, channels // groups).reshape(batch, channels)

    mean_of_group = each(mean(lambda rows: rows.sum(2)))
    centre = mean_of_group.float()[:, None, None]
    variance = each(mean(lambda rows: (rows - centre).square_().sum(2)))
    scale = (variance + eps).rsqrt() * (1.0 if weight is None else weight.double())
    shift = (0.0 if bias is None else bias.double()) - mean_of_group * scale
    return torch.addcmul(shift.float()[:, :, None, None], x, scale.float()[:, :, None, None])
