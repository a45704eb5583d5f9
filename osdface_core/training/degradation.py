"""Degrades a good picture: blur, shrinking, noise and JPEG, once or several times, then back to its
size.

Second-order degradation with the kernels of Real-ESRGAN (Wang et al. 2021, section 3); OSDFace runs
one chain twice. All that is random comes from the generator given, so that a seed and a sample's
number make the same picture on every machine.
"""

from __future__ import annotations

import hashlib
import io
import math
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..errors import OSDFaceError

Range = tuple[float, float]
T = TypeVar("T")

KERNELS = (
    "none",
    "iso",
    "aniso",
    "generalized_iso",
    "generalized_aniso",
    "plateau_iso",
    "plateau_aniso",
    "sinc",
)
NOISES = ("none", "gaussian", "poisson")
RESIZES = ("area", "bilinear", "bicubic", "nearest")


@dataclass(frozen=True)
class Stage:
    """One chain of blur, shrinking, noise and JPEG.

    A pair is a range, drawn from evenly; a mapping gives the chance of each kind.

    kernels: kinds of blur, of KERNELS.
    kernel_size: taps a side; odd numbers of the range are drawn.
    sigma: of the Gaussian along each axis, in pixels.
    generalized: exponent of the generalised Gaussian.
    plateau: exponent of the plateau-shaped kernel.
    shrink: what the sides are divided by.
    resize: kinds of interpolation, of RESIZES, for shrinking and enlarging.
    noises: kinds of noise, of NOISES.
    noise: standard deviation of Gaussian noise, in levels of 255.
    poisson: strength of shot noise, as Real-ESRGAN scales it.
    grey: chance that the noise is the same in all channels.
    jpeg: quality.
    jpeg_chance: chance of JPEG compression.
    enlarge: whether the stage ends at the picture's full size; the last stage always does.
    """

    kernels: dict[str, float] = field(default_factory=lambda: {"iso": 0.5, "aniso": 0.5})
    kernel_size: tuple[int, int] = (7, 41)
    sigma: Range = (0.1, 10.0)
    generalized: Range = (0.5, 4.0)
    plateau: Range = (1.0, 2.0)
    shrink: Range = (0.8, 16.0)
    resize: dict[str, float] = field(
        default_factory=lambda: {"area": 1.0, "bilinear": 1.0, "bicubic": 1.0}
    )
    noises: dict[str, float] = field(default_factory=lambda: {"gaussian": 1.0})
    noise: Range = (0.0, 15.0)
    poisson: Range = (0.05, 3.0)
    grey: float = 0.0
    jpeg: Range = (40.0, 95.0)
    jpeg_chance: float = 1.0
    enlarge: bool = True

    def __post_init__(self) -> None:
        for name, given, known in (
            ("kernels", self.kernels, KERNELS),
            ("noises", self.noises, NOISES),
            ("resize", self.resize, RESIZES),
        ):
            if (
                not given
                or set(given) - set(known)
                or min(given.values()) < 0
                or not sum(given.values())
            ):
                raise OSDFaceError(
                    f"`{name}` of a degradation is {given}; chances of {', '.join(known)} are "
                    f"wanted: correct them."
                )


@dataclass(frozen=True)
class Print:
    """What an old photograph has, or its print in a book, before it is degraded further.

    chance: of any of it.
    halftone: chance of a screen of dots.
    pitch: of the screen, in pixels.
    grain: standard deviation of the film's grain, in levels of 255.
    coarse: size of the grain, the Gaussian's sigma in pixels.
    scratches: how many bright or dark lines at most.
    """

    chance: float = 0.0
    halftone: float = 0.4
    pitch: Range = (2.5, 6.0)
    grain: Range = (0.0, 24.0)
    coarse: Range = (0.4, 1.5)
    scratches: int = 4


@dataclass(frozen=True)
class Degradation:
    """How a good picture is degraded.

    stages: run one after the other.
    old: comes before them.
    sinc: chance of a sinc filter at the end, for ringing (Real-ESRGAN, section 3.4).
    chance: of being degraded at all.
    """

    stages: tuple[Stage, ...] = (Stage(), Stage())
    old: Print = field(default_factory=Print)
    sinc: float = 0.0
    chance: float = 1.0

    def __call__(self, picture: Tensor, generator: torch.Generator) -> Tensor:
        """(3,H,W) in [0,1] -> the same size, in 256 steps of [0,1]."""
        # A chance of 1 draws nothing, so that it changes no number of the other draws.
        if self.chance < 1 and drawn((0, 1), generator) >= self.chance:
            return picture
        size = picture.shape[-2:]
        x = picture[None]
        # A chance of 0 draws nothing, so that it changes no number of the other draws.
        if self.old.chance and drawn((0, 1), generator) < self.old.chance:
            x = printed(x, self.old, generator)
        for stage in self.stages:
            x = degraded(x, stage, generator)
            if stage.enlarge:
                x = resized(x, size, picked(stage.resize, generator))
        if drawn((0, 1), generator) < self.sinc:
            x = blurred(
                x, sinc_kernel(_odd((7, 21), generator), drawn((math.pi / 3, math.pi), generator))
            )
        x = resized(
            x, size, picked(self.stages[-1].resize, generator) if self.stages else "bicubic"
        )
        return x[0].clamp(0, 1).mul(255).round().div(255)


