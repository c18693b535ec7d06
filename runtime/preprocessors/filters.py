"""Filters of pixels: Gaussian blur, gray, smaller pixels, the lines of a sketch."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["blur", "gaussian", "gray", "sketch", "tile"]

Pixels = NDArray[np.uint8]

WHITE = 255
BYTES_REACH, FLOATS_REACH = 3, 4  # standard deviations to each side, as in OpenCV
KERNEL_SUM = 256  # of the kernel for bytes
# Of the difference of two blurs (XDoG), as in the ControlNet extension of Automatic1111's web UI.
FINE, COARSE = 0.5, 5.0


def gaussian(pixels: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    """Blur (H, W, 3) float32; edges are mirrored, without repeating the outermost pixel.

    sigma: standard deviation in pixels, above 0
    """
    kernel = _kernel(sigma, FLOATS_REACH).astype(np.float32)
    return _convolved(_convolved(pixels, kernel, 0), kernel, 1)


def blur(pixels: Pixels, sigma: float) -> Pixels:
    """Blur (H, W, 3) uint8 by a Gaussian, with OpenCV's kernel of whole numbers, 256 in all."""
    kernel, error = np.zeros(0), 0.0
    exact = _kernel(sigma, BYTES_REACH) * KERNEL_SUM
    for weight in exact[: len(exact) // 2]:  # what rounding leaves goes to the next weight
        kernel = np.append(kernel, np.rint(weight + error))
        error += weight - kernel[-1]
    whole = np.concatenate([kernel, [KERNEL_SUM - 2 * kernel.sum()], kernel[::-1]])
    weights = whole.astype(np.int32)
    blurred = _convolved(_convolved(pixels.astype(np.int32), weights, 1), weights, 0)
    half = KERNEL_SUM**2 // 2
    return ((blurred + half) // KERNEL_SUM**2).clip(0, WHITE).astype(np.uint8)


def _kernel(sigma: float, reach: int) -> NDArray[np.float64]:
    """Return a Gaussian whose sum is 1, so many standard deviations to each side."""
    radius = (round(sigma * reach * 2 + 1) | 1) // 2
    kernel = np.exp(-np.square(np.arange(-radius, radius + 1)) / (2 * sigma * sigma))
    normed: NDArray[np.float64] = kernel / kernel.sum()
    return normed


def _convolved(pixels: NDArray[Any], kernel: NDArray[Any], axis: int) -> NDArray[Any]:
    """Convolve (H, W, 3) along one axis; of a kernel's numbers, which are symmetric."""
    radius, size = len(kernel) // 2, pixels.shape[axis]
    around = [(radius, radius) if each == axis else (0, 0) for each in range(3)]
    padded = np.moveaxis(np.pad(pixels, around, "reflect"), axis, 0)
    found = np.zeros((size, *padded.shape[1:]), pixels.dtype)
    for at, weight in enumerate(kernel):
        found += weight * padded[at : at + size]
    return np.moveaxis(found, 0, axis)


def gray(pixels: Pixels) -> Pixels:
    """Return the luma of (H, W, 3) uint8 in all three channels."""
    luma = np.asarray(Image.fromarray(pixels).convert("L"))
    return np.repeat(luma[..., None], 3, axis=2)


def tile(pixels: Pixels, factor: float) -> Pixels:
    """Take the detail out of (H, W, 3) uint8: it is shrunk so many times and enlarged again."""
    height, width = pixels.shape[:2]
    image = Image.fromarray(pixels)
    small = (max(1, round(width / factor)), max(1, round(height / factor)))
    if small == image.size:
        return pixels
    shrunk = image.resize(small, Image.Resampling.BOX)
    return np.array(shrunk.resize((width, height), Image.Resampling.BICUBIC))


def sketch(pixels: Pixels, threshold: int) -> Pixels:
    """Draw the lines of (H, W, 3) uint8 in white: where a fine blur is below a coarse one.

    threshold: 0 to 255, of twice the difference in the channel where it is least
    """
    floats = pixels.astype(np.float32)
    fine, coarse = (gaussian(floats, sigma) for sigma in (FINE, COARSE))
    difference = (WHITE - (coarse - fine).min(axis=2)).clip(0, WHITE).astype(np.uint8)
    is_line = 2 * (WHITE - difference.astype(np.int32)) > threshold
    return np.repeat((WHITE * is_line).astype(np.uint8)[..., None], 3, axis=2)
