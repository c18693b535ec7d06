"""Pictures beside each other, to judge a model by eye."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def save_grid(rows: Sequence[np.ndarray], path: Path) -> None:
    """Write rows of pictures, each (n, H, W, 3) uint8, as one PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    partial = path.with_name(f".{path.name}")
    Image.fromarray(grid).save(partial, format="PNG")
    partial.replace(path)
