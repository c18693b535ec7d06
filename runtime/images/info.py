"""What a picture's file says of itself: its settings, its mark, its signature, its watermark."""

from pathlib import Path
from typing import Any

from runtime.images.credentials import describe_credentials
from runtime.images.files import read_image, read_settings, read_source_type
from runtime.images.watermark import read_watermark

__all__ = ["describe_image"]

NONE = "none in the file"


def describe_image(path: Path) -> dict[str, Any]:
    """Say what a picture is and what it was made with, as values of JSON, `kind` first.

    Raises RequestError when it cannot be read.
    """
    settings, image = read_settings(path), read_image(path)
    return {
        "kind": "picture",
        "file": str(path),
        "size": f"{image.width} × {image.height}",
        "mark": read_source_type(path) or NONE,
        "content_credentials": describe_credentials(path),
        "watermark": read_watermark(image) or "none found",
        "settings": settings or NONE,
    }
