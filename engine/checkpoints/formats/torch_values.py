"""What the names in a checkpoint's pickle stand for: tensors in their storages, and plain values.

Storages and tensors are checked against the file when they are met; nothing of them is read.
torch/_utils.py has the signatures of what rebuilds tensors.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from mmap import mmap
from typing import Any

from engine.checkpoints.formats.numpy_values import CALLS as NUMPY_CALLS
from engine.checkpoints.formats.numpy_values import (
    NumpyArray,
    is_shape,
    show_shape,
    simplify_strides,
)
from engine.checkpoints.formats.pickles import Call, Name, UnfitError
from engine.checkpoints.formats.tensors import (
    DTYPES,
    MAX_BYTES,
    StoredTensor,
    are_counts,
    extent,
    short,
)
from engine.checkpoints.formats.zip_archive import Entry

__all__ = ["CALLS", "STORAGES", "NumpyArray", "ParameterDict", "Storage", "load_storage"]

STORAGES: Mapping[str, str] = {
    "torch.BoolStorage": "BOOL",
    "torch.ByteStorage": "U8",
    "torch.CharStorage": "I8",
    "torch.ShortStorage": "I16",
    "torch.IntStorage": "I32",
    "torch.LongStorage": "I64",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.FloatStorage": "F32",
    "torch.DoubleStorage": "F64",
    "torch.storage.UntypedStorage": "U8",
}
TYPES: Mapping[str, str] = {
    "torch.bool": "BOOL",
    "torch.uint8": "U8",
    "torch.int8": "I8",
    "torch.uint16": "U16",
    "torch.int16": "I16",
    "torch.uint32": "U32",
    "torch.int32": "I32",
    "torch.uint64": "U64",
    "torch.int64": "I64",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float32": "F32",
    "torch.float64": "F64",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.float8_e4m3fnuz": "F8_E4M3FNUZ",
    "torch.float8_e5m2fnuz": "F8_E5M2FNUZ",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """Numbers in the file that tensors view; dtype as in DTYPES, entry in bytes."""

    dtype: str
    entry: Entry
    file: mmap


class Ordered(dict[str, Any]):
    """An OrderedDict, whose state (torch's `_metadata`, versions of modules) is of no use here."""

    def set_state(self, state: Any) -> None:
        """Ignore the attributes of a state dict."""


@dataclass(slots=True)
class ParameterDict:
    """torch's module of named tensors, which textual-inversion files hold."""

    parameters: dict[str, Any] = field(default_factory=dict)

    def set_state(self, state: Any) -> None:
        """Take the tensors out of the attributes of the module; raises UnfitError without any."""
        parameters = state.get("_parameters") if isinstance(state, dict) else None
        if not isinstance(parameters, dict):
            raise UnfitError("a ParameterDict without parameters")
        self.parameters = parameters


def load_storage(entries: Mapping[bytes, Entry], root: bytes, file: mmap, key: Any) -> Storage:
    """Find the entry of a storage by its persistent id ("storage", type, key, device, values).

    entries: of the archive, of which those of storages begin with root, "NAME/", and "data/"
    Raises UnfitError unless the entry is as large as the id says.
    """
    if not isinstance(key, tuple) or len(key) != 5 or key[0] != "storage":
        raise UnfitError("a persistent id that is no storage's")
    _, kind, name, _, count = key
    if not isinstance(kind, Name) or kind.text not in STORAGES:
        raise UnfitError("a storage of an unknown type")
    if not isinstance(name, str) or not are_counts([count]):
        raise UnfitError("a storage without a name or a size")
    entry = entries.get(root + b"data/" + name.encode("utf-8", "replace"))
    if entry is None:
        raise UnfitError(f"a storage {short(name)}, which the archive lacks,")
    if entry.is_compressed:
        raise UnfitError(f"a storage {short(name)}, which is compressed,")
    dtype = STORAGES[kind.text]
    if entry.size != count * DTYPES[dtype].itemsize:
        raise UnfitError(
            f"a storage {short(name)} of {count} {dtype} values, for which the archive holds "
            f"{entry.size} bytes,"
        )
    return Storage(dtype=dtype, entry=entry, file=file)


def _rebuild_tensor(
    storage: Any, start: Any, shape: Any, strides: Any, *others: Any
) -> StoredTensor:
    """Place a tensor in its storage: torch._utils._rebuild_tensor, and _v2 since 0.4."""
    if not isinstance(storage, Storage):
        raise UnfitError("a tensor without a storage")
    if len(others) > 2 and others[2]:
        raise UnfitError("a tensor that is to be conjugated or negated")
    return _place(storage, storage.dtype, start, shape, strides)


def _rebuild_typed_tensor(
    storage: Any, start: Any, shape: Any, strides: Any, *others: Any
) -> StoredTensor:
    """Place a tensor in an untyped storage: torch._utils._rebuild_tensor_v3."""
    if not isinstance(storage, Storage) or storage.dtype != "U8":
        raise UnfitError("a tensor without a storage")
    dtype = others[2] if len(others) > 2 else None
    if not isinstance(dtype, Name) or dtype.text not in TYPES or any(others[3:]):
        raise UnfitError("a tensor of an unknown type")
    return _place(storage, TYPES[dtype.text], start, shape, strides)


def _place(storage: Storage, dtype: str, start: Any, shape: Any, strides: Any) -> StoredTensor:
    """Check that a tensor lies in its storage, whatever its strides are."""
    fits = is_shape(shape) and is_shape(strides) and are_counts([start])
    if not fits or len(shape) != len(strides):
        raise UnfitError(f"a tensor of shape {show_shape(shape)} and strides {show_shape(strides)}")
    shape = tuple(shape)
    itemsize = DTYPES[dtype].itemsize
    count = math.prod(shape)
    last = start + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    if count and (last + 1) * itemsize > storage.entry.size:
        raise UnfitError(
            f"a tensor of shape {show_shape(shape)} that ends at value {last + 1} of a storage "
            f"of {storage.entry.size // itemsize}"
        )
    if count * itemsize > len(storage.file) or extent(shape) * itemsize > MAX_BYTES:
        raise UnfitError(f"a tensor of shape {show_shape(shape)}, larger than the file,")
    return StoredTensor(
        dtype=dtype,
        shape=shape,
        offset=storage.entry.offset + (start * itemsize if count else 0),
        nbytes=count * itemsize,
        file=storage.file,
        strides=simplify_strides(shape, strides),
    )


def _parameter(tensor: Any, *_: Any) -> StoredTensor:
    if not isinstance(tensor, StoredTensor):
        raise UnfitError("a parameter without a tensor")
    return tensor


def _ordered() -> Ordered:
    return Ordered()


def _parameter_dict() -> ParameterDict:
    return ParameterDict()


def _set(items: Any) -> list[Any]:
    if not isinstance(items, list):
        raise UnfitError("a set that is not made of a list")
    return items


def _size(sizes: Any) -> tuple[int, ...]:
    if not is_shape(sizes):
        raise UnfitError("a torch.Size that is none")
    return tuple(sizes)


def _device(name: Any, *_: Any) -> str:
    if not isinstance(name, str):
        raise UnfitError("a torch.device without a name")
    return name


def _encode(text: Any, encoding: Any) -> str:
    """Keep bytes as the text that pickles of version 2 make of them: _codecs.encode."""
    if not isinstance(text, str) or encoding != "latin1":
        raise UnfitError("bytes in another encoding than latin1")
    return text


def _empty_bytes() -> bytes:
    """Return what pickles of version 2 write as `bytes()`."""
    return b""


def _device_tensor(array: Any, *_: Any) -> StoredTensor:
    """Take the numbers of a tensor that lay on a Mac's GPU, say."""
    if not isinstance(array, NumpyArray) or array.tensor is None:
        raise UnfitError("a tensor of a device without its numbers")
    return array.tensor


CALLS: Mapping[str, Call | None] = {
    "collections.OrderedDict": _ordered,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_typed_tensor,
    "torch._utils._rebuild_device_tensor_from_numpy": _device_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.nn.parameter.Parameter": _parameter,
    "torch.nn.modules.container.ParameterDict": _parameter_dict,
    "torch.Size": _size,
    "torch.device": _device,
    "__builtin__.set": _set,
    "builtins.set": _set,
    "_codecs.encode": _encode,
    "__builtin__.bytes": _empty_bytes,
    "builtins.bytes": _empty_bytes,
    **NUMPY_CALLS,
    **dict.fromkeys([*STORAGES, *TYPES]),
}
