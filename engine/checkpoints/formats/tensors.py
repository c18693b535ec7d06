"""Tensors where they lie in a file, whatever its format: mapped, checked, never copied.

safetensors is the format that is nothing else: the length of its header (8 bytes, little-endian),
the header in JSON, `{name: {"dtype": "F16", "shape": [2, 3], "data_offsets": [begin, end]}}`, and
the data, which the tensors cover without holes or overlaps
(https://github.com/huggingface/safetensors#format).

float16 numbers become float32 two to three times as fast as numpy makes them, which converts one
at a time: the bits of a float16, moved to where a float32 has them, are that number times 2⁻¹¹²,
subnormal ones included; infinities and NaN alone are not.
"""

import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.checkpoints.formats.blocks import BLOCKS, read_blocks
from engine.checkpoints.formats.float8 import FLOAT8, read_float8
from engine.errors import ModelError

__all__ = [
    "DTYPES",
    "FLOATS",
    "MAX_HEADER",
    "StoredTensor",
    "add_into",
    "are_counts",
    "damaged",
    "extent",
    "is_mapped",
    "is_unicode",
    "map_file",
    "parse_object",
    "read_header",
    "short",
    "widen",
]

# The element types by the names that safetensors gives them.
DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "BOOL": np.dtype("?"),
        "U8": np.dtype("<u1"),
        "I8": np.dtype("<i1"),
        "U16": np.dtype("<u2"),
        "I16": np.dtype("<i2"),
        "U32": np.dtype("<u4"),
        "I32": np.dtype("<i4"),
        "U64": np.dtype("<u8"),
        "I64": np.dtype("<i8"),
        "F16": np.dtype("<f2"),
        "BF16": np.dtype("<u2"),  # as it is stored: numpy has no bfloat16
        "F32": np.dtype("<f4"),
        "F64": np.dtype("<f8"),
        **dict.fromkeys(FLOAT8, np.dtype("<u1")),
    }
)
FLOATS = ("F16", "BF16", "F32", "F64", *FLOAT8, *BLOCKS)  # what weights may be
# What safetensors has besides, and why it is no weight that is read.
NOT_READ: Mapping[str, str] = MappingProxyType(
    {
        "C64": "complex numbers",
        "F4": "numbers of 4 bits",
        "F6_E2M3": "numbers of 6 bits",
        "F6_E3M2": "numbers of 6 bits",
        "F8_E8M0": "the scales of numbers of 4 to 8 bits (MX)",
    }
)
MAX_DIMENSIONS = 32  # numpy's limit before version 2
MAX_BYTES = 2**63 - 1  # of one array, in numpy


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies in a mapped file; nothing of it is read before `array` is called.

    dtype: safetensors' name for it, such as "F16" or "BF16", or GGML's, such as "Q8_0"
    offset: of its first value, in bytes from the start of the file
    nbytes: the size of its values, side by side
    file: the mapped file, or bytes that a pickle holds instead
    strides: steps in values from one index to the next, as torch counts them; None: side by side
    scale: what its values are to be multiplied by; each of its sizes divides that of the tensor
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    file: mmap.mmap | bytes
    strides: tuple[int, ...] | None = None
    scale: "StoredTensor | None" = None

    def array(self) -> NDArray[Any]:
        """View the tensor in the file, read-only and without a copy.

        Copied are numbers that numpy has not, of which all come out exactly: BF16 as float32 (it is
        a float32's upper half), float8 as float16, GGML's blocks as float32. So are tensors with a
        scale, which become float32, and those at an offset that no processor likes, in files of
        safetensors before 0.3.
        """
        array = self._values()
        if self.scale is not None:
            array = _scaled(array, self.scale.array())
        array.flags.writeable = False
        return array

    @property
    def is_float(self) -> bool:
        """Whether its numbers are a weight's: floating-point ones, or whole ones with a scale."""
        return self.dtype in FLOATS or (self.dtype == "I8" and self.scale is not None)

    def _values(self) -> NDArray[Any]:
        if self.dtype in BLOCKS:
            data = np.ndarray((self.nbytes,), np.uint8, buffer=self.file, offset=self.offset)
            return read_blocks(self.dtype, data).reshape(self.shape)
        dtype = DTYPES[self.dtype]
        strides = self.strides and tuple(step * dtype.itemsize for step in self.strides)
        stored: NDArray[Any] = np.ndarray(
            self.shape, dtype, buffer=self.file, offset=self.offset, strides=strides
        )
        if self.dtype in FLOAT8:
            return read_float8(self.dtype, stored)
        if self.dtype == "BF16":
            bits = stored.astype(np.uint32)
            bits <<= 16
            return bits.view(np.float32)
        return stored if stored.flags.aligned else stored.copy()


