"""How different two pictures look to a network: the distance of what it sees on the way.

In the loss it is a small classifier of subject and style that is trained here; the judge is another
network (`training.mobilenet`), so that no picture is judged by what it was made to please.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.loop import Loop, LoopSettings, Losses, autocast, draw

WIDTHS = (24, 48, 96, 160)
SMALLEST = 0.5  # of a side, of the squares that the classifier is shown
NOISE = 0.05  # standard deviation, of pixels of -1 to 1
BATCH = 32

Network = Callable[[Tensor], Sequence[Tensor]]


class Classifier(nn.Module):
    """Four convolutions of stride 2; `forward` returns what each of them sees."""

    def __init__(self, subjects: int, styles: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv2d(inner, outer, 3, stride=2, padding=1)
            for inner, outer in zip((3, *WIDTHS), WIDTHS, strict=False)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in WIDTHS)
        self.subjects = nn.Linear(WIDTHS[-1], subjects)
        self.styles = nn.Linear(WIDTHS[-1], styles)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the features of images (B, 3, H, W) of -1 to 1: (B, C, h, w) of each size."""
        seen = [images]
        for layer, norm in zip(self.layers, self.norms, strict=True):
            seen.append(F.silu(norm(layer(seen[-1]))))
        return seen[1:]

    def logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of subjects (B, subjects) and of styles (B, styles)."""
        pooled = self(images)[-1].amax((2, 3))
        return self.subjects(pooled), self.styles(pooled)


def distance(network: Network, a: Tensor, b: Tensor) -> Tensor:
    """Return the mean distance of images (B, 3, H, W) of -1 to 1, 0 for equal ones.

    It is the sum over the features' sizes of the squared difference of what is seen at a place,
    each scaled to length 1: LPIPS without its learned weights (Zhang et al. 2018,
    arXiv:1801.03924).
    """
    total = a.new_zeros(())
    for of_a, of_b in zip(network(a), network(b), strict=True):
        difference = F.normalize(of_a.float()) - F.normalize(of_b.float())
        total = total + difference.square().sum(1).mean()
    return total


@torch.no_grad()
def mean_distance(network: Network, a: np.ndarray, b: np.ndarray) -> float:
    """Return the distance of uint8 images (n, H, W, 3), the mean over all."""
    pairs = zip(_pixels(a).split(BATCH), _pixels(b).split(BATCH), strict=True)
    return sum(float(distance(network, x, y)) * len(x) for x, y in pairs) / len(a)


def train(
    images: np.ndarray,
    labels: np.ndarray,
    settings: LoopSettings,
    folder: Path,
    draws: np.ndarray | None = None,
) -> Classifier:
    """Train a classifier on images (n, H, W, 3) uint8; its checkpoint goes to `folder`.

    labels: (n, 2) int64, subject and style; draws: as `training.autoencoder.train` has them
    """
    torch.manual_seed(settings.seed)
    device = torch.device(settings.device)
    subjects, styles = (int(count) for count in labels.max(axis=0) + 1)
    classifier = Classifier(subjects, styles)
    loop = Loop(classifier, settings, folder / "classifier.pt")
    torch.manual_seed(settings.seed + loop.step)
    pixels, wanted = torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device)
    weights = None if draws is None else torch.from_numpy(draws).to(device)

    def losses(step: int) -> Losses:
        chosen = draw(len(pixels), settings.batch_size, weights, device)
        shown = _shown(pixels[chosen].permute(0, 3, 1, 2).float() / 127.5 - 1)
        with autocast(settings.device):
            of_subjects, of_styles = classifier.logits(shown)
        subject = F.cross_entropy(of_subjects.float(), wanted[chosen, 0])
        return {"loss": subject + F.cross_entropy(of_styles.float(), wanted[chosen, 1])}

    ema = loop.run(losses, name="classifier")
    assert isinstance(ema, Classifier)
    return ema


def _shown(images: Tensor) -> Tensor:
    """Cut a square out of each image, mirrored half of the time, with noise on it: same shape."""
    count, device = len(images), images.device
    size = SMALLEST + (1 - SMALLEST) * torch.rand(count, device=device)
    mirror = 1 - 2 * torch.randint(2, (count,), device=device)
    theta = torch.zeros(count, 2, 3, device=device)
    theta[:, 0, 0], theta[:, 1, 1] = size * mirror, size
    theta[:, :, 2] = (1 - size)[:, None] * (2 * torch.rand(count, 2, device=device) - 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    cut = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return cut + NOISE * torch.randn_like(cut)


def _pixels(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
