"""Pictures that carry a textual inversion, as AUTOMATIC1111's web UI makes them to be shared.

A PNG has it in a text chunk `sd-ti-embedding`: the base64 of JSON in which {"TORCHTENSOR": lists of
numbers} stands for a tensor. Another form hides it in the lowest bits of the pixels; that one is
refused. https://www.w3.org/TR/png-3/#11textinfo
"""

import base64
import json
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from engine.checkpoints.formats.tensors import StoredTensor, damaged, is_unicode, short
from engine.checkpoints.formats.torch_archive import flatten
from engine.errors import ModelError

__all__ = ["is_picture", "read_picture"]

PNG = b"\x89PNG\r\n\x1a\n"
KEYWORD = b"sd-ti-embedding"
TENSOR = "TORCHTENSOR"
MAX_TEXT = 2**22  # bytes; 75 vectors of 1024 numbers have 2 MB
OTHERS = (b"\xff\xd8\xff", b"GIF8", b"\0\0\0\x0cJXL ", b"\xff\x0a")


def is_picture(start: bytes) -> bool:
    """Tell whether a file that starts with these bytes is a picture."""
    webp = start[:4] == b"RIFF" and start[8:12] == b"WEBP"
    avif = start[4:12] in (b"ftypavif", b"ftypavis")
    return start.startswith((PNG, *OTHERS)) or webp or avif


def read_picture(path: Path, file: mmap.mmap) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Read the tensors of a textual inversion out of a mapped picture, as float32, and its facts.

    The numbers are decimals in the file, so they are held in memory. Raises ModelError when it has
    none in a text chunk, or when that is damaged.
    """
    found = _chunk(path, file) if file[: len(PNG)] == PNG else None
    if found is None:
        raise ModelError(
            f"{path} is a picture without a textual inversion in a text chunk "
            f"{KEYWORD.decode()!r}; one that is hidden in the pixels is not read: take it as .pt "
            "or .safetensors"
        )
    if len(found) > MAX_TEXT:
        raise damaged(path, f"its embedding has {len(found)} bytes, and {MAX_TEXT} are allowed")
    try:
        text = base64.b64decode(found, validate=True).decode("utf-8")
        value = json.loads(text, object_pairs_hook=_value)
    except (ValueError, RecursionError, OverflowError) as error:
        raise damaged(path, f"its embedding is no JSON in base64 ({error})") from None
    if not isinstance(value, dict):
        raise damaged(path, f"its embedding is a {type(value).__name__}, not an object")
    return flatten(path, value)


def _chunk(path: Path, file: mmap.mmap) -> bytes | None:
    """Find the text of the embedding among a PNG's chunks."""
    for kind, start, size in _chunks(path, file):
        if kind in (b"tEXt", b"iTXt"):
            keyword = file[start : start + min(size, 80)].partition(b"\0")[0]
            if keyword == KEYWORD:
                text = file[start + len(keyword) + 1 : start + size]
                return _international(path, text) if kind == b"iTXt" else text
    return None


def _chunks(path: Path, file: mmap.mmap) -> Iterator[tuple[bytes, int, int]]:
    """Go through the chunks: kind, first byte and size, each inside the file."""
    position = len(PNG)
    while position < len(file):
        if position + 12 > len(file):
            raise damaged(path, f"it is cut off in a chunk at byte {position}")
        size, kind = struct.unpack_from(">I4s", file, position)
        if position + 12 + size > len(file):
            raise damaged(
                path, f"its chunk at byte {position} has {size} bytes, the file {len(file)}"
            )
        yield kind, position + 8, size
        position += 12 + size


def _international(path: Path, text: bytes) -> bytes:
    """Take the text behind an iTXt chunk's compression and languages."""
    _, _, rest = text[2:].partition(b"\0")
    if text[:1] != b"\0":
        raise damaged(path, "its embedding is compressed, which nobody writes")
    return rest.partition(b"\0")[2]


def _value(pairs: list[tuple[str, Any]]) -> Any:
    """Make a dictionary of a JSON object's pairs, and a tensor of one that stands for it."""
    values = dict(pairs)
    if len(values) != len(pairs):
        twice = next(name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1)
        raise ValueError(f"{short(twice)} is there twice")
    if not all(is_unicode(name) for name in values):
        raise ValueError("a name is no valid Unicode")
    return _tensor(values[TENSOR]) if values.keys() == {TENSOR} else values


def _tensor(numbers: Any) -> StoredTensor:
    rows: list[Any] = numbers if isinstance(numbers, list) and numbers else [None]
    is_matrix = all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows)
    matrix = rows if is_matrix else [rows]
    if not matrix[0] or not all(type(value) in (int, float) for row in matrix for value in row):
        raise ValueError(f"a {TENSOR} is no vector or matrix of numbers")
    with np.errstate(over="ignore"):
        array = np.array(matrix, np.float64).astype(np.float32)
    memory = mmap.mmap(-1, array.nbytes)
    memory[:] = array.tobytes()
    shape = array.shape if is_matrix else array.shape[1:]
    return StoredTensor(dtype="F32", shape=shape, offset=0, nbytes=array.nbytes, file=memory)