def _scaled(array: NDArray[Any], scale: NDArray[Any]) -> NDArray[np.float32]:
    """Multiply an array by a scale, of which each value counts for a block of the array's."""
    wide = widen(array)
    pairs = list(zip(scale.shape, array.shape, strict=True))
    blocks = wide.reshape([size for s, n in pairs for size in (s, n // s)])
    blocks *= widen(scale).reshape([size for s, _ in pairs for size in (s, 1)])
    return wide


def map_file(path: Path) -> mmap.mmap:
    """Map a file into memory, read-only; raises ModelError or OSError when it cannot."""
    if not path.is_file():
        raise ModelError(
            f"{path} does not exist; give a checkpoint (.safetensors, .ckpt, .pt, .bin) "
            "or a part's folder"
        )
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise damaged(path, "it is empty")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def is_mapped(array: NDArray[Any]) -> bool:
    """Tell whether an array, of any shape, is a view of a mapped file, whose pages may go."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base, mmap.mmap)


def are_counts(values: Any) -> bool:
    """Tell whether values are a list or tuple of whole numbers that numpy can count with."""
    return isinstance(values, (list, tuple)) and all(
        type(value) is int and 0 <= value <= MAX_BYTES for value in values
    )


def extent(shape: Sequence[int]) -> int:
    """Count a shape's values without its dimensions of 0: numpy limits these too."""
    return math.prod(size for size in shape if size)


def is_unicode(text: str) -> bool:
    """Tell whether a text is whole: with halves of characters it could not even be printed."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def short(value: object) -> str:
    """Show a value in a message, however long or deep it is."""
    try:
        return f"{value!r:.80}"
    except (RecursionError, ValueError):  # too deep, or a number of more digits than Python shows
        return f"a {type(value).__name__}"


def damaged(path: Path, problem: str) -> ModelError:
    """Say what is wrong with a file, for the caller to raise."""
    return ModelError(f"{path} is damaged: {problem}; download it or save it again")


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


# Bytes. The reference implementation's limit is 100 MB, of which a hostile header makes 2 GB of
# objects; a header of SDXL's 2,500 tensors has 0.3 MB.
MAX_HEADER = 2**25


def read_header(path: Path, file: mmap.mmap) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Read a mapped file's header: where its tensors are, in the header's order, and its metadata.

    Raises ModelError unless they cover the data from its first byte to its last.
    """
    start = 8 + int.from_bytes(file[:8], "little")
    if start > len(file) or start > MAX_HEADER:
        raise damaged(
            path,
            f"its first 8 bytes state a header of {start - 8} bytes, and there are "
            f"{len(file)} in the file ({MAX_HEADER} are allowed)",
        )
    header = parse_object(path, file[8:start])
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise damaged(path, "its __metadata__ is not an object of texts")
    for text in chain(header, metadata, metadata.values()):
        if not is_unicode(text):
            raise damaged(path, f"its text {short(text)} is no valid Unicode")
    tensors = {name: _locate(path, name, header[name], file, start) for name in header}
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != end:
            wrong = "overlaps the tensor before it" if tensor.offset < end else "follows a hole"
            raise damaged(path, f"{short(name)}, at byte {tensor.offset}, {wrong}")
        end += tensor.nbytes
    if end != len(file):
        raise damaged(path, f"its tensors end at byte {end}, the file at {len(file)}")
    return tensors, metadata


def _locate(path: Path, name: str, entry: Any, file: mmap.mmap, start: int) -> StoredTensor:
    """Check one entry of a header against the file; the data begin at byte `start`."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise damaged(path, f"{short(name)} lacks its dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if isinstance(dtype, str) and dtype in NOT_READ:
        raise ModelError(
            f"{path}: {short(name)} has dtype {dtype}, {NOT_READ[dtype]}, which are not read; "
            "take the model in float16, bfloat16 or float8"
        )
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ModelError(
            f"{path}: {short(name)} has dtype {short(dtype)}; supported are "
            f"{', '.join(DTYPES)}: save the checkpoint in one of them"
        )
    if not are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise damaged(path, f"{short(name)} has shape {short(shape)}")
    if not are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise damaged(path, f"{short(name)} has data_offsets {short(offsets)}")
    begin, end = offsets
    if start + end > len(file):
        raise damaged(
            path, f"{short(name)} ends at byte {start + end}, and the file at {len(file)}"
        )
    itemsize = DTYPES[dtype].itemsize
    if math.prod(shape) * itemsize != end - begin or extent(shape) * itemsize > MAX_BYTES:
        raise damaged(
            path, f"{short(name)}, {dtype} of shape {short(shape)}, has {end - begin} bytes"
        )
    return StoredTensor(
        dtype=dtype, shape=tuple(shape), offset=start + begin, nbytes=end - begin, file=file
    )


def parse_object(path: Path, text: bytes) -> dict[str, Any]:
    """Read a JSON object in UTF-8; raises ModelError, also when a name is there twice."""
    try:
        values = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"it holds no valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise damaged(path, f"its JSON is a {type(values).__name__}, not an object")
    return values


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{short(name)} is there twice")
        values[name] = value
    return values
