"""A picture on its way to being larger: every step of the engine's loop is a tile of it."""

import json
import logging
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from PIL import Image

from engine.errors import RequestError
from runtime.images.files import (
    SOURCE_KEY,
    encode_image,
    program_version,
    settings_in,
    source_type_in,
)
from runtime.images.overlaps import Tiles
from runtime.images.upscaler import Upscaler
from serving.enlarging_request import UNCHANGED, EnlargingRequest
from serving.unfinished_picture import FinishedPicture
from serving.uploads import decode

__all__ = ["EnlargingPicture"]

log = logging.getLogger("latentrt.serving")

ENHANCED = "algorithmicallyEnhanced"  # what a picture becomes that does not say what it is
MOST_KEPT = 16_000  # characters of what a picture says that it was made with


class EnlargingPicture:
    """An `UnfinishedPicture` whose steps are an upscaler's tiles; without one it has none.

    upscaler: that of the request, None where it needs none
    most_pixels: of the result
    Raises BadRequestError for a picture that is not whole, RequestError for one that would become
    too large.
    """

    def __init__(
        self, request: EnlargingRequest, upscaler: Upscaler | None, most_pixels: int
    ) -> None:
        self._request = request
        self._image = decode("image", request.image)
        scale = 1.0 if upscaler is None else float(upscaler.scale)
        self._factor = request.factor_of(*self._image.size, scale)
        wide, high = (round(side * self._factor) for side in self._image.size)
        if wide * high > most_pixels:
            raise RequestError(
                f"the enlarged picture would have {wide} x {high} pixels; up to {most_pixels} in "
                "all are made, so give a smaller factor"
            )
        self.calls = self.total = 0
        self._tiles: Tiles[Image.Image] | None = None
        if upscaler is not None:
            upscaler.check_size(*self._image.size, self._factor)
            self.total = upscaler.count_tiles(*self._image.size, self._factor)
            self._upscaled = upscaler.tiles(self._image, self._factor)
        self._is_entered = False

    @property
    def bucket(self) -> Hashable:
        """As `UnfinishedPicture` says; a tile shares its call with nothing."""
        return id(self)

    @property
    def form(self) -> str:
        """As `UnfinishedPicture` says."""
        return f"enlarging by {self._request.upscaler}"

    def fitting_rows(self) -> int:
        """As `UnfinishedPicture` says."""
        return 1

    @property
    def run_is_over(self) -> bool:
        """As `UnfinishedPicture` says."""
        return not self._is_entered or self.is_done

    @property
    def is_done(self) -> bool:
        """As `UnfinishedPicture` says."""
        return self._is_entered and self.calls == self.total

    def enter(self) -> None:
        """As `UnfinishedPicture` says."""
        self._is_entered = True

    def step(self) -> None:
        """Make the next tile. Raises BackendError."""
        next(self._upscaled)
        self.calls += 1

    def preview(self) -> Callable[[], bytes]:
        """As `UnfinishedPicture` says; nobody can ask for one."""
        raise AssertionError

    def finish(self) -> FinishedPicture:
        """As `UnfinishedPicture` says; what the picture was made with is kept in its file."""
        request, image = self._request, self._larger()
        own = {
            "upscale": request.upscaler,
            "width": image.width,
            "height": image.height,
            "latentrt": program_version(),
        }
        data = self._file(image, own)
        return FinishedPicture(data=data, settings=own)

    def _larger(self) -> Image.Image:
        request, image = self._request, self._image
        if self.total:
            image = _rest(self._upscaled)
        elif request.upscaler != UNCHANGED:
            width, height = (round(side * self._factor) for side in image.size)
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        if request.size is not None and request.upscaler != UNCHANGED:
            image = _of_size(image, *request.size, crop=request.crop)
        image.info[SOURCE_KEY] = source_type_in(request.image) or ENHANCED
        return image

    def _file(self, image: Image.Image, own: Mapping[str, Any]) -> bytes:
        request = self._request
        kept, name = _made_with(request.image), f"{request.upscaler}:{self._factor:g}"
        if not request.is_plain:
            again = {**_left_out(kept), "upscale": name} if "upscale" in kept else {}
            kept = {"upscale": name, **kept, **({"left_out": again} if again else {})}
        kept |= {"latentrt": own["latentrt"]}
        try:
            return encode_image(image, request.format, kept, quality=request.quality)
        except Exception:  # a stranger's file may say anything of how it was made
            log.exception("a picture's settings cannot be written")
            return encode_image(image, request.format, {}, quality=request.quality)


def _rest(tiles: Tiles[Image.Image]) -> Image.Image:
    """Return what is made of all tiles, of which none is left."""
    while True:
        try:
            next(tiles)
        except StopIteration as made:
            image: Image.Image = made.value
            return image


def _of_size(image: Image.Image, width: int, height: int, *, crop: bool) -> Image.Image:
    """Resize a picture to cover a size, and cut what reaches beyond off all around."""
    scale = max(width / image.width, height / image.height)
    sides = round(image.width * scale), round(image.height * scale)
    covering = image.resize(sides, Image.Resampling.LANCZOS) if sides != image.size else image
    if not crop:
        return covering
    left, top = ((side - wanted) // 2 for side, wanted in zip(sides, (width, height), strict=True))
    return covering.crop((left, top, left + width, top + height))


def _made_with(data: bytes) -> dict[str, Any]:
    """Return what a stranger's picture says that it was made with, where that can be kept."""
    try:
        found = settings_in(data) or {}
    except RequestError:
        return {}
    return found if len(json.dumps(found)) <= MOST_KEPT else {}


def _left_out(kept: Mapping[str, Any]) -> dict[str, Any]:
    left = kept.get("left_out")
    return left if isinstance(left, dict) else {}
