"""The safetensors format: one file of tensors, memory-mapped and never copied.

A file is the length of its header (8 bytes, little-endian), the header in JSON,
`{name: {"dtype": "F16", "shape": [2, 3], "data_offsets": [begin, end]}}`, and the data, which the
tensors cover without holes or overlaps: https://github.com/huggingface/safetensors#format.
"""

import json
import math
import mmap
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from engine.checkpoints.formats.tensors import (
    DTYPES,
    MAX_BYTES,
    MAX_DIMENSIONS,
    StoredTensor,
    are_counts,
    damaged,
    extent,
    is_unicode,
    short,
)
from engine.errors import ModelError

__all__ = ["MAX_HEADER", "parse_object", "read_header"]

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
