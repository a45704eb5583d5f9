"""Black-and-white, sepia and other pictures of one tone, whose colour follows from their light.

In such a picture each pixel's colour is one function of its luminance, the tone curve. What is
restored in it keeps its luminance and takes the colour from the curve.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .picture import finite

# Shares of red, green and blue in luminance, as in grey (ITU-R BT.601).
LUMA = (0.299, 0.587, 0.114)
# JPEG with halved colours keeps the mean colour of blocks of so many pixels a side, and little
# else. Small pictures have smaller blocks, so that there are some; large ones are sampled.
BLOCK, LEAST_BLOCK = 16, 4
LEAST_BLOCKS, MOST_BLOCKS = 12, 40
# Points of a curve, from black to white, the closer the darker: there a tone changes most.
POINTS = 24
# A picture has one tone if this share of its blocks lies on the curve, to within that part of its
# mean colourfulness: it is 0.07 to 0.3 for old photographs of one tone as JPEG, and 0.48 or more
# for coloured portraits, however pale (docs/pasting.md). Whatever the tone, the losses of JPEG stay
# below LEAST_TOLERANCE, and what is off by MOST_TOLERANCE is seen.
SHARE, TOLERANCE = 0.98, 0.3
LEAST_TOLERANCE, MOST_TOLERANCE = 2.5 / 255, 5 / 255
# Pixels a side of the square whose mean colour says whether a place has the tone: what JPEG spreads
# of a colour beside it is within.
PLACE = 9
# A curve that is nowhere further from grey is grey.
GREY = 0.5 / 255


@dataclass(frozen=True)
class ToneCurve:
    """Colour as a function of luminance: R - Y and B - Y (POINTS,2), for Y of 0 to 1."""

    differences: Tensor

    def toned(self, rgb: Tensor) -> Tensor:
        """RGB (...,3) in the colours of the curve, and as light as before where it goes so far.

        Colours of a tone that is not grey are within [0,1].
        """
        light = luminance(rgb)
        if not bool(self.differences.any()):
            return light[..., None].expand_as(rgb)
        # Paper is not lighter than its white: a colour cut off at 1 would leave the curve.
        steps = torch.linspace(0, 1, 1025)
        colours = self.at(steps)
        there = steps[(colours.amin(-1) >= -1e-6) & (colours.amax(-1) <= 1 + 1e-6)]
        if len(there):
            light = light.clamp(float(there.min()), float(there.max()))
        return self.at(light).clamp(0, 1)

    def holds(self, rgb: Tensor) -> Tensor:
        """Where (H,W) the colours about a pixel of RGB (H,W,3 or more) lie on the curve.

        A detail of another colour, such as a stamp on a grey picture or lips that were painted red,
        is too small for the curve to be refused, and keeps its colour.
        """
        rgb = finite(rgb[..., :3])
        off = (rgb - self.at(luminance(rgb))).movedim(-1, 0)[None]
        off = F.avg_pool2d(off, PLACE, 1, PLACE // 2, count_include_pad=False)
        return off[0].abs().amax(0) <= 2 * MOST_TOLERANCE

    def at(self, light: Tensor) -> Tensor:
        """The colours (...,3) of luminances (...); they may leave [0,1]."""
        # Between two points.
        place = light.clamp(0, 1).sqrt() * (POINTS - 1)
        low = place.floor().clamp(max=POINTS - 2)
        table, first = self.differences.to(light), low.long()
        red, blue = torch.lerp(table[first], table[first + 1], (place - low)[..., None]).unbind(-1)
        green = -(LUMA[0] * red + LUMA[2] * blue) / LUMA[1]
        return light[..., None] + torch.stack([red, green, blue], -1)


def luminance(rgb: Tensor) -> Tensor:
    """(...,3) -> (...): ITU-R BT.601's weighted sum."""
    return LUMA[0] * rgb[..., 0] + LUMA[1] * rgb[..., 1] + LUMA[2] * rgb[..., 2]


