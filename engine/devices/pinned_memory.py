"""Page-locked memory of the processor, through which arrays go to a GPU and come back.

The GPU reads and writes it by itself while the processor goes on, so a piece is used again only
when the copy that used it is done.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.devices.device import Shape

MIN_BYTES = 2**16  # bytes of a piece: to lock memory takes long, however little it is


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Page-locked memory; buffer: cuda.core's; event: the end of the last copy that uses it."""

    buffer: Any
    nbytes: int
    event: Any

    @property
    def address(self) -> int:
        """Where it begins."""
        return int(self.buffer.handle)

    def view(self, shape: Shape, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Look at its beginning as an array of this shape and dtype."""
        raw = (ctypes.c_byte * (prod(shape) * dtype.itemsize)).from_address(self.address)
        array: NDArray[Any] = np.frombuffer(memoryview(raw), dtype)
        return array.reshape(shape)


class Staging:
    """Pieces of page-locked memory, each of a power of two and used by one copy at a time.

    allocate: returns a buffer of so many bytes; new_event: returns an event that nothing awaits
    """

    def __init__(self, allocate: Callable[[int], Any], new_event: Callable[[], Any]) -> None:
        self._allocate = allocate
        self._new_event = new_event
        self._pieces: list[Piece] = []

    def take(self, nbytes: int) -> Piece:
        """Find a piece that no copy uses any more, or make one."""
        for piece in self._pieces:
            if nbytes <= piece.nbytes and piece.event.is_done:
                return piece
        size = max(MIN_BYTES, 1 << (nbytes - 1).bit_length())
        made = Piece(buffer=self._allocate(size), nbytes=size, event=self._new_event())
        self._pieces.append(made)
        return made
