"""The safetensors format: one file of tensors, memory-mapped and never copied.

A file is the length of its header (8 bytes, little-endian), the header in JSON,
`{name: {"dtype": "F16", "shape": [2, 3], "data_offsets": [begin, end]}}`, and the data, which the
tensors cover without holes or overlaps: https://github.com/huggingface/safetensors#format.
"""

import json
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

__all__ = ["StoredTensor", "damaged", "map_file", "parse_object", "read_header", "short"]

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
MAX_HEADER = 100_000_000  # bytes; the reference implementation's limit
MAX_DIMENSIONS = 32  # numpy's limit before version 2
MAX_BYTES = 2**63 - 1  # of one array, in numpy


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies in a mapped file; nothing of it is read before `array` is called.

    dtype: the format's name for it, such as "F16" or "BF16"
    offset, nbytes: bytes from the start of the file, and the tensor's size
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    file: mmap.mmap

    def array(self) -> NDArray[Any]:
        """View the tensor in the file, read-only and without a copy.

        Two kinds are copied: BF16, which becomes float32 (exactly: it is a float32's upper half),
        and tensors at an offset that no processor likes, in files of safetensors before 0.3.
        """
        stored: NDArray[Any] = np.ndarray(
            self.shape, DTYPES[self.dtype], buffer=self.file, offset=self.offset
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
        raise ModelError(f"{path} does not exist; give a .safetensors file or a part's folder")
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise damaged(path, "it is empty")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def read_header(path: Path, file: mmap.mmap) -> dict[str, StoredTensor]:
    """Read a mapped file's header: where its tensors are, by name, in the header's order.

    Raises ModelError unless they cover the data from its first byte to its last.
    """
    if file[:40].startswith(b"version https://git-lfs"):
        raise ModelError(f"{path} is a pointer of Git LFS; run `git lfs pull` for the weights")
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
    tensors = {name: _locate(path, name, header[name], file, start) for name in header}
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != end:
            wrong = "overlaps the tensor before it" if tensor.offset < end else "follows a hole"
            raise damaged(path, f"{short(name)}, at byte {tensor.offset}, {wrong}")
        end += tensor.nbytes
    if end != len(file):
        raise damaged(path, f"its tensors end at byte {end}, the file at {len(file)}")
    return tensors


def _locate(path: Path, name: str, entry: Any, file: mmap.mmap, start: int) -> StoredTensor:
    """Check one entry of a header against the file; the data begin at byte `start`."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise damaged(path, f"{short(name)} lacks its dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ModelError(
            f"{path}: {short(name)} has dtype {short(dtype)}; supported are "
            f"{', '.join(DTYPES)}: save the checkpoint in one of them"
        )
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise damaged(path, f"{short(name)} has shape {short(shape)}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise damaged(path, f"{short(name)} has data_offsets {short(offsets)}")
    begin, end = offsets
    if start + end > len(file):
        raise damaged(
            path, f"{short(name)} ends at byte {start + end}, and the file at {len(file)}"
        )
    itemsize = DTYPES[dtype].itemsize
    if math.prod(shape) * itemsize != end - begin or _extent(shape) * itemsize > MAX_BYTES:
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


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value <= MAX_BYTES for value in values
    )


def _extent(shape: Sequence[int]) -> int:
    """The values of a shape whose dimensions of 0 are left out: numpy limits these too."""
    return math.prod(size for size in shape if size)


def short(value: object) -> str:
    """Show a value in a message, however long it is."""
    return f"{value!r:.80}"


def damaged(path: Path, problem: str) -> ModelError:
    """Say what is wrong with a file, for the caller to raise."""
    return ModelError(f"{path} is damaged: {problem}; download it or save it again")
