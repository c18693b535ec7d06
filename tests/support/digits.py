"""Digits drawn with Pillow's font, as IDX files: a small data set that needs no download."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from training.idx import write_idx


def digit(label, rng, side=28):
    """Draw a digit, moved and sized at random: (side, side) uint8, light on black."""
    image = Image.new("L", (side, side))
    size = int(rng.integers(side * 5 // 8, side * 7 // 8))
    at = tuple(rng.integers(side // 8, side // 3, 2))
    font = ImageFont.load_default(size)
    ImageDraw.Draw(image).text(at, str(label), fill=255, font=font, anchor="lt")
    return np.asarray(image)


def write_digits(folder, per_class, side=28, ending="", dot="-", classes=10):
    """Write training and test split, equally large; returns the training split's arrays."""
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(classes, dtype=np.uint8), per_class)
    for split in ("t10k", "train"):
        images = np.stack([digit(label, rng, side) for label in labels])
        write_idx(folder / f"{split}-images{dot}idx3-ubyte{ending}", images)
        write_idx(folder / f"{split}-labels{dot}idx1-ubyte{ending}", labels)
    return images, labels
