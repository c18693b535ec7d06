"""What numpy's names in a pickle stand for: numbers, texts, and arrays whose bytes it holds.

Numbers come from metrics that training keeps, arrays from settings and from tensors of devices
without storages of their own, such as a Mac's GPU once was.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.checkpoints.formats.pickle_values import Name, Opaque, UnfitError
from engine.checkpoints.formats.pickles import Call
from engine.checkpoints.formats.tensors import (
    MAX_BYTES,
    MAX_DIMENSIONS,
    StoredTensor,
    are_counts,
    extent,
    short,
)

__all__ = ["CALLS", "NumpyArray", "is_shape", "show_shape", "simplify_strides"]

# numpy's dtypes by its names for them; texts are "U" or "S" and a length.
DTYPES: Mapping[str, str] = {
    "b1": "BOOL",
    "i1": "I8",
    "i2": "I16",
    "i4": "I32",
    "i8": "I64",
    "u1": "U8",
    "u2": "U16",
    "u4": "U32",
    "u8": "U64",
    "f2": "F16",
    "f4": "F32",
    "f8": "F64",
}
TEXT = re.compile(r"[US]\d{1,6}", re.ASCII)


@dataclass(slots=True)
class NumpyType:
    """numpy's dtype of numbers ("f8") or texts ("U2"), and the order of its bytes."""

    kind: str
    order: str = field(default="<")

    def set_state(self, state: Any) -> None:
        """Take the order of the bytes out of (version, order, …); raises UnfitError for others."""
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|"):
            raise UnfitError("a numpy dtype of an unknown state")
        self.order = state[1]


@dataclass(slots=True)
class NumpyArray:
    """An array of numpy, whose numbers lie in the pickle itself; one of texts has no tensor."""

    tensor: StoredTensor | None = None

    def set_state(self, state: Any) -> None:
        """Take the numbers out of (version, shape, dtype, by columns, bytes), or UnfitError."""
        if not isinstance(state, tuple) or len(state) != 5 or not is_shape(state[1]):
            raise UnfitError("an array of numpy without its shape and bytes")
        _, shape, dtype, by_columns, data = state
        if isinstance(dtype, Opaque) or isinstance(data, (Opaque, list)):
            return
        if not isinstance(dtype, NumpyType) or not isinstance(data, (bytes, str)):
            raise UnfitError("an array of numpy without its dtype or bytes")
        if dtype.kind not in DTYPES:
            return
        values = _bytes_of(data)
        element = np.dtype(dtype.order + dtype.kind)
        size, most = (count * element.itemsize for count in (math.prod(shape), extent(shape)))
        if size != len(values) or most > MAX_BYTES:
            raise UnfitError(
                f"an array of numpy of shape {show_shape(shape)} in {len(values)} bytes"
            )
        if dtype.order == ">":
            values = np.frombuffer(values, element).astype(element.newbyteorder("<")).tobytes()
        strides = np.cumprod([1, *shape[:-1]]).tolist() if by_columns and shape else None
        self.tensor = StoredTensor(
            dtype=DTYPES[dtype.kind],
            shape=tuple(shape),
            offset=0,
            nbytes=len(values),
            file=values,
            strides=simplify_strides(shape, strides) if strides else None,
        )


def simplify_strides(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...] | None:
    """Drop strides that say nothing: those of dimensions of 1, and of values side by side."""
    if not math.prod(shape):
        return None
    side_by_side: list[int] = []
    step = 1
    for size in reversed(shape):
        side_by_side.append(step)
        step *= size
    side_by_side.reverse()
    kept = tuple(
        step if size > 1 else plain
        for size, step, plain in zip(shape, strides, side_by_side, strict=True)
    )
    return None if kept == tuple(side_by_side) else kept


def is_shape(values: Any) -> bool:
    """Tell whether values are a shape; a long list is not looked through."""
    return (
        isinstance(values, (list, tuple)) and len(values) <= MAX_DIMENSIONS and are_counts(values)
    )


def show_shape(values: Any) -> str:
    """Show a shape in a message; what is none may be deep or endless."""
    is_short = isinstance(values, (list, tuple)) and len(values) <= MAX_DIMENSIONS
    if is_short and all(isinstance(value, int) for value in values):
        return short(list(values))
    return f"of type {type(values).__name__}"


def _dtype(kind: Any, *_: Any) -> NumpyType | Opaque:
    if not isinstance(kind, str):
        raise UnfitError("a numpy dtype without a name")
    if kind not in DTYPES and not TEXT.fullmatch(kind):
        return Opaque(f"numpy.dtype({kind[:20]!r})", 0)
    return NumpyType(kind)


def _scalar(kind: Any, data: Any) -> bool | int | float | str:
    if not isinstance(kind, NumpyType) or not isinstance(data, (bytes, str)):
        raise UnfitError("a number of numpy without its dtype or bytes")
    dtype, value = np.dtype(kind.order + kind.kind), _bytes_of(data)
    if len(value) != dtype.itemsize or not value:
        raise UnfitError(f"a number of numpy with {len(value)} bytes, not {dtype.itemsize},")
    if dtype.kind == "S":
        return value.rstrip(b"\0").decode("latin1")
    if dtype.kind == "U":
        try:  # here, as numpy lets codes beyond Unicode's through
            return value.decode("utf-32-be" if kind.order == ">" else "utf-32-le").rstrip("\0")
        except UnicodeDecodeError:
            raise UnfitError("a text of numpy that is no valid Unicode") from None
    number: bool | int | float = np.frombuffer(value, dtype)[0].item()
    return number


def _array(kind: Any, *_: Any) -> NumpyArray:
    """Make an array that its state fills: numpy.core.multiarray._reconstruct."""
    if not isinstance(kind, Name) or kind.text != "numpy.ndarray":
        raise UnfitError("an array of numpy of an unknown class")
    return NumpyArray()


def _bytes_of(data: bytes | str) -> bytes:
    """Return bytes, which pickles of version 2 keep as text."""
    try:
        return data.encode("latin1") if isinstance(data, str) else data
    except UnicodeEncodeError:
        raise UnfitError("bytes in another encoding than latin1") from None


CALLS: Mapping[str, Call | None] = {
    "numpy.ndarray": None,
    "numpy.dtype": _dtype,
    "numpy.core.multiarray._reconstruct": _array,
    "numpy._core.multiarray._reconstruct": _array,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
}
