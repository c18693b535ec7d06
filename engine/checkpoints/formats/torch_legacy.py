"""What torch.save wrote before version 1.6, and still does when asked: pickles, then the storages.

Five pickles follow each other: a number that marks the format, its version, facts of the computer,
the object, and the keys of its storages. Then, in the order of the keys, each storage has the
number of its values in 8 bytes and the values. (torch/serialization.py, `_legacy_save`.)
"""

import io
from collections.abc import Mapping
from mmap import mmap
from pathlib import Path
from typing import Any

from engine.checkpoints.formats.pickles import Call, Name, UnfitError, read_pickle
from engine.checkpoints.formats.tensors import DTYPES, StoredTensor, are_counts, damaged, short
from engine.checkpoints.formats.torch_archive import MAX_PICKLE, flatten
from engine.checkpoints.formats.torch_values import CALLS, STORAGES, Storage
from engine.checkpoints.formats.zip_archive import Entry
from engine.errors import ModelError

__all__ = ["MAGIC", "read_legacy"]

MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first pickle
VERSION = 1001
COUNT = 8  # bytes of the number before a storage


def read_legacy(path: Path, file: mmap) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Read where a mapped file's tensors are, and its metadata, as those of an archive.

    Raises ModelError when it is damaged, or holds anything else than data.
    """
    pickles = _Pickles(path, file)
    version, facts = pickles.read(), pickles.read()
    if version != VERSION:
        raise ModelError(
            f"{path} is in the format {short(version)} of torch, and {VERSION} is read; load it "
            "with torch and torch.save it again"
        )
    if not isinstance(facts, dict) or facts.get("little_endian") is not True:
        raise ModelError(
            f"{path} was written big-endian, and only little-endian is read; save it again on "
            "another computer, or as .safetensors"
        )
    # Where a storage is, the file says after the object: it is read once more when that is known.
    start, wanted = pickles.position, _Storages(file)
    value = pickles.read(wanted)
    keys = pickles.read()
    if keys != list(wanted.sizes) and isinstance(value, dict):
        flatten(path, value)  # a storage of values that are not read is refused by their name
    places = _places(path, file, keys, pickles.position, wanted.sizes)
    pickles.position = start
    value = pickles.read(_Storages(file, places))
    if not isinstance(value, dict):
        raise ModelError(
            f"{path} holds a value of type {type(value).__name__}, and a dictionary of tensors is "
            "expected; save the model's state_dict"
        )
    return flatten(path, value)


class _Pickles:
    """Reads one pickle after the other, as data."""

    def __init__(self, path: Path, file: mmap) -> None:
        self._path = path
        self._stream = io.BytesIO(file[:MAX_PICKLE])
        self.position = len(MAGIC)

    def read(self, load: Call | None = None) -> Any:
        """Read the next; load: makes a storage of a persistent id. Raises ModelError."""
        self._stream.seek(self.position)
        value = read_pickle(self._path, self._stream, CALLS, load or _refuse)
        self.position = self._stream.tell()
        return value


def _refuse(_: Any) -> Any:
    raise UnfitError("a storage in a place of its own")


class _Storages:
    """Makes storages of persistent ids ("storage", type, key, device, values, view).

    places: where each one's bytes are, when that is known; else they are only noted
    sizes: of those that were asked for, by key: a value's bytes, and the number of values
    """

    def __init__(self, file: mmap, places: Mapping[str, int] | None = None) -> None:
        self._file, self._places = file, places
        self.sizes: dict[str, tuple[int, int]] = {}

    def __call__(self, key: Any) -> Storage:
        """Make one; raises UnfitError."""
        if not isinstance(key, tuple) or len(key) not in (5, 6) or key[0] != "storage":
            raise UnfitError("a persistent id that is no storage's")
        kind, name, count, view = key[1], key[2], key[4], key[5:]
        if not isinstance(kind, Name) or kind.text not in STORAGES:
            raise UnfitError("a storage of an unknown type")
        if not isinstance(name, str) or not are_counts([count]):
            raise UnfitError("a storage without a name or a size")
        dtype = STORAGES[kind.text]
        itemsize, start = DTYPES[dtype].itemsize, 0
        if self.sizes.setdefault(name, (itemsize, count)) != (itemsize, count):
            raise UnfitError(f"a storage {short(name)} of two types or sizes")
        if view and view[0] is not None:
            start, count = _view(view[0], count)
        offset = self._places[name] if self._places else 0
        entry = Entry(offset + start * itemsize, count * itemsize, False)
        return Storage(dtype=dtype, entry=entry, file=self._file)


def _view(view: Any, whole: int) -> tuple[int, int]:
    """Read a part of a storage that torch before 0.4 kept as a storage: (key, start, values)."""
    if not isinstance(view, tuple) or len(view) != 3 or not are_counts(view[1:]):
        raise UnfitError("a view of a storage that is none")
    start, count = view[1:]
    if start + count > whole:
        raise UnfitError(f"a view of {count} values at {start} of a storage of {whole}")
    return start, count


def _places(
    path: Path, file: mmap, keys: Any, position: int, sizes: Mapping[str, tuple[int, int]]
) -> dict[str, int]:
    """Go through the storages behind the pickles; returns where each one's values begin."""
    texts = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not texts or sorted(keys) != sorted(sizes):
        raise damaged(path, "the storages that it lists are not those of its tensors")
    places: dict[str, int] = {}
    for key in keys:
        itemsize, count = sizes[key]
        stated = int.from_bytes(file[position : position + COUNT], "little")
        places[key] = position + COUNT
        position += COUNT + count * itemsize
        if position > len(file):
            raise damaged(
                path, f"its storage {short(key)} ends at byte {position}, the file at {len(file)}"
            )
        if stated != count:
            raise damaged(path, f"its storage {short(key)} has {stated} values, and not {count}")
    if position != len(file):
        raise damaged(path, f"its storages end at byte {position}, the file at {len(file)}")
    return places
