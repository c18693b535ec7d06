"""The number formats of GGML: blocks of small whole numbers that share a scale.

A block of 32 numbers has one scale in float16, and in the forms `_1` a smallest value beside it.
The formats `_K` have 256 numbers in a block and, within it, groups of 16 or 32 with scales of their
own, which are whole numbers themselves. The layouts are those of the structures in ggml-common.h
(https://github.com/ggml-org/ggml), and the arithmetic is the `gguf` package's, in float32, so that
the numbers are the same to the last bit.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BLOCKS", "Block", "read_blocks"]

Bytes = NDArray[np.integer[Any]]  # of 8 bits
Floats = NDArray[np.float32]

PIECE = 2**16  # numbers at a time: what is between them stays in the processor's cache
# The 16 values of IQ4, which lie closer together around 0.
IQ4_VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A format: its numbers and bytes, and what makes numbers of bytes.

    read: bytes (n, nbytes) to float32 (n, values)
    """

    values: int
    nbytes: int
    read: Callable[[Bytes], Floats]


def read_blocks(dtype: str, stored: Bytes) -> Floats:
    """Return the numbers of blocks that lie side by side, as a new flat float32 array."""
    block = BLOCKS[dtype]
    blocks = stored.reshape(-1, block.nbytes)
    numbers = np.empty((len(blocks), block.values), np.float32)
    step = PIECE // block.values
    with np.errstate(invalid="ignore", over="ignore"):  # scales may be anything; see `bind`
        for start in range(0, len(blocks), step):
            piece = slice(start, start + step)
            numbers[piece] = block.read(blocks[piece])
    return numbers.reshape(-1)


