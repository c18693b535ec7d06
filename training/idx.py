"""Pictures with labels in IDX files, as MNIST, Fashion-MNIST and EMNIST are published.

A file is two zeros, the type of its numbers (8: bytes), the number of dimensions, each dimension in
four bytes, the highest first, and the numbers (LeCun et al., "The MNIST database"). What a file
claims is believed as far as the file reaches.
"""

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np

from engine.errors import RequestError

BYTES = 0x08  # the type of numbers from 0 to 255
MAX_DEFLATE = 1032  # times: no gzip stream unfolds to more
SPLITS = {"train": "train", "test": "t10k"}
DIGITS = tuple("0123456789")
SIDES = range(8, 65, 4)  # of pictures: halved twice without a rest


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledPictures:
    """images: (n, side, side) uint8; labels: (n,) int64, below the number of classes."""

    images: np.ndarray
    labels: np.ndarray

    @classmethod
    def read(cls, folder: Path, split: str, classes: int) -> Self:
        """Read a split, "train" or "test", of a folder of four files, gzipped or not.

        Raises RequestError for a file that is missing or not what it should be.
        """
        images_path = _find(folder, f"{SPLITS[split]}-images", "idx3")
        labels_path = _find(folder, f"{SPLITS[split]}-labels", "idx1")
        images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
        if not len(images) or len(images) != len(labels):
            raise RequestError(
                f"{images_path} has {len(images)} pictures and {labels_path.name} {len(labels)} "
                "labels; give files of one data set, which is not empty"
            )
        height, width = images.shape[1:]
        if height != width or height not in SIDES:
            raise RequestError(
                f"{images_path} has pictures of {height} x {width} pixels; squares are expected "
                f"whose side is a multiple of 4 from {SIDES[0]} to {SIDES[-1]}"
            )
        if labels.max() >= classes:
            raise RequestError(
                f"{labels_path} has the label {labels.max()}, beyond the {classes} classes; give "
                "--classes with a name for every label, from 0 on"
            )
        return cls(images=images, labels=labels.astype(np.int64))


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read an IDX file of bytes, uint8 of any shape; RequestError for other than so many axes."""
    try:
        with path.open("rb") as start:
            zipped = start.read(2) == b"\x1f\x8b"
        limit = path.stat().st_size * (MAX_DEFLATE if zipped else 1)
        with gzip.open(path) if zipped else path.open("rb") as file:
            return _read(path, file, dimensions, limit)  # type: ignore[arg-type]
    except (OSError, EOFError, zlib.error) as error:
        raise RequestError(f"{path} cannot be read ({error}); restore the file") from error


def write_idx(path: Path, values: np.ndarray) -> None:
    """Write an array of uint8, of any shape, as an IDX file, gzipped where it ends in .gz."""
    header = bytes([0, 0, BYTES, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    data = header + np.ascontiguousarray(values, np.uint8).tobytes()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def _read(path: Path, file: BinaryIO, dimensions: int, limit: int) -> np.ndarray:
    head = file.read(4 + 4 * dimensions)
    if head[:4] != bytes([0, 0, BYTES, dimensions]) or len(head) < 4 + 4 * dimensions:
        raise RequestError(
            f"{path} does not begin as an IDX file of bytes in {dimensions} dimensions does; give "
            "the files of MNIST's or Fashion-MNIST's own format"
        )
    shape = struct.unpack(f">{dimensions}I", head[4:])
    count = math.prod(shape)
    data = file.read(count + 1) if count <= limit else b""
    if len(data) != count:
        raise RequestError(
            f"{path} says that it holds {' x '.join(map(str, shape))} bytes, and holds "
            f"{'more' if len(data) > count else 'less'}; download it again"
        )
    return np.frombuffer(bytearray(data), np.uint8).reshape(shape)


def _find(folder: Path, stem: str, kind: str) -> Path:
    names: Sequence[str] = [f"{stem}{dot}{kind}-ubyte{end}" for end in ("", ".gz") for dot in "-."]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise RequestError(
        f"{folder} has no {names[0]}, nor one with .gz; --idx wants the folder of the four files "
        "of MNIST, Fashion-MNIST or a data set in their format"
    )
