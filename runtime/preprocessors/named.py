"""The preprocessors that need no network, by the names that commands and requests call them."""

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.errors import RequestError
from runtime.checks import check_number
from runtime.images.canvas import MAX_SIDE
from runtime.preprocessors import filters
from runtime.preprocessors.canny import canny

__all__ = ["PREPROCESSORS", "Blur", "Canny", "Gray", "Preprocessor", "Scribble", "Tile"]
__all__ += ["check_pixels", "inpaint_hint"]

Pixels = NDArray[np.uint8]

MAX_THRESHOLD = 10_000  # far above any gradient of bytes
MAX_SIGMA = 100.0  # pixels
WHITE, HALF = 255, 128


class Preprocessor(Protocol):
    """Makes a hint of a picture: (H, W, 3) uint8 -> (H, W, 3) uint8."""

    def __call__(self, pixels: Pixels) -> Pixels:
        """Return the hint, as large as the picture. Raises RequestError, BackendError."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Canny:
    """White edges on black, as OpenCV's Canny finds them.

    low, high: thresholds of the gradient; an edge begins above the high one, and ends at the low
    l2_norm: whether the gradient's length is measured, and not the sum of its two parts
    """

    low: float = 100.0
    high: float = 200.0
    l2_norm: bool = False

    def __post_init__(self) -> None:
        """Refuse what is no threshold."""
        for name in ("low", "high"):
            check_number(name, getattr(self, name), Real, 0, MAX_THRESHOLD)

    def __call__(self, pixels: Pixels) -> Pixels:
        """(H, W, 3) uint8 -> (H, W, 3) uint8 of 0 and 255."""
        edges = canny(check_pixels(pixels), self.low, self.high, l2_norm=self.l2_norm)
        return np.repeat(edges[..., None], 3, axis=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scribble:
    """White lines on black, as of a sketch: a difference of two blurs above a threshold.

    threshold: 0 to 255; a lower one draws more
    """

    threshold: int = 32

    def __post_init__(self) -> None:
        """Refuse what is no threshold."""
        check_number("threshold", self.threshold, Integral, 0, WHITE)

    def __call__(self, pixels: Pixels) -> Pixels:
        """(H, W, 3) uint8 -> (H, W, 3) uint8 of 0 and 255."""
        return filters.sketch(check_pixels(pixels), self.threshold)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """The picture without its finest detail; factor: how many times smaller pixels are kept."""

    factor: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what nothing can be divided by."""
        check_number("factor", self.factor, Real, 1, MAX_SIDE)

    def __call__(self, pixels: Pixels) -> Pixels:
        """(H, W, 3) uint8 -> (H, W, 3) uint8."""
        return filters.tile(check_pixels(pixels), self.factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Blur:
    """The picture blurred by a Gaussian; sigma: its standard deviation in pixels."""

    sigma: float = 9.0

    def __post_init__(self) -> None:
        """Refuse what is no blur."""
        check_number("sigma", self.sigma, Real, 0.1, MAX_SIGMA)

    def __call__(self, pixels: Pixels) -> Pixels:
        """(H, W, 3) uint8 -> (H, W, 3) uint8."""
        return filters.blur(check_pixels(pixels), self.sigma)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gray:
    """The picture without colours."""

    def __call__(self, pixels: Pixels) -> Pixels:
        """(H, W, 3) uint8 -> (H, W, 3) uint8, of three equal channels."""
        return filters.gray(check_pixels(pixels))


PREPROCESSORS: Mapping[str, type[Any]] = MappingProxyType(
    {"canny": Canny, "scribble": Scribble, "tile": Tile, "blur": Blur, "gray": Gray}
)


def inpaint_hint(pixels: Pixels, mask: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return what a ControlNet for inpainting is shown: (H, W, 3) float32.

    pixels: (H, W, 3) uint8; mask: (H, W) uint8, from 128 on painted anew
    The picture from 0 to 1, and -1 where it is painted anew (Zhang et al. 2023, arXiv:2302.05543,
    as published for version 1.1). Raises RequestError.
    """
    if mask.dtype != np.uint8 or mask.shape != check_pixels(pixels).shape[:2]:
        raise RequestError(
            f"the mask came as {mask.dtype} {mask.shape} for {pixels.shape[:2]} pixels; give uint8 "
            "of the picture's height and width"
        )
    hint = pixels.astype(np.float32) / np.float32(WHITE)
    hint[mask >= HALF] = -1.0
    return hint


def check_pixels(pixels: Pixels) -> Pixels:
    """Return what is (H, W, 3) uint8, of sides up to 8192; raises RequestError for all else."""
    if (
        pixels.dtype != np.uint8
        or pixels.ndim != 3
        or pixels.shape[2] != 3
        or not all(1 <= side <= MAX_SIDE for side in pixels.shape[:2])
    ):
        raise RequestError(
            f"a picture came as {pixels.dtype} {pixels.shape}; give uint8 of (height, width, 3), "
            f"each side up to {MAX_SIDE}"
        )
    return pixels
