"""RetinaFace narrowed to 230,000 weights: the same anchors, passes and outputs, so that everything behind it stays as it is."""

from __future__ import annotations

from torch import nn

from ..networks import Operations
from ..retinaface import STEPS, ContextModule, FeaturePyramid, Head, MobileNet, RetinaFace, conv_bn, conv_dw

WIDTH = 48
SLOPE = 0.1


class Trunk(MobileNet):
    """(B,3,H,W) -> features of 48, 96 and 160 channels at 1/8, 1/16 and 1/32 of the size."""

    channels = (48, 96, 160)

    def __init__(self, operations: Operations) -> None:
        nn.Module.__init__(self)
        first, second, third = self.channels
        self.stage1 = nn.Sequential(
            conv_bn(3, 12, 2, SLOPE, operations),
            *(conv_dw(a, b, s, operations) for a, b, s in ((12, 24, 2), (24, 32, 1), (32, first, 2), (first, first, 1))),
        )
        self.stage2 = nn.Sequential(conv_dw(first, second, 2, operations), *(conv_dw(second, second, 1, operations) for _ in range(3)))
        self.stage3 = nn.Sequential(conv_dw(second, third, 2, operations), *(conv_dw(third, third, 1, operations) for _ in range(2)))


class Detector(RetinaFace):
    def __init__(self, operations: Operations = nn) -> None:
        nn.Module.__init__(self)
        self.body = Trunk(operations)
        self.fpn = FeaturePyramid(Trunk.channels, WIDTH, SLOPE, operations)
        self.ssh1, self.ssh2, self.ssh3 = (ContextModule(WIDTH, SLOPE, operations) for _ in STEPS)
        self.ClassHead = nn.ModuleList(Head(WIDTH, 2, operations) for _ in STEPS)
        self.BboxHead = nn.ModuleList(Head(WIDTH, 4, operations) for _ in STEPS)
        self.LandmarkHead = nn.ModuleList(Head(WIDTH, 10, operations) for _ in STEPS)
