"""Pictures enlarged by diffusion: what the low picture lacks is drawn out of noise.

Legend
    low     the low picture enlarged by Lanczos' kernel, with noise of the level that is asked for
    x       what the picture has beyond low, times RESIDUAL_SCALE, on its way from noise (DDIM)
    cells   a picture of -1 to 1 on the low picture's grid, (3 · scale², h, w): each cell's pixels
            are its channels, as torch's pixel_unshuffle lays them

Noise is torch's, drawn for low first and then for x, as diffusers' StableDiffusionUpscalePipeline
does. Every call of the UNet is made in tiles that overlap, whose outputs fade into each other
before a step is made of them (Bar-Tal et al. 2023, arXiv:2302.08113, equation 5).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.backends.base import Engine
from engine.configs.upsampler import (
    LOW_RES_SCHEDULER,
    MAX_NOISE_LEVEL,
    RESIDUAL_SCALE,
    SCHEDULER,
    STEPS,
    UpsamplerConfig,
)
from runtime.checks import check_number
from runtime.images.overlaps import Tiles, cuts_of, windows_of
from runtime.noise import MAX_SEED, TorchNoise
from runtime.samplers import program
from runtime.samplers.noise_schedule import NoiseSchedule

__all__ = ["Sampling", "upsampled"]

MAX_STEPS = 1000  # the timesteps of its training
HALF = np.float32(127.5)  # bytes for a number of -1 to 1

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a diffusion upsampler draws.

    num_inference_steps: calls of its UNet, 1 to 1000
    noise_level: of the noise that is added to the low picture, 0 to 100, which hides its faults
    seed: of all noise
    """

    num_inference_steps: int = STEPS
    noise_level: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what no upsampler could do."""
        check_number("num_inference_steps", self.num_inference_steps, Integral, 1, MAX_STEPS)
        check_number("noise_level", self.noise_level, Integral, 0, MAX_NOISE_LEVEL)
        check_number("seed", self.seed, Integral, 0, MAX_SEED)


def upsampled(
    engine: Engine,
    config: UpsamplerConfig,
    pixels: NDArray[np.uint8],
    sampling: Sampling,
    *,
    tile: int,
) -> Tiles[NDArray[np.uint8]]:
    """Enlarge a picture (H, W, 3) once: (scale · H, scale · W, 3), tile by tile.

    engine: of the upsampler's graph; tile: side of the tiles of a call, in pixels that go in
    Raises BackendError.
    """
    (height, width), scale = pixels.shape[:2], config.scale
    padding = [(0, -side % config.multiple) for side in (height, width)]
    padded = np.pad(pixels, [*padding, (0, 0)], mode="reflect")
    rng = TorchNoise(sampling.seed)
    low = noised(enlarged_cells(padded, scale), sampling.noise_level, rng)
    x = rng.normal(low.shape)
    steps = program("ddim", NoiseSchedule.from_config(SCHEDULER), sampling.num_inference_steps)
    unet = _TiledUNet.over(engine, x.shape, tile, config.multiple)
    total = len(steps.timesteps) * unet.count
    calls = zip(steps.timesteps, steps.matrices.astype(np.float32), strict=True)
    for call, (timestep, matrix) in enumerate(calls):
        times = np.array([timestep, sampling.noise_level], np.float32)
        kept, taken, _ = matrix[0]  # DDIM remembers nothing and draws no noise
        out = np.zeros_like(x)
        for done in unet.add(out, np.concatenate([x, low]), times):
            yield call * unet.count + done, total
        x = kept * x + taken * out
    picture = from_cells(low + x / np.float32(RESIDUAL_SCALE), scale)
    return picture[: scale * height, : scale * width]


def enlarged_cells(pixels: NDArray[np.uint8], scale: int) -> Array:
    """Enlarge a picture (H, W, 3) by Lanczos' kernel; returns its cells (3 · scale², H, W)."""
    height, width = pixels.shape[:2]
    size = (scale * width, scale * height)
    larger = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
    parted = larger.reshape(height, scale, width, scale, 3).transpose(4, 1, 3, 0, 2)
    cells: Array = parted.reshape(-1, height, width).astype(np.float32) / HALF - np.float32(1)
    return cells


def from_cells(cells: Array, scale: int) -> NDArray[np.uint8]:
    """Lay cells (3 · scale², h, w) out as a picture (scale · h, scale · w, 3)."""
    height, width = cells.shape[1:]
    parted = cells.reshape(3, scale, scale, height, width).transpose(3, 1, 4, 2, 0)
    whole = parted.reshape(scale * height, scale * width, 3) * HALF + HALF
    picture: NDArray[np.uint8] = np.rint(whole).clip(0, 255).astype(np.uint8)
    return picture


def noised(cells: Array, noise_level: int, rng: TorchNoise) -> Array:
    """Add the noise of a level to a low picture's cells (C, h, w), as diffusers' `add_noise`."""
    signal = NoiseSchedule.from_config(LOW_RES_SCHEDULER).alphas_cumprod[noise_level]
    noise = rng.normal(cells.shape)
    return np.float32(signal**0.5) * cells + np.float32((1 - signal) ** 0.5) * noise


@dataclass(frozen=True, slots=True, kw_only=True)
class _TiledUNet:
    """A UNet over the whole of a picture, tile by tile.

    rows, columns: the tiles' places, each with its weights along that axis
    """

    engine: Engine
    rows: list[tuple[slice, Array]]
    columns: list[tuple[slice, Array]]

    @classmethod
    def over(cls, engine: Engine, shape: tuple[int, ...], side: int, multiple: int) -> "_TiledUNet":
        """Lay tiles over cells of this shape (C, h, w)."""
        rows, columns = (
            list(zip(cuts := cuts_of(size, side, multiple), windows_of(cuts, 1), strict=True))
            for size in shape[1:]
        )
        return cls(engine=engine, rows=rows, columns=columns)

    @property
    def count(self) -> int:
        """How many tiles there are."""
        return len(self.rows) * len(self.columns)

    def add(self, out: Array, sample: Array, times: Array) -> Iterator[int]:
        """Add the output to out, (C, h, w); yields after every tile how many are done.

        sample: x and low, (2 C, h, w); times: (2,)
        """
        tiles = product(self.rows, self.columns)
        for done, ((row, down), (column, across)) in enumerate(tiles, 1):
            given = np.ascontiguousarray(sample[None, :, row, column])
            found: NDArray[Any] = self.engine.run({"sample": given, "times": times})["out"]
            out[:, row, column] += found[0] * np.multiply.outer(down, across)
            yield done
