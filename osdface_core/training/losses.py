"""Losses and measures of restored faces. Pictures are (B,3,H,W) in [0,1] unless another range is
stated; every function gives a mean over the batch.

Pretrained networks are read from files of other projects, named at each; nothing is fetched.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Conv2d, Linear

from ..errors import OSDFaceError
from ..layers import load_network
from ..weights.reading import read_tensors

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Term:
    """A loss. weight: 0 for a loss that is not computed. files: of its pretrained network."""

    weight: float = 0.0
    files: tuple[Path, ...] = ()


def wanted(name: str, term: Term, files: str = "") -> bool:
    """Whether a loss is computed; the log says where it is not.

    name: its key in the configuration.
    files: which files its network is read from, if it has one. Without them it is not computed.
    """
    if term.weight and files and not term.files:
        log.warning(
            "%s is switched off: `losses.%s.files` names no network (%s).", name, name, files
        )
        return False
    if not term.weight:
        log.info("%s is switched off: its weight is 0.", name)
    return bool(term.weight)


def charbonnier(given: Tensor, right: Tensor, epsilon: float = 1e-3) -> Tensor:
    """Mean of sqrt(difference^2 + epsilon^2) - epsilon: an absolute error that is smooth at 0."""
    return ((given - right).square() + epsilon**2).sqrt().mean() - epsilon


def differences(given: Tensor, right: Tensor) -> Tensor:
    """Mean absolute error of the differences of neighbouring pixels, horizontal and vertical, of
    pictures in any range.
    """
    return sum(
        ((given.diff(dim=d) - right.diff(dim=d)).abs().mean() for d in (-1, -2)),
        given.new_zeros(()),
    )


def edges(pictures: Tensor) -> Tensor:
    """(B,3,H,W) -> (B,1,H,W): Sobel's gradient magnitude sqrt(gx^2 + gy^2 + 1e-6) of the channels'
    mean, with zeros beyond the border, as in OSDFace's demonstration of edge-aware DISTS.
    """
    across = torch.tensor(
        [[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=pictures.device
    )
    filters = torch.stack([across, across.T])[:, None].to(pictures)
    gx, gy = F.conv2d(pictures.mean(1, keepdim=True), filters, padding=1).split(1, dim=1)
    return (gx.square() + gy.square() + 1e-6).sqrt()


class VGG16(nn.Module):
    """torchvision's VGG16: normalised pictures -> relu1_2, relu2_2, relu3_3, relu4_3, relu5_3."""

    LEVELS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
    WIDTHS = (64, 128, 256, 512, 512)

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleDict()
        inside = 3
        for layers, width in zip(self.LEVELS, self.WIDTHS, strict=True):
            for layer in layers:
                self.features[str(layer)] = Conv2d(inside, width, 3, padding=1)
                inside = width

    def forward(self, x: Tensor, pool: nn.Module) -> list[Tensor]:
        found = []
        for i, layers in enumerate(self.LEVELS):
            x = pool(x) if i else x
            for layer in layers:
                x = F.relu(self.features[str(layer)](x))
            found.append(x)
        return found


class HannPool(nn.Module):
    """(B,C,H,W) -> half the size: root of the squares' mean under a 3 x 3 Hann window, which does
    not alias (Henaff and Simoncelli).
    """

    def forward(self, x: Tensor) -> Tensor:
        window = torch.tensor([0.5, 1.0, 0.5], device=x.device, dtype=x.dtype)
        window = torch.outer(window, window) / 4
        power = F.conv2d(
            x.square(), window.expand(x.shape[1], 1, 3, 3), stride=2, padding=1, groups=x.shape[1]
        )
        return (power + 1e-12).sqrt()


