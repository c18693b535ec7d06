"""Folders of pictures with captions, in the layouts of COCO and of Flickr30k."""

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from PIL import Image

from engine.errors import RequestError


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
            captions.setdefault(names[annotation["image_id"]], []).append(annotation["caption"])
    except (OSError, ValueError, KeyError, TypeError) as error:
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
        with table.open(encoding="utf-8", newline="") as file:
            for line in file:
                if "\t" in line:
                    name, text = line.split("\t", 1)
                    name = name.rsplit("#", 1)[0]
                else:
                    name, number, text = next(
                        csv.reader([line], delimiter="|", quotechar=None, quoting=csv.QUOTE_NONE)
                    )
                    if number.strip() == "comment_number":
                        continue
                captions.setdefault(name.strip(), []).append(text.strip())
    except (OSError, ValueError, StopIteration) as error:
        raise RequestError(
            f"{table} is not Flickr30k's caption table ({error}); its lines read "
            "`name.jpg| 0| caption` or `name.jpg#0<tab>caption`"
        ) from error
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