def generator_for(seed: int, *numbers: int) -> torch.Generator:
    """A generator seeded with a hash of these numbers, so that neighbours are independent."""
    digest = hashlib.blake2b(repr((seed, *numbers)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def drawn(of: Range, generator: torch.Generator) -> float:
    """A number of the range, evenly distributed."""
    return of[0] + (of[1] - of[0]) * float(torch.rand((), generator=generator, dtype=torch.float64))


def picked(chances: dict[str, float], generator: torch.Generator) -> str:
    """One of the names, by its chance; the chances need not add up to 1."""
    names = list(chances)
    return names[
        int(
            torch.multinomial(
                torch.tensor([float(chances[n]) for n in names]), 1, generator=generator
            )
        )
    ]


def _odd(of: tuple[int, int], generator: torch.Generator) -> int:
    return 2 * round(drawn(((of[0] - 1) / 2, (of[1] - 1) / 2), generator)) + 1


def degraded(x: Tensor, stage: Stage, generator: torch.Generator) -> Tensor:
    """One stage on x (1,3,H,W) in [0,1] -> (1,3,h,w) in [0,1], the sides divided by the shrink."""
    kind = picked(stage.kernels, generator)
    if kind != "none":
        x = blurred(x, kernel(kind, stage, generator))
    shrink = drawn(stage.shrink, generator)
    height, width = (max(1, round(side / shrink)) for side in x.shape[-2:])
    x = resized(x, (height, width), picked(stage.resize, generator))
    x = noisy(x, stage, generator)
    if drawn((0, 1), generator) < stage.jpeg_chance:
        x = compressed(x, round(drawn(stage.jpeg, generator)))
    return x.clamp(0, 1)


def printed(x: Tensor, old: Print, generator: torch.Generator) -> Tensor:
    """x (1,3,H,W) in [0,1] as a grainy, scratched photograph, or its print in dots."""
    height, width = x.shape[-2:]
    grain = torch.randn(1, 1, height, width, generator=generator)
    sigma = drawn(old.coarse, generator)
    grain = F.conv2d(grain, gaussian_kernel(11, sigma, sigma, 0.0)[None, None], padding=5)
    x = x + drawn(old.grain, generator) / 255 * grain / grain.std()
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    for _ in range(int(torch.randint(old.scratches + 1, (), generator=generator))):
        angle, place = drawn((0, math.pi), generator), drawn((-0.5, 0.5), generator) * width
        way = (columns - width / 2) * math.cos(angle) + (rows - height / 2) * math.sin(angle)
        line = (drawn((0.3, 1.5), generator) - (way - place).abs() + 0.5).clamp(0, 1)
        x = x + line * (drawn((0, 1), generator) - x) * drawn((0.3, 1), generator)
    if drawn((0, 1), generator) < old.halftone:
        angle, pitch = drawn((0, math.pi / 2), generator), drawn(old.pitch, generator)
        cos, sin = (f(angle) * math.pi / pitch for f in (math.cos, math.sin))
        screen = torch.cos(columns * cos + rows * sin) * torch.cos(rows * cos - columns * sin)
        # Dots that grow with the darkness; soft-edged, since ink runs and scanners blur.
        soft = drawn((0.15, 0.6), generator)
        dots = torch.sigmoid((x - 0.5 + screen * 0.5) / soft * 4)
        share = drawn((0.3, 1), generator)
        low, high = drawn((0, 0.2), generator), drawn((0.8, 1), generator)
        x = torch.lerp(x, low + (high - low) * dots, share)
    return x.clamp(0, 1)


def resized(x: Tensor, size: tuple[int, int] | torch.Size, mode: str) -> Tensor:
    if x.shape[-2:] == torch.Size(size):
        return x
    if mode in ("area", "nearest"):
        return F.interpolate(x, tuple(size), mode=mode)
    # Without antialiasing, as OpenCV's resize, which Real-ESRGAN and the usual test sets use.
    return F.interpolate(x, tuple(size), mode=mode, align_corners=False).clamp(0, 1)


def kernel(kind: str, stage: Stage, generator: torch.Generator) -> Tensor:
    """(k,k) fp32 of sum 1."""
    size = _odd(stage.kernel_size, generator)
    if kind == "sinc":
        return sinc_kernel(size, drawn((math.pi / (3 if size < 13 else 5), math.pi), generator))
    across = drawn(stage.sigma, generator)
    along, angle = (
        (drawn(stage.sigma, generator), drawn((-math.pi, math.pi), generator))
        if kind.endswith("aniso")
        else (across, 0.0)
    )
    exponent = drawn(
        stage.generalized if kind.startswith("generalized") else stage.plateau, generator
    )
    return gaussian_kernel(
        size, across, along, angle, kind.partition("_")[0] if "_" in kind else "gaussian", exponent
    )


def gaussian_kernel(
    size: int,
    across: float,
    along: float,
    angle: float,
    shape: str = "gaussian",
    exponent: float = 1.0,
) -> Tensor:
    """(size,size) fp32 of sum 1 (Liu et al. 2020; Real-ESRGAN, section 3.1).

    With q the squared distance in standard deviations and b the exponent: gaussian is exp(-q/2),
    generalized exp(-q^b/2), plateau 1/(1+q^b).

    size: taps a side.
    across: standard deviation along the first axis, in pixels.
    along: along the second axis.
    angle: by which the axes are turned, in radians.
    shape: gaussian, generalized or plateau.
    exponent: b.
    """
    steps = torch.arange(size, dtype=torch.float64) - size // 2
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    u = (x * math.cos(angle) + y * math.sin(angle)) / across
    v = (y * math.cos(angle) - x * math.sin(angle)) / along
    q = u**2 + v**2
    weights = (
        1 / (1 + q**exponent)
        if shape == "plateau"
        else torch.exp(-0.5 * q ** (exponent if shape == "generalized" else 1.0))
    )
    return (weights / weights.sum()).float()


def sinc_kernel(size: int, cutoff: float) -> Tensor:
    """(size,size) fp32 of sum 1: the ideal low-pass filter, cutoff in radians a pixel."""
    steps = torch.arange(size, dtype=torch.float64) - size // 2
    radius = (steps[:, None] ** 2 + steps[None, :] ** 2).sqrt()
    weights = cutoff * torch.special.bessel_j1(cutoff * radius) / (2 * math.pi * radius)
    weights[size // 2, size // 2] = cutoff**2 / (4 * math.pi)
    return (weights / weights.sum()).float()


def blurred(x: Tensor, weights: Tensor) -> Tensor:
    """x (1,3,H,W) correlated with weights (k,k), mirrored beyond the edge.

    By Fourier transform, which for 41 taps is far faster on a CPU.
    """
    border = weights.shape[-1] // 2
    padded = F.pad(x, [border] * 4, mode="reflect" if border < min(x.shape[-2:]) else "replicate")
    size = padded.shape[-2:]
    spectrum = torch.fft.rfft2(padded) * torch.fft.rfft2(weights.flip(0, 1).to(x), s=size)
    whole = torch.fft.irfft2(spectrum, s=size)
    return whole[..., 2 * border :, 2 * border :].clamp(0, 1)


def noisy(x: Tensor, stage: Stage, generator: torch.Generator) -> Tensor:
    """x (1,3,H,W) in [0,1] with noise; not clamped."""
    kind = picked(stage.noises, generator)
    if kind == "none":
        return x
    grey = drawn((0, 1), generator) < stage.grey
    if kind == "gaussian":
        channels = 1 if grey else x.shape[1]
        deviation = drawn(stage.noise, generator) / 255
        return x + deviation * torch.randn(1, channels, *x.shape[-2:], generator=generator)
    levels = x.mean(1, keepdim=True) if grey else x
    levels = (levels * 255).round().clamp(0, 255) / 255
    photons = 2.0 ** math.ceil(math.log2(max(2, len(levels.unique()))))
    return x + drawn(stage.poisson, generator) * (
        torch.poisson(levels * photons, generator=generator) / photons - levels
    )


def compressed(x: Tensor, quality: int) -> Tensor:
    """x (1,3,H,W) in [0,1] through JPEG with the usual 4:2:0 chroma subsampling."""
    pixels = x[0].clamp(0, 1).mul(255).round().byte().movedim(0, -1).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    with Image.open(file) as image:
        return (
            torch.from_numpy(np.asarray(image.convert("RGB")).copy()).movedim(-1, 0)[None].float()
            / 255
        )
