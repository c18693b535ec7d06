"""Data sets as files that are written row by row and mapped into memory, so any size will do."""

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

import numpy as np
from numpy.lib import format as npy
from numpy.typing import DTypeLike

from engine.errors import RequestError
from training.captions import Record

IMAGES, TEXTS, ENDS = "images.npy", "texts.npy", "ends.npy"


class ArrayWriter:
    """A `.npy` file that grows; row: the shape of one row."""

    def __init__(self, path: Path, row: tuple[int, ...], dtype: DTypeLike) -> None:
        self.row, self.dtype, self.count = row, np.dtype(dtype), 0
        self._file = path.open("wb")
        self._write_header()
        self._start = self._file.tell()

    def append(self, rows: np.ndarray) -> None:
        """Write rows (n, …) behind those that are there."""
        assert rows.shape[1:] == self.row
        self._file.write(np.ascontiguousarray(rows, self.dtype).tobytes())
        self.count += len(rows)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Write how many rows there are: numpy leaves room for the number to grow."""
        self._file.seek(0)
        self._write_header()
        assert self._file.tell() == self._start
        self._file.close()

    def _write_header(self) -> None:
        description = {
            "descr": npy.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.count, *self.row),
        }
        npy.write_array_header_1_0(self._file, description)


class Captions(Sequence[tuple[str, ...]]):
    """The captions of every picture; texts: JSON after JSON as bytes; ends: (n,) int64, of each."""

    def __init__(self, texts: np.ndarray, ends: np.ndarray) -> None:
        self._texts, self._ends = texts, ends

    @overload
    def __getitem__(self, index: int) -> tuple[str, ...]: ...

    @overload
    def __getitem__(self, index: slice) -> list[tuple[str, ...]]: ...

    def __getitem__(self, index: int | slice) -> Any:
        """Read the captions of one picture, or of several."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = int(self._ends[index - 1]) if index else 0
        return tuple(json.loads(self._texts[start : int(self._ends[index])].tobytes()))

    def __len__(self) -> int:
        """Count the pictures."""
        return len(self._ends)


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionedImages:
    """images: (n, size, size, 3) uint8; captions: one tuple of texts for each picture."""

    images: np.ndarray
    captions: Sequence[tuple[str, ...]]

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Map what `write` wrote."""
        return cls(
            images=mapped(folder / IMAGES),
            captions=Captions(mapped(folder / TEXTS), mapped(folder / ENDS)),
        )


def write(records: Iterable[Record], folder: Path, size: int) -> None:
    """Write the records' middle squares and captions into a folder, whole or not at all.

    One picture is in memory at a time. Raises RequestError when there is none.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    end = 0
    with (
        ArrayWriter(partial / IMAGES, (size, size, 3), np.uint8) as images,
        ArrayWriter(partial / TEXTS, (), np.uint8) as texts,
        ArrayWriter(partial / ENDS, (), np.int64) as ends,
    ):
        for record in records:
            images.append(record.square(size)[None])
            text = json.dumps(record.captions).encode()
            texts.append(np.frombuffer(text, np.uint8))
            end += len(text)
            ends.append(np.array([end]))
        count = images.count
    if not count:
        raise RequestError("the captions name no picture; give a file with at least one caption")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def mapped(path: Path) -> np.ndarray:
    """Map a `.npy` file, of any shape; what is written to the array stays in memory."""
    array: np.ndarray = np.load(path, mmap_mode="c", allow_pickle=False)
    return array
