"""Are drawn pictures of the class that was asked for, and as varied as real ones?

A small network that learned the classes from the real training split is the judge. It counts how
many pictures it takes for what they were asked for, and compares how its features are spread: the
Fréchet distance (Heusel et al. 2017, arXiv:1706.08500, equation 6), in its features in place of
Inception's. Real pictures of the test split beside those of the training split are the floor. How
far apart pictures of one class are tells of a model that draws the same over and over.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime import Pipeline
from training.ddpm import as_latents
from training.idx import LabelledPictures
from training.loop import Loop, LoopSettings, Losses

FEATURES = 64
SHIFT = 2  # pixels by which pictures are moved in training
BATCH = 64
SHOWN = 16  # pictures of a class
SETTINGS = LoopSettings(steps=800, batch_size=32, learning_rate=2e-3, warmup_steps=50)
DRAWING = {"num_inference_steps": 50, "guidance_scale": 1.0, "sampler": "ddpm"}


class Judge(nn.Module):
    """Two convolutions, two layers: pictures (B, 1, side, side) to logits (B, classes)."""

    def __init__(self, side: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * (side // 4) ** 2, FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of the classes (B, classes) of images (B, 1, side, side), float32."""
        logits: Tensor = self.head(self.body(images))
        return logits


def train(pictures: LabelledPictures, classes: int, settings: LoopSettings, folder: Path) -> Judge:
    """Train a judge on real pictures, each moved a little."""
    torch.manual_seed(settings.seed)
    side = pictures.images.shape[1]
    judge = Judge(side, classes)
    loop = Loop(judge, settings, folder / "judge.pt")
    torch.manual_seed(settings.seed + loop.step)
    device = torch.device(settings.device)
    padded = F.pad(as_latents(pictures.images), [SHIFT] * 4, value=-1.0).to(device)
    labels = torch.from_numpy(pictures.labels).to(device)

    def losses(step: int) -> Losses:
        chosen = torch.randint(len(padded), (settings.batch_size,), device=device)
        top, left = (int(n) for n in torch.randint(2 * SHIFT + 1, (2,)))
        moved = padded[chosen, :, top : top + side, left : left + side]
        return {"loss": F.cross_entropy(judge(moved), labels[chosen])}

    ema = loop.run(losses, name="judge")
    assert isinstance(ema, Judge)
    return ema.cpu()


@torch.no_grad()
def look(judge: Judge, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the classes that the judge sees, (n,) int64, and its features, (n, F) float64."""
    features = torch.cat([judge.body(part) for part in as_latents(images).split(512)])
    return judge.head(features).argmax(1).numpy(), features.double().numpy()


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the squared distance of two normal distributions with these samples' moments.

    a, b: (n, F) float64. The trace of the root of the covariances' product is the sum of the roots
    of its eigenvalues, which are those of a symmetric matrix and not below 0.
    """
    (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * shared)


def diversity(values: np.ndarray, labels: np.ndarray) -> float:
    """Return the distance of two different pictures of one class, the mean over pairs and classes.

    values: (n, F) float64, of pictures; labels: (n,) int64, of which classes of one picture have
    no pairs. Returns 0.0 where there is no pair.
    """
    means = []
    for label in np.unique(labels):
        own = values[labels == label]
        squares = (own**2).sum(1)
        apart = np.sqrt((squares[:, None] + squares - 2 * own @ own.T).clip(0))
        np.fill_diagonal(apart, 0)  # rounding leaves something there
        if len(own) > 1:
            means.append(apart.sum() / (len(own) * (len(own) - 1)))
    return float(np.mean(means)) if means else 0.0


def evaluate(
    judge: Judge,
    drawn: np.ndarray,
    train_split: LabelledPictures,
    test_split: LabelledPictures,
) -> dict[str, Any]:
    """Return what the judge finds of pictures drawn for the test split's classes, one for each.

    drawn: (n, side, side) uint8. A diversity is in the judge's features, and in pixels of 0 to 1;
    `diversity_of_real` are its shares of the test split's own.
    """
    labels = test_split.labels
    seen, features = look(judge, drawn)
    seen_real, real = look(judge, test_split.images)
    _, trained_on = look(judge, train_split.images)
    floor = frechet_distance(real, trained_on)
    distance = frechet_distance(features, trained_on)
    spread = {
        "features": (diversity(features, labels), diversity(real, labels)),
        "pixels": (diversity(_flat(drawn), labels), diversity(_flat(test_split.images), labels)),
    }
    return {
        "pictures": len(labels),
        "accuracy_drawn": float((seen == labels).mean()),
        "accuracy_real_test": float((seen_real == labels).mean()),
        "frechet_drawn": distance,
        "frechet_real_test": floor,
        "times_the_floor": distance / floor,
        "diversity_drawn": {name: values[0] for name, values in spread.items()},
        "diversity_real_test": {name: values[1] for name, values in spread.items()},
        "diversity_of_real": {name: a / b if b else None for name, (a, b) in spread.items()},
    }


def _flat(images: np.ndarray) -> np.ndarray:
    """Return the pixels of pictures (n, side, side) uint8 as (n, side · side), 0 to 1."""
    flat: np.ndarray = images.reshape(len(images), -1) / 255.0
    return flat


def draw(pipeline: Pipeline, prompts: Sequence[str], seed: int, **how: Any) -> np.ndarray:
    """Draw each prompt with the runtime: gray pictures, (n, side, side) uint8.

    how: fields of `runtime.Request`, in the place of those in DRAWING
    """
    drawn: list[np.ndarray] = []
    for start in range(0, len(prompts), BATCH):
        chosen = list(prompts[start : start + BATCH])
        result = pipeline(chosen, seed=seed + start, **{**DRAWING, **how})
        drawn += [np.asarray(image)[..., 0] for image in result.images]
    return np.stack(drawn)


def grid(images: np.ndarray, labels: np.ndarray, count: int = SHOWN) -> list[np.ndarray]:
    """Return rows of the first `count` pictures of each class, (count, side, side, 3) uint8.

    images: (n, side, side) uint8; a row that has fewer is filled with black.
    """
    rows = []
    for label in np.unique(labels):
        row = np.zeros((count, *images.shape[1:]), np.uint8)
        own = images[labels == label][:count]
        row[: len(own)] = own
        rows.append(np.repeat(row[..., None], 3, axis=3))
    return rows
