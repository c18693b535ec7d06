"""Noise on the picture that image-to-image starts from.

A kind and its amount mean what they mean in scikit-image's `random_noise`. What is random are
normal numbers of each picture's own generator, of a stream apart from the one that it draws with,
so a picture's other noise is the same with and without.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.errors import RequestError
from runtime.noise import Noise

__all__ = [
    "GAUSSIAN",
    "SALT_PEPPER",
    "ImageNoise",
    "check_image_noise",
    "noise_seed",
    "noisy_pixels",
]

GAUSSIAN, SALT_PEPPER = KINDS = ("gaussian", "salt-pepper")
_STREAM = 0x9E3779B9  # the golden ratio's bits, as good as any; a seed's low half chooses a stream
_NUMBER = re.compile(r"\d{1,9}(\.\d{0,30})?|\.\d{1,30}", re.ASCII)

Normal = Callable[[tuple[int, ...]], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class ImageNoise:
    """A kind of noise and how much of it, 0 to 1.

    "gaussian": the variance of what is added to each value of 0 to 1
    "salt-pepper": the share of values that become 0 or 1, either equally often
    """

    kind: str
    amount: float

    @classmethod
    def read(cls, text: object) -> Self:
        """Read what a request calls it, such as "gaussian:0.1"; raises RequestError."""
        kind, _, amount = text.partition(":") if isinstance(text, str) else ("", "", "")
        if kind not in KINDS or not _NUMBER.fullmatch(amount) or float(amount) > 1:
            raise RequestError(
                f"image_noise is {str(text)[:100]!r}; give gaussian:VARIANCE or salt-pepper:SHARE, "
                "a number from 0 to 1, such as gaussian:0.1"
            )
        return cls(kind, float(amount))

    def added(self, pixels: NDArray[np.uint8], normal: Normal) -> NDArray[np.uint8]:
        """Return pixels (H, W, 3) with noise, every channel its own, clipped and rounded.

        normal: draws independent numbers of mean 0 and variance 1, of a shape
        """
        if self.kind == GAUSSIAN:
            values = pixels + np.float32(255 * self.amount**0.5) * normal(pixels.shape)
            return values.clip(0, 255).round().astype(np.uint8)
        # A normal number is below this in that share of all draws, and below 0 in half of them.
        below = NormalDist().inv_cdf(self.amount) if 0 < self.amount < 1 else np.inf
        hit = (normal(pixels.shape) < below) & (self.amount > 0)
        white = normal(pixels.shape) < 0
        return np.where(hit, np.where(white, 255, 0), pixels).astype(np.uint8)


def check_image_noise(text: str, strength: float | None, is_painted: bool) -> None:
    """Refuse what is no noise, and one of which strength leaves nothing: RequestError.

    is_painted: whether a part of the image is painted anew, where strength is 1 if it is None
    """
    ImageNoise.read(text)
    if is_painted and strength in (None, 1):
        raise RequestError(
            "image_noise came with what is painted anew from noise alone, at strength 1; give a "
            "strength below 1"
        )


def noise_seed(seed: int) -> int:
    """Return the seed of a picture's image noise, another stream than the picture's own."""
    return seed ^ _STREAM


def noisy_pixels(
    pixels: NDArray[np.uint8],
    image_noise: ImageNoise,
    streams: Sequence[Noise],
    mask: Image.Image | None,
) -> NDArray[np.uint8]:
    """Return an image (H, W, 3) with noise of each picture's own, (B, H, W, 3).

    streams: of each picture's random numbers; mask: of the image, what is black keeps none
    """
    noisy = np.stack([image_noise.added(pixels, stream.normal) for stream in streams])
    if mask is not None:
        noisy = np.where(np.asarray(mask)[..., None] < 128, pixels, noisy)
    return noisy
