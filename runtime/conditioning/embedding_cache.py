"""What text encoders gave lately, so that the same texts are not encoded again."""

import threading
from collections import OrderedDict
from collections.abc import Hashable

import numpy as np
from numpy.typing import NDArray

__all__ = ["Kept"]

KEPT_BYTES = 2**26  # some fifty pairs of prompts in XL


class Kept:
    """The arrays of the latest keys, as many as fit; safe to use from several threads."""

    def __init__(self, limit: int = KEPT_BYTES) -> None:
        self._limit = limit
        self._arrays: OrderedDict[Hashable, tuple[NDArray[np.float32], ...]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> tuple[NDArray[np.float32], ...] | None:
        """Return what was put there, None for what was not or is gone."""
        with self._lock:
            found = self._arrays.get(key)
            if found is not None:
                self._arrays.move_to_end(key)
            return found

    def put(self, key: Hashable, arrays: tuple[NDArray[np.float32], ...]) -> None:
        """Keep arrays in place of those that were not asked for the longest."""
        with self._lock:
            self._bytes += _size(arrays) - _size(self._arrays.pop(key, ()))
            self._arrays[key] = arrays
            while self._bytes > self._limit:
                _, gone = self._arrays.popitem(last=False)
                self._bytes -= _size(gone)


def _size(arrays: tuple[NDArray[np.float32], ...]) -> int:
    return sum(array.nbytes for array in arrays)