class DISTS(nn.Module):
    """Deep image structure and texture similarity (Ding et al. 2020): 0 for equal pictures.

    Files: torchvision's vgg16-397923af.pth and the authors' weights.pt (`alpha`, `beta`; pyiqa's
    DISTS_weights-f5e65c96.pth).
    """

    CHANNELS = (3, *VGG16.WIDTHS)

    def __init__(self) -> None:
        super().__init__()
        self.vgg = VGG16()
        self.pool = HannPool()
        self.alpha = nn.Parameter(torch.empty(1, sum(self.CHANNELS), 1, 1))
        self.beta = nn.Parameter(torch.empty(1, sum(self.CHANNELS), 1, 1))

    def features(self, pictures: Tensor) -> list[Tensor]:
        return [pictures, *self.vgg(_for_imagenet(pictures), self.pool)]

    def forward(self, given: Tensor, right: Tensor) -> Tensor:
        total = (self.alpha.sum() + self.beta.sum()).reshape(())
        alike = given.new_zeros(len(given))
        parts = zip(
            self.alpha.split(self.CHANNELS, 1), self.beta.split(self.CHANNELS, 1), strict=True
        )
        for x, y, (alpha, beta) in zip(
            self.features(given), self.features(right), parts, strict=True
        ):
            x_mean, y_mean = (v.mean((2, 3), keepdim=True) for v in (x, y))
            texture = (2 * x_mean * y_mean + 1e-6) / (x_mean.square() + y_mean.square() + 1e-6)
            x_power, y_power = (
                (v - m).square().mean((2, 3), keepdim=True) for v, m in ((x, x_mean), (y, y_mean))
            )
            covariance = (x * y).mean((2, 3), keepdim=True) - x_mean * y_mean
            structure = (2 * covariance + 1e-6) / (x_power + y_power + 1e-6)
            alike = alike + ((alpha * texture + beta * structure) / total).sum((1, 2, 3))
        return (1 - alike).mean()


def edge_aware_dists(network: DISTS, given: Tensor, right: Tensor) -> Tensor:
    """DISTS of the pictures and DISTS of their edges, in equal parts (OSDFace, section 3.3)."""
    of_edges = [edges(x).expand(-1, 3, -1, -1) for x in (given, right)]
    return network(given, right) + network(*of_edges)


class AlexNet(nn.Module):
    """torchvision's AlexNet: normalised pictures -> what its five convolutions see."""

    # Number, width, side, stride and padding of each; the second and third see a pooled picture.
    LAYERS = (
        (0, 64, 11, 4, 2),
        (3, 192, 5, 1, 2),
        (6, 384, 3, 1, 1),
        (8, 256, 3, 1, 1),
        (10, 256, 3, 1, 1),
    )
    POOLED = (3, 6)
    WIDTHS = tuple(width for _, width, *_ in LAYERS)

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleDict()
        inside = 3
        for number, width, side, stride, padding in self.LAYERS:
            self.features[str(number)] = Conv2d(inside, width, side, stride, padding)
            inside = width

    def forward(self, x: Tensor, pool: nn.Module) -> list[Tensor]:
        found = []
        for number, *_ in self.LAYERS:
            x = pool(x) if number in self.POOLED else x
            x = F.relu(self.features[str(number)](x))
            found.append(x)
        return found


class LPIPS(nn.Module):
    """Learned perceptual similarity (Zhang et al. 2018) over VGG16, or over AlexNet, a twentieth of
    the work. Files: torchvision's vgg16-397923af.pth and the authors' vgg.pth, or
    alexnet-owt-7be5be79.pth and alex.pth.
    """

    def __init__(self, of: type[VGG16 | AlexNet] = VGG16) -> None:
        super().__init__()
        self.vgg = of()
        self.pool = nn.MaxPool2d(2 if of is VGG16 else 3, 2)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.empty(1, width, 1, 1)) for width in of.WIDTHS
        )

    def forward(self, given: Tensor, right: Tensor) -> Tensor:
        found = (
            self.vgg((x * 2 - 1 - x.new_tensor(_SHIFT)) / x.new_tensor(_SCALE), self.pool)
            for x in (given, right)
        )
        total = given.new_zeros(())
        for x, y, weight in zip(*found, self.weights, strict=True):
            x, y = (v / (v.square().sum(1, keepdim=True).sqrt() + 1e-10) for v in (x, y))  # noqa: PLW2901
            total = total + ((x - y).square() * weight).sum(1).mean()
        return total


