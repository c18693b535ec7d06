"""The weights of a model's part: its checkpoint in safetensors, wherever and in however many files.

A large model is cut into shards, several files with an index, `{"weight_map": {name: file}}`.
"""

import hashlib
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import MappingProxyType
from typing import Any

from numpy.typing import NDArray

from engine.errors import ModelError
from engine.safetensors import StoredTensor, damaged, map_file, parse_object, read_header, short

__all__ = ["StoredTensor", "Weights", "open_weights"]

# Where diffusers and transformers put a part's weights, in the order of preference.
FILES = (
    "{}.safetensors",
    "{}.safetensors.index.json",
    "{}.fp16.safetensors",
    "{}.safetensors.index.fp16.json",
)
STEMS = ("diffusion_pytorch_model", "model")
PICKLED = (".bin", ".ckpt", ".pkl", ".pt", ".pth")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Weights(Mapping[str, NDArray[Any]]):
    """A checkpoint's tensors by name, as read-only arrays; each access makes a new view.

    files: the mapped files by path
    tensors: dtype and shape of each tensor, known without reading it
    """

    files: Mapping[Path, mmap.mmap]
    tensors: Mapping[str, StoredTensor]

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

    path: a `.safetensors` file, the `.index.json` of a sharded one, or the folder of a model's
    part, such as `unet/`. The files must not be changed while the weights are in use.
    Raises ModelError when there are none, or when they are damaged, pickled or of an unknown dtype.
    """
    try:
        if path.is_dir():
            path = _find(path)
        if path.suffix == ".json":
            return _open_shards(path)
        return _join([path])
    except OSError as error:
        raise ModelError(
            f"{error.filename or path} cannot be read ({error.strerror or error}); "
            "check the path and its permissions"
        ) from error


def _find(folder: Path) -> Path:
    """Choose the weights file, or the index of several, in the folder of a model's part."""
    for name in FILES:
        for stem in STEMS:
            if (path := folder / name.format(stem)).is_file():
                return path
    for path in sorted(folder.iterdir()):
        if path.suffix in PICKLED:
            raise _pickled(path)
    raise ModelError(
        f"{folder} holds no weights; expected is {FILES[0].format(STEMS[0])} or "
        f"{FILES[0].format(STEMS[1])}: give the folder of one part of the model, such as unet/"
    )


def _open_shards(index: Path) -> Weights:
    """Map all files that an index names, and check that they hold what it says."""
    if not index.is_file():
        raise ModelError(f"{index} does not exist; give a .safetensors file or a part's folder")
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
    for path in paths:
        if path.suffix in PICKLED:
            raise _pickled(path)
        files[path] = map_file(path)
        for name, tensor in read_header(path, files[path]).items():
            if name in tensors:
                raise damaged(path, f"{short(name)} is in another shard too")
            tensors[name] = tensor
    return Weights(files=MappingProxyType(files), tensors=MappingProxyType(tensors))


def _is_plain_name(name: str) -> bool:
    """Tell whether a name stays in its folder, on any system."""
    return bool(name) and PurePosixPath(name).name == name == PureWindowsPath(name).name != ".."


def _pickled(path: Path) -> ModelError:
    return ModelError(
        f"{path} is pickled, which can run code when it is opened; safetensors are needed: "
        "save the model again with save_pretrained(..., safe_serialization=True)"
    )
