"""Does the text steer the picture? Drawn pictures are matched against the originals.

The distance is defined here and was trained on nothing: both pictures are averaged over squares
of 8 x 8 pixels, and the 16 x 16 RGB values are compared by their Euclidean distance.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.model import find_model
from export.modules.autoencoder import Autoencoder
from runtime import Pipeline
from training import autoencoder, ship
from training.pictograms import STYLES, Pictograms, caption, unseen_synonyms

CELL = 8  # pixels
STEPS, FEW_STEPS = 20, 4
GUIDANCE_SCALE = 5.0
BATCH = 8
SEEDS = (0, 1, 2, 3)
TRAINED_SEED = 7
TOPS = (1, 5)
SYNONYM_STYLE = 0  # fluent, which has most subjects of a design of its own


def evaluate(
    model: str,
    data: Pictograms,
    seeds: Sequence[int] = SEEDS,
    *,
    few_steps: Path | None = None,
) -> dict[str, Any]:
    """Draw every held-out pair and as many trained ones; return means over the seeds.

    A picture is matched among all originals of its own kind (held out or trained); rank 1 means
    that no other original is nearer than the one it was asked for. Sharpness is the mean
    difference of neighbours in the held-out pairs drawn, beside that of their originals.

    few_steps: a LoRA of `training.distillation`, to draw in few steps with and without guidance
    """
    pipeline = Pipeline.load(model)
    held_out = np.argwhere(data.held_out)
    trained = np.argwhere(~data.held_out & data.everyday[:, None])
    chosen = np.random.default_rng(TRAINED_SEED).permutation(len(trained))[: len(held_out)]
    trained = trained[np.sort(chosen)]
    originals, of_trained = (data.images[pairs[:, 0], pairs[:, 1]] for pairs in (held_out, trained))

    def draw(pairs: np.ndarray, steps: int, scale: float = GUIDANCE_SCALE) -> list[np.ndarray]:
        texts = [caption(data.names[subject], STYLES[style]) for subject, style in pairs]
        return [np.stack(list(_draw(pipeline, texts, seed, steps, scale))) for seed in seeds]

    drawn, of_trained_drawn = draw(held_out, STEPS), draw(trained, STEPS)
    if few_steps is not None:
        pipeline.set_loras([few_steps])
    few = draw(held_out, FEW_STEPS, GUIDANCE_SCALE if few_steps is None else 1.0)
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE_SCALE, "sampler": "ddim"}
    return {
        "settings": settings,
        "seeds": list(seeds),
        "held_out": _shares(drawn, originals),
        "trained": _shares(of_trained_drawn, of_trained),
        "few_steps": _shares(few, originals),
        "few_steps_lora": few_steps is not None,
        "copied": copied(data, held_out),
        "sharpness": sharpness(np.concatenate(drawn)) / sharpness(originals),
        "autoencoder_psnr": _reconstruction(model, originals),
    }


def synonyms(model: str, data: Pictograms, seeds: Sequence[int] = SEEDS) -> dict[str, Any]:
    """Ask for subjects by words that no caption had, and by their names; return the shares.

    The model is to be trained with `--unseen-synonyms`. A picture is matched among the originals
    of all these subjects in one style, of pairs that were not held out.
    """
    words = unseen_synonyms(data)
    subjects = [s for s in words if not data.held_out[s, SYNONYM_STYLE]]
    originals = data.images[subjects, SYNONYM_STYLE]
    pipeline, style = Pipeline.load(model), STYLES[SYNONYM_STYLE]
    texts = {"synonyms": [words[s] for s in subjects], "names": [data.names[s] for s in subjects]}
    found: dict[str, Any] = {
        kind: _shares(
            [
                np.stack(list(_draw(pipeline, [caption(word, style) for word in asked], seed)))
                for seed in seeds
            ],
            originals,
        )
        for kind, asked in texts.items()
    }
    return {**found, "chance_top_1": 1 / len(subjects), "seeds": list(seeds)}


def figures(report: dict[str, Any]) -> dict[str, float]:
    """Return what `evaluate` found as one figure each."""
    return {
        "held_out_top1": report["held_out"]["top_1"],
        "held_out_top5": report["held_out"]["top_5"],
        "trained_top1": report["trained"]["top_1"],
        "autoencoder_psnr": report["autoencoder_psnr"],
        "sharpness": report["sharpness"],
        "four_step_top1": report["few_steps"]["top_1"],
    }


def copied(data: Pictograms, pairs: np.ndarray) -> dict[str, dict[str, float]]:
    """Match the originals of the same subjects in another style: the best other, for each style.

    That is what can be known of a held-out picture: its subject in the styles that were trained.
    pairs: (n, 2) int64, subject and style
    """
    originals = data.images[pairs[:, 0], pairs[:, 1]]
    places = np.stack(
        [ranks(data.images[pairs[:, 0], style], originals) for style in range(len(STYLES))]
    )
    found = {}
    for style, name in enumerate(STYLES):
        own = np.delete(places[:, pairs[:, 1] == style], style, axis=0)
        found[name] = {f"top_{k}": float((own <= k).mean(axis=1).max()) for k in TOPS}
    found["all"] = {
        f"top_{k}": float(
            np.average(
                [found[name][f"top_{k}"] for name in STYLES],
                weights=np.bincount(pairs[:, 1], minlength=len(STYLES)),
            )
        )
        for k in TOPS
    }
    return found


def sharpness(images: np.ndarray) -> float:
    """Return the mean absolute difference of neighbours in (n, H, W, 3) uint8 pictures."""
    return float(sum(np.abs(np.diff(images.astype(np.int16), axis=axis)).mean() for axis in (1, 2)))


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


def _reconstruction(model: str, images: np.ndarray) -> float:
    """Return the PSNR in dB of pictures that the model's autoencoder encodes and decodes."""
    module = Autoencoder(autoencoder.CONFIG).eval()
    _, state = ship.read_model(find_model(model))
    module.load_state_dict(state)
    return autoencoder.psnr(images, autoencoder.reconstruct(module, images))


def _shares(drawn: Sequence[np.ndarray], originals: np.ndarray) -> dict[str, Any]:
    places = np.stack([ranks(images, originals) for images in drawn])
    shares = {f"top_{k}": float((places <= k).mean()) for k in TOPS}
    return {"pictures": len(originals), **shares}


def _draw(
    pipeline: Pipeline,
    captions: Sequence[str],
    seed: int,
    steps: int = STEPS,
    scale: float = GUIDANCE_SCALE,
) -> Iterator[np.ndarray]:
    for start in range(0, len(captions), BATCH):
        result = pipeline(
            captions[start : start + BATCH],
            seed=seed * len(captions) + start,
            num_inference_steps=steps,
            guidance_scale=scale,
            sampler="ddim",
        )
        yield from map(np.asarray, result.images)
