"""Pictures enlarged by a trained upscaler, in tiles that overlap.

Memory follows from the tile's size, which the architecture's widest layers decide.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.backends.base import Engine
from engine.backends.settings import (
    BackendSettings,
    ComputePrecision,
    graph_precision,
    on_processor,
)
from engine.checkpoints.upscaler import UpscalerFile, open_upscaler
from engine.configs.base import Sizes
from engine.configs.upsampler import UpsamplerConfig
from engine.configs.upscalers import UpscalerConfig
from engine.engines import open_engine
from engine.errors import RequestError
from engine.graphs.upsampler import upsampler_graph
from engine.graphs.upscalers import upscaler_graph
from runtime.checks import check_image, check_number
from runtime.images.files import SOURCE_KEY, WHITE, as_rgb
from runtime.images.overlaps import Tiles, cuts_of, windows_of
from runtime.images.upsampling import Sampling, upsampled
from runtime.images.upscaling import MAX_FACTOR

__all__ = ["Upscaler"]

MAX_PIXELS = 2**26  # of a result: more would not be read again
NUMBERS = 2**27  # that are alive at once in a tile, by the architecture's own estimate
LARGEST_TILE, SMALLEST_TILE = 512, 64
LANCZOS = Image.Resampling.LANCZOS

Array = NDArray[np.float32]
OnTile = Callable[[int, int], object]
"""Called after every tile, with how many are done, and how many there are."""
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Upscaler:
    """An upscaler with its engine; `load` makes one, a call enlarges a picture.

    tile: the side of the tiles that are computed at once, in pixels that go in
    sampling: how a diffusion upsampler draws; of other upscalers it says nothing
    """

    file: UpscalerFile
    engine: Engine
    tile: int
    sampling: Sampling = field(default_factory=Sampling)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        precision: ComputePrecision | None = None,
        settings: BackendSettings | None = None,
        sampling: Sampling | None = None,
    ) -> Self:
        """Open a file of ESRGAN, Real-ESRGAN or SwinIR, or of a diffusion upsampler.

        precision: what to compute in, which the backend must offer; None is float32
        settings: how it runs, on the processor whatever the backend, as `on_processor` says
        sampling: how a diffusion upsampler draws, if it is one
        Raises ModelError, BackendError, or RequestError for sampling of another upscaler.
        """
        chosen = on_processor(settings)
        computed: ComputePrecision = precision or "float32"
        file = open_upscaler(Path(path))
        written = graph_precision(chosen, computed)
        if isinstance(file.config, UpsamplerConfig):
            graph = upsampler_graph(file.config, written)
        elif sampling is None:
            graph = upscaler_graph(file.config, written)
        else:
            raise RequestError(
                f"{path} enlarges in one pass ({file.kind}) and takes no steps, noise level or "
                "seed; give a file of a diffusion upsampler, or leave them out"
            )
        engine = open_engine(graph, file.weights, chosen, computed)
        tile = tile_side(file.config)
        return cls(file=file, engine=engine, tile=tile, sampling=sampling or Sampling())

    @property
    def scale(self) -> int:
        """How many times larger its network makes both sides."""
        return self.file.config.scale

    def __call__(
        self, image: Image.Image, factor: float | None = None, *, on_tile: OnTile | None = None
    ) -> Image.Image:
        """Return an RGB picture enlarged, with transparency where it had some.

        factor: 1 to 16, None for the upscaler's own scale; it is used as often as that takes, and
            Lanczos' kernel brings what it makes to the size that is wanted
        Raises RequestError for what is no picture or would be too large, BackendError.
        """
        return _run_through(self.tiles(image, factor), on_tile)

    def tiles(self, image: Image.Image, factor: float | None = None) -> Tiles[Image.Image]:
        """Do as a call does, tile by tile, for whoever does other work between two of them.

        Tiles are counted anew in each pass.
        """
        check_image("image", image)
        factor = float(self.scale) if factor is None else factor
        check_number("factor", factor, Real, 1, MAX_FACTOR)
        size = round(image.width * factor), round(image.height * factor)
        self.check_size(*image.size, factor)
        pixels = np.asarray(as_opaque(image))
        for i in range(self._passes(factor)):
            if i:  # no larger between two passes than the second needs
                needed = [math.ceil(side / self.scale) for side in size]
                pixels = np.asarray(Image.fromarray(pixels).resize(needed, LANCZOS))
            pixels = yield from self.enlarged(pixels)
        larger = Image.fromarray(pixels)
        if larger.size != size:
            larger = larger.resize(size, LANCZOS)
        if image.has_transparency_data:
            alpha = image.convert("RGBA").getchannel("A")
            larger.putalpha(alpha.resize(size, LANCZOS))
        keeps_profile = image.mode in ("RGB", "RGBA")  # others' would be of other colours
        kept = (SOURCE_KEY, *(("icc_profile",) if keeps_profile else ()))
        larger.info = {key: image.info[key] for key in kept if key in image.info}
        return larger

    def count_tiles(self, width: int, height: int, factor: float | None = None) -> int:
        """Return how many tiles a picture of this size takes, all passes together."""
        factor = float(self.scale) if factor is None else factor
        sides, count = [height, width], 0
        for i in range(self._passes(factor)):
            if i:
                sides = [math.ceil(round(side * factor) / self.scale) for side in (height, width)]
            padded, multiple = map(self._padded, sides), self.file.config.multiple
            count += math.prod(len(cuts_of(side, self.tile, multiple)) for side in padded)
        is_drawn = isinstance(self.file.config, UpsamplerConfig)
        return count * self.sampling.num_inference_steps if is_drawn else count

    def check_size(self, width: int, height: int, factor: float | None) -> None:
        """Raise RequestError where a picture of this size would become too large."""
        for times in (self.scale, factor or self.scale):
            wide, high = round(width * times), round(height * times)
            if wide * high > MAX_PIXELS:
                raise RequestError(
                    f"the enlarged picture would have {wide} x {high} pixels, and {MAX_PIXELS} in "
                    "all may be made; give a smaller factor or picture"
                )

    def _passes(self, factor: float) -> int:
        """Return how often the network is used; a scale of 1 restores and enlarges nothing."""
        if self.scale == 1:
            return 1
        return max(math.ceil(math.log(factor, self.scale) - 1e-9), 1)

    def _padded(self, side: int) -> int:
        return side + -side % self.file.config.multiple

    def enlarged(self, pixels: NDArray[np.uint8]) -> Tiles[NDArray[np.uint8]]:
        """Enlarge (H, W, 3) once, by the scale; returns (scale · H, scale · W, 3).

        Raises BackendError.
        """
        config = self.file.config
        if isinstance(config, UpsamplerConfig):
            drawn = upsampled(self.engine, config, pixels, self.sampling, tile=self.tile)
            return (yield from drawn)
        height, width = pixels.shape[:2]
        multiple, scale = config.multiple, self.scale
        padding = [(0, self._padded(side) - side) for side in (height, width)]
        padded = np.pad(pixels, [*padding, (0, 0)], mode="reflect")
        result = np.empty((scale * height, scale * width, 3), np.uint8)
        rows, columns = (cuts_of(side, self.tile, multiple) for side in padded.shape[:2])
        windows = [windows_of(cuts, scale) for cuts in (rows, columns)]
        strip = np.zeros((scale * rows[0].stop, scale * padded.shape[1], 3), np.float32)
        total, done = len(rows) * len(columns), 0
        ends = [*(cut.start for cut in rows[1:]), rows[-1].stop]
        for row, down, end in zip(rows, windows[0], ends, strict=True):
            for column, across in zip(columns, windows[1], strict=True):
                tile = self._run(padded[row, column])
                place = slice(scale * column.start, scale * column.stop)
                strip[:, place] += tile * np.multiply.outer(down, across)[:, :, None]
                done += 1
                yield done, total
            ready = scale * (end - row.start)  # rows that no further tile reaches
            place = slice(scale * row.start, min(scale * end, len(result)))
            result[place] = _as_bytes(strip[: place.stop - place.start, : result.shape[1]])
            strip[: len(strip) - ready] = strip[ready:].copy()
            strip[len(strip) - ready :] = 0
        return result

    def _run(self, pixels: NDArray[np.uint8]) -> Array:
        """Enlarge a tile (h, w, 3); returns floats of about 0 to 1."""
        floats = np.moveaxis(pixels.astype(np.float32) / np.float32(WHITE), -1, 0)[None]
        found: NDArray[Any] = self.engine.run({"pixels": np.ascontiguousarray(floats)})["upscaled"]
        return np.moveaxis(found[0], 0, -1)


def _run_through(tiles: Tiles[Made], on_tile: OnTile | None) -> Made:
    """Do all that is left; returns what is made."""
    while True:
        try:
            done = next(tiles)
        except StopIteration as made:
            result: Made = made.value
            return result
        if on_tile is not None:
            on_tile(*done)


def as_opaque(image: Image.Image) -> Image.Image:
    """Return a picture's own colours, also where it is transparent."""
    return image.convert("RGBA").convert("RGB") if image.has_transparency_data else as_rgb(image)


def tile_side(config: UpscalerConfig) -> int:
    """Return the side of tiles whose largest layers fit into the memory that is meant for them."""
    numbers = config.activations("upscaler", Sizes(height=256, width=256)) / 256**2
    side = min(max(math.isqrt(int(NUMBERS / numbers)), SMALLEST_TILE), LARGEST_TILE)
    return side - side % config.multiple


def _as_bytes(image: Array) -> NDArray[np.uint8]:
    rounded: NDArray[np.uint8] = np.rint(image * np.float32(WHITE)).clip(0, WHITE).astype(np.uint8)
    return rounded