def _half(blocks: Bytes, at: int) -> Floats:
    """Read the float16 at a byte of each block, as a column."""
    return blocks[:, at : at + 2].copy().view("<f2").astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """Split bytes (n, b): the lower halves of all, then the upper ones, as (n, 2 · b)."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _bits(packed: Bytes) -> Bytes:
    """Split bytes (n, b) into their bits, the lowest first, as (n, 8 · b)."""
    bits: Bytes = np.unpackbits(packed.view(np.uint8), axis=1, bitorder="little")
    return bits


def _pairs(packed: Bytes) -> Bytes:
    """Split 64 bytes into 256 numbers of 2 bits: of each 32 bytes first all the lowest pairs."""
    halves = packed.reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    return (halves & 3).reshape(-1, 256)


def _q4_0(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).astype(np.int8) - np.int8(8)).astype(
        np.float32
    )


def _q4_1(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).astype(np.float32) + _half(blocks, 2)


def _five_bits(high: Bytes, low: Bytes) -> Bytes:
    return _nibbles(low) | _bits(high) << 4


def _q5_0(blocks: Bytes) -> Floats:
    numbers = _five_bits(blocks[:, 2:6], blocks[:, 6:]).astype(np.int8) - np.int8(16)
    return _half(blocks, 0) * numbers.astype(np.float32)


def _q5_1(blocks: Bytes) -> Floats:
    numbers = _five_bits(blocks[:, 4:8], blocks[:, 8:]).astype(np.float32)
    return _half(blocks, 0) * numbers + _half(blocks, 2)


def _q8_0(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _grouped(scale: Floats, numbers: NDArray[Any]) -> Floats:
    """Multiply each group of numbers (n, 256) by its own scale (n, groups)."""
    groups = scale.shape[1]
    product: Floats = scale[..., None] * numbers.reshape(len(scale), groups, -1).astype(np.float32)
    return product


def _affine(scale: Floats, numbers: NDArray[Any], minimum: Floats) -> Floats:
    """Multiply each group, and take its own smallest value away."""
    return (_grouped(scale, numbers) - minimum[..., None]).reshape(len(scale), -1)


def _q2_k(blocks: Bytes) -> Floats:
    scales = blocks[:, :16]
    scale = _half(blocks, 80) * (scales & 15).astype(np.float32)
    minimum = _half(blocks, 82) * (scales >> 4).astype(np.float32)
    return _affine(scale, _pairs(blocks[:, 16:80]), minimum)


def _q3_k(blocks: Bytes) -> Floats:
    packed = blocks[:, 96:108]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high = (packed[:, None, 8:] >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 4, 1)) & 3
    scales = (low | high.reshape(-1, 16) << 4).astype(np.int8) - np.int8(32)
    scale = _half(blocks, 108) * scales.astype(np.float32)
    mask = _bits(blocks[:, :32]).reshape(-1, 32, 8).swapaxes(1, 2).reshape(-1, 256)
    numbers = _pairs(blocks[:, 32:96]).astype(np.int8) - ((mask ^ 1) << 2).astype(np.int8)
    return _grouped(scale, numbers).reshape(len(blocks), -1)


def _scales_of_six_bits(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Split 12 bytes into 8 scales and 8 smallest values; the last four have their bits apart."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale = np.concatenate([first & 63, third & 15 | first >> 2 & 48], axis=1)
    minimum = np.concatenate([second & 63, third >> 4 | second >> 2 & 48], axis=1)
    return scale, minimum


def _low_then_high(packed: Bytes) -> Bytes:
    """Split 128 bytes into 256 nibbles: of each 32 bytes the lower halves, then the upper."""
    return _nibbles(packed.reshape(-1, 32)).reshape(-1, 256)


def _q4_k(blocks: Bytes) -> Floats:
    scale, minimum = _scales_of_six_bits(blocks[:, 4:16])
    return _affine(
        _half(blocks, 0) * scale.astype(np.float32),
        _low_then_high(blocks[:, 16:]),
        _half(blocks, 2) * minimum.astype(np.float32),
    )


def _q5_k(blocks: Bytes) -> Floats:
    scale, minimum = _scales_of_six_bits(blocks[:, 4:16])
    high = _bits(blocks[:, 16:48]).reshape(-1, 32, 8).swapaxes(1, 2).reshape(-1, 256)
    return _affine(
        _half(blocks, 0) * scale.astype(np.float32),
        _low_then_high(blocks[:, 48:]) | high << 4,
        _half(blocks, 2) * minimum.astype(np.float32),
    )


def _q6_k(blocks: Bytes) -> Floats:
    low = _nibbles(blocks[:, :128].reshape(-1, 64)).reshape(-1, 256)
    numbers = (low | _pairs(blocks[:, 128:192]) << 4).astype(np.int8) - np.int8(32)
    scale = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return _grouped(scale, numbers).reshape(len(blocks), -1)


def _iq4_nl(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * IQ4_VALUES[_nibbles(blocks[:, 2:])]


def _iq4_xs(blocks: Bytes) -> Floats:
    shifts = np.arange(0, 16, 2).astype(np.uint16)
    high = blocks[:, 2:4].copy().view("<u2") >> shifts & 3
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(-1, 8)
    scales = (low | high.astype(np.uint8) << 4).astype(np.int8) - np.int8(32)
    numbers = IQ4_VALUES[_nibbles(blocks[:, 8:].reshape(-1, 16)).reshape(-1, 256)]
    return _grouped(_half(blocks, 0) * scales.astype(np.float32), numbers).reshape(len(blocks), -1)


# By their names in GGML.
BLOCKS: Mapping[str, Block] = MappingProxyType(
    {
        "Q4_0": Block(values=32, nbytes=18, read=_q4_0),
        "Q4_1": Block(values=32, nbytes=20, read=_q4_1),
        "Q5_0": Block(values=32, nbytes=22, read=_q5_0),
        "Q5_1": Block(values=32, nbytes=24, read=_q5_1),
        "Q8_0": Block(values=32, nbytes=34, read=_q8_0),
        "Q2_K": Block(values=256, nbytes=84, read=_q2_k),
        "Q3_K": Block(values=256, nbytes=110, read=_q3_k),
        "Q4_K": Block(values=256, nbytes=144, read=_q4_k),
        "Q5_K": Block(values=256, nbytes=176, read=_q5_k),
        "Q6_K": Block(values=256, nbytes=210, read=_q6_k),
        "IQ4_NL": Block(values=32, nbytes=18, read=_iq4_nl),
        "IQ4_XS": Block(values=256, nbytes=136, read=_iq4_xs),
    }
)
