"""A conditional GAN beside the model in pixels: one pass of a generator of the same size.

The generator is a way up of the UNet's own residual blocks from noise, told of the class as those
are of the timestep. Its opponent has spectral norms (Miyato et al. 2018, arXiv:1802.05957), sees
the class by a projection (Miyato & Koyama 2018, arXiv:1802.05637, equation 3), and learns by the
hinge loss.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from engine.errors import RequestError
from export.modules.layers import ResnetBlock, Upsample
from training.adversarial import fixed, hinge
from training.ddpm import as_latents
from training.idx import SIDES, LabelledPictures
from training.loop import Loop, LoopSettings, Losses

NOISE, EMBEDDING = 128, 128
WIDTHS = (112, 96, 32)  # from a quarter of the side on: as many parameters as `training.ddpm` has
PATCH_WIDTHS = (32, 64, 128)  # of the discriminator, from the whole side on
GROUPS, EPS, SLOPE = 8, 1e-5, 0.2
BETAS = (0.0, 0.99)  # no momentum: the opponent moves
BATCH = 256  # pictures drawn at a time
DESCRIPTION = "gan"  # in the file's metadata


class Generator(nn.Module):
    """Noise (B, NOISE) and classes (B,) int64 to pictures (B, 1, side, side) of -1 to 1."""

    def __init__(self, side: int, classes: int, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.side, self.class_count, self.low = side, classes, side // 4
        self.classes = nn.Embedding(classes, EMBEDDING)
        self.first = nn.Linear(NOISE, widths[0] * self.low**2)
        blocks: list[nn.Module] = []
        for inner, outer in zip((widths[0], *widths), widths, strict=False):
            if blocks:
                blocks.append(Upsample(inner))
            blocks += [_block(inner, outer), _block(outer, outer)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.GroupNorm(GROUPS, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Draw (B, 1, side, side) float32; see the class."""
        told = self.classes(labels)
        x = self.first(noise).unflatten(1, (-1, self.low, self.low))
        for block in self.blocks:
            x = block(x, told) if isinstance(block, ResnetBlock) else block(x)
        return torch.tanh(self.conv_out(F.silu(self.norm(x))))


def _block(inner: int, outer: int) -> ResnetBlock:
    return ResnetBlock(inner, outer, groups=GROUPS, eps=EPS, time_channels=EMBEDDING)


class Discriminator(nn.Module):
    """Pictures (B, 1, side, side) and their classes (B,) to logits (B,), high for real ones."""

    def __init__(self, classes: int, widths: Sequence[int] = PATCH_WIDTHS) -> None:
        super().__init__()
        layers: list[nn.Module] = [_normed(nn.Conv2d(1, widths[0], 3, 1, 1))]
        for inner, outer in pairwise(widths):
            layers += [
                nn.LeakyReLU(SLOPE),
                _normed(nn.Conv2d(inner, outer, 4, 2, 1)),
                nn.LeakyReLU(SLOPE),
                _normed(nn.Conv2d(outer, outer, 3, 1, 1)),
            ]
        self.layers = nn.Sequential(*layers, nn.LeakyReLU(SLOPE))
        self.head = _normed(nn.Linear(widths[-1], 1))
        self.classes = _normed(nn.Embedding(classes, widths[-1]))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return logits (B,) float32; see the class."""
        features = self.layers(images).sum((2, 3))
        logits: Tensor = self.head(features)[:, 0] + (self.classes(labels) * features).sum(1)
        return logits


def _normed(layer: nn.Module) -> nn.Module:
    return spectral_norm(layer)


class Opponents(nn.Module):
    """What is trained together: their losses share no parameter, so one optimiser serves both."""

    def __init__(self, side: int, classes: int) -> None:
        super().__init__()
        self.generator = Generator(side, classes)
        self.discriminator = Discriminator(classes)

    def losses(self, noise: Tensor, asked: Tensor, images: Tensor, labels: Tensor) -> Losses:
        """Return both losses; noise (B, NOISE), asked (B,) of the generator, the rest real."""
        drawn = self.generator(noise, asked)
        real = self.discriminator(images, labels)
        told = hinge(real, self.discriminator(drawn.detach(), asked))
        fooled = -fixed(self.discriminator, drawn, asked).mean()
        return {"loss": told + fooled, "hinge": told.detach(), "fooled": fooled.detach()}


def train(
    pictures: LabelledPictures, classes: int, settings: LoopSettings, folder: Path
) -> Generator:
    """Train both on labelled pictures; returns the average of the generator.

    The checkpoint goes to `folder`.
    """
    torch.manual_seed(settings.seed)
    module = Opponents(pictures.images.shape[1], classes)
    loop = Loop(module, settings, folder / "gan.pt")
    rng = np.random.default_rng([settings.seed, loop.step])
    torch.manual_seed(int(rng.integers(2**62)))  # a resumed training draws no noise twice
    device, batch = torch.device(settings.device), settings.batch_size
    images = as_latents(pictures.images).to(device)
    labels = torch.from_numpy(pictures.labels).to(device)

    def losses(step: int) -> Losses:
        chosen = torch.randint(len(images), (batch,), device=device)
        asked = labels[torch.randint(len(labels), (batch,), device=device)]
        noise = torch.randn(batch, NOISE, device=device)
        return module.losses(noise, asked, images[chosen], labels[chosen])

    ema = loop.run(losses, name="gan")
    assert isinstance(ema, Opponents)
    return ema.generator


@torch.no_grad()
def draw(generator: Generator, labels: np.ndarray, seed: int) -> np.ndarray:
    """Draw a picture of each class in labels (n,) int64: (n, side, side) uint8."""
    noise = torch.randn(len(labels), NOISE, generator=torch.Generator().manual_seed(seed))
    parts = zip(noise.split(BATCH), torch.from_numpy(labels).split(BATCH), strict=True)
    drawn = torch.cat([generator(*part)[:, 0] for part in parts])
    return drawn.add(1).mul(127.5).round().byte().numpy()


def write(generator: Generator, path: Path) -> None:
    """Write a generator as safetensors, float32, whole or not at all."""
    description = json.dumps({"side": generator.side, "classes": generator.class_count})
    state = {name: value.cpu().contiguous() for name, value in generator.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    save_file(state, partial, metadata={DESCRIPTION: description})
    partial.replace(path)


def read(path: Path, classes: int) -> Generator:
    """Open what `write` wrote; raises RequestError for another file, or one of other classes."""
    try:
        with safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {})[DESCRIPTION])
            side, count = description["side"], description["classes"]
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise RequestError(
            f"{path} is no generator that `python -m training gan` wrote ({error!r})"
        ) from error
    if type(side) is not int or side not in SIDES or count != classes:
        raise RequestError(
            f"{path} draws {side} pixels and {count} classes, where {classes} are named; give the "
            "--classes that it was trained with"
        )
    generator = Generator(side, count)
    try:
        generator.load_state_dict(state)
    except RuntimeError as error:
        raise RequestError(f"{path} is of a generator of another form; train it anew") from error
    return generator.eval()
