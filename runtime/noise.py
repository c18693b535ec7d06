"""Gaussian noise: the numbers of ``torch.randn`` on a CPU and on a CUDA GPU, from numpy alone.

A seed means one picture with torch's CPU generator and another with its CUDA generator, so both are
here: `make_noise` takes "cpu" (diffusers with a CPU generator, ComfyUI) or "cuda" (diffusers with a
CUDA generator, Automatic1111).

Legend of the CPU generator
    u32     one output of the generator, the Mersenne Twister MT19937 (Matsumoto and Nishimura 1998)
    u       a uniform number in [0, 1): the low 24 bits of one u32 (float32), or the low 53 bits of
            two u32, the first one high (float64)
    z       a normal number, by Box and Muller (1958): sqrt(-2 ln(1 - u)) times cos or sin(2 pi u')

Sources: PyTorch, ``aten/src/ATen/native/cpu/DistributionTemplates.h`` (``normal_fill``),
``aten/src/ATen/core/DistributionsHelper.h`` (``normal_distribution<double>``) and
``aten/src/ATen/native/cuda/DistributionTemplates.h`` (``calc_execution_policy`` and the grid-stride
kernel below it).
"""

import math
import operator
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from engine.errors import RequestError
from runtime.checks import OneOrMore, check_choice, check_number
from runtime.philox import curand_normal, philox4x32

__all__ = [
    *("MAX_SEED", "NOISES", "Noise", "PhiloxNoise", "TorchNoise"),
    *("draw", "draw_seeds", "fresh_noise", "make_noise", "seeds_of", "vary"),
]

AHEAD_BYTES = 2**24  # of noise that is drawn before it is needed

MAX_SEED = 2**64 - 1

_BLOCK = 16  # torch fills 16 normal numbers at a time: 8 cosines, then their 8 sines
_TWO_PI = np.float32(2 * math.pi)
_CHUNK = 2**13  # threads of the GPU computed at once: what they need stays in the cache


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
        self._twister = np.random.RandomState(_checked(seed) & 0xFFFF_FFFF)
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


class PhiloxNoise:
    """The stream of normal numbers that torch draws on a CUDA GPU from one seed.

    ``PhiloxNoise(seed).normal(shape)`` equals ``torch.randn(shape, device="cuda",
    generator=torch.Generator("cuda").manual_seed(seed))`` within 1e-6 (a GPU's logarithm and sine
    are approximate), and every later draw equals torch's next draw. Half precision on a GPU is
    these numbers, rounded.

    A GPU runs a limited number of threads at once, and gives a second number to the same thread
    when there are more numbers than threads. So all GPUs agree on a draw as long as each has as
    many threads as the draw has numbers, and differ beyond. A draw of 512 x 512 pixels has 16,384
    numbers, of 1024 x 1024 pixels 65,536; a Tesla T4 has 40,960 threads, an RTX 3060 43,008, a 3090
    125,952, a 4090 196,608, an A100 221,184.

    Args:
        seed: 0 to 2**64 - 1; all 64 bits choose the stream.
        threads: of the GPU: its multiprocessors times the threads of each (128 x 1536 of an
            RTX 4090). None is a GPU of any size, which is also what Automatic1111 computes with
            "RNG: NV".

    Raises:
        RequestError: the seed is not an integer in that range, or threads is no multiple of 256.
    """

    def __init__(self, seed: int, threads: int | None = None) -> None:
        """Open the stream at its beginning."""
        if threads is not None and (type(threads) is not int or threads < 1 or threads % 256):
            raise RequestError(
                f"threads is {threads!r}; give a multiple of 256, such as {128 * 1536} for an "
                "RTX 4090, or None"
            )
        self._key = _checked(seed)
        self._threads = threads
        self._calls = 0  # that each thread has made so far, the counter's lower half

    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Draw independent numbers of mean 0 and variance 1.

        Args:
            shape: any shape of up to 2**29 numbers, from where torch draws them in parts

        Returns:
            (*shape), float32
        """
        values = np.empty(math.prod(shape), np.float32)
        threads = min(self._threads or values.size, values.size)
        for start in range(0, values.size, 4 * threads or 1):
            self._fill(values[start : start + 4 * threads], threads)
            self._calls += 1
        return values.reshape(shape)

    def _fill(self, values: NDArray[np.float32], threads: int) -> None:
        """Fill up to four numbers for each thread: all the first ones, all the second ones, ..."""
        low, high = np.uint64(self._calls & 0xFFFF_FFFF), np.uint64(self._calls >> 32)
        for first in range(0, threads, _CHUNK):
            thread = np.arange(first, min(first + _CHUNK, threads), dtype=np.uint64)
            words = philox4x32((low, high, thread, np.uint64(0)), self._key)
            for output, start in enumerate(range(first, values.size, threads)):
                part = values[start : start + thread.size]
                part[:] = curand_normal(words, output)[: part.size]


Noise: TypeAlias = TorchNoise | PhiloxNoise
NOISES: Mapping[str, Callable[[int], Noise]] = {"cpu": TorchNoise, "cuda": PhiloxNoise}


def make_noise(kind: str, seed: int) -> Noise:
    """Open the stream of one seed, of torch's generator on a "cpu" or on a "cuda" GPU.

    Raises RequestError for another kind, and for a seed outside 0 to 2**64 - 1.
    """
    check_choice("noise", kind, tuple(NOISES))
    return NOISES[kind](seed)


def draw(noises: Sequence[Noise], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Draw (B, *shape) from each picture's own generator, as diffusers does with a list of them."""
    return np.concatenate([noise.normal((1, *shape)) for noise in noises])


