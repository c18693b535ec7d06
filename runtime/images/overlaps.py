"""Tiles of a picture that overlap, and how much each counts where two are computed.

A network sees some pixels around each that it makes, so what lies near a tile's cut edge is not
what it would be within. Those pixels are thrown away, and where two tiles are left, one fades into
the other.
"""

import math
from collections.abc import Generator, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["Tiles", "cuts_of", "windows_of"]

OVERLAP, EDGE = 32, 8  # of tiles, and what of it is thrown away, in pixels that go in

Array = NDArray[np.float32]
Made = TypeVar("Made")
Tiles = Generator[tuple[int, int], None, Made]
"""Yields after every tile how many are done and how many there are; returns what is made of all."""


def cuts_of(size: int, side: int, multiple: int) -> list[slice]:
    """Cut an axis into evenly spread tiles of one size that overlap."""
    side = min(side, size)
    overlap = OVERLAP + multiple  # starts are rounded to the multiple
    count = math.ceil((size - overlap) / (side - overlap)) if size > side else 1
    step = (size - side) / max(count - 1, 1) / multiple
    starts = [math.floor(i * step + 1e-9) * multiple for i in range(count)]
    return [slice(start, start + side) for start in starts]


def windows_of(cuts: Sequence[slice], scale: int) -> list[Array]:
    """Weigh the tiles along an axis, (scale · side,) each; weights sum to 1 everywhere.

    Towards an edge that was cut they fall over the overlap, to nothing before its last pixels.
    """
    length = scale * (cuts[0].stop - cuts[0].start)
    total = np.zeros(scale * cuts[-1].stop)
    windows = []
    for i, cut in enumerate(cuts):
        window = np.ones(length)
        ramp = _ramp(length, scale)
        if i:
            window *= ramp
        if i < len(cuts) - 1:
            window *= ramp[::-1]
        windows.append(window)
        total[scale * cut.start : scale * cut.stop] += window
    return [
        (window / total[scale * cut.start : scale * cut.stop]).astype(np.float32)
        for window, cut in zip(windows, cuts, strict=True)
    ]


def _ramp(length: int, scale: int) -> NDArray[np.float64]:
    """Rise from 0 to 1 over what of the overlap is kept, as the square of a sine does."""
    places = (np.arange(length) + 0.5) / scale
    kept = (places - EDGE) / (OVERLAP - 2 * EDGE)
    ramp: NDArray[np.float64] = np.sin(np.pi / 2 * kept.clip(0, 1)) ** 2
    return ramp
