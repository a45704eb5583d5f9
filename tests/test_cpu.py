"""Networks carried out in another way on a processor: the same numbers, against fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import Conv2d, GroupNorm

from osdface_core import cpu
from osdface_core.cpu import group_norm, optimized, upsampled_convolution

CPU = torch.device("cpu")


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 17),
    st.integers(1, 13),
    st.booleans(),
    st.integers(0, 99),
)
def test_a_convolution_of_an_enlarged_picture_is_done_before_it(
    batch: int,
    channels: int,
    height: int,
    width: int,
    biased: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    x, weight, bias = (
        torch.randn(batch, channels, height, width),
        torch.randn(5, channels, 3, 3),
        torch.randn(5) if biased else None,
    )
    enlarged = F.interpolate(x.double(), scale_factor=2, mode="nearest")
    wanted = F.conv2d(enlarged, weight.double(), None if bias is None else bias.double(), padding=1)
    torch.testing.assert_close(
        upsampled_convolution(x, weight, bias).double(), wanted, rtol=1e-5, atol=2e-5
    )


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (61, 67), (200, 256)])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_group_norm_in_channels_last_order_is_as_exact_as_torchs_in_the_usual_one(
    size: tuple[int, int], mean: float
) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 24, *size) + mean, torch.randn(24), torch.randn(24)
    wanted = F.group_norm(x.double(), 8, weight.double(), bias.double(), 1e-6)
    error = (group_norm(last(x), 8, weight, bias, 1e-6) - wanted).abs().max()
    usual = (F.group_norm(x, 8, weight, bias, 1e-6) - wanted).abs().max()
    assert error <= max(2 * usual, 1e-6)


class Network(nn.Module):
    """Every way in which an enlargement and a convolution can follow each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Conv2d(3, 16, 3, padding=1)
        self.norm = GroupNorm(4, 16)
        self.plain, self.stepped = (
            Conv2d(16, 16, 3, padding=1),
            Conv2d(16, 16, 3, stride=2, padding=1),
        )
        self.wide, self.same = (
            Conv2d(16, 16, 5, padding=2),
            Conv2d(16, 16, 3, padding="same", groups=4),
        )
        self.dilated, self.last = Conv2d(16, 16, 3, padding=2, dilation=2), Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.first(x)))
        for layer in (self.plain, self.stepped, self.wide, self.same, self.dilated):
            x = layer(F.interpolate(x, scale_factor=2.0, mode="nearest"))
            x = x[..., : x.shape[2] // 2, : x.shape[3] // 2]
        enlarged = F.interpolate(x, size=(2 * x.shape[2], 2 * x.shape[3]))
        x = self.plain(enlarged) + self.plain(enlarged * 0.5) + self.plain(enlarged)
        x = self.plain(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False))
        x = self.plain(F.relu(F.interpolate(x, scale_factor=2)))
        return self.last(self.plain(F.interpolate(x, (x.shape[2] * 2, x.shape[3] * 3))))


def test_a_network_gives_within_what_it_gives_without() -> None:
    torch.manual_seed(0)
    network, x = Network().eval(), torch.rand(2, 3, 36, 44)
    with torch.inference_mode():
        wanted = network.double()(x.double())
        network.float()
        with optimized(CPU, network):
            found = network(x)
        assert (found - wanted).abs().max() < 2e-6 + 2 * (network(x) - wanted).abs().max()


def test_torchs_functions_may_be_called_in_each_of_their_ways() -> None:
    torch.manual_seed(0)
    x, weight, bias, scale = (
        torch.rand(1, 4, 8, 8),
        torch.randn(4, 4, 3, 3),
        torch.randn(4),
        torch.rand(4),
    )

    def everything() -> list[Tensor]:
        enlarged = [
            F.interpolate(x, None, 2.0, "nearest"),
            F.interpolate(x, None, 2.0, "bilinear"),
            F.interpolate(input=x, scale_factor=2.0),
            F.interpolate(x, (16, 16)),
            F.interpolate(x, 8),
        ]
        found = [F.conv2d(big, weight, bias, 1, 1) for big in enlarged]
        ways: list[tuple[int, Any]] = [(1, 0), (1, 1), (1, "valid"), (2, 0), (2, 1)]
        found += [
            F.conv2d(F.interpolate(x, scale_factor=2), weight, bias, stride, padding)
            for stride, padding in ways
        ]
        found += [
            F.conv2d(input=x, weight=weight, stride=2, padding=[1, 1]),
            F.conv2d(x[0], weight, bias, padding=(1, 2)),
        ]
        return [
            *found,
            F.group_norm(input=found[0], num_groups=2, weight=scale),
            F.group_norm(found[0], 4),
            F.group_norm(x[0], 2),
        ]

    wanted = everything()
    with optimized(CPU):
        found = everything()
    for one, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, right, rtol=1e-5, atol=1e-5)


def test_it_takes_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for name in ("upsampled_convolution", "group_norm"):
        usual = getattr(cpu, name)
        monkeypatch.setattr(
            cpu, name, lambda *inputs, name=name, usual=usual: ran.append(name) or usual(*inputs)
        )
    network = nn.Sequential(
        Conv2d(3, 8, 3, padding=1),
        GroupNorm(2, 8),
        nn.Upsample(scale_factor=2),
        Conv2d(8, 8, 3, padding=1),
    )
    with torch.inference_mode(), optimized(CPU, network):
        network(torch.rand(1, 3, 16, 16))
    assert ran == ["group_norm", "upsampled_convolution"]


def test_bf16_stays_bf16() -> None:
    network, x = Network().eval(), torch.rand(1, 3, 36, 44)
    with torch.inference_mode():
        wanted = network(x)
        network.bfloat16()
        with optimized(CPU, network):
            found = network(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found - wanted).abs().max() < 0.1


def test_a_compiled_network_and_another_device_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def changes(*given: Any) -> bool:
        with optimized(*given) as mode:
            return mode is not None

    network: Any = nn.Sequential(Conv2d(3, 3, 1))
    assert changes(CPU, network)
    assert not changes(torch.device("meta"), network)
    assert not changes(CPU, network, nn.ModuleList([torch.compile(network)]))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not changes(CPU, network)
