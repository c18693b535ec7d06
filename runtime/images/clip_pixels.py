"""Pictures as CLIP sees them, equal to transformers' CLIPImageProcessor."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.images.files import WHITE, as_rgb

__all__ = ["clip_pixels"]

# Of CLIP's training pictures, 0 to 1.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def clip_pixels(image: Image.Image, side: int) -> NDArray[np.float32]:
    """Return the middle of a picture, (1, 3, side, side), normalised; transparent is white."""
    pixels = _cropped(as_rgb(image), side)
    normal = (np.asarray(pixels, np.float32) / WHITE - MEAN) / DEVIATION
    return np.ascontiguousarray(np.moveaxis(normal, -1, 0)[None], np.float32)


def _cropped(image: Image.Image, side: int) -> Image.Image:
    """Resize a picture so that its shorter side is this long, and take its middle, as CLIP does."""
    short = min(image.size)
    width, height = (int(side * length / short) for length in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return resized.crop((left, top, left + side, top + side))
