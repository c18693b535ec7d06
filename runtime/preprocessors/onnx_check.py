"""What an ONNX file of a stranger refers to, found before any library opens it.

An ONNX file may have its tensors in other files (`external_data` of TensorProto in onnx.proto), by
a path that may lead anywhere. The file is walked as protobuf
(https://protobuf.dev/programming-guides/encoding) in place, however large it is.
"""

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from engine.errors import RequestError

__all__ = ["MAX_BYTES", "check_onnx"]

MAX_BYTES = 2**32  # of a preprocessor's file with the files of its tensors
MAX_MESSAGES = 10_000_000

# Where messages that hold tensors are, by the kind of message and the number of its field.
_HOLDS: Mapping[str, Mapping[int, str]] = MappingProxyType(
    {
        "model": {7: "graph", 20: "training", 25: "function"},
        "training": {1: "graph", 2: "graph"},
        "graph": {1: "node", 5: "tensor", 15: "sparse"},
        "function": {7: "node", 11: "attribute"},
        "node": {5: "attribute"},
        "attribute": {
            **dict.fromkeys((5, 10), "tensor"),
            **dict.fromkeys((6, 11), "graph"),
            **dict.fromkeys((22, 23), "sparse"),
        },
        "sparse": {1: "tensor", 2: "tensor"},
        "tensor": {13: "entry"},
    }
)
GRAPH, KEY, VALUE, LOCATION = 7, 1, 2, b"location"
NUMBER, EIGHT_BYTES, TEXT, FOUR_BYTES = 0, 1, 2, 5  # wire types


def check_onnx(path: Path) -> None:
    """Refuse what is no ONNX file, is too large, or has tensors outside its own folder.

    Raises RequestError.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if not 0 < size <= MAX_BYTES:
                raise RequestError(
                    f"{path} has {size} bytes; a preprocessor may have {MAX_BYTES}, give another"
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                locations = set(_locations(data))
    except (ValueError, IndexError) as error:
        raise RequestError(
            f"{path} is no ONNX file ({error}); give one whole, such as depth.onnx"
        ) from error
    except OSError as error:
        raise RequestError(
            f"{path} cannot be read ({error.strerror or error}); give an ONNX file"
        ) from error
    total = size + sum(_size_beside(path, location) for location in locations)
    if total > MAX_BYTES:
        raise RequestError(
            f"{path} and its tensors have {total} bytes; a preprocessor may have {MAX_BYTES}"
        )


def _size_beside(path: Path, location: bytes) -> int:
    """Return the size of a file of tensors in the ONNX file's folder; RequestError elsewhere."""
    try:
        folder = path.resolve().parent
        place = (folder / location.decode()).resolve()
        if place.is_relative_to(folder) and place.is_file():
            return place.stat().st_size
    except (OSError, RuntimeError, ValueError):
        pass
    raise RequestError(
        f"{path} has tensors in {location[:200].decode(errors='replace')!r}, which is no file of "
        "its folder; give a preprocessor that is whole"
    )


def _locations(data: mmap.mmap) -> Iterator[bytes]:
    """Yield where tensors are that are in other files; raises ValueError, IndexError."""
    waiting, count = [("model", 0, len(data))], 0
    if GRAPH not in {field for field, *_ in _fields(data, 0, len(data))}:
        raise ValueError("it has no graph")
    while waiting:
        kind, start, stop = waiting.pop()
        count += 1
        if count > MAX_MESSAGES:
            raise ValueError("it has too many parts")
        if kind == "entry":
            entry = {f: data[a:b] for f, a, b in _fields(data, start, stop) if b - a < 10_000}
            if entry.get(KEY) == LOCATION:
                yield entry.get(VALUE, b"")
            continue
        for field, begin, end in _fields(data, start, stop):
            if (held := _HOLDS[kind].get(field)) is not None:
                waiting.append((held, begin, end))


def _fields(data: mmap.mmap, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Walk a message; yields the number of each text or message, where it begins and ends."""
    while start < stop:
        tag, start = _varint(data, start, stop)
        wire = tag & 7
        if wire == NUMBER:
            _, start = _varint(data, start, stop)
        elif wire in (EIGHT_BYTES, FOUR_BYTES):
            start += 8 if wire == EIGHT_BYTES else 4
        elif wire == TEXT:
            length, start = _varint(data, start, stop)
            yield tag >> 3, start, start + length
            start += length
        else:
            raise ValueError(f"unexpected wire type {wire}")
        if start > stop:
            raise ValueError("it ends early")


def _varint(data: mmap.mmap, start: int, stop: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if start >= stop:
            raise ValueError("it ends early")
        byte = data[start]
        value |= (byte & 0x7F) << shift
        start += 1
        if byte < 0x80:
            return value, start
    raise ValueError("a number is too long")
