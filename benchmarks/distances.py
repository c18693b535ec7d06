"""How far apart two outputs are: relative error of numbers, PSNR and SSIM of pictures."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

WINDOW = 7  # pixels along one side of the squares that SSIM compares
K1, K2 = 0.01, 0.03
RANGE = 255


def relative_error(given: NDArray[Any], expected: NDArray[Any]) -> float:
    """Return |given - expected| / |expected| in the Euclidean norm; infinite for other shapes."""
    if given.shape != expected.shape:
        return math.inf
    reference = expected.astype(np.float64)
    return float(np.linalg.norm(given - reference) / np.linalg.norm(reference))


def ssim(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Structural similarity of two pictures, (H, W, channels) of 8 bits; 1 for equal ones.

    Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity",
    equation 13, averaged over every square of 7 × 7 pixels and over the channels. Variances are
    those of a sample, over n - 1.
    """
    x, y = a.astype(np.float64), b.astype(np.float64)
    bessel = WINDOW**2 / (WINDOW**2 - 1)
    mean_x, mean_y = _means(x), _means(y)
    variance_x = bessel * (_means(x * x) - mean_x**2)
    variance_y = bessel * (_means(y * y) - mean_y**2)
    covariance = bessel * (_means(x * y) - mean_x * mean_y)
    c1, c2 = (K1 * RANGE) ** 2, (K2 * RANGE) ** 2
    similar = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similar /= (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return float(similar.mean())


def _means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Average over every square that lies in the picture, by differences of running sums."""
    for axis in (0, 1):
        zero = np.zeros_like(values.take([0], axis))
        sums = np.concatenate([zero, values.cumsum(axis)], axis)
        count = sums.shape[axis]
        ends = sums.take(range(WINDOW, count), axis)
        values = (ends - sums.take(range(count - WINDOW), axis)) / WINDOW
    return values
