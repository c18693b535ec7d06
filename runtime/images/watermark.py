"""An invisible watermark: a few characters in the brightness of a picture, without the original.

One bit a block of 8 x 8 pixels: the picture's brightness goes through one level of the Haar
wavelet, its low band through the cosine transform in blocks of 4 x 4, and the two lowest
frequencies of a block are moved to the nearest of two lattices, one for each value of the bit (Chen
and Wornell 2001, "Quantization index modulation", section V). So what is lost in compression and in
halving, the high frequencies, holds nothing of it. The bits repeat over the picture in an order
that a shift by whole blocks only rotates; whoever reads tries all shifts, and a checksum tells
which is right.
"""

import zlib
from collections.abc import Iterator
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.errors import RequestError

__all__ = [
    "MAX_CHARACTERS",
    "check_watermark",
    "check_watermark_size",
    "embed_watermark",
    "read_bits",
    "read_watermark",
    "watermark_bits",
]

MAX_CHARACTERS = 4  # of ASCII
BITS = 64  # those of the characters, and as many of their checksum
BLOCK = 8  # pixels
STEP = 22.0  # between two points of a lattice: larger survives more and is seen sooner
ROW_SHIFT = 8  # by which a row of blocks begins further on: any 8 x 8 blocks hold all bits
SCALES = (1.0, 2.0)  # at which a picture is looked at: as it is, and halved
UNSURE = 6  # bits of a picture that may be read wrong
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as in JPEG
PLACES = ((0, 1), (1, 0))  # of a block's cosines

Array = NDArray[np.float64]


def embed_watermark(image: Image.Image, text: str) -> Image.Image:
    """Return an RGB picture that holds a text; what is beyond whole blocks stays as it is.

    Transparency stays too.

    text: 1 to 4 characters of ASCII
    Raises RequestError for another text, and for a picture with fewer blocks than bits.
    """
    bits = watermark_bits(text)
    pixels = np.asarray(image.convert("RGB")).astype(np.float64)
    check_watermark_size(image.width, image.height)
    rows, columns = pixels.shape[0] // BLOCK, pixels.shape[1] // BLOCK
    inside = pixels[: rows * BLOCK, : columns * BLOCK]
    wanted = bits[_order(rows, columns)]
    coefficients = _cosines(_low_band(inside @ LUMA))
    change = np.zeros_like(coefficients)
    for place in PLACES:
        values = coefficients[:, :, place[0], place[1]]
        change[:, :, place[0], place[1]] = _nearest(values, wanted) - values
    added = _pixels(change)
    # Where white or black would be passed, the block moves away from it as a whole.
    over = _block_extreme(inside.max(-1) + added, np.max) - 255
    under = _block_extreme(inside.min(-1) + added, np.min)
    shift = np.minimum(-np.clip(over, 0, None), 0) - np.clip(under, None, 0)
    added += np.kron(shift, np.ones((BLOCK, BLOCK)))
    marked = np.array(image.convert("RGB"))
    marked[: rows * BLOCK, : columns * BLOCK] = (
        np.rint(inside + added[:, :, None]).clip(0, 255).astype(np.uint8)
    )
    result = Image.fromarray(marked)
    if image.has_transparency_data:
        result.putalpha(image.convert("RGBA").getchannel("A"))
    result.info.update(image.info)
    return result


def read_watermark(image: Image.Image) -> str | None:
    """Return the text that a picture holds, or None.

    It is found in a picture that was cut out, halved, or compressed within reason.
    """
    for scale in SCALES:
        size = (round(image.width * scale), round(image.height * scale))
        luma = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC)) @ LUMA
        for votes in _votes(luma):
            if (text := _text(votes)) is not None:
                return text
    return None


def watermark_bits(text: str) -> NDArray[np.int64]:
    """Return the bits that stand for a text, (64,) of 0 and 1."""
    check_watermark(text)
    content = text.encode().ljust(MAX_CHARACTERS, b"\0")
    whole = content + zlib.crc32(content).to_bytes(4, "big")
    return np.array([byte >> place & 1 for byte in whole for place in range(8)])


