"""Tensors where they lie in a file, whatever the file's format: mapped, checked, never copied."""

import math
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import ModelError

__all__ = [
    "DTYPES",
    "StoredTensor",
    "are_counts",
    "damaged",
    "extent",
    "is_unicode",
    "map_file",
    "short",
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
    }
)
MAX_DIMENSIONS = 32  # numpy's limit before version 2
MAX_BYTES = 2**63 - 1  # of one array, in numpy


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies in a mapped file; nothing of it is read before `array` is called.

    dtype: safetensors' name for it, such as "F16" or "BF16"
    offset: of its first value, in bytes from the start of the file
    nbytes: the size of its values, side by side
    strides: steps in values from one index to the next, as torch counts them; None: side by side
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    file: mmap.mmap
    strides: tuple[int, ...] | None = None

    def array(self) -> NDArray[Any]:
        """View the tensor in the file, read-only and without a copy.

        Two kinds are copied: BF16, which becomes float32 (exactly: it is a float32's upper half),
        and tensors at an offset that no processor likes, in files of safetensors before 0.3.
        """
        dtype = DTYPES[self.dtype]
        strides = self.strides and tuple(step * dtype.itemsize for step in self.strides)
        stored: NDArray[Any] = np.ndarray(
            self.shape, dtype, buffer=self.file, offset=self.offset, strides=strides
        )
        if self.dtype == "BF16":
            bits = stored.astype(np.uint32)
            bits <<= 16
            stored = bits.view(np.float32)
        elif not stored.flags.aligned:
            stored = stored.copy()
        stored.flags.writeable = False
        return stored


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
