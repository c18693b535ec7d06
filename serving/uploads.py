"""Pictures that are sent to a server: told apart by their headers, decoded where the engine lives.

No URL is fetched and no file is opened: a picture is bytes in the request. What Pillow says of
broken ones is kept from whoever sent them.
"""

import base64
import binascii
import io
import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from serving.errors import BadRequestError, TooLargeError

FORMATS = ("PNG", "JPEG", "WEBP")
DATA_URL = ";base64,"


def read_base64(name: str, text: str) -> bytes:
    """Return the bytes of a picture that came as base64, perhaps as a data URL of an image.

    Raises BadRequestError, also for every other URL.
    """
    if text.startswith("data:"):
        head, found, text = text.partition(DATA_URL)
        if not found or not head.startswith("data:image/"):
            raise BadRequestError(
                f"{name} is a data URL of something else; give base64 of a PNG, JPEG or WebP file",
                param=name,
            )
    elif "://" in text[:64]:
        raise BadRequestError(
            f"{name} is a URL, and nothing is fetched here; send the picture itself, in base64",
            code="url_not_fetched",
            param=name,
        )
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise BadRequestError(
            f"{name} is not base64; give that of a picture's file", param=name
        ) from None


def size_of(name: str, data: bytes, most_pixels: int) -> tuple[int, int]:
    """Return a picture's width and height by its header, before anything is decoded.

    Raises BadRequestError for what is no picture or moves, TooLargeError for too many pixels.
    """
    with _opened(name, data) as image:
        width, height = image.size
        frames = getattr(image, "n_frames", 1)
    if width * height > most_pixels:
        raise TooLargeError(
            f"{name} has {width} x {height} pixels; up to {most_pixels} are taken", param=name
        )
    if frames > 1:
        raise BadRequestError(f"{name} has {frames} frames; give a picture with one", param=name)
    return width, height


def decode(name: str, data: bytes) -> Image.Image:
    """Decode a picture that `size_of` has let through, turned as its camera says, in its own mode.

    Raises BadRequestError where the file is not whole.
    """
    try:
        with _opened(name, data) as image:
            image.load()
            turned = ImageOps.exif_transpose(image)
            return turned.convert("RGB") if turned.mode in ("CMYK", "YCbCr", "LAB") else turned
    except BadRequestError:
        raise
    except Exception:
        raise _unreadable(name) from None


def transparency_as_mask(picture: Image.Image) -> Image.Image | None:
    """Return OpenAI's mask of a picture: white where it is fully transparent, None if nowhere."""
    if not picture.has_transparency_data:
        return None
    alpha = np.asarray(picture.convert("RGBA"))[..., 3]
    if alpha.all():
        return None
    return Image.fromarray(np.where(alpha == 0, 255, 0).astype(np.uint8))


def _opened(name: str, data: bytes) -> Any:
    """Open a picture's header. Pillow's own limit on pixels is one of ours, said in our words."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise TooLargeError(f"{name} has far too many pixels", param=name) from None
    except Exception:
        raise _unreadable(name) from None


def _unreadable(name: str) -> BadRequestError:
    return BadRequestError(
        f"{name} cannot be read; give a whole PNG, JPEG or WebP file", code="bad_image", param=name
    )
