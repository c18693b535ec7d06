"""float8: numbers of one byte, each of which a float16 is exactly.

E4M3 and E5M2 have that many bits of exponent and mantissa (Micikevicius et al. 2022,
arXiv:2209.05433). The forms FNUZ have no infinities and no negative zero, and a bias that is one
larger (Noune et al. 2022, arXiv:2206.02915); E4M3 without it is what torch calls `e4m3fn`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FLOAT8", "read_float8"]

PIECE = 2**16  # numbers at a time: numpy makes an index of 8 bytes of each


def _table(exponent_bits: int, *, fnuz: bool) -> NDArray[np.float16]:
    """Return the float16 of each of the 256 bytes."""
    mantissa_bits = 7 - exponent_bits
    bias = 2 ** (exponent_bits - 1) - 1 + fnuz
    codes = np.arange(256)
    exponent = codes >> mantissa_bits & 2**exponent_bits - 1
    fraction = (codes & 2**mantissa_bits - 1) / 2**mantissa_bits
    size = np.where(
        exponent, (1 + fraction) * 2.0 ** (exponent - bias), fraction * 2.0 ** (1 - bias)
    )
    values = np.where(codes < 128, size, -size)
    if fnuz:
        values[0x80] = np.nan
    elif exponent_bits == 4:
        values[[0x7F, 0xFF]] = np.nan
    else:  # as in float16: the largest exponent stands for infinities and NaN
        special = exponent == 31
        values[special] = np.where(fraction, np.nan, np.copysign(np.inf, values))[special]
    table: NDArray[np.float16] = values.astype(np.float16)
    return table


# By the names that safetensors gives them.
FLOAT8: Mapping[str, NDArray[np.float16]] = MappingProxyType(
    {
        "F8_E4M3": _table(4, fnuz=False),
        "F8_E5M2": _table(5, fnuz=False),
        "F8_E4M3FNUZ": _table(4, fnuz=True),
        "F8_E5M2FNUZ": _table(5, fnuz=True),
    }
)


def read_float8(dtype: str, stored: NDArray[np.uint8]) -> NDArray[Any]:
    """Return float8 numbers of any shape as new float16 ones, exactly."""
    table, codes = FLOAT8[dtype], stored.reshape(-1)
    values = np.empty(codes.size, np.float16)
    for start in range(0, codes.size, PIECE):
        piece = slice(start, start + PIECE)
        np.take(table, codes[piece], out=values[piece], mode="clip")
    return values.reshape(stored.shape)
