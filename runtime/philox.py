"""Philox, the counter-based generator behind CUDA's random numbers, and cuRAND's normal numbers.

A counter and a key go in, random words come out. Nothing is remembered, so any number of a stream
can be computed by itself, and all of them at once.

Sources: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011),
section 3.3 (Philox 4x32-10); Box and Muller (1958), in the arithmetic of cuRAND's
``curand_normal.h``.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["Words", "curand_normal", "philox4x32"]

Words = NDArray[np.uint64] | np.uint64

_ROUNDS = 10
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = np.array([0x9E3779B9, 0xBB67AE85], np.uint32)  # golden ratio; sqrt(3) - 1
_LOW, _HALF = np.uint64(0xFFFF_FFFF), np.uint64(32)
_UNIT = np.float32(2**-32)
_TURN = np.float64(_UNIT * np.float32(2 * np.pi))  # cuRAND keeps it in float32


def philox4x32(counter: tuple[Words, Words, Words, Words], key: int) -> tuple[Words, ...]:
    """Return four random words of 32 bits for each counter.

    Args:
        counter: four words, lowest first, each below 2**32; their shapes broadcast
        key: 0 to 2**64 - 1

    Returns:
        four words of the counters' shape, each below 2**32
    """
    a, b, c, d = counter
    keys = np.array([key & 0xFFFF_FFFF, key >> 32], np.uint32)
    for _ in range(_ROUNDS):
        p, q = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = q >> _HALF ^ b ^ keys[0], q & _LOW, p >> _HALF ^ d ^ keys[1], p & _LOW
        keys = keys + _WEYL
    return a, b, c, d


def curand_normal(words: tuple[Words, ...], output: int) -> NDArray[np.float32]:
    """Return one of the four normal numbers that cuRAND's `curand_normal4` makes of four words.

    Of each pair of words come a sine and then a cosine. What goes into the logarithm and into
    them is the GPU's to the last bit.

    Args:
        words: from `philox4x32`; the numbers have the shape of one of them
        output: 0 to 3
    """
    x, y = words[output & 2].astype(np.float32), words[output & 2 | 1].astype(np.float32)
    u = x * _UNIT + _UNIT / 2
    # Products of two float32 numbers are exact in float64: one rounding, as a fused multiply-add.
    angle = (y * _TURN + _TURN / 2).astype(np.float32)
    radius: NDArray[np.float32] = np.sqrt(np.float32(-2) * np.log(u))
    return radius * (np.cos(angle) if output % 2 else np.sin(angle))
