"""The weights of a checkpoint, in whichever format, and in however many files.

A file is read as what it holds: safetensors, GGUF, what torch.save writes, or a picture with a
textual inversion; its suffix decides nothing. A large model is cut into shards, several files with
an index, `{"weight_map": {name: file}}`.
"""

import hashlib
import mmap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.checkpoints.formats.scales import with_scales
from engine.checkpoints.formats.tensors import (
    MAX_HEADER,
    StoredTensor,
    damaged,
    map_file,
    parse_object,
    read_header,
    short,
)
from engine.checkpoints.formats.wrappers import unwrap
from engine.errors import ModelError

__all__ = ["StoredTensor", "Weights", "open_weights", "read_tensors", "release", "require_finite"]

# Where diffusers and transformers put a part's weights, in the order of preference.
FILES = tuple(
    file.format(stem)
    for suffix, stems in (
        ("safetensors", ("diffusion_pytorch_model", "model")),
        ("bin", ("diffusion_pytorch_model", "pytorch_model")),
    )
    for file in (
        f"{{}}.{suffix}",
        f"{{}}.{suffix}.index.json",
        f"{{}}.fp16.{suffix}",
        f"{{}}.{suffix}.index.fp16.json",
    )
    for stem in stems
)
PIECE = 2**16  # values that are looked at together: they stay in the processor's cache


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Weights(Mapping[str, NDArray[Any]]):
    """A checkpoint's tensors by name, as read-only arrays; each access makes a new view.

    files: the mapped files by path
    tensors: dtype and shape of each tensor, known without reading it
    metadata: what else the files say, as texts: safetensors' `__metadata__`, or the numbers and
        texts beside the tensors of a pickled checkpoint, such as "global_step"
    notes: what was left out, a clause each
    """

    files: Mapping[Path, mmap.mmap]
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> NDArray[Any]:
        """View a tensor; raises KeyError when there is none of this name."""
        return self.tensors[name].array()

    def __iter__(self) -> Iterator[str]:
        """Go through the names in the order of the files' headers."""
        return iter(self.tensors)

    def __len__(self) -> int:
        """Count the tensors."""
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:
        """Tell whether there is a tensor of this name, without touching it."""
        return name in self.tensors

    def __eq__(self, other: object) -> bool:
        """Equal is only itself: a mapping's equality would compare every number."""
        return self is other

    def __hash__(self) -> int:
        """Hash by identity, as `==` compares."""
        return id(self)

    def __repr__(self) -> str:
        """Name the files; thousands of tensors help nobody."""
        return f"Weights({', '.join(map(str, self.files))}: {len(self)} tensors)"

    def release(self, *, used_in_place: Collection[str] = ("F32",)) -> None:
        """Give back the memory of what was read; the files stay mapped, and are read again.

        used_in_place: dtypes whose files are left alone, as their tensors are read all the time
        """
        used = {id(t.file) for t in self.tensors.values() if t.dtype in used_in_place}
        for file in self.files.values():
            if id(file) not in used and hasattr(mmap, "MADV_DONTNEED"):
                file.madvise(mmap.MADV_DONTNEED)

    def content_hash(self) -> str:
        """SHA-256, in hexadecimal, of the files' bytes in the order of their names.

        Of one file it is what `sha256sum` prints. Every byte is read, at 1 to 2 GB a second.
        """
        digest = hashlib.sha256()
        for path in sorted(self.files, key=lambda path: path.name):
            digest.update(self.files[path])
        return digest.hexdigest()


def open_weights(path: Path) -> Weights:
    """Map a checkpoint and read its header, but none of its tensors.

    path: a file of safetensors, GGUF or torch.save (`.ckpt`, `.pt`, `.bin`), a picture that carries
    a textual inversion, the `.index.json` of a sharded checkpoint, or the folder of a model's part,
    such as `unet/`. The files must not be changed while the weights are in use. No code of a
    pickled file is ever run.
    Raises ModelError when there are none, when they are damaged or of an unknown dtype, or when a
    pickle holds anything else than data.
    """
    try:
        if path.is_dir():
            path = _find(path)
        weights = _open_shards(path) if path.suffix == ".json" else _join([path])
        tensors, notes = unwrap(weights.tensors)
        tensors = with_scales(path, tensors, weights.metadata)
        return replace(weights, tensors=MappingProxyType(dict(tensors)), notes=notes)
    except OSError as error:
        raise ModelError(
            f"{error.filename or path} cannot be read ({error.strerror or error}); "
            "check the path and its permissions"
        ) from error


def release(weights: Mapping[str, NDArray[Any]]) -> None:
    """Give back the memory of a file's weights, of any shape and dtype, however they come."""
    if give_back := getattr(weights, "release", None):
        give_back()


def require_finite(source: Path | str, name: str, array: NDArray[Any]) -> None:
    """Raise ModelError when a tensor holds a number that is not finite.

    source: the file, or what it is called
    array: of any dtype and shape; whole numbers always are. Reads every value, at some GB a second.
    """
    if array.dtype.kind != "f" or not array.size:
        return
    is_half = array.dtype == np.float16
    numbers: NDArray[Any] = array.view(np.uint16) if is_half else array
    pieces: Iterable[Any] = np.nditer(numbers, ["external_loop", "buffered"], buffersize=PIECE)
    for piece in pieces:
        # Of float16, eight times as fast as isfinite: all bits of the exponent are set.
        if (piece & 0x7C00).max() == 0x7C00 if is_half else not np.isfinite(piece).all():
            raise ModelError(
                f"{source} is damaged: {short(name)} holds values that are not finite (NaN, "
                f"infinite or too large for {array.dtype}); download it again, or take another"
            )


