"""Layers whose weights may lie on another device, in another type, and belong to someone else.

A weight is brought to the input's device and type when the layer is called, and never written to; a
LoRA is added to what was brought. The names are torch.nn's, so that the module is an `Operations`.
None of the classes is torch.nn's own: hosts patch those for the LoRAs of a picture's prompt.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sd21.adapters import Adapter


class Layer(nn.Module):
    """A layer with a weight, perhaps a bias, and any number of LoRAs with their strengths."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, shape: tuple[int, ...], has_bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(shape[0]), requires_grad=False) if has_bias else None
        self.adapters: list[tuple[Adapter, float]] = []

    def values(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias on the device and in the type of a tensor; not copied if they are."""
        weight: Tensor = self.weight
        if self.adapters:
            weight = weight.to(like.device)
            for adapter, strength in self.adapters:
                weight = merged(weight, adapter, strength)
        bias = None if self.bias is None else self.bias.to(like.device, like.dtype)
        return weight.to(like.device, like.dtype), bias


def merged(weight: Tensor, adapter: Adapter, strength: float) -> Tensor:
    """A weight with a LoRA added to it, fp32."""
    up = adapter.up.to(weight.device, torch.float32).flatten(1)
    down = adapter.down.to(weight.device, torch.float32).flatten(1)
    # At once, since on a CPU the memory that is passed through is what takes the time.
    whole = torch.addmm(weight.float().flatten(1), up, down, alpha=adapter.scale * strength)
    return whole.view(weight.shape)


class Linear(Layer):
    """A linear layer (B,n,inside) -> (B,n,out); its weight may be that of a 1 x 1 convolution."""

    def __init__(self, inside: int, out: int, bias: bool = True) -> None:
        super().__init__((out, inside), bias)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.values(x)
        return F.linear(x, weight.flatten(1), bias)


class Conv2d(Layer):
    """A convolution (B,inside,H,W) -> (B,out,H',W')."""

    def __init__(
        self, inside: int, out: int, kernel: int, stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__((out, inside, kernel, kernel))
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.values(x)
        return F.conv2d(x, weight, bias, self.stride, self.padding)


class GroupNorm(Layer):
    """A group norm over (B,C,H,W)."""

    def __init__(self, groups: int, channels: int, eps: float) -> None:
        super().__init__((channels,))
        self.groups, self.eps = groups, eps

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.values(x)
        return F.group_norm(x, self.groups, weight, bias, self.eps)


class LayerNorm(Layer):
    """A layer norm over the last axis."""

    def __init__(self, channels: int) -> None:
        super().__init__((channels,))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.values(x)
        return F.layer_norm(x, weight.shape, weight, bias)
