"""Pictures to start from, and how alike two are."""

import math

import numpy as np
from PIL import Image, ImageDraw


def drawing(height, width):
    """Draw shapes with hard and soft edges, of `height` by `width` pixels, RGB."""
    ramp = np.linspace(40, 220, width).astype(np.uint8)
    image = Image.fromarray(np.broadcast_to(ramp[None, :, None], (height, width, 3)).copy())
    draw = ImageDraw.Draw(image)
    draw.ellipse((width // 8, height // 8, width // 2, height // 2), fill=(230, 40, 30))
    draw.rectangle((width // 2, height // 2, width - 9, height - 9), fill=(20, 90, 200))
    return image


def psnr(a, b):
    """Peak signal-to-noise ratio of two pictures of 8 bits, in dB; infinite for equal ones."""
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    error = np.mean(difference**2)
    return 10 * math.log10(255**2 / error) if error else math.inf


def same(a, b):
    """Tell whether two pictures have the same pixels."""
    return np.array_equal(np.asarray(a), np.asarray(b))