def _find(folder: Path) -> Path:
    """Choose the weights file, or the index of several, in the folder of a model's part."""
    for name in FILES:
        if (path := folder / name).is_file():
            return path
    raise ModelError(
        f"{folder} holds no weights; expected is {FILES[0]}, {FILES[1]} or the same as .bin: "
        "give the folder of one part of the model, such as unet/"
    )


def _open_shards(index: Path) -> Weights:
    """Map all files that an index names, and check that they hold what it says."""
    if not index.is_file():
        raise ModelError(f"{index} does not exist; give a checkpoint or a part's folder")
    if index.stat().st_size > MAX_HEADER:
        raise damaged(index, f"it has more than {MAX_HEADER} bytes, and an index is short")
    weight_map = parse_object(index, index.read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged(index, "it has no weight_map of tensor names and file names")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain_name(file):
            raise damaged(
                index, f"it puts {short(name)} in {short(file)}, which is no file beside it"
            )
    shards = [index.parent / name for name in sorted(set(weight_map.values()))]
    for shard in shards:
        if not shard.is_file():
            raise ModelError(
                f"{shard} is missing, and {index.name} names it; download all of the model's files"
            )
    weights = _join(shards)
    for name, file in weight_map.items():
        held = weights.tensors.get(name)
        if held is None or held.file is not weights.files[index.parent / file]:
            raise damaged(index, f"it puts {short(name)} in {file}, which does not hold it")
    return weights


def _join(paths: Sequence[Path]) -> Weights:
    """Map files whose tensors have different names, as one checkpoint."""
    files: dict[Path, mmap.mmap] = {}
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        files[path] = map_file(path)
        found, texts = read_tensors(path, files[path])
        metadata |= texts
        for name, tensor in found.items():
            if name in tensors:
                raise damaged(path, f"{short(name)} is in another shard too")
            tensors[name] = tensor
    return Weights(
        files=MappingProxyType(files),
        tensors=MappingProxyType(tensors),
        metadata=MappingProxyType(metadata),
    )


def _is_plain_name(name: str) -> bool:
    """Tell whether a name stays in its folder, on any system."""
    return bool(name) and PurePosixPath(name).name == name == PureWindowsPath(name).name != ".."


# Formats that are not read, by their first bytes, and what to do about each.
TAR = (
    "is in the format of torch before 0.2; load it with torch and torch.save it again, "
    "or save it as .safetensors"
)
PLAIN_PICKLE = "is a bare pickle, which torch.save did not write; take the model as .safetensors"
PICKLES = tuple(bytes([0x80, version]) for version in range(2, 6))
WEB_PAGE = "is a web page, not a checkpoint; download the file itself"
OTHERS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "is a pointer of Git LFS; run `git lfs pull` for the weights"),
    (b"\x89HDF\r\n", "is an HDF5 file, of Keras; take the model as .safetensors"),
    (b"\x1f\x8b", "is compressed by gzip; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive; unpack it first"),
    (b"Rar!", "is a RAR archive; unpack it first"),
    (b"\x93NUMPY", "is a single array of numpy; take the model as .safetensors"),
)


def read_tensors(path: Path, file: mmap.mmap) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Read where a mapped file's tensors are, in the file's order, and its metadata.

    Raises ModelError when the file is in no format that is read here, or damaged.
    """
    if file[4:9] == b"\0\0\0\0{":  # safetensors: a header of less than 4 GB, in JSON
        return read_header(path, file)
    # Most files end here; the readers of others are imported where one is met.
    from engine.checkpoints.formats.gguf import MAGIC as GGUF
    from engine.checkpoints.formats.gguf import read_gguf
    from engine.checkpoints.formats.picture import is_picture, read_picture
    from engine.checkpoints.formats.torch_archive import read_archive
    from engine.checkpoints.formats.torch_legacy import MAGIC as LEGACY
    from engine.checkpoints.formats.torch_legacy import read_legacy

    if file[:4] in (b"PK\3\4", b"PK\5\6"):
        return read_archive(path, file)
    if file[: len(GGUF)] == GGUF:
        return read_gguf(path, file)
    if file[: len(LEGACY)] == LEGACY:
        return read_legacy(path, file)
    if is_picture(file[:16]):
        return read_picture(path, file)
    _refuse_others(path, file)
    return read_header(path, file)


def _refuse_others(path: Path, file: mmap.mmap) -> None:
    """Raise ModelError unless a file is called safetensors, and merely damaged."""
    start = file[:512]
    for signature, what in OTHERS:
        if start.startswith(signature):
            raise ModelError(f"{path} {what}")
    if start[257:262] == b"ustar":
        raise ModelError(f"{path} {TAR}")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b'{"error')):
        raise ModelError(f"{path} {WEB_PAGE}")
    if path.suffix == ".safetensors" and not start.startswith(PICKLES):
        return
    if start.startswith(PICKLES):
        raise ModelError(f"{path} {PLAIN_PICKLE}")
    raise ModelError(
        f"{path} is no checkpoint: it begins with the bytes {start[:8].hex(' ')}, and safetensors "
        "or an archive of torch.save is expected; download it again"
    )
