"""What torch.save writes: a zip archive of a pickle and, in an entry each, the tensors' storages.

`.ckpt`, `.pt`, `.pth` and `.bin` files hold `NAME/data.pkl`, `NAME/data/0` …, and since torch 2.1
`NAME/byteorder`. The pickle is read as data (`pickles.py`) and the storages are mapped in place.
https://pytorch.org/docs/stable/notes/serialization.html#file-format-for-torch-save
"""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from mmap import mmap
from pathlib import Path
from typing import Any

from engine.checkpoints.formats.numpy_values import NumpyArray
from engine.checkpoints.formats.pickle_values import Opaque, refused
from engine.checkpoints.formats.pickles import read_pickle
from engine.checkpoints.formats.tensors import StoredTensor, damaged, short
from engine.checkpoints.formats.torch_values import CALLS, ParameterDict, load_storage
from engine.checkpoints.formats.zip_archive import read_directory
from engine.errors import ModelError

__all__ = ["MAX_PICKLE", "UNREAD", "flatten", "read_archive"]

MAX_PICKLE = 2**25  # bytes; a training checkpoint of SD 1.5 has 1 MB
UNREAD = "an object that is not read: "  # what metadata say of one, before its name
MAX_VISITS = 2**24  # characters of all names, and steps to them; a cycle of values ends here too


def read_archive(path: Path, file: mmap) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Read a mapped archive of torch.save: where its tensors are, and its metadata.

    The tensors of a checkpoint are those in its `state_dict`, or all when there is none; names of
    nested dictionaries and lists are joined by dots. Metadata are the numbers and texts beside
    them. An object that is no data is named there when it stands apart from tensors, as the
    settings of a training do. Raises ModelError for one among tensors, and when the archive is
    damaged.
    """
    entries = read_directory(path, file)
    pickles = [name for name in entries if re.fullmatch(rb"[^/]+/data\.pkl", name)]
    if len(pickles) != 1:
        raise ModelError(
            f"{path} is a zip archive that torch.save did not write: it holds {len(pickles)} "
            "entries data.pkl, and one is expected; unpack it, or get the model's file"
        )
    root = pickles[0].removesuffix(b"data.pkl")
    if root + b"constants.pkl" in entries:
        raise ModelError(f"{path} is a TorchScript program; save its state_dict by torch.save")
    entry, order = entries[pickles[0]], entries.get(root + b"byteorder")
    if entry.is_compressed or (order and order.is_compressed):
        raise ModelError(
            f"{path} is compressed, and torch.save compresses nothing; unpack it and store the "
            "same files without compression, or take the model as .safetensors"
        )
    if order is not None and file[order.offset : order.offset + min(order.size, 9)] != b"little":
        raise ModelError(
            f"{path} was written big-endian, and only little-endian is read; save it again on "
            "another computer, or as .safetensors"
        )
    if entry.size > MAX_PICKLE:
        raise damaged(path, f"its pickle has {entry.size} bytes, and {MAX_PICKLE} are allowed")
    value = read_pickle(
        path,
        file[entry.offset : entry.offset + entry.size],
        CALLS,
        partial(load_storage, entries, root, file),
    )
    if isinstance(value, Opaque):
        raise refused(path, value)
    if not isinstance(value, dict):
        raise ModelError(
            f"{path} holds a value of type {type(value).__name__}, and a dictionary of tensors is "
            "expected; "
            "save the model's state_dict"
        )
    return flatten(path, value)


def flatten(path: Path, root: Mapping[str, Any]) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Name all tensors and numbers below a dictionary, without recursion, in its order."""
    tensors: dict[str, StoredTensor] = {}
    metadata = {name: str(value) for name, value in root.items() if _is_plain(value)}
    state_dict = root.get("state_dict")
    if isinstance(state_dict, Opaque):
        raise refused(path, state_dict)
    top, objects = root, dict[str, Opaque]()
    if isinstance(state_dict, dict):
        top, objects = state_dict, {n: v for n, v in root.items() if isinstance(v, Opaque)}
    left = [(_named("", top), _holds_tensors(top))]
    visits = 0
    while left:
        values, among_tensors = left[-1]
        item = next(values, None)
        if item is None:
            left.pop()
            continue
        name, value = item
        visits += 1 + len(name)
        if visits > MAX_VISITS:
            raise damaged(path, f"its dictionaries are too many or too deep, at {short(name)}")
        if isinstance(value, ParameterDict):
            value = value.parameters
        if isinstance(value, NumpyArray):
            value = value.tensor
        if isinstance(value, (dict, list, tuple)):
            left.append((_named(f"{name}.", value), _holds_tensors(value)))
        elif isinstance(value, StoredTensor):
            if name in tensors:
                raise damaged(path, f"{short(name)} is there twice")
            tensors[name] = value
        elif isinstance(value, Opaque):
            if among_tensors:
                raise refused(path, value)
            objects[name] = value
        elif _is_plain(value):
            metadata[name] = str(value)
    for name, value in objects.items():
        if not tensors:
            raise refused(path, value)
        metadata[name] = f"{UNREAD}{value.text}"
    return tensors, metadata


def _holds_tensors(values: Any) -> bool:
    each = values.values() if isinstance(values, dict) else values
    return any(isinstance(value, (StoredTensor, NumpyArray)) for value in each)


def _named(prefix: str, values: Any) -> Iterator[tuple[str, Any]]:
    """Go through a dictionary or list with full names."""
    pairs = values.items() if isinstance(values, dict) else enumerate(values)
    return ((f"{prefix}{key}", value) for key, value in pairs)


def _is_plain(value: object) -> bool:
    return isinstance(value, (str, bool, int, float))
