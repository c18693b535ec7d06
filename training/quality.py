"""Does the text steer the picture? Drawn pictures are matched against the originals.

The distance is defined here and was trained on nothing: both pictures are averaged over squares
of 8 x 8 pixels, and the 16 x 16 RGB values are compared by their Euclidean distance.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from runtime import Pipeline
from training.pictograms import STYLES, Pictograms, caption

CELL = 8  # pixels
STEPS = 20
GUIDANCE_SCALE = 5.0
BATCH = 8
TRAINED_SEED = 7
TOPS = (1, 5)


def evaluate(model: str, data: Pictograms) -> dict[str, Any]:
    """Draw every held-out pair and as many trained ones; return the shares matched.

    A picture is matched among all originals of its own kind (held out or trained); rank 1 means
    that no other original is nearer than the one it was asked for.
    """
    pipeline = Pipeline.load(model)
    held_out = np.argwhere(data.held_out)
    trained = np.argwhere(~data.held_out)
    chosen = np.random.default_rng(TRAINED_SEED).permutation(len(trained))[: len(held_out)]
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE_SCALE, "sampler": "ddim"}
    return {
        "settings": settings,
        "held_out": _shares(pipeline, data, held_out),
        "trained": _shares(pipeline, data, trained[np.sort(chosen)]),
    }


def features(images: np.ndarray) -> np.ndarray:
    """Average (n, H, W, 3) uint8 pictures over cells: (n, H / 8 · W / 8 · 3) float64, 0 to 1."""
    count, height, width, channels = images.shape
    cells = images.reshape(count, height // CELL, CELL, width // CELL, CELL, channels)
    averages: np.ndarray = cells.mean(axis=(2, 4)).reshape(count, -1) / 255.0
    return averages


def ranks(drawn: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """Return the rank (n,), from 1, of the i-th original in the distances of the i-th picture.

    drawn, originals: (n, H, W, 3) uint8.
    """
    a, b = features(drawn), features(originals)
    distances = np.linalg.norm(a[:, None] - b[None], axis=2)
    own = np.diagonal(distances)[:, None]
    places: np.ndarray = (distances < own).sum(axis=1) + 1
    return places


def _shares(pipeline: Pipeline, data: Pictograms, pairs: np.ndarray) -> dict[str, Any]:
    originals = data.images[pairs[:, 0], pairs[:, 1]]
    captions = [caption(data.names[subject], STYLES[style]) for subject, style in pairs]
    places = ranks(np.stack(list(_draw(pipeline, captions))), originals)
    shares = {f"top_{k}": float((places <= k).mean()) for k in TOPS}
    return {"pictures": len(pairs), **shares}


def _draw(pipeline: Pipeline, captions: list[str]) -> Iterator[np.ndarray]:
    for start in range(0, len(captions), BATCH):
        result = pipeline(
            captions[start : start + BATCH],
            seed=start,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE_SCALE,
        )
        yield from map(np.asarray, result.images)
