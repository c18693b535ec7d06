"""Upscaling between two passes ("hires fix"): latents or pixels become larger, then are refined.

Latents are resampled as by torch's `interpolate` with `align_corners=False`: separably, with one
matrix for the rows and one for the columns. The cubic kernel is that of Keys (1981), equation 4,
with a = -0.75, and a = -0.5 where torch smooths against aliasing.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from numbers import Integral, Real
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.errors import RequestError, choice
from runtime.checks import check_given, check_number

__all__ = [
    "MODES",
    "PIXELS",
    "UPSCALERS",
    "Hires",
    "UpscalerChoice",
    "is_trained",
    "parse_upscaler",
    "upscale_latents",
    "upscale_pixels",
]

Kernel = Callable[[NDArray[np.float64]], NDArray[np.float64]]

MODES = {  # by Automatic1111's names
    "latent": "bilinear",
    "latent (antialiased)": "bilinear-antialiased",
    "latent (bicubic)": "bicubic",
    "latent (bicubic antialiased)": "bicubic-antialiased",
    "latent (nearest)": "nearest",
    "latent (nearest-exact)": "nearest-exact",
}
PIXELS = "lanczos"
UPSCALERS = (PIXELS, *MODES.values())  # of hires fix; the first enlarges pixels, the rest latents
HIRES_STRENGTH = 0.6
MAX_FACTOR = 16  # of a trained upscaler, used several times
MAX_STEPS = 10**6  # the model's schedule knows how many there may be


@dataclass(frozen=True, slots=True, kw_only=True)
class UpscalerChoice:
    """An upscaler's file, and how many times larger the sides become; None is its own scale."""

    path: Path
    factor: float | None = None

    def __post_init__(self) -> None:
        """Refuse factors that make a picture smaller, or larger than any."""
        if self.factor is not None:
            check_number("the factor of an upscaler", self.factor, Real, 1, MAX_FACTOR)


def parse_upscaler(text: str) -> UpscalerChoice:
    """Read `FILE` or `FILE:FACTOR`; a colon in FILE is its own unless a number follows.

    Raises RequestError.
    """
    head, colon, last = text.rpartition(":")
    try:
        factor = float(last) if colon else None
    except ValueError:
        head, factor = text, None
    path = head if colon else text
    if not path.strip() or "\0" in path:
        raise RequestError(f"{text!r} names no upscaler; give FILE or FILE:FACTOR")
    return UpscalerChoice(path=Path(path), factor=factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hires:
    """A second run over the finished latents, enlarged: "hires fix".

    scale: of both sides, above 1 and up to 8; the sides are rounded to what the model takes
    strength: how far the second run goes from the enlarged picture, above 0 and up to 1
    num_inference_steps: of the second run before `strength` shortens it; None takes the first's
    upscaler: one of `UPSCALERS`, of which "lanczos" enlarges the decoded pixels and the others the
        latents; or the path of a trained upscaler's file, which enlarges the pixels
    """

    scale: float = 2.0
    strength: float = HIRES_STRENGTH
    num_inference_steps: int | None = None
    upscaler: str = PIXELS

    def __post_init__(self) -> None:
        """Fill in defaults, and refuse what no model could fulfil."""
        for each in fields(self):
            if getattr(self, each.name) is None:
                object.__setattr__(self, each.name, each.default)
        check_number("hires.scale", self.scale, Real, 1, 8)
        check_number("hires.strength", self.strength, Real, 0, 1)
        check_given("hires.num_inference_steps", self.num_inference_steps, Integral, 1, MAX_STEPS)
        if self.upscaler not in UPSCALERS and not _is_file(self.upscaler):
            raise RequestError(
                f"hires.upscaler is {self.upscaler!r}; "
                + choice(self.upscaler, UPSCALERS, or_else=", or give the path of a file")
            )


def is_trained(upscaler: str) -> bool:
    """Tell whether what a run is enlarged by is an upscaler's file; "" is none."""
    return upscaler not in ("", *UPSCALERS)


def _is_file(path: object) -> bool:
    try:
        return isinstance(path, str) and Path(path).is_file()
    except (OSError, ValueError):  # a name that no system takes
        return False


def upscale_latents(
    latents: NDArray[np.float32], height: int, width: int, mode: str = "bilinear"
) -> NDArray[np.float32]:
    """Resample latents.

    Args:
        latents: (B, C, h, w) float32.
        height, width: of the result, in cells of the latents, not pixels.
        mode: a value of `MODES`, or the name that it has in Automatic1111, in any case.

    Returns:
        (B, C, height, width) float32

    Raises:
        RequestError: there is no such mode.
    """
    chosen = MODES.get(mode.lower(), mode.lower())
    if chosen not in MODES.values():
        raise RequestError(f"latents are not upscaled by {mode!r}; {choice(mode, MODES.values())}")
    rows = _matrix(latents.shape[2], height, chosen)
    columns = _matrix(latents.shape[3], width, chosen)
    resampled: NDArray[np.float32] = (rows @ latents @ columns.T).astype(np.float32)
    return resampled


def upscale_pixels(image: Image.Image, *, height: int, width: int) -> Image.Image:
    """Resize a picture to (height, width) pixels with Lanczos' kernel."""
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _matrix(old: int, new: int, mode: str) -> NDArray[np.float64]:
    """Return the weights (new, old) of the old places in each new one."""
    if mode.startswith("nearest"):
        return np.eye(old)[_nearest(old, new, 0.5 if mode == "nearest-exact" else 0.0)]
    centers = (np.arange(new)[:, None] + 0.5) * old / new - 0.5
    smooth = mode.endswith("-antialiased")
    cubic = partial(_cubic, a=-0.5 if smooth else -0.75)
    kernel: Kernel = cubic if mode.startswith("bicubic") else _triangle
    if smooth:
        weights: NDArray[np.float64] = kernel((np.arange(old) - centers) / max(old / new, 1))
        weights /= weights.sum(axis=1, keepdims=True)
        return weights
    taps = np.floor(centers) + np.arange(-1, 3)
    matrix = np.zeros((new, old))
    within = taps.clip(0, old - 1).astype(int)  # beyond the edge, its own value goes on
    np.add.at(matrix, (np.arange(new)[:, None], within), kernel(taps - centers))
    return matrix


def _nearest(old: int, new: int, shift: float) -> NDArray[np.int64]:
    """Return the old place of each new one, with torch's float32 scale: it decides ties."""
    scaled = (np.arange(new) + shift) * float(np.float32(old) / np.float32(new))
    return np.floor(scaled.astype(np.float32)).astype(np.int64).clip(0, old - 1)


def _triangle(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    return (1 - abs(distance)).clip(0, None)


def _cubic(distance: NDArray[np.float64], a: float) -> NDArray[np.float64]:
    d = abs(distance)
    near = ((a + 2) * d - (a + 3)) * d**2 + 1
    far = a * (((d - 5) * d + 8) * d - 4)
    return np.where(d < 1, near, np.where(d < 2, far, 0.0))
