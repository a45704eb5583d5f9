"""RetinaFace (Deng et al. 2020) with a ResNet50, a MobileNet0.25 or a narrow trunk.

Parameters have the names of facexlib's weight files. The built-in detector is the one with the
narrow trunk, which is our own: 236,000 weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import Operations, load_network

if TYPE_CHECKING:
    from .resnet50 import ResNet50

# Two anchors of these sides at every cell of the three feature maps, with which facexlib's files
# were trained.
STEPS = (8, 16, 32)
ANCHOR_SIDES = ((16, 32), (64, 128), (256, 512))
VARIANCES = (0.1, 0.2)
MEAN_BGR = (104.0, 117.0, 123.0)
ANCHORS_PER_CELL = 2
# Channels of the built-in detector's first layer, by which its file is recognised.
NARROWEST = 12


def conv_bn(
    channels: int,
    out: int,
    stride: int,
    slope: float | None,
    operations: Operations,
    kernel: int = 3,
) -> nn.Sequential:
    """A convolution without bias, batch norm, and a leaky ReLU.

    channels: of the input.
    out: channels of the output.
    stride: of the convolution.
    slope: of the ReLU below 0; None for no ReLU.
    operations: whose layers to use.
    kernel: side of the convolution in pixels.
    """
    layers = [
        operations.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(out),
    ]
    return nn.Sequential(*layers, *([] if slope is None else [nn.LeakyReLU(slope, inplace=True)]))


def conv_dw(channels: int, out: int, stride: int, operations: Operations) -> nn.Sequential:
    """A depth-wise and a point-wise convolution, each with batch norm and a leaky ReLU."""
    return nn.Sequential(
        operations.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
        nn.LeakyReLU(0.1, inplace=True),
        operations.Conv2d(channels, out, 1, bias=False),
        nn.BatchNorm2d(out),
        nn.LeakyReLU(0.1, inplace=True),
    )


class MobileNet(nn.Module):
    """(B,3,H,W) -> features of 64, 128 and 256 channels at 1/8, 1/16 and 1/32 of the size."""

    channels = (64, 128, 256)

    def __init__(self, operations: Operations) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(
            conv_bn(3, 8, 2, 0.1, operations),
            *(
                conv_dw(a, b, s, operations)
                for a, b, s in ((8, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1))
            ),
        )
        self.stage2 = nn.Sequential(
            conv_dw(64, 128, 2, operations), *(conv_dw(128, 128, 1, operations) for _ in range(5))
        )
        self.stage3 = nn.Sequential(
            conv_dw(128, 256, 2, operations), conv_dw(256, 256, 1, operations)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = self.stage1(x)
        second = self.stage2(first)
        return first, second, self.stage3(second)


class Narrow(MobileNet):
    """(B,3,H,W) -> features of 48, 96 and 160 channels at 1/8, 1/16 and 1/32 of the size.

    The trunk of the built-in detector.
    """

    channels = (48, 96, 160)

    def __init__(self, operations: Operations) -> None:
        nn.Module.__init__(self)
        first, second, third = self.channels
        self.stage1 = nn.Sequential(
            conv_bn(3, NARROWEST, 2, 0.1, operations),
            *(
                conv_dw(a, b, s, operations)
                for a, b, s in ((NARROWEST, 24, 2), (24, 32, 1), (32, first, 2), (first, first, 1))
            ),
        )
        self.stage2 = nn.Sequential(
            conv_dw(first, second, 2, operations),
            *(conv_dw(second, second, 1, operations) for _ in range(3)),
        )
        self.stage3 = nn.Sequential(
            conv_dw(second, third, 2, operations),
            *(conv_dw(third, third, 1, operations) for _ in range(2)),
        )


class FeaturePyramid(nn.Module):
    """Brings three feature maps to one width and adds the coarser ones to the finer."""

    def __init__(
        self, channels: tuple[int, ...], out: int, slope: float, operations: Operations
    ) -> None:
        super().__init__()
        self.output1, self.output2, self.output3 = (
            conv_bn(c, out, 1, slope, operations, kernel=1) for c in channels
        )
        self.merge1 = conv_bn(out, out, 1, slope, operations)
        self.merge2 = conv_bn(out, out, 1, slope, operations)

    def forward(
        self, first: Tensor, second: Tensor, third: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        third = self.output3(third)
        second = self.output2(second)
        second = self.merge2(second + F.interpolate(third, second.shape[2:], mode="nearest"))
        first = self.output1(first)
        first = self.merge1(first + F.interpolate(second, first.shape[2:], mode="nearest"))
        return first, second, third


class ContextModule(nn.Module):
    """(B,C,h,w) -> (B,C,h,w): one to three 3x3 convolutions in parallel.

    The context module of SSH (Najibi et al. 2017).
    """

    def __init__(self, channels: int, slope: float, operations: Operations) -> None:
        super().__init__()
        half, quarter = channels // 2, channels // 4
        self.conv3X3 = conv_bn(channels, half, 1, None, operations)
        self.conv5X5_1 = conv_bn(channels, quarter, 1, slope, operations)
        self.conv5X5_2 = conv_bn(quarter, quarter, 1, None, operations)
        self.conv7X7_2 = conv_bn(quarter, quarter, 1, slope, operations)
        self.conv7x7_3 = conv_bn(quarter, quarter, 1, None, operations)

    def forward(self, x: Tensor) -> Tensor:
        shared = self.conv5X5_1(x)
        return F.relu(
            torch.cat(
                [self.conv3X3(x), self.conv5X5_2(shared), self.conv7x7_3(self.conv7X7_2(shared))], 1
            )
        )


class Head(nn.Module):
    """(B,C,h,w) -> (B, h*w*anchors, values)."""

    def __init__(self, channels: int, values: int, operations: Operations) -> None:
        super().__init__()
        self.values = values
        self.conv1x1 = operations.Conv2d(channels, ANCHORS_PER_CELL * values, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1x1(x).permute(0, 2, 3, 1).reshape(len(x), -1, self.values)


class RetinaFace(nn.Module):
    """BGR (B,3,H,W) of 0..255 less MEAN_BGR -> boxes, confidences and landmarks in pixels.

    Boxes (B,A,4) are x1, y1, x2, y2; confidences (B,A) are 0..1; landmarks are (B,A,5,2). A is the
    number of anchors, in facexlib's order. As in facexlib, a landmark on the centre of the
    picture's first pixel is at (0, 0). needs_refinement: whether the landmarks are good only in an
    upright window around the face.
    """

    def __init__(self, trunk: str, operations: Operations = nn) -> None:
        super().__init__()
        self.needs_refinement = trunk == "narrow"
        self.body: ResNet50 | MobileNet
        if trunk == "resnet50":
            # To import torchvision takes as long as torch itself.
            from . import resnet50

            self.body = resnet50.ResNet50()
        else:
            self.body = (Narrow if trunk == "narrow" else MobileNet)(operations)
        width, slope = {"resnet50": (256, 0.0), "narrow": (48, 0.1)}.get(trunk, (64, 0.1))
        self.fpn = FeaturePyramid(self.body.channels, width, slope, operations)
        self.ssh1, self.ssh2, self.ssh3 = (ContextModule(width, slope, operations) for _ in STEPS)
        self.ClassHead = nn.ModuleList(Head(width, 2, operations) for _ in STEPS)
        self.BboxHead = nn.ModuleList(Head(width, 4, operations) for _ in STEPS)
        self.LandmarkHead = nn.ModuleList(Head(width, 10, operations) for _ in STEPS)

    @property
    def home(self) -> torch.device:
        """The device where pictures must be.

        It is the buffers' device: a host may page parameters in and out as they are used. Not
        called `device`, because hosts set an attribute of that name on the modules that they hold.
        """
        return next(self.buffers()).device

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maps = self.fpn(*self.body(x))
        features = [
            module(m) for module, m in zip((self.ssh1, self.ssh2, self.ssh3), maps, strict=True)
        ]
        classes, boxes, landmarks = (
            torch.cat([head(feature) for head, feature in zip(heads, features, strict=True)], 1)
            for heads in (self.ClassHead, self.BboxHead, self.LandmarkHead)
        )
        centres, sides = anchors(x.shape[2], x.shape[3], x.device)
        half = torch.exp(boxes[..., 2:] * VARIANCES[1]) * sides[:, None] / 2
        middle = centres + boxes[..., :2] * VARIANCES[0] * sides[:, None]
        points = (
            centres[:, None] + landmarks.unflatten(-1, (5, 2)) * VARIANCES[0] * sides[:, None, None]
        )
        return torch.cat([middle - half, middle + half], -1), classes.softmax(-1)[..., 1], points


def anchors(height: int, width: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Centres (A,2) as (x,y) and sides (A,) of the square anchors of a picture, in pixels."""
    centres, sides = [], []
    for step, pair in zip(STEPS, ANCHOR_SIDES, strict=True):
        y = (torch.arange(-(-height // step), device=device) + 0.5) * step
        x = (torch.arange(-(-width // step), device=device) + 0.5) * step
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2)
        centres.append(grid.repeat_interleave(ANCHORS_PER_CELL, 0))
        sides.append(torch.tensor(pair, dtype=torch.float32, device=device).repeat(len(grid)))
    return torch.cat(centres), torch.cat(sides)


def build_retinaface(tensors: dict[str, Tensor], operations: Operations = nn) -> RetinaFace:
    """A network ready to run, with the trunk that `tensors` belong to.

    Raises OSDFaceError that names what is missing, left over, misshapen or not finite.
    """
    tensors = {name.removeprefix("module."): t for name, t in tensors.items()}
    first = tensors.get("body.stage1.0.0.weight")
    trunk = "resnet50" if "body.conv1.weight" in tensors else "mobilenet0.25"
    if first is not None and first.shape[:1] == (NARROWEST,):
        trunk = "narrow"
    return load_network(
        lambda: RetinaFace(trunk, operations),
        tensors,
        "The face detector's file does not fit RetinaFace",
        "use detection_Resnet50_Final.pth or detection_mobilenet0.25_Final.pth of facexlib.",
    )