def tone_curve(picture: Tensor, place: tuple[int, int, int, int] | None = None) -> ToneCurve | None:
    """The one tone curve of a picture, or None where it has colours.

    A curve is fitted to the means of blocks, in which the losses of JPEG are next to nothing, and
    holds if nearly all blocks lie on it.

    picture: (H,W,C) in [0,1], C of 3 or more.
    place: left, top, right and bottom in pixels of the part that matters; it is grown where it is
        small. The whole picture if None.
    """
    x1, y1, x2, y2 = place or (0, 0, picture.shape[1], picture.shape[0])
    rows = _grown(y1, y2, picture.shape[0])
    columns = _grown(x1, x2, picture.shape[1])
    part = picture[rows, columns, :3]
    if not part.numel():
        return None
    light, colour = _block_means(part)
    if len(light) < LEAST_BLOCKS**2:
        # Of so few blocks a curve passes near all, whatever their colours.
        is_grey = float(torch.quantile(colour.abs().amax(1), SHARE)) <= LEAST_TOLERANCE
        return ToneCurve(torch.zeros(POINTS, 2)) if is_grey else None
    # Points that no block reaches are drawn towards their neighbours.
    slack = torch.eye(POINTS, dtype=torch.float64).diff(dim=0) * 1e-2 * len(light) ** 0.5
    differences = torch.linalg.lstsq(
        torch.cat([light, slack]),
        torch.cat([colour, colour.new_zeros(len(slack), 2)]),
        driver="gelsd",
    ).solution
    off = (light @ differences - colour).abs().amax(1)
    colourfulness = float(colour.abs().amax(1).mean())
    tolerance = min(max(TOLERANCE * colourfulness, LEAST_TOLERANCE), MOST_TOLERANCE)
    if float(torch.quantile(off, SHARE)) > tolerance:
        return None
    if float(differences.abs().max()) < GREY:
        differences = torch.zeros_like(differences)
    return ToneCurve(differences.float())


def _grown(start: int, stop: int, length: int) -> slice:
    """From `start` to `stop`, or as much about their middle as enough blocks take, within a side.

    length: of the side, in pixels.
    """
    missing = max(BLOCK * LEAST_BLOCKS - (stop - start), 0)
    start = max(0, min(start - missing // 2, length - (stop - start) - missing))
    return slice(start, min(length, max(stop, start + BLOCK * LEAST_BLOCKS)))


def _block_means(picture: Tensor) -> tuple[Tensor, Tensor]:
    """(H,W,3) -> means over N blocks: the points' shares (N,POINTS), and R - Y and B - Y (N,2).

    Both fp64, on the CPU.
    """
    sides = picture.shape[:2]
    block = min(max(min(sides) // LEAST_BLOCKS, LEAST_BLOCK), BLOCK, *sides)
    rows, columns = (
        (torch.linspace(0, n - 1, min(n, MOST_BLOCKS)).round().int() * block).tolist()
        for n in (sides[0] // block, sides[1] // block)
    )
    strips = torch.stack([picture[y : y + block] for y in rows])
    blocks = torch.stack([strips[:, :, x : x + block] for x in columns])
    pixels = finite(blocks.cpu()).flatten(2, 3).flatten(0, 1).double()
    light = luminance(pixels)
    return _shares(light), (pixels[..., ::2] - light[..., None]).mean(1)


def _shares(light: Tensor) -> Tensor:
    """Luminances (N,n) -> (N,POINTS): how much each point has of them, each between two points."""
    place = light.clamp(0, 1).sqrt() * (POINTS - 1)
    low = place.floor().clamp(max=POINTS - 2)
    shares = light.new_zeros(len(light), POINTS)
    shares.scatter_add_(1, low.long(), 1 - (place - low))
    shares.scatter_add_(1, low.long() + 1, place - low)
    return shares / light.shape[1]