def vary(
    noise: NDArray[np.float32], other: NDArray[np.float32], strength: float
) -> NDArray[np.float32]:
    """Go from one noise to another on a sphere, as Automatic1111's variation seeds do.

    noise, other: (B, C, h, w) float32; strength: from 0, the noise, to 1, the other
    Source: its `modules/rng.py`, `slerp`, whose vectors are the columns of each channel.
    """

    def unit(array: NDArray[np.float32]) -> NDArray[np.float32]:
        length: NDArray[np.float32] = np.linalg.norm(array, axis=2, keepdims=True)
        return array / length

    cosine = (unit(noise) * unit(other)).sum(2, keepdims=True)
    omega = np.arccos(cosine.clip(-1, 1))
    apart = cosine.mean((1, 2, 3), keepdims=True) <= 0.9995  # else nearly one noise, as of one seed
    sine = np.where(np.sin(omega) == 0, 1, np.sin(omega))
    weights = np.sin((1 - strength) * omega) / sine, np.sin(strength * omega) / sine
    varied = np.where(apart, weights[0] * noise + weights[1] * other, noise)
    return varied.astype(np.float32)


def _checked(seed: int) -> int:
    try:
        seed = operator.index(seed)
    except TypeError:
        raise RequestError(
            f"seed is {seed!r}; it must be an integer from 0 to {MAX_SEED}"
        ) from None
    if not 0 <= seed <= MAX_SEED:
        raise RequestError(f"seed is {seed}, outside 0 to {MAX_SEED}; choose a seed in that range")
    return seed


def _box_muller(uniforms: NDArray[np.float32]) -> NDArray[np.float32]:
    """Turn (n,) uniform into (n,) normal numbers, n a multiple of 16, all in float32 as torch."""
    u = uniforms.reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - u[:, 0]))
    angle = _TWO_PI * u[:, 1]
    normal: NDArray[np.float32] = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return normal.reshape(-1)


def seeds_of(
    name: str, given: OneOrMore[int] | None, count: int, step: int
) -> tuple[int, ...] | None:
    """Return the seed of each of so many pictures: those given, or counted from one by a step.

    name: that a sentence calls them. Raises RequestError for other than 0 to 2**64 - 1, and for
    another number of them.
    """
    if given is None:
        return None
    if isinstance(given, Sequence) and not isinstance(given, str):
        if len(given) != count:
            raise RequestError(
                f"{name} has {len(given)} numbers for {count} pictures; give one number, or as "
                "many as there are pictures"
            )
        for seed in given:
            check_number(name, seed, Integral, 0, MAX_SEED)
        return tuple(int(seed) for seed in given)
    check_number(name, given, Integral, 0, MAX_SEED)
    return tuple((int(given) + i * step) % (MAX_SEED + 1) for i in range(count))


def draw_seeds(count: int, step: int) -> list[int]:
    """Draw the first of so many seeds below 2**32; the others follow it by a step."""
    first = secrets.randbelow(2**32)
    return [first + i * step for i in range(count)]


def fresh_noise(
    rngs: Sequence[Noise], shape: tuple[int, int, int], needs_noise: NDArray[np.bool_]
) -> Iterator[NDArray[np.float32]]:
    """Yield the noise of each call, (B, C, h, w), drawn some calls ahead.

    A draw between two calls takes ten times as long as draws in a row: the engine has emptied the
    processor's caches.
    """
    silence = np.zeros((len(rngs), *shape), np.float32)
    ahead = max(1, AHEAD_BYTES // silence.nbytes)
    waiting: list[NDArray[np.float32]] = []
    for call, draws in enumerate(needs_noise):
        if draws and not waiting:
            left = int(needs_noise[call:].sum())
            waiting = [draw(rngs, shape) for _ in range(min(ahead, left))]
        yield waiting.pop(0) if draws else silence
