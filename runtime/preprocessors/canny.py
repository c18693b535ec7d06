"""Canny's edges (Canny 1986, doi:10.1109/TPAMI.1986.4767851), pixel for pixel those of OpenCV.

Legend
    dx, dy  Sobel's derivatives over 3 x 3 pixels, edges continued
    m       the gradient's magnitude: |dx| + |dy| (L1), or dx² + dy² (L2, squared)
A pixel is an edge where m is a maximum along the gradient, above the high threshold, or above the
low one and joined to such a pixel. Of three channels each pixel takes that with the largest m.
"""

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["canny"]

Whole = NDArray[np.int32]

TAN_22 = round(math.tan(math.pi / 8) * 2**15)  # OpenCV's sectors are in fixed point of 15 bits
MOST = 32767  # OpenCV's largest threshold before it is squared
NEIGHBOURS = ((0, 1), (1, -1), (1, 0), (1, 1))  # each pair of the eight once
EDGE = 255


def canny(
    pixels: NDArray[np.uint8], low: float, high: float, *, l2_norm: bool = False
) -> NDArray[np.uint8]:
    """Return the edges of (H, W, 3) or (H, W) uint8: (H, W) uint8 of 0 and 255.

    low, high: thresholds of the magnitude, in either order; with `l2_norm` of its square root
    """
    dx, dy, magnitude = _gradient(pixels, l2_norm=l2_norm)
    low, high = sorted((low, high))
    if l2_norm:
        low, high = (min(MOST, t) ** 2 if t > 0 else min(MOST, t) for t in (low, high))
    thin = _is_maximum(dx, dy, magnitude) & (magnitude > math.floor(low))
    strong = thin & (magnitude > math.floor(high))
    return (EDGE * _joined(thin, strong)).astype(np.uint8)


def _gradient(pixels: NDArray[np.uint8], *, l2_norm: bool) -> tuple[Whole, Whole, Whole]:
    """Return dx, dy and m, (H, W) each."""
    image = pixels[..., None] if pixels.ndim == 2 else pixels
    around = np.pad(image.astype(np.int32), ((1, 1), (1, 1), (0, 0)), "edge")
    down = around[:-2] + 2 * around[1:-1] + around[2:]
    dx = down[:, 2:] - down[:, :-2]
    across = around[:, :-2] + 2 * around[:, 1:-1] + around[:, 2:]
    dy = across[2:] - across[:-2]
    magnitude = dx**2 + dy**2 if l2_norm else np.abs(dx) + np.abs(dy)
    largest = magnitude.argmax(axis=2)[..., None]
    found = [np.take_along_axis(each, largest, axis=2)[..., 0] for each in (dx, dy, magnitude)]
    return found[0], found[1], found[2]


def _is_maximum(dx: Whole, dy: Whole, magnitude: Whole) -> NDArray[np.bool_]:
    """Tell where m is a maximum along the gradient, in four sectors; of equal ones the first is."""
    around = np.pad(magnitude, 1)  # nothing is beyond the picture

    def at(down: int, across: int) -> Whole:
        height, width = magnitude.shape
        return around[1 + down : 1 + down + height, 1 + across : 1 + across + width]

    x, y = np.abs(dx), np.abs(dy) << 15
    flat = x * TAN_22
    is_across = y < flat
    is_down = ~is_across & (y > flat + (x << 16))
    falls = (dx ^ dy) < 0
    across = (magnitude > at(0, -1)) & (magnitude >= at(0, 1))
    down = (magnitude > at(-1, 0)) & (magnitude >= at(1, 0))
    rising = (magnitude > at(-1, -1)) & (magnitude > at(1, 1))
    falling = (magnitude > at(-1, 1)) & (magnitude > at(1, -1))
    diagonal = np.where(falls, falling, rising)
    return np.select([is_across, is_down], [across, down], diagonal)


def _joined(thin: NDArray[np.bool_], strong: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the thin pixels that are joined to strong ones, (H, W).

    Pixels are joined to trees, each to the smallest of its neighbours' roots, until each tree is a
    whole line: a few passes, however long the line winds.
    """
    height, width = thin.shape
    count = int(thin.sum())
    index = np.full((height + 1, width + 2), -1)
    index[:height, 1:-1][thin] = np.arange(count)
    here = index[:height, 1:-1]
    one, other = [], []
    for down, across in NEIGHBOURS:
        there = index[down : down + height, 1 + across : 1 + across + width]
        both = (here >= 0) & (there >= 0)
        one.append(here[both])
        other.append(there[both])
    a, b = np.concatenate(one), np.concatenate(other)
    root = np.arange(count)
    while a.size:
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while (root[root] != root).any():
            root = root[root]
        a, b = root[a], root[b]
        apart = a != b
        a, b = a[apart], b[apart]
    has_strong = np.zeros(count, np.bool_)
    has_strong[root[strong[thin]]] = True
    found = np.zeros_like(thin)
    found[thin] = has_strong[root]
    return found