def read_bits(image: Image.Image) -> NDArray[np.int64]:
    """Return the bits that a picture of the marked one's size and place says, (64,)."""
    luma = np.asarray(image.convert("RGB")) @ LUMA
    rows, columns = (side // BLOCK * BLOCK for side in luma.shape)
    return (_sum(_said(luma[:rows, :columns])) > 0).astype(np.int64)


def check_watermark(text: str) -> None:
    """Raise RequestError for a text that no picture can hold."""
    if not 1 <= len(text) <= MAX_CHARACTERS or not text.isascii() or not text.isprintable():
        raise RequestError(
            f"watermark is {text!r}; give 1 to {MAX_CHARACTERS} printable ASCII characters"
        )


def check_watermark_size(width: int, height: int) -> None:
    """Raise RequestError for sides, in pixels, of a picture with fewer blocks than bits."""
    blocks = (height // BLOCK) * (width // BLOCK)
    if blocks < BITS:
        raise RequestError(
            f"a watermark needs {BITS} blocks of {BLOCK} x {BLOCK} pixels, and a picture of "
            f"{width} x {height} has {blocks}; draw a larger one"
        )


def _text(votes: Array) -> str | None:
    """Return the text of the only rotation of the bits whose checksum is right.

    Up to two of the bits whose votes are closest are taken for wrong ones.
    """
    bits = (votes > 0).astype(np.uint8)
    for wrong in _unsure(votes):
        tried = bits.copy()
        tried[list(wrong)] ^= 1
        for shift in range(BITS):
            whole = np.packbits(np.roll(tried, -shift), bitorder="little").tobytes()
            content, check = whole[:MAX_CHARACTERS], whole[MAX_CHARACTERS:]
            if zlib.crc32(content).to_bytes(4, "big") == check:
                text = content.rstrip(b"\0").decode("ascii", "replace")
                if text and text.isprintable() and text.isascii():
                    return text
    return None


def _unsure(votes: Array) -> Iterator[tuple[int, ...]]:
    """Yield which bits to take for wrong ones: none, one, then two of the least sure."""
    weakest = np.argsort(np.abs(votes))[:UNSURE].tolist()
    for count in range(3):
        yield from combinations(weakest, count)


def _votes(luma: Array) -> Iterator[Array]:
    """Yield what the blocks say of each bit, (BITS,), for every place where blocks may begin."""
    for top in range(BLOCK):
        for left in range(BLOCK):
            rows, columns = (luma.shape[0] - top) // BLOCK, (luma.shape[1] - left) // BLOCK
            if rows * columns < BITS:
                continue
            cut = luma[top : top + rows * BLOCK, left : left + columns * BLOCK]
            said = _said(cut)
            yield _sum(said)


def _sum(said: Array) -> Array:
    """Sum what blocks say, (rows, columns), of each bit: (BITS,)."""
    order = _order(*said.shape).ravel()
    return np.bincount(order, said.ravel(), BITS).astype(np.float64)


def _said(luma: Array) -> Array:
    """Return what each block says of its bit, (rows, columns): above 0 a one, below 0 a zero."""
    coefficients = _cosines(_low_band(luma))
    said = np.zeros(coefficients.shape[:2])
    for row, column in PLACES:
        phase = 2 * np.pi * coefficients[:, :, row, column] / STEP
        said -= np.cos(phase)  # multiples of the step are zeros, those between them ones
    return said


def _order(rows: int, columns: int) -> NDArray[np.int64]:
    """Return which bit each block holds, (rows, columns)."""
    order: NDArray[np.int64] = (
        np.arange(columns)[None] + ROW_SHIFT * np.arange(rows)[:, None]
    ) % BITS
    return order


def _nearest(values: Array, bits: NDArray[np.int64]) -> Array:
    """Return the nearest point of each value's lattice."""
    offset = bits * STEP / 2
    nearest: Array = np.rint((values - offset) / STEP) * STEP + offset
    return nearest


def _low_band(luma: Array) -> Array:
    """Return the low band of one level of the orthonormal Haar wavelet, half as high and wide."""
    halves = luma.reshape(luma.shape[0] // 2, 2, luma.shape[1] // 2, 2)
    low: Array = halves.sum(axis=(1, 3)) / 2
    return low


def _basis() -> Array:
    """Return the orthonormal cosine transform of 4 numbers, (4, 4)."""
    side = BLOCK // 2
    rows, columns = np.mgrid[0:side, 0:side]
    basis: Array = np.cos(np.pi * rows * (2 * columns + 1) / (2 * side)) * np.sqrt(2 / side)
    basis[0] /= np.sqrt(2)
    return basis


def _cosines(low: Array) -> Array:
    """Transform blocks of 4 x 4: (h, w) -> (h // 4, w // 4, 4, 4)."""
    side, basis = BLOCK // 2, _basis()
    blocks = low.reshape(low.shape[0] // side, side, low.shape[1] // side, side).swapaxes(1, 2)
    return basis @ blocks @ basis.T


def _pixels(coefficients: Array) -> Array:
    """Bring a change of cosines back to a change of pixels, through both transforms."""
    basis = _basis()
    blocks = (basis.T @ coefficients @ basis).swapaxes(1, 2)
    low = blocks.reshape(blocks.shape[0] * blocks.shape[1], -1)
    return np.kron(low, np.full((2, 2), 0.5))


def _block_extreme(values: Array, extreme: object) -> Array:
    """Return the largest or the smallest number of each block."""
    blocks = values.reshape(values.shape[0] // BLOCK, BLOCK, values.shape[1] // BLOCK, BLOCK)
    found: Array = extreme(blocks, axis=(1, 3))  # type: ignore[operator]
    return found
