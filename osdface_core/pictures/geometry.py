"""Affine maps of the plane.

Coordinates are (x, y) in pixels with pixel centres at .5: the pixel in row j, column i spans
[i,i+1] x [j,j+1].
"""

from __future__ import annotations

import math

Box = tuple[float, float, float, float]
Points = tuple[tuple[float, float], ...]
Affine = tuple[tuple[float, float, float], tuple[float, float, float]]


def inverse(matrix: Affine) -> Affine:
    """The inverse map. Raises ZeroDivisionError for a map that has none."""
    (a, b, c), (d, e, f) = matrix
    det = a * e - b * d
    return (e / det, -b / det, (b * f - c * e) / det), (-d / det, a / det, (c * d - a * f) / det)


def compose(after: Affine, first: Affine) -> Affine:
    """The map that applies `first`, then `after`."""
    (a, b, c), (d, e, f) = first
    (p, q, r), (s, t, u) = after
    return (p * a + q * d, p * b + q * e, p * c + q * f + r), (
        s * a + t * d,
        s * b + t * e,
        s * c + t * f + u,
    )


def apply(matrix: Affine, x: float, y: float) -> tuple[float, float]:
    """The image of the point (x, y)."""
    (a, b, c), (d, e, f) = matrix
    return a * x + b * y + c, d * x + e * y + f


def scaling(x: float, y: float) -> Affine:
    """The map that multiplies by x and y: from a picture to the same picture resized."""
    return (x, 0.0, 0.0), (0.0, y, 0.0)


def translated(matrix: Affine, x: float, y: float) -> Affine:
    """`matrix` followed by a step of (x, y)."""
    (a, b, c), (d, e, f) = matrix
    return (a, b, c + x), (d, e, f + y)


def scale_of(matrix: Affine) -> float:
    """The factor by which the map scales lengths: the square root of its absolute determinant."""
    (a, b, _), (d, e, _) = matrix
    return math.sqrt(abs(a * e - b * d))


def bounds(matrix: Affine, width: float, height: float) -> tuple[float, float, float, float]:
    """x1, y1, x2, y2 of the box around the image of a width x height rectangle at the origin."""
    corners = [apply(matrix, x, y) for x in (0.0, width) for y in (0.0, height)]
    xs, ys = zip(*corners, strict=True)
    return min(xs), min(ys), max(xs), max(ys)
