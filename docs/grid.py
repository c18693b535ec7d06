"""Draw the README's grid of pictures: `python docs/grid.py`."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from runtime import Pipeline

STYLES = ("fluent", "flat", "noto", "twemoji")
SUBJECTS = (
    "red apple", "cat face", "pizza", "sailboat", "snowman", "sunflower",
    "rocket", "owl", "strawberry", "cactus", "penguin", "guitar",
)  # fmt: skip
SEED = 7


def main(out: Path) -> None:
    """Draw every subject (across) in every style (down) and write one PNG."""
    pipeline = Pipeline.load("pictogram")
    rows = []
    for style in STYLES:
        prompts = [f"a {subject}, {style} style" for subject in SUBJECTS]
        images = pipeline(prompts, seed=SEED).images
        rows.append(np.concatenate([np.asarray(image) for image in images], axis=1))
    Image.fromarray(np.concatenate(rows)).save(out)
    print(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "grid.png")
