"""Pictures with captions, one by one: COCO's layout, Flickr30k's and that of trainers' folders.

Captions are read at once and pictures when they are asked for, so a set may be of any size.
"""

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from engine.errors import RequestError

# The published table has a line without its second bar: `2199200615.jpg| 4   A dog runs …`.
FLICKR30K_LINE = re.compile(r"(?P<name>[^|\t#]+)(\| *\d+ *\|?|#\d+\t)(?P<caption>.+)")
FLICKR30K_TITLE = "comment_number"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
METADATA = "metadata.jsonl"
CAPTION_FILES = (".txt", ".caption")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One picture; name: for messages; read: gives its file's bytes."""

    name: str
    captions: tuple[str, ...]
    read: Callable[[], bytes]

    def image(self) -> Image.Image:
        """Decode the picture, upright and in RGB; raises RequestError when it cannot be read."""
        try:
            with Image.open(io.BytesIO(self.read())) as file:
                return ImageOps.exif_transpose(file).convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise RequestError(
                f"the picture {self.name} cannot be read ({error}); restore it"
            ) from error

    def square(self, size: int) -> np.ndarray:
        """Cut the picture's middle square and scale it: (size, size, 3) uint8."""
        image = self.image()
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS, box=box))


def read_coco(annotations: Path, folder: Path) -> Iterator[Record]:
    """Read COCO's captions JSON: `images` with id and file_name, `annotations` with image_id.

    Raises RequestError when the file is not of that layout.
    """
    try:
        values = json.loads(annotations.read_text(encoding="utf-8"))
        names = {image["id"]: image["file_name"] for image in values["images"]}
        captions: dict[str, list[str]] = {}
        for annotation in values["annotations"]:
            text = annotation["caption"].strip()
            captions.setdefault(names[annotation["image_id"]], []).append(text)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RequestError(
            f"{annotations} is not COCO's captions JSON ({type(error).__name__}: {error}); "
            "it holds `images` (id, file_name) and `annotations` (image_id, caption)"
        ) from error
    return _records(captions, folder)


def read_flickr30k(table: Path, folder: Path) -> Iterator[Record]:
    """Read Flickr30k's captions: `results.csv` (image_name| comment_number| comment), or the
    older token file (`name.jpg#0<tab>caption`).

    Raises RequestError when the file is not of either layout.
    """
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(_lines(table), 1):
        if not line.strip() or (number == 1 and FLICKR30K_TITLE in line):
            continue
        match = FLICKR30K_LINE.fullmatch(line.rstrip())
        if match is None:
            raise RequestError(
                f"line {number} of {table} is {line!r}; Flickr30k's lines read "
                "`name.jpg| 0| caption` or `name.jpg#0<tab>caption`"
            )
        captions.setdefault(match["name"].strip(), []).append(match["caption"].strip())
    return _records(captions, folder)


def read_folder(folder: Path, prompt: str | None = None) -> Iterator[Record]:
    """Read a folder of pictures captioned by `metadata.jsonl` or by a `.txt` file beside each.

    A line of metadata.jsonl has `file_name` and `text`, one or a list; a `.txt` file has one
    caption a line. prompt: of pictures that have none. Raises RequestError for what is missing.
    """
    if not folder.is_dir():
        raise RequestError(f"{folder} is no folder; give one of pictures with captions")
    if (folder / METADATA).is_file():
        return _records(_metadata(folder / METADATA), folder)
    captions = {}
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES):
        beside = next(filter(Path.is_file, map(path.with_suffix, CAPTION_FILES)), None)
        lines = [line.strip() for line in _lines(beside)] if beside else []
        texts = list(filter(None, lines)) or ([] if prompt is None else [prompt])
        if not texts:
            raise RequestError(
                f"the picture {path} has no caption; write one into {path.with_suffix('.txt').name}"
                f" beside it or into {METADATA}, or give --prompt TEXT for all that have none"
            )
        captions[path.relative_to(folder).as_posix()] = texts
    return _records(captions, folder)


def texts_of(value: object) -> list[str]:
    """Return a caption, or a list of them, as texts that are not empty; raises ValueError."""
    given = value if isinstance(value, list) else [value]
    texts = [text.strip() for text in given if isinstance(text, str)]
    if not texts or len(texts) < len(given) or not all(texts):
        raise ValueError(f"{str(value)[:80]!r} is no caption")
    return texts


def _metadata(path: Path) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            values: dict[str, Any] = json.loads(line)
            texts = texts_of(values["text"] if "text" in values else values["caption"])
            captions.setdefault(str(values["file_name"]), []).extend(texts)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RequestError(
                f"line {number} of {path} is {line[:80]!r} ({type(error).__name__}: {error}); a "
                'line reads {"file_name": "a.png", "text": "a caption"}'
            ) from error
    return captions


def _lines(path: Path) -> Sequence[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} cannot be read ({error}); give a UTF-8 text file") from error


def _records(captions: Mapping[str, Iterable[str]], folder: Path) -> Iterator[Record]:
    if not captions:
        raise RequestError("the captions name no picture; give a file with at least one caption")
    for name in captions:
        inner = PurePosixPath(str(name))
        if inner.is_absolute() or ".." in inner.parts:
            raise RequestError(
                f"the captions name the picture {name!r}, which is outside of {folder}; give a "
                "path within the folder"
            )
    return (
        Record(name=str(folder / name), captions=tuple(texts), read=(folder / name).read_bytes)
        for name, texts in captions.items()
    )
