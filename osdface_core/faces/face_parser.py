"""Which pixels of a face crop are face, by ParseNet or by the small built-in parser.

ParseNet's parameters have the names of facexlib's parsing_parsenet.pth.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..chunks import in_chunks, is_out_of_memory
from ..cpu import optimized
from ..layers import Operations, load_network
from ..pictures.resampling import antialiased, filter_columns

SIDE = 512
WIDTHS = (64, 128, 256, 256, 256)
BODY_BLOCKS = 10
# CelebAMask-HQ's labels: background, skin, nose, glasses, eyes, brows, ears (l and r each), mouth,
# lips, hair, hat, earring, necklace, neck, clothes.
LABELS = 19
# What counts as face, as in facexlib. Hair does, because a seam would show at its edge against the
# forehead; hat, neck, clothes and what is in front of or beside the face do not.
FACE_LABELS = (*range(1, 14), 15)
# Specks of other labels up to this radius, in pixels of the parser, count as its noise.
SPECK = 2.0
# Peak of ParseNet's activations for one face in fp32, in bytes.
BYTES_PER_FACE = 420 * 1024**2
# Of the built-in parser: pixels a side of its input, and channels at 1/2 to 1/16 of that.
SMALL_SIDE = 256
SMALL_WIDTHS = (16, 32, 64, 96)


class ConvLayer(nn.Module):
    """(B,C,H,W) -> (B,out,H',W'): a 3 x 3 convolution with reflected edges.

    scale: "up" doubles the size before, "down" halves it.
    norm: batch norm follows.
    relu: leaky ReLU follows.
    """

    def __init__(
        self,
        channels: int,
        out: int,
        operations: Operations,
        *,
        scale: str = "none",
        norm: bool = False,
        relu: bool = False,
    ) -> None:
        super().__init__()
        self.up = scale == "up"
        self.conv2d = operations.Conv2d(
            channels, out, 3, 2 if scale == "down" else 1, bias=not norm
        )
        self.norm = nn.Sequential(OrderedDict(norm=nn.BatchNorm2d(out))) if norm else nn.Identity()
        self.relu = nn.LeakyReLU(0.2) if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.relu(self.norm(self.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"))))


class ResidualBlock(nn.Module):
    """(B,C,H,W) -> (B,out,H',W'): two convolutions beside a shortcut of the same scale."""

    def __init__(
        self, channels: int, out: int, operations: Operations, scale: str = "none"
    ) -> None:
        super().__init__()
        plain = scale == "none" and channels == out
        self.shortcut_func = (
            nn.Identity() if plain else ConvLayer(channels, out, operations, scale=scale)
        )
        self.conv1 = ConvLayer(
            channels, out, operations, scale="up" if scale == "up" else "none", norm=True, relu=True
        )
        self.conv2 = ConvLayer(
            out, out, operations, scale="down" if scale == "down" else "none", norm=True
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut_func(x) + self.conv2(self.conv1(x))


class ParseNet(nn.Module):
    """(B,3,512,512) in [-1,1] -> label scores (B,19,512,512).

    The face parser of PSFRGAN (Chen et al. 2021) that facexlib ships.
    """

    def __init__(self, operations: Operations = nn) -> None:
        super().__init__()
        steps = list(itertools.pairwise(WIDTHS))
        self.encoder = nn.Sequential(
            ConvLayer(3, WIDTHS[0], operations),
            *(ResidualBlock(a, b, operations, scale="down") for a, b in steps),
        )
        self.body = nn.Sequential(
            *(ResidualBlock(WIDTHS[-1], WIDTHS[-1], operations) for _ in range(BODY_BLOCKS))
        )
        self.decoder = nn.Sequential(
            *(ResidualBlock(b, a, operations, scale="up") for a, b in reversed(steps))
        )
        # Not used here, but in the file.
        self.out_img_conv = ConvLayer(WIDTHS[0], 3, operations)
        self.out_mask_conv = ConvLayer(WIDTHS[0], LABELS, operations)

    side = SIDE

    def forward(self, x: Tensor) -> Tensor:
        features = self.encoder(x)
        return self.out_mask_conv(self.decoder(features + self.body(features)))


def _block(channels: int, out: int, operations: Operations, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        operations.Conv2d(channels, out, 3, stride, 1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(inplace=True),
    )


class SmallParser(nn.Module):
    """(B,3,256,256) in [-1,1] -> the logit of face (B,1,256,256).

    The built-in parser, a U-Net (Ronneberger et al. 2015) of our own.
    """

    side = SMALL_SIDE

    def __init__(self, operations: Operations = nn) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            nn.Sequential(_block(a, b, operations, stride=2), _block(b, b, operations))
            for a, b in itertools.pairwise((3, *SMALL_WIDTHS))
        )
        self.middle = _block(SMALL_WIDTHS[-1], SMALL_WIDTHS[-1], operations)
        upwards = list(itertools.pairwise(SMALL_WIDTHS[::-1]))
        self.narrow = nn.ModuleList(operations.Conv2d(a, b, 1) for a, b in upwards)
        self.up = nn.ModuleList(_block(b, b, operations) for _, b in upwards)
        self.face = operations.Conv2d(SMALL_WIDTHS[0], 1, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen = []
        size = x.shape[-2:]
        for down in self.down:
            x = down(x)
            seen.append(x)
        x = self.middle(x)
        for narrow, up, finer in zip(self.narrow, self.up, reversed(seen[:-1]), strict=True):
            x = F.interpolate(narrow(x), finer.shape[-2:], mode="bilinear")
            x = up(x + finer)
        return F.interpolate(self.face(x), size, mode="bilinear")


def build_parser(tensors: dict[str, Tensor], operations: Operations = nn) -> ParseNet | SmallParser:
    """A parser ready to run, of the kind that the tensors belong to. Raises OSDFaceError if they
    are not ParseNet's either.
    """
    if "face.weight" in tensors:
        return load_network(
            lambda: SmallParser(operations),
            tensors,
            "The face parser's file does not fit the small built-in parser",
            "use parsing_parsenet.pth of facexlib, or the file that comes with this project.",
        )
    return load_network(
        lambda: ParseNet(operations),
        tensors,
        "The face parser's file does not fit ParseNet",
        "use parsing_parsenet.pth of facexlib.",
    )


def parse_faces(
    crops: Tensor,
    network: ParseNet | SmallParser,
    out_of_memory: Callable[[BaseException], bool] = is_out_of_memory,
) -> Tensor:
    """How likely each pixel is face: crops (N,H,W,3) in [0,1] -> (N,512,512) in [0,1].

    On the device of `crops`. out_of_memory: tells whether an error says that fewer crops at once
    may work.
    """
    maps = torch.empty(len(crops), SIDE, SIDE, device=crops.device)
    # Parameters may lie elsewhere, as a host pages them in and out; buffers stay where it computes.
    device = next(network.buffers()).device

    def work(part: slice) -> None:
        pixels = crops[part].movedim(-1, 1).to(device, torch.float32).clamp(0, 1)
        if pixels.shape[-2:] != (network.side, network.side):
            pixels = antialiased(pixels, (network.side, network.side), "bilinear")
        with torch.inference_mode(), optimized(device):
            found = face_probability(network(pixels * 2 - 1))
            if network.side != SIDE:
                found = F.interpolate(found[:, None], (SIDE, SIDE), mode="bilinear")[:, 0]
            maps[part] = found.to(maps.device)

    in_chunks(len(crops), max(len(crops), 1), work, out_of_memory)
    return maps


def face_probability(scores: Tensor) -> Tensor:
    """ParseNet's label scores (B,19,H,W), or the logit of face (B,1,H,W) -> the probability
    (B,H,W) that a pixel is face: the sum of those of FACE_LABELS.
    """
    if scores.shape[1] == 1:
        return scores[:, 0].float().sigmoid()
    return scores.float().softmax(1)[:, list(FACE_LABELS)].sum(1)


def feather_mask(face_map: Tensor, feather: float) -> Tensor:
    """The mask (H,W) of a face map (H,W): 0 where no face is, rising to 1 inside the face.

    feather: width of the rise, as a fraction of the side.
    """
    weight = torch.ones_like(face_map)
    for sigma in (SPECK * face_map.shape[-1] / SIDE, feather * face_map.shape[-1] / 3.3):
        if sigma > 0.3:
            weight = weight * (2 * _blur(face_map, sigma) - 1).clamp(0, 1)
    return weight


def _blur(picture: Tensor, sigma: float) -> Tensor:
    # A wide blur leaves no detail that a smaller picture cannot hold, and is many times as fast
    # there.
    smaller = 2 ** max(0, int(math.log2(sigma / 3)))
    height, width = picture.shape
    if smaller > 1 and height % smaller == width % smaller == 0:
        small = _blur(F.avg_pool2d(picture[None], smaller)[0], sigma / smaller)
        return F.interpolate(small[None, None], (height, width), mode="bilinear")[0, 0]
    reach = round(3 * sigma)
    x = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (x / sigma) ** 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(picture[None, None], (reach, reach, reach, reach), mode="replicate")[0]
    return filter_columns(filter_columns(padded, kernel).transpose(1, 2).contiguous(), kernel)[
        0
    ].T.contiguous()
