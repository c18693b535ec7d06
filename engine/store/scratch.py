"""Memory that the system can write out: what a library reads once need not stay in memory."""

import errno
import math
import mmap
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from engine.errors import OutputError
from engine.store.cache import cache_folder


class Scratch:
    """A mapped file without a name, which arrays are put into; it goes when the last of them does.

    It is in the cache folder, or in the system's temporary one; where there is neither, as in a
    container that may only be read, it is memory that the system cannot write out.

    size: in bytes; raises OutputError when the folders have no room for them
    """

    def __init__(self, size: int) -> None:
        mapped = _mapped_file(size)
        self._is_file = mapped is not None
        self._map = mmap.mmap(-1, size) if mapped is None else mapped
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
        if self._is_file and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def _mapped_file(size: int) -> mmap.mmap | None:
    """Map a new file in the first folder that takes it; None where none may be written to."""
    full: list[str] = []
    for find in (cache_folder, lambda: Path(tempfile.gettempdir())):
        try:
            folder = find()
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                if hasattr(os, "posix_fallocate"):  # a hole that cannot be filled later is a crash
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
                return mmap.mmap(file.fileno(), size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                full.append(f"{folder} ({error.strerror})")
    if not full:
        return None
    raise OutputError(
        f"{size / 2**20:.0f} MiB are needed meanwhile, and {' and '.join(full)} has no room for "
        "them; make some, or set LATENTRT_CACHE to another folder"
    )
