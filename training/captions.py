"""Folders of pictures with captions, in the layouts of COCO and of Flickr30k."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from PIL import Image

from engine.errors import RequestError

# The published table has a line without its second bar: `2199200615.jpg| 4   A dog runs …`.
FLICKR30K_LINE = re.compile(r"(?P<name>[^|\t#]+)(\| *\d+ *\|?|#\d+\t)(?P<caption>.+)")
FLICKR30K_TITLE = "comment_number"


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionedImages:
    """images: (n, size, size, 3) uint8; captions: one tuple of texts for each picture."""

    images: np.ndarray
    captions: tuple[tuple[str, ...], ...]

    def save(self, path: Path) -> None:
        """Write everything as one `.npz`, whole or not at all."""
        partial = path.with_suffix(".partial.npz")
        captions = np.array([json.dumps(texts) for texts in self.captions])
        np.savez(partial, images=self.images, captions=captions)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote; no pickles."""
        with np.load(path, allow_pickle=False) as arrays:
            captions = tuple(tuple(json.loads(str(texts))) for texts in arrays["captions"])
            return cls(images=arrays["images"], captions=captions)


def read_coco(annotations: Path, folder: Path, size: int) -> CaptionedImages:
    """Read COCO's captions JSON: `images` with id and file_name, `annotations` with image_id.

    Raises RequestError when the file is not of that layout or a picture is missing.
    """
    try:
        values = json.loads(annotations.read_text(encoding="utf-8"))
        names = {image["id"]: image["file_name"] for image in values["images"]}
        captions: dict[str, list[str]] = {}
        for annotation in values["annotations"]:
            text = annotation["caption"].strip()
            captions.setdefault(names[annotation["image_id"]], []).append(text)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(
            f"{annotations} is not COCO's captions JSON ({type(error).__name__}: {error}); "
            "it holds `images` (id, file_name) and `annotations` (image_id, caption)"
        ) from error
    return _read(captions, folder, size)


def read_flickr30k(table: Path, folder: Path, size: int) -> CaptionedImages:
    """Read Flickr30k's captions: `results.csv` (image_name| comment_number| comment), or the
    older token file (`name.jpg#0<tab>caption`).

    Raises RequestError when the file is not of either layout or a picture is missing.
    """
    captions: dict[str, list[str]] = {}
    try:
        lines = table.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise RequestError(f"{table} cannot be read ({error}); give a UTF-8 text file") from error
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and FLICKR30K_TITLE in line):
            continue
        match = FLICKR30K_LINE.fullmatch(line.rstrip())
        if match is None:
            raise RequestError(
                f"line {number} of {table} is {line!r}; Flickr30k's lines read "
                "`name.jpg| 0| caption` or `name.jpg#0<tab>caption`"
            )
        captions.setdefault(match["name"].strip(), []).append(match["caption"].strip())
    return _read(captions, folder, size)


def _read(captions: Mapping[str, Iterable[str]], folder: Path, size: int) -> CaptionedImages:
    if not captions:
        raise RequestError("the captions name no picture; give a file with at least one caption")
    images = np.stack([_read_square(folder / name, size) for name in captions])
    return CaptionedImages(images=images, captions=tuple(map(tuple, captions.values())))


def _read_square(path: Path, size: int) -> np.ndarray:
    """Read a picture, cut its middle square, and scale it to (size, size, 3) uint8."""
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, ValueError) as error:
        raise RequestError(f"the picture {path} cannot be read ({error}); restore it") from error
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS, box=box))
