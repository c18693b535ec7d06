"""What text encoders gave lately, so that a text that comes again is not encoded again."""

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["EmbeddingCache"]

Array = NDArray[np.float32]

CACHE_BYTES = 2**26  # some fifty pairs of prompts in XL


@dataclass(slots=True, eq=False)
class EmbeddingCache:
    """What text encoders gave for the latest keys, as much as fits; safe for several threads."""

    limit: int = CACHE_BYTES
    _arrays: OrderedDict[Hashable, tuple[Array, ...]] = field(default_factory=OrderedDict)
    _bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, key: Hashable) -> tuple[NDArray[np.float32], ...] | None:
        """Return the arrays that were put there, of any shape, or None."""
        with self._lock:
            found = self._arrays.get(key)
            if found is not None:
                self._arrays.move_to_end(key)
            return found

    def put(self, key: Hashable, arrays: tuple[NDArray[np.float32], ...]) -> None:
        """Keep arrays, of any shape, in place of those that were not asked for the longest."""
        with self._lock:
            self._bytes += _size(arrays) - _size(self._arrays.pop(key, ()))
            self._arrays[key] = arrays
            while self._bytes > self.limit:
                _, gone = self._arrays.popitem(last=False)
                self._bytes -= _size(gone)


def _size(arrays: tuple[NDArray[np.float32], ...]) -> int:
    return sum(array.nbytes for array in arrays)
