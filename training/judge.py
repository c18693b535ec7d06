"""Are drawn pictures of the class that was asked for, and as varied as real ones?

A small network that learned the classes from the real training split is the judge. It counts how
many pictures it takes for what they were asked for, and compares how its features are spread: the
Fréchet distance (Heusel et al. 2017, arXiv:1706.08500, equation 6), in its features in place of
Inception's. Real pictures of the test split beside those of the training split are the floor.
"""

from collections.abc import Iterator, Sequence
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


def evaluate(
    pipeline: Pipeline,
    judge: Judge,
    train_split: LabelledPictures,
    test_split: LabelledPictures,
    classes: Sequence[str],
    *,
    seed: int = 0,
    **drawing: Any,
) -> dict[str, Any]:
    """Draw a picture for each one of the test split, of its class; return the judge's findings.

    drawing: fields of `runtime.Request`, in the place of those in DRAWING
    """
    how = {**DRAWING, **drawing}
    labels = test_split.labels
    drawn = np.stack(list(draw(pipeline, [classes[label] for label in labels], seed, how)))
    seen, features = look(judge, drawn)
    seen_real, real = look(judge, test_split.images)
    _, trained_on = look(judge, train_split.images)
    floor = frechet_distance(real, trained_on)
    distance = frechet_distance(features, trained_on)
    return {
        "pictures": len(labels),
        "drawing": {**how, "seed": seed},
        "accuracy_drawn": float((seen == labels).mean()),
        "accuracy_real_test": float((seen_real == labels).mean()),
        "frechet_drawn": distance,
        "frechet_real_test": floor,
        "times_the_floor": distance / floor,
    }


def draw(
    pipeline: Pipeline, prompts: Sequence[str], seed: int, how: dict[str, Any]
) -> Iterator[np.ndarray]:
    """Draw each prompt with the runtime; yields gray pictures, (side, side) uint8."""
    for start in range(0, len(prompts), BATCH):
        result = pipeline(list(prompts[start : start + BATCH]), seed=seed + start, **how)
        for image in result.images:
            yield np.asarray(image)[..., 0]
