"""Draw the pictures of docs/control.md: `python docs/edges.py`."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from runtime import Control, Pipeline
from runtime.preprocessors.named import Canny

# What gives the edges, and what is drawn along them.
PAIRS = (
    ("a teapot, noto style", "a teapot, fluent style"),
    ("a cat face, flat style", "a tiger face, fluent style"),
    ("a red apple, fluent style", "an orange, noto style"),
    ("a pear, twemoji style", "a guitar, fluent style"),
)
SEED = 7


def main(out: Path) -> None:
    """Write a row for each pair: a picture, its edges, what is drawn with them and without."""
    pipeline = Pipeline.load("pictogram", controls="edges")
    rows = []
    for given, prompt in PAIRS:
        picture = pipeline(given, seed=SEED).images[0]
        control = Control(net="edges", image=picture)
        steered = pipeline(prompt, seed=SEED, controls=[control]).images[0]
        plain = pipeline(prompt, seed=SEED).images[0]
        seen = Canny()(np.asarray(picture))
        rows.append(np.concatenate([picture, seen, steered, plain], axis=1))
    left, right = np.split(np.concatenate(rows), 2)
    Image.fromarray(np.concatenate([left, right], axis=1)).save(out)
    print(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "edges.png")
