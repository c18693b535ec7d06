"""Memory that the system can write out: what a library reads once need not stay in memory."""

import math
import mmap
import os
import tempfile
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from engine.errors import OutputError
from engine.store.cache import cache_folder


class Scratch:
    """A mapped file without a name, which arrays are put into; it goes when the last of them does.

    size: in bytes; raises OutputError when the cache folder has no room for them
    """

    def __init__(self, size: int) -> None:
        folder = cache_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                if hasattr(os, "posix_fallocate"):  # a hole that cannot be filled later is a crash
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
                self._map = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise OutputError(
                f"the cache folder {folder} has no room for {size / 2**20:.0f} MiB that are needed "
                f"meanwhile ({error.strerror or error}); make room, or set LATENTRT_CACHE to "
                "another folder"
            ) from error
        self._used = 0

    def put(self, array: NDArray[Any]) -> NDArray[Any]:
        """Copy an array into the file; returns it there, of the same shape and dtype."""
        there = self.take(array.shape, array.dtype)
        there[...] = array
        return there

    def take(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return the next array of the file, of this shape and dtype, all zeros."""
        there = np.frombuffer(self._map, dtype, math.prod(shape), self._used).reshape(shape)
        self._used += there.nbytes
        return there

    def release(self) -> None:
        """Give back the memory; what is read again comes from the file."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
