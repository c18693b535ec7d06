"""float16 numbers as float32, two to three times as fast as numpy makes them.

numpy converts one number at a time. The bits of a float16, moved to where a float32 has them, are
that number times 2⁻¹¹², subnormal ones included; infinities and NaN alone are not.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["add_into", "widen"]

EXPONENT = np.uint16(0x7C00)  # all of its bits are set in what is not finite
KEPT = np.int32(-0x70002000)  # of a float32: the sign, and what a float16 has of all else
FACTOR = np.float32(2.0**112)
PIECE = 2**16  # numbers at a time: they stay in the processor's cache


def widen(values: NDArray[Any]) -> NDArray[np.float32]:
    """Return values of any float type as a new float32 array, exactly where they are float16."""
    if not _is_plain(values):
        return values.astype(np.float32, order="C")
    wide = np.empty(values.shape, np.float32)
    flat = wide.reshape(-1)
    for place, piece in _pieces(values):
        flat[place] = piece
    return wide


def add_into(total: NDArray[np.float32], values: NDArray[Any]) -> None:
    """Add values of any float type to float32 ones of the same shape, which are contiguous."""
    if not _is_plain(values):
        np.add(total, values, out=total, casting="same_kind")
        return
    flat = total.reshape(-1)
    for place, piece in _pieces(values):
        flat[place] += piece


def _is_plain(values: NDArray[Any]) -> bool:
    """Tell whether these are float16 numbers side by side."""
    return values.dtype == np.float16 and values.flags.c_contiguous


def _pieces(values: NDArray[Any]) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Convert piece by piece, into one buffer."""
    bits = values.reshape(-1).view(np.int16)
    buffer = np.empty(min(PIECE, bits.size), np.int32)
    for start in range(0, bits.size, PIECE):
        half = bits[start : start + PIECE]
        place = slice(start, start + half.size)
        if (half.view(np.uint16) & EXPONENT).max() == EXPONENT:
            yield place, half.view(np.float16).astype(np.float32)
            continue
        moved = np.left_shift(half, 13, out=buffer[: half.size], dtype=np.int32)
        moved &= KEPT
        single = moved.view(np.float32)
        single *= FACTOR
        yield place, single