_SHIFT = [[[-0.030]], [[-0.088]], [[-0.188]]]
_SCALE = [[[0.458]], [[0.448]], [[0.450]]]


def _for_imagenet(x: Tensor) -> Tensor:
    return (x - x.new_tensor([[[0.485]], [[0.456]], [[0.406]]])) / x.new_tensor(
        [[[0.229]], [[0.224]], [[0.225]]]
    )


def tones(given: Tensor, right: Tensor) -> Tensor:
    """Mean squared error of pictures (B,3,H,W), sides multiples of 8, at an eighth of their size.

    Blotches of colour and wrong shades are in it, fine detail is not: LPIPS hardly asks for the
    former, and the error of every pixel is mostly the latter's.
    """
    return F.avg_pool2d(given - right, 8).square().mean()


def weave(given: Tensor, right: Tensor, block: int = 8, window: int = 8) -> Tensor:
    """What the error of pictures (B,3,H,W), sides multiples of `block`, has in common at each place
    of its blocks: the mean square of that, over all places and windows of `window` blocks a side.

    A decoder draws a block from a few numbers, so that the detail it makes up repeats from block to
    block: the eye sees a weave, a loss of detail does not. Errors that do not repeat cancel in a
    window's mean.
    """
    places = F.pixel_unshuffle(given - right, block)
    window = min(window, *places.shape[-2:])
    common = F.avg_pool2d(places, window, max(1, window // 2))
    common = common.unflatten(1, (given.shape[1], -1))
    return (common - common.mean(2, keepdim=True)).square().mean()


def leaning(
    given: Tensor, degraded: Tensor, right: Tensor, spoilt: float, lean: float = 1.0
) -> Tensor:
    """`given` itself, all (B,3,H,W), whose gradients are multiplied by each picture's share: the
    mean squared error of `degraded` over `spoilt`, from 0.25 to 2, to the power of `lean`; by 1
    where `spoilt` is 0.
    """
    if not spoilt:
        return given
    lost = (degraded - right).square().mean((1, 2, 3), keepdim=True)
    return torch.lerp(given.detach(), given, (lost / spoilt).clamp(0.25, 2).pow(lean).to(given))


def shaken(pictures: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Pictures (B,3,H,W), all shifted by up to 7 px, mirrored and resized by the same chance."""
    top, left, across, down = torch.randint(8, (4,), generator=generator).tolist()
    axes = [axis for axis, draw in ((-1, across), (-2, down)) if draw % 2]
    scale = 0.7 + 0.5 * float(torch.rand((), generator=generator))
    return [
        F.interpolate(
            x[..., top:, left:].flip(axes), scale_factor=scale, mode="bilinear", antialias=True
        )
        for x in pictures
    ]


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = Conv2d(channels, channels // 16, 1, bias=False)
        self.fc2 = Conv2d(channels // 16, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class Bottleneck(nn.Module):
    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.shortcut_layer = (
            nn.MaxPool2d(1, stride)
            if inside == out
            else nn.Sequential(Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(inside),
            Conv2d(inside, out, 3, 1, 1, bias=False),
            nn.PReLU(out),
            Conv2d(out, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            SqueezeExcite(out),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut_layer(x) + self.res_layer(x)


class ArcFace(nn.Module):
    """ArcFace's IR-SE50 (Deng et al. 2019). File: facexlib's recognition_arcface_ir_se50.pth.

    Takes FFHQ-aligned crops; the part of them that it is shown, at 112 px, is the one that pSp
    takes (Richardson et al. 2021).
    """

    def __init__(self) -> None:
        super().__init__()
        self.input_layer = nn.Sequential(
            Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64)
        )
        levels = ((64, 64, 3), (64, 128, 4), (128, 256, 14), (256, 512, 3))
        self.body = nn.Sequential(
            *(
                Bottleneck(out if i else inside, out, 1 if i else 2)
                for inside, out, count in levels
                for i in range(count)
            )
        )
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(512),
            nn.Dropout(0.0),
            nn.Flatten(),
            Linear(512 * 7 * 7, 512),
            nn.BatchNorm1d(512),
        )

    def forward(self, faces: Tensor) -> Tensor:
        """(B,3,112,112) in [-1,1] -> (B,512) of length 1."""
        return F.normalize(self.output_layer(self.body(self.input_layer(faces))), dim=1)

    def of_crops(self, crops: Tensor) -> Tensor:
        height, width = crops.shape[-2:]
        part = crops[
            ..., height * 35 // 256 : height * 223 // 256, width * 32 // 256 : width * 220 // 256
        ]
        return self(F.interpolate(part, (112, 112), mode="bilinear", antialias=True) * 2 - 1)


class Scaled(nn.Module):
    """A convolution, then a factor and a shift for each channel."""

    def __init__(self, inside: int, out: int, side: int, stride: int = 1, padding: int = 1) -> None:
        super().__init__()
        self.conv = Conv2d(inside, out, side, stride, padding)
        self.scale = nn.Parameter(torch.ones(out))
        self.shift = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        channels = (1, -1, 1, 1)
        return self.conv(x) * self.scale.view(channels) + self.shift.view(channels)


class DlibBlock(nn.Module):
    """A residual block, of which some halve the size."""

    def __init__(self, inside: int, out: int, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv1 = Scaled(inside, out, 3, *((2, 0) if down else (1, 1)))
        self.conv2 = Scaled(out, out, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(x)))
        if self.down:
            x = F.avg_pool2d(x, 2)
            x = F.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))
            y = F.pad(y, (0, x.shape[3] - y.shape[3], 0, x.shape[2] - y.shape[2]))
        return F.relu(x + y)


class DlibFace(nn.Module):
    """dlib's ResNet-29 (Davis King, public domain): one person's faces are less than 0.6 apart.

    File: identity.safetensors, which benchmarks/measures.py makes of face-api's. Takes FFHQ-aligned
    crops; it is shown the square of them that face-api cuts out for it, at 150 px.
    """

    # The blocks' names, the channels that each is given, and those that it gives.
    BLOCKS = (
        *((f"conv32_{i}", 32, 32) for i in (1, 2, 3)),
        ("conv64_down", 32, 64),
        *((f"conv64_{i}", 64, 64) for i in (1, 2, 3)),
        ("conv128_down", 64, 128),
        *((f"conv128_{i}", 128, 128) for i in (1, 2)),
        ("conv256_down", 128, 256),
        *((f"conv256_{i}", 256, 256) for i in (1, 2)),
        ("conv256_down_out", 256, 256),
    )
    MEAN = (122.782, 117.001, 104.298)
    # Left, top and side of the square in a crop of side 1: half of it and 0.43 before the middle of
    # the eyes' and the mouth's centres, its side the distance from eyes to mouth over 0.45.
    SQUARE = (0.185, 0.283, 0.632)

    def __init__(self) -> None:
        super().__init__()
        self.conv32_down = Scaled(3, 32, 7, 2, 0)
        self.blocks = nn.ModuleDict(
            {name: DlibBlock(inside, out, "down" in name) for name, inside, out in self.BLOCKS}
        )
        self.fc = nn.Parameter(torch.empty(256, 128))

    def forward(self, faces: Tensor) -> Tensor:
        """(B,3,150,150) in [0,1] -> (B,128)."""
        x = (faces * 255 - faces.new_tensor(self.MEAN)[:, None, None]) / 256
        x = F.max_pool2d(F.relu(self.conv32_down(x)), 3, 2)
        for block in self.blocks.values():
            x = block(x)
        return x.mean((2, 3)) @ self.fc

    def of_crops(self, crops: Tensor) -> Tensor:
        """(B,3,S,S) in [0,1], aligned -> (B,128)."""
        left, top, side = (round(part * crops.shape[-1]) for part in self.SQUARE)
        part = crops[..., top : top + side, left : left + side]
        return self(F.interpolate(part, (150, 150), mode="bilinear", antialias=True))


def identity(network: ArcFace | DlibFace, given: Tensor, right: Tensor) -> Tensor:
    """1 - the cosine of the faces' embeddings."""
    with torch.no_grad():
        target = network.of_crops(right)
    return 1 - F.cosine_similarity(network.of_crops(given), target).mean()


def gan_losses(kind: str, fake: Tensor | None = None, real: Tensor | None = None) -> Tensor:
    """The discriminator's loss, or with `fake` alone the generator's.

    kind: softplus or hinge.
    fake: what the discriminator gives for restored pictures.
    real: what it gives for good ones.
    """
    if fake is None:
        raise ValueError("a GAN loss needs what the discriminator says of the fake")
    if real is None:
        return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()
    if kind == "hinge":
        return (F.relu(1 + fake).mean() + F.relu(1 - real).mean()) / 2
    return (F.softplus(fake).mean() + F.softplus(-real).mean()) / 2


def _tensors(files: Sequence[Path]) -> dict[str, Tensor]:
    return {name: tensor for file in files for name, tensor in read_tensors(file).items()}


def _vgg(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        f"vgg.{name}": tensor for name, tensor in tensors.items() if name.startswith("features.")
    }


def load_dists(files: Sequence[Path]) -> DISTS:
    tensors = _tensors(files)
    state = _vgg(tensors) | {name: tensors[name] for name in ("alpha", "beta") if name in tensors}
    return load_network(
        DISTS,
        state,
        "The files given for DISTS do not fit it",
        "give vgg16-397923af.pth and DISTS' weights.pt.",
        spare=True,
    )


def load_lpips(files: Sequence[Path]) -> LPIPS:
    tensors = _tensors(files)
    state = _vgg(tensors)
    state |= {
        f"weights.{i}": tensors[key]
        for i in range(5)
        if (key := f"lin{i}.model.1.weight") in tensors
    }
    first = state.get("vgg.features.0.weight")
    return load_network(
        partial(LPIPS, AlexNet if first is not None and first.shape[-1] == 11 else VGG16),
        state,
        "The files given for LPIPS do not fit it",
        "give vgg16-397923af.pth and LPIPS' vgg.pth, or alexnet-owt-7be5be79.pth and alex.pth.",
        spare=True,
    )


def load_identity(files: Sequence[Path]) -> ArcFace | DlibFace:
    """The network of a file: ArcFace's or dlib's."""
    tensors = _tensors(files)
    why = "The file given for the identity loss does not fit"
    remedy = (
        "give recognition_arcface_ir_se50.pth, or benchmarks/measures.py's identity.safetensors."
    )
    if "fc" in tensors:
        return load_network(DlibFace, tensors, why, remedy)
    return load_network(ArcFace, tensors, why, remedy)


def measures(given: Tensor, right: Tensor) -> dict[str, float]:
    """PSNR in dB and gradient energy as a share of the original's, means over the pictures."""
    given = given.clamp(0, 1)
    error = (given - right).square().mean((1, 2, 3))

    def energy(x: Tensor) -> Tensor:
        return sum((x.diff(dim=d).square().mean((1, 2, 3)) for d in (-1, -2)), x.new_zeros(len(x)))

    return {
        "psnr": float((-10 * error.clamp(min=1e-10).log10()).mean()),
        "sharpness": float((energy(given) / energy(right)).mean()),
    }


def mean_of_each(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each figure over dictionaries with the same keys."""
    return {key: sum(one[key] for one in figures) / len(figures) for key in figures[0]}


def check_finite(losses: dict[str, float], step: int) -> None:
    """Raises OSDFaceError for a loss that is NaN or infinite."""
    for name, value in losses.items():
        if not -float("inf") < value < float("inf"):
            raise OSDFaceError(
                f"{name} became {value} at step {step}: go on from the last checkpoint with a "
                f"lower learning rate."
            )
