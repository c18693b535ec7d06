"""GGUF: a header of facts and of tensors' places, and the tensors behind it.

Header, little-endian: "GGUF", the version (2 or 3), the numbers of tensors and of facts; then each
fact (name, type, value) and each tensor (name, number of dimensions, their sizes from the innermost
out, type, offset). Data begin at the next multiple of the alignment, as does every tensor in them.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

ComfyUI-GGUF lays matrices whose rows are no whole blocks out in rows of 256 numbers, and keeps
their shapes as facts of the file.
"""

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from mmap import mmap
from pathlib import Path
from types import MappingProxyType
from typing import Any

from engine.checkpoints.formats.blocks import BLOCKS
from engine.checkpoints.formats.tensors import (
    DTYPES,
    MAX_BYTES,
    StoredTensor,
    are_counts,
    damaged,
    extent,
    short,
)
from engine.errors import ModelError

__all__ = ["MAGIC", "read_gguf"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER = 2**23  # bytes; that of SDXL has 0.2 MB
MAX_DIMENSIONS = 4
ALIGNMENT, ALIGNMENT_NAME = 32, "general.alignment"
SHAPE_NAME = "comfy.gguf.orig_shape."
MAX_DEPTH = 4  # of arrays in arrays

# Of facts: the struct format of each type of one number; then texts and arrays.
NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
TEXT, ARRAY = 8, 9
# Of tensors: GGML's types by their numbers.
TYPES: Mapping[int, str] = MappingProxyType(
    {
        **{0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0"},
        **{10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS"},
        **{24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"},
    }
)
NOT_READ: Mapping[int, str] = MappingProxyType(
    {
        **{9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S"},
        **{21: "IQ3_S", 22: "IQ2_S", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"},
        40: "NVFP4",
    }
)


def read_gguf(path: Path, file: mmap) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Read a mapped file's header: where its tensors are, in its order, and its facts as texts.

    Arrays of facts are left out. Raises ModelError when the file is damaged, of another version or
    byte order, or holds numbers of a type that is not read.
    """
    header = _Header(path, file, len(MAGIC))
    version = header.number("I")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        what = "is big-endian" if swapped in VERSIONS else f"is of version {version}"
        raise ModelError(
            f"{path} is a GGUF file that {what}; read are little-endian ones of the versions "
            f"{' and '.join(map(str, VERSIONS))}: convert the model again"
        )
    tensors, facts = header.number("Q"), header.number("Q")
    for count, minimum, what in ((tensors, 24, "tensors"), (facts, 13, "facts")):
        if count * minimum > min(len(file), MAX_HEADER):
            raise damaged(path, f"its header states {count} {what}, more than it has bytes for")
    metadata: dict[str, str] = {}
    shapes: dict[str, Any] = {}
    for _ in range(facts):
        name = header.text()
        value = header.value(header.number("I"))
        if name.startswith(SHAPE_NAME):
            shapes[name.removeprefix(SHAPE_NAME)] = value
        elif value is not None and not isinstance(value, list):
            metadata[name] = str(value)
    entries = [_Entry.read(header) for _ in range(tensors)]
    return dict(_locate(path, file, header, entries, metadata, shapes)), metadata


@dataclass(slots=True)
class _Header:
    """Reads one value after the other; raises ModelError where the file or the limit ends."""

    path: Path
    file: mmap
    position: int

    def take(self, size: int) -> int:
        """Pass over some bytes; returns where they begin."""
        start, self.position = self.position, self.position + size
        if self.position > min(len(self.file), MAX_HEADER):
            raise damaged(
                self.path,
                f"its header goes on to byte {self.position}, and there are {len(self.file)} in "
                f"the file ({MAX_HEADER} are allowed)",
            )
        return start

    def number(self, kind: str) -> Any:
        """Read one number of a struct format."""
        form = f"<{kind}"
        return struct.unpack_from(form, self.file, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        """Read a text, which its length comes before."""
        size = self.number("Q")
        start = self.take(size)
        try:
            return self.file[start : start + size].decode("utf-8")
        except UnicodeDecodeError as error:
            raise damaged(
                self.path, f"its text at byte {start} is no valid Unicode ({error.reason})"
            ) from None

    def value(self, kind: int, depth: int = 0) -> Any:
        """Read a fact's value: a number, a text, a list of a few numbers; None of other arrays."""
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == TEXT:
            return self.text()
        if kind != ARRAY or depth == MAX_DEPTH:
            raise damaged(self.path, f"a fact before byte {self.position} is of the type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in NUMBERS:
            form = f"<{NUMBERS[inner]}"
            start = self.take(count * struct.calcsize(form))
            if count > MAX_DIMENSIONS:
                return None
            return list(struct.unpack_from(f"<{count}{form[1]}", self.file, start))
        for _ in range(min(count, MAX_HEADER)):  # each takes bytes, and those end
            self.value(inner, depth + 1)
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """What the header says of a tensor; sizes: from the innermost dimension out."""

    name: str
    sizes: tuple[int, ...]
    kind: int
    offset: int

    @classmethod
    def read(cls, header: _Header) -> "_Entry":
        name, dimensions = header.text(), header.number("I")
        if dimensions > MAX_DIMENSIONS:
            raise damaged(header.path, f"{short(name)} has {dimensions} dimensions")
        sizes = tuple(header.number("Q") for _ in range(dimensions))
        return cls(name=name, sizes=sizes, kind=header.number("I"), offset=header.number("Q"))


def _locate(
    path: Path,
    file: mmap,
    header: _Header,
    entries: list[_Entry],
    metadata: Mapping[str, str],
    shapes: Mapping[str, Any],
) -> Iterator[tuple[str, StoredTensor]]:
    """Go through the tensors, each checked against the file and against those beside it."""
    alignment = metadata.get(ALIGNMENT_NAME, str(ALIGNMENT))
    if not alignment.isdecimal() or not 0 < int(alignment) <= MAX_HEADER:
        raise damaged(path, f"its {ALIGNMENT_NAME} is {short(alignment)}")
    start = -(-header.position // int(alignment)) * int(alignment)
    names: set[str] = set()
    places = [(start, start, "")]
    for entry in entries:
        if entry.name in names:
            raise damaged(path, f"{short(entry.name)} is there twice")
        names.add(entry.name)
        tensor = _tensor(path, file, entry, start, shapes.get(entry.name, entry.sizes[::-1]))
        places.append((tensor.offset, tensor.offset + tensor.nbytes, entry.name))
        yield entry.name, tensor
    places.sort()
    for (_, end, before), (begin, _, name) in pairwise(places):
        if begin < end:
            raise damaged(path, f"{short(name)}, at byte {begin}, overlaps {short(before)}")


def _tensor(path: Path, file: mmap, entry: _Entry, start: int, shape: Any) -> StoredTensor:
    """Check one entry against the file; the data begin at byte `start`.

    shape: its own, which may be another than that in which it is laid out
    """
    name, sizes = entry.name, entry.sizes
    dtype = TYPES.get(entry.kind)
    if dtype is None:
        known = NOT_READ.get(entry.kind, f"type {entry.kind}")
        raise ModelError(
            f"{path}: {short(name)} is of GGML's {known}, which is not read; read are "
            f"{', '.join(TYPES.values())}: take the model in one of them"
        )
    count = math.prod(sizes)
    if not are_counts(sizes) or extent(sizes) * 8 > MAX_BYTES:
        raise damaged(path, f"{short(name)} has the sizes {short(sizes)}")
    if dtype in BLOCKS:
        block = BLOCKS[dtype]
        if not sizes or sizes[0] % block.values:
            raise damaged(
                path,
                f"{short(name)}, {dtype}, has rows of {short(sizes[:1])} numbers, and its "
                f"blocks have {block.values}",
            )
        nbytes = count // block.values * block.nbytes
    else:
        nbytes = count * DTYPES[dtype].itemsize
    if start + entry.offset + nbytes > len(file):
        end = start + entry.offset + nbytes
        raise damaged(path, f"{short(name)} ends at byte {end}, and the file at {len(file)}")
    own = isinstance(shape, (list, tuple)) and len(shape) <= MAX_DIMENSIONS and are_counts(shape)
    if not own or math.prod(shape) != count or extent(shape) * 8 > MAX_BYTES:
        raise damaged(
            path, f"{short(name)} has {count} numbers, and is said to be of shape {short(shape)}"
        )
    return StoredTensor(
        dtype=dtype, shape=tuple(shape), offset=start + entry.offset, nbytes=nbytes, file=file
    )
