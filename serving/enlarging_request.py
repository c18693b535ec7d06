"""A picture that is to be enlarged, and nothing drawn: numbers and bytes for another process."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

from runtime.images.upscaling import MAX_FACTOR
from serving.errors import BadRequestError, TooLargeError
from serving.limits import Limits
from serving.picture_request import PIXELS
from serving.uploads import size_of

__all__ = ["LANCZOS", "UNCHANGED", "EnlargingRequest"]

LANCZOS, UNCHANGED = PLAIN = ("lanczos", "none")  # that need no network
# Steps of a guided picture of 512 x 512 that a pass over one takes, by the operations of the
# largest usual network, Real-ESRGAN x4plus.
PASS_WORK = 6.0


@dataclass(frozen=True, kw_only=True)
class EnlargingRequest:
    """An upscaler's request. In queues it stands beside `PictureRequest`, as one picture.

    image: a file as it was sent
    upscaler: a name of the operator's, or "lanczos" or "none"
    factor: how many times larger the sides become, None for as many as the upscaler makes them
    size: width and height in place of a factor; what reaches beyond that shape is cut off, or with
        `crop` False the picture has it too
    format, quality: as of `PictureRequest`
    """

    image: bytes = field(repr=False)
    upscaler: str
    factor: float | None = None
    size: Sequence[int] | None = None
    crop: bool = True
    format: str = "PNG"
    quality: int = 95
    # What a picture that is drawn has further, and this has not.
    model: ClassVar[str] = ""
    loras: ClassVar[Sequence[tuple[str, float]]] = ()
    fields: ClassVar[Mapping[str, Any]] = {}
    count: ClassVar[int] = 1
    preview_every: ClassVar[int] = 0

    @property
    def is_plain(self) -> bool:
        """Whether no network is needed."""
        return self.upscaler in PLAIN

    def factor_of(self, width: int, height: int, scale: float = 1.0) -> float:
        """Return by what a picture of these sides is enlarged; scale: where nothing is asked for.

        A size that is smaller than the picture is reached from 1.
        """
        if self.size is not None:
            return max(self.size[0] / width, self.size[1] / height, 1.0)
        return scale if self.factor is None else self.factor

    @property
    def work(self) -> float:
        """About what it takes, in guided steps of 512 by 512 pixels."""
        width, height = size_of("image", self.image, 2**62)
        share = width * height / PIXELS
        if self.is_plain:
            return 0.1 * share
        passes = 1 if self.factor_of(width, height) <= 4 else 2
        return PASS_WORK * share * (1 if passes == 1 else 1 + self.factor_of(width, height) ** 2)

    def checked(self, limits: Limits) -> Self:
        """Return the request. Raises BadRequestError or TooLargeError beyond a limit."""
        width, height = size_of("image", self.image, limits.upload_pixels)
        if self.factor is not None and not 1 <= self.factor <= MAX_FACTOR:
            raise BadRequestError(
                f"factor is {self.factor:g}; give 1 to {MAX_FACTOR}", param="factor"
            )
        if self.size is not None and min(self.size) < 1:
            raise BadRequestError("a side is less than 1; give pixels", param="size")
        factor = self.factor_of(width, height)
        if factor > MAX_FACTOR:
            raise BadRequestError(
                f"the picture would become {factor:.1f} times larger; up to {MAX_FACTOR} are done",
                param="size",
            )
        wide, high = round(width * factor), round(height * factor)
        if wide * high > limits.upscaled_pixels:
            raise TooLargeError(
                f"the enlarged picture would have {wide} x {high} pixels; up to "
                f"{limits.upscaled_pixels} in all are made"
            )
        if self.work > limits.work:
            raise TooLargeError(
                f"the request is {self.work:.0f} steps of 512 x 512 pixels' work; up to "
                f"{limits.work:.0f} are taken"
            )
        return self

    def packed(self) -> tuple[bytes, list[bytes]]:
        """Return all but the picture as JSON, and the picture."""
        head = {each.name: getattr(self, each.name) for each in fields(self)}
        return json.dumps({**head, "image": None}).encode(), [self.image]

    @classmethod
    def unpacked(cls, head: bytes, pictures: Sequence[bytes]) -> Self:
        """Return the request that was packed."""
        return cls(**{**json.loads(head), "image": pictures[0]})
