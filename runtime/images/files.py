"""Picture files: reading one to start from, writing results with their settings inside."""

import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from engine.errors import OutputError, RequestError
from engine.store.cache import write_atomically
from runtime.images.a1111 import PARAMETERS_KEY, format_parameters, parse_parameters

SETTINGS_KEY = "latentrt"  # the PNG text chunk that holds the settings as JSON
WHITE = 255
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def read_image(path: Path) -> Image.Image:
    """Read a picture as RGB, turned as its camera says; raises RequestError.

    Transparent parts become white.
    """
    from PIL import ImageOps

    try:
        with warnings.catch_warnings():
            # A picture that would fill the memory is an error here, not a warning.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                return as_rgb(ImageOps.exif_transpose(file))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Warning) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise RequestError(
            f"the image {path} cannot be read ({why}); give a whole PNG, JPEG or WebP file"
        ) from error


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture of any mode to RGB: transparent parts become white, 16 bits become 8."""
    if image.mode == "I" or image.mode.startswith("I;16"):  # convert() would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def check_output(path: Path) -> None:
    """Refuse a path that no picture could be written to, before any work is done for it.

    Raises OutputError.
    """
    if path.suffix.lower() not in FORMATS:
        raise OutputError(f"{path} ends in {path.suffix!r}; give a name in {', '.join(FORMATS)}")
    try:
        folder, is_folder = path.resolve().parent, path.is_dir()
        found, writable = folder.is_dir(), os.access(folder, os.W_OK)
    except (OSError, RuntimeError, ValueError) as error:  # too long, closed to us, a loop of links
        why = getattr(error, "strerror", None) or error
        raise OutputError(
            f"{str(path)!r} cannot be written ({why}); choose another path"
        ) from error
    if not found:
        raise OutputError(f"the folder {path.parent} does not exist; make it first")
    if is_folder:
        raise OutputError(f"{path} is a folder; give the name of a file")
    if not writable:
        raise OutputError(f"the folder {folder} may not be written to; choose another")


def write_image(image: Image.Image, path: Path, settings: Mapping[str, Any]) -> None:
    """Write a picture, whole or not at all; a PNG also holds the settings it was made with.

    They are there as JSON and, where they name a prompt and a sampler, as Automatic1111 has them.
    Raises OutputError when it cannot be written; a file that was there then stays as it was.
    """
    check_output(path)
    kind = FORMATS[path.suffix.lower()]
    options: dict[str, Any] = {"quality": 95} if kind != "PNG" else {"pnginfo": _chunk(settings)}

    def write(file: BinaryIO) -> None:
        image.save(file, format=kind, **options)

    write_atomically(path, write)


def read_settings(path: Path) -> dict[str, Any] | None:
    """Return the settings that a PNG of ours or of Automatic1111 was made with, or None.

    Raises RequestError when it is no picture.
    """
    try:
        with Image.open(path) as file:
            texts = [file.info.get(key) for key in (SETTINGS_KEY, PARAMETERS_KEY)]
        ours, others = (text if isinstance(text, str) else None for text in texts)
        settings = json.loads(ours) if ours else parse_parameters(others or "")
    except (OSError, ValueError, SyntaxError, RecursionError) as error:
        raise RequestError(f"{path} cannot be read as a picture ({error})") from error
    return settings if isinstance(settings, dict) and settings else None


def is_image(path: Path) -> bool:
    """Tell by its content whether a file is a picture that is read here; raises OSError."""
    with path.open("rb") as file:
        start = file.read(12)
    webp = start.startswith(b"RIFF") and start[8:] == b"WEBP"
    return webp or start.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"))


def describe_image(path: Path) -> dict[str, Any]:
    """Say what a picture is and what it was made with, as values of JSON, `kind` first.

    Raises RequestError when it cannot be read.
    """
    settings = read_settings(path)
    image = read_image(path)
    facts = {"kind": "picture", "file": str(path), "size": f"{image.width} × {image.height}"}
    return facts | ({"settings": settings} if settings else {"settings": "none in the file"})


def _chunk(settings: Mapping[str, Any]) -> PngImagePlugin.PngInfo:
    chunk = PngImagePlugin.PngInfo()
    chunk.add_itxt(SETTINGS_KEY, json.dumps(settings, ensure_ascii=False), zip=False)
    if {"prompt", "sampler"} <= settings.keys():
        chunk.add_text(PARAMETERS_KEY, format_parameters(settings))
    return chunk


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of pictures of 8 bits, in dB; infinite for equal ones."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return 10 * math.log10(WHITE**2 / error) if error else math.inf
