"""Gaussian noise: the numbers of ``torch.randn`` with a CPU generator, from numpy alone.

Legend
    u32     one output of the generator, the Mersenne Twister MT19937 (Matsumoto and Nishimura 1998)
    u       a uniform number in [0, 1): the low 24 bits of one u32 (float32), or the low 53 bits of
            two u32, the first one high (float64)
    z       a normal number, by Box and Muller (1958): sqrt(-2 ln(1 - u)) times cos or sin(2 pi u')

Source: PyTorch, ``aten/src/ATen/native/cpu/DistributionTemplates.h`` (``normal_fill``) and
``aten/src/ATen/core/DistributionsHelper.h`` (``normal_distribution<double>``).
"""

import math
import operator

import numpy as np
from numpy.typing import NDArray

from engine.errors import RequestError

__all__ = ["MAX_SEED", "TorchNoise"]

MAX_SEED = 2**64 - 1

_BLOCK = 16  # torch fills 16 normal numbers at a time: 8 cosines, then their 8 sines
_TWO_PI = np.float32(2 * math.pi)


class TorchNoise:
    """The stream of normal numbers that torch draws from one seed.

    ``TorchNoise(seed).normal(shape)`` equals
    ``torch.randn(shape, generator=torch.Generator().manual_seed(seed))`` within 5e-7 (the last bits
    of float32 logarithms and cosines differ between libraries), and every later draw equals torch's
    next draw from the same generator.

    Args:
        seed: 0 to 2**64 - 1. As in torch, only the low 32 bits choose the stream.

    Raises:
        RequestError: the seed is not an integer in that range.
    """

    def __init__(self, seed: int) -> None:
        """Open the stream at its beginning."""
        try:
            seed = operator.index(seed)
        except TypeError:
            raise RequestError(
                f"seed is {seed!r}; it must be an integer from 0 to {MAX_SEED}"
            ) from None
        if not 0 <= seed <= MAX_SEED:
            raise RequestError(
                f"seed is {seed}, outside 0 to {MAX_SEED}; choose a seed in that range"
            )
        self._twister = np.random.RandomState(seed & 0xFFFF_FFFF)
        self._spare: float | None = None  # the second number of a pair drawn by `_few`

    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Draw independent numbers of mean 0 and variance 1.

        Args:
            shape: any shape; torch takes another path for fewer than 16 numbers, followed here.

        Returns:
            (*shape), float32
        """
        size = math.prod(shape)
        values = self._many(size) if size >= _BLOCK else self._few(size)
        return values.reshape(shape)

    def _many(self, size: int) -> NDArray[np.float32]:
        """Draw 16 or more: float32 Box-Muller in blocks of 16; a tail redraws the last 16."""
        uniforms = self._uniforms(size)
        whole = size - size % _BLOCK
        values = np.empty(size, np.float32)
        values[:whole] = _box_muller(uniforms[:whole])
        if whole < size:
            values[-_BLOCK:] = _box_muller(self._uniforms(_BLOCK))
        return values

    def _few(self, size: int) -> NDArray[np.float32]:
        """Draw fewer than 16: one float64 pair at a time; a spare number waits for the next."""
        values = np.empty(size, np.float32)
        for i in range(size):
            if self._spare is not None:
                values[i], self._spare = self._spare, None
                continue
            angle = 2 * math.pi * self._uniform64()
            radius = math.sqrt(-2 * math.log1p(-self._uniform64()))
            values[i], self._spare = radius * math.cos(angle), radius * math.sin(angle)
        return values

    def _uniforms(self, size: int) -> NDArray[np.float32]:
        bits = self._twister.randint(0, 2**32, size, dtype=np.uint32)
        return (bits & np.uint32(2**24 - 1)).astype(np.float32) * np.float32(2**-24)

    def _uniform64(self) -> float:
        high, low = (int(word) for word in self._twister.randint(0, 2**32, 2, dtype=np.uint32))
        return ((high << 32 | low) & (2**53 - 1)) / 2**53


def _box_muller(uniforms: NDArray[np.float32]) -> NDArray[np.float32]:
    """Turn (n,) uniform into (n,) normal numbers, n a multiple of 16, all in float32 as torch."""
    u = uniforms.reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - u[:, 0]))
    angle = _TWO_PI * u[:, 1]
    normal: NDArray[np.float32] = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return normal.reshape(-1)
