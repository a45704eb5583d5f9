"""RetinaFace's trunk ResNet50, of torchvision, which is imported for this trunk alone."""

from __future__ import annotations

from torch import Tensor
from torchvision.models.resnet import Bottleneck, ResNet


class ResNet50(ResNet):
    """(B,3,H,W) -> features of 512, 1024 and 2048 channels at 1/8, 1/16 and 1/32 of the size."""

    channels = (512, 1024, 2048)

    def __init__(self) -> None:
        super().__init__(Bottleneck, [3, 4, 6, 3])
        del self.avgpool, self.fc

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        first = self.layer2(x)
        second = self.layer3(first)
        return first, second, self.layer4(second)
