"""Smooths the alignment of one face over the frames of a video, without lag."""

from __future__ import annotations

import cmath
import math

import numpy as np

from ..pictures.geometry import Affine
from .align import TEMPLATE, TEMPLATE_SIZE
from .track import BRIDGED


def smooth(
    matrices: dict[int, Affine], bridged: set[int], size: int, smoothing: float
) -> dict[int, Affine]:
    """The alignment of one face over its frames, with less jitter and no lag.

    Centre, logarithm of the size, and angle are each smoothed on their own (Whittaker 1923, Eilers
    2003: least squares with a penalty on second differences), which looks ahead as far as back and
    so never trails; a jump of a single frame counts little (Huber). Gaps longer than can be bridged
    split the frames into runs that are smoothed apart.

    matrices: picture -> crop, by frame.
    bridged: frames whose matrix is interpolated.
    size: the crop's side in pixels.
    smoothing: 0..1.
    """
    if smoothing <= 0:
        return matrices
    frames = sorted(matrices)
    breaks = [i for i in range(1, len(frames)) if frames[i] - frames[i - 1] > BRIDGED + 1]
    out: dict[int, Affine] = {}
    for start, stop in zip([0, *breaks], [*breaks, len(frames)], strict=True):
        run = frames[start:stop]
        # Frames of a flash belong to the run, without a measurement.
        everything = range(run[0], run[-1] + 1)
        if len(everything) < 3:
            out |= {frame: matrices[frame] for frame in run}
            continue
        weights = np.array(
            [1.0 if frame in matrices and frame not in bridged else 0.0 for frame in everything]
        )
        poses = np.zeros((len(everything), 4))
        for i, frame in enumerate(everything):
            if frame in matrices:
                poses[i] = _pose(matrices[frame], size)
        poses[:, 3] = np.unwrap(_forward_fill(poses[:, 3], weights))
        strength = 10 ** (STRONGEST * smoothing - 0.4)
        for k, factor in enumerate((1, 1, SIZE_FACTOR, ANGLE_FACTOR)):
            poses[:, k] = whittaker(poses[:, k], weights, strength * factor)
        out |= {frame: _matrix(poses[frame - run[0]], size) for frame in run}
    return out


# Decades by which the penalty on the centre's second differences grows from no smoothing to full,
# and factors for size and angle. A change of size or tilt is seen as shimmer long before one of
# place is, and heads are quicker to move than to grow or tilt.
STRONGEST = 2.5
SIZE_FACTOR, ANGLE_FACTOR = 10.0, 10.0
# Rounds of reweighting; values over which a drift is averaged; and how many times the noise it must
# be before it counts as motion, since a detector's noise is not white.
ROUNDS, RUN, DRIFT = 6, 5, 5.0


def _forward_fill(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Values without a measurement replaced by the last one, so that angles unwrap across them."""
    index = np.maximum.accumulate(np.where(weights > 0, np.arange(len(values)), 0))
    return values[index]


def _landmark_centre(size: int) -> complex:
    """The mean of the template's landmarks in a crop of `size` px, as x + iy."""
    return sum(complex(*point) for point in TEMPLATE) / len(TEMPLATE) * size / TEMPLATE_SIZE


def _pose(matrix: Affine, size: int) -> tuple[float, float, float, float]:
    """x and y of the landmarks' mean in the picture, the logarithm of the scale, and the angle.

    About that point the errors of the four are independent.
    """
    (a, _, x), (b, _, y) = matrix
    turn = complex(a, b)
    centre = (_landmark_centre(size) - complex(x, y)) / turn
    return centre.real, centre.imag, math.log(abs(turn)), cmath.phase(turn)


def _matrix(pose: np.ndarray, size: int) -> Affine:
    turn = cmath.rect(math.exp(pose[2]), pose[3])
    step = _landmark_centre(size) - turn * complex(pose[0], pose[1])
    return (turn.real, -turn.imag, step.real), (turn.imag, turn.real, step.imag)


def whittaker(values: np.ndarray, weights: np.ndarray, strength: float) -> np.ndarray:
    """z that minimises sum w (y - z)^2 + strength * sum v (second difference of z)^2.

    values, weights: y and w, (n,), n of 3 or more; a weight of 0 marks a gap, which is filled. In a
    few rounds w falls where a single value is far off, and v where several in a row are off to one
    side: there the face really moves.
    """
    # Imported where a video is smoothed: it takes half as long as a face.
    from scipy.linalg import solveh_banded

    measured = weights > 0
    data, bend = np.ones(len(values)), np.ones(len(values) - 2)
    smoothed = values
    # Third differences of a smooth motion are next to nothing; those of noise have 20 times its
    # variance.
    rough = np.abs(np.diff(values[measured], 3))
    noise = 1.4826 * float(np.median(rough)) / math.sqrt(20) if len(rough) else math.inf
    for _ in range(ROUNDS):
        # The 1e-9 keeps gaps at an end from being free to go anywhere.
        smoothed = solveh_banded(
            _bands(strength * bend, weights * data + 1e-9), weights * data * values
        )
        residual = np.where(measured, values - smoothed, 0.0)
        spread = 1.4826 * np.median(np.abs(residual[measured])) if measured.any() else 0.0
        if spread <= 0:
            break
        data = np.minimum(1.0, 2.5 * spread / np.maximum(np.abs(residual), 1e-12))
        drift = _running_sum(data * residual) / np.maximum(_running_sum(data * measured), 1.0)
        excess = np.maximum(0.0, np.abs(drift) / max(noise / math.sqrt(RUN), 1e-12) - DRIFT)
        bend = 1 / (1 + excess[1:-1]) ** 3
    return smoothed


def _running_sum(values: np.ndarray) -> np.ndarray:
    """Sums over RUN values around each."""
    return np.convolve(values, np.ones(RUN))[RUN // 2 :][: len(values)]


def _bands(bend: np.ndarray, diagonal: np.ndarray) -> np.ndarray:
    """The upper bands of D' diag(bend) D + diag(diagonal), D the second difference."""
    bands = np.zeros((3, len(diagonal)))
    bands[2] = diagonal
    bands[2, :-2] += bend
    bands[2, 1:-1] += 4 * bend
    bands[2, 2:] += bend
    bands[1, 1:-1] -= 2 * bend
    bands[1, 2:] -= 2 * bend
    bands[0, 2:] += bend
    return bands
