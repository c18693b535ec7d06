"""Picture files: reading one to start from, writing results with their settings inside."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, PngImagePlugin

from engine.cache import write_atomically
from engine.errors import OutputError, RequestError

SETTINGS_KEY = "latentrt"  # the PNG text chunk that holds the settings as JSON
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
                image = ImageOps.exif_transpose(file)
                if image.has_transparency_data:
                    image = image.convert("RGBA")
                    white = Image.new("RGBA", image.size, "white")
                    image = Image.alpha_composite(white, image)
                return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Warning) as error:
        raise RequestError(
            f"the image {path} cannot be read ({error}); give a whole PNG, JPEG or WebP file"
        ) from error


def check_output(path: Path) -> None:
    """Refuse a path that no picture could be written to, before any work is done for it.

    Raises OutputError.
    """
    if path.suffix.lower() not in FORMATS:
        raise OutputError(f"{path} ends in {path.suffix!r}; give a name in {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise OutputError(f"the folder {path.parent} does not exist; make it first")
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give the name of a file")


def write_image(image: Image.Image, path: Path, settings: Mapping[str, Any]) -> None:
    """Write a picture, whole or not at all; a PNG also holds the settings it was made with.

    Raises OutputError when it cannot be written; a file that was there then stays as it was.
    """
    check_output(path)
    kind = FORMATS[path.suffix.lower()]
    options: dict[str, Any] = {"quality": 95} if kind != "PNG" else {"pnginfo": _chunk(settings)}

    def write(file: BinaryIO) -> None:
        image.save(file, format=kind, **options)

    write_atomically(path, write)


def read_settings(path: Path) -> dict[str, Any] | None:
    """Return the settings that a PNG of ours was made with, or None; raises RequestError."""
    try:
        with Image.open(path) as file:
            text = file.info.get(SETTINGS_KEY)
        settings = json.loads(text) if isinstance(text, str) else None
    except (OSError, ValueError, SyntaxError) as error:
        raise RequestError(f"{path} cannot be read as a picture ({error})") from error
    return settings if isinstance(settings, dict) else None


def _chunk(settings: Mapping[str, Any]) -> PngImagePlugin.PngInfo:
    chunk = PngImagePlugin.PngInfo()
    chunk.add_itxt(SETTINGS_KEY, json.dumps(settings, ensure_ascii=False), zip=False)
    return chunk
