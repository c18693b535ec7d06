"""What steers a request's pictures, as it goes to the engine: controls, image prompts, regions.

Their pictures are bytes that were sent, checked by their headers before anything decodes them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from PIL import Image

from runtime.control import NONE, Control
from runtime.image_prompt import ImagePrompt
from runtime.images.canvas import gray_of
from runtime.preprocessors.choice import named_preprocessor
from runtime.regions import Region
from serving.uploads import decode

__all__ = [
    "ControlRequest",
    "ImagePromptRequest",
    "RegionRequest",
    "packed",
    "pictures_of",
    "unpacked",
]


@dataclass(frozen=True, kw_only=True)
class ControlRequest:
    """A control: the name of a net of the operator's, and what `runtime.control.Control` has.

    mask: a picture that is white where an inpainting net is to fill; None for what is transparent
    """

    net: str
    picture: bytes = field(repr=False)
    mask: bytes | None = field(default=None, repr=False)
    weight: float | Sequence[float] = 1.0
    start: float = 0.0
    end: float = 1.0
    mode: str = "balanced"
    type: str | None = None
    preprocessor: str | None = None

    def control(self, *, decoded: bool = True) -> Control:
        """Make the control; without `decoded` of a picture that only stands for its own.

        Raises RequestError, and BadRequestError for a picture that is not whole.
        """
        if self.preprocessor not in (None, NONE):
            named_preprocessor(str(self.preprocessor))  # of a stranger no file is opened
        image = Image.new("RGB", (8, 8))
        if decoded:
            image = decode("controls", self.picture)
            if self.mask is not None:
                image = _transparent(image, decode("controls", self.mask))
        return Control(
            net=self.net,
            image=image,
            weight=self.weight,
            start=self.start,
            end=self.end,
            mode=self.mode,
            type=self.type,
            preprocessor=self.preprocessor,
        )


@dataclass(frozen=True, kw_only=True)
class RegionRequest:
    """A region: its text, and the mask that is white where the text counts."""

    prompt: str
    mask: bytes = field(repr=False)
    weight: float = 1.0

    def region(self, *, decoded: bool = True) -> Region:
        """Make the region; without `decoded` of a mask that only stands for its own.

        Raises RequestError, and BadRequestError for a picture that is not whole.
        """
        mask = decode("regions", self.mask) if decoded else Image.new("L", (8, 8), 255)
        return Region(mask=mask, prompt=self.prompt, weight=self.weight)


@dataclass(frozen=True, kw_only=True)
class ImagePromptRequest:
    """Pictures that are attended to, and the operator's IP-Adapter that sees them as one prompt.

    The other fields are those of `runtime.image_prompt.ImagePrompt`.
    """

    adapter: str
    pictures: Sequence[bytes] = field(repr=False)
    mask: bytes | None = field(default=None, repr=False)
    scale: float | Sequence[float] = 1.0
    start: float = 0.0
    end: float = 1.0

    def image_prompt(self, *, decoded: bool = True) -> ImagePrompt:
        """Make the image prompt; without `decoded` of pictures that only stand for its own.

        Raises RequestError, and BadRequestError for a picture that is not whole.
        """

        def picture(data: bytes) -> Image.Image:
            return decode("image_prompts", data) if decoded else Image.new("L", (8, 8), 255)

        return ImagePrompt(
            adapter=self.adapter,
            image=[picture(data) for data in self.pictures],
            mask=None if self.mask is None else picture(self.mask),
            scale=self.scale,
            start=self.start,
            end=self.end,
        )


Steering = tuple[Sequence[ControlRequest], Sequence[RegionRequest], Sequence[ImagePromptRequest]]
"""What steers a request: controls, regions and image prompts."""


def pictures_of(steering: Steering) -> Iterator[tuple[str, bytes]]:
    """Yield every picture that was sent, by the field that it came in."""
    controls, regions, image_prompts = steering
    for control in controls:
        yield from (("controls", data) for data in (control.picture, control.mask) if data)
    yield from (("regions", region.mask) for region in regions)
    for prompt in image_prompts:
        masks = () if prompt.mask is None else (prompt.mask,)
        yield from (("image_prompts", data) for data in (*prompt.pictures, *masks))


def packed(steering: Steering) -> tuple[dict[str, Any], list[bytes]]:
    """Return all but the pictures, ready for JSON, and the pictures, empty for none."""
    controls, regions, image_prompts = steering
    pictures = [data for control in controls for data in (control.picture, control.mask or b"")]
    pictures += [region.mask for region in regions]
    for prompt in image_prompts:
        pictures += [prompt.mask or b"", *prompt.pictures]
    head = {
        "controls": [_without(control, "picture", "mask") for control in controls],
        "regions": [_without(region, "mask") for region in regions],
        "image_prompts": [
            {**_without(prompt, "pictures", "mask"), "pictures": len(prompt.pictures)}
            for prompt in image_prompts
        ],
    }
    return head, pictures


def unpacked(
    head: Mapping[str, Sequence[Mapping[str, Any]]], pictures: Sequence[bytes]
) -> tuple[tuple[ControlRequest, ...], tuple[RegionRequest, ...], tuple[ImagePromptRequest, ...]]:
    """Return what was packed."""
    left = list(pictures)
    controls = tuple(
        ControlRequest(**{**each, "picture": left.pop(0), "mask": left.pop(0) or None})
        for each in head["controls"]
    )
    regions = tuple(RegionRequest(**{**each, "mask": left.pop(0)}) for each in head["regions"])
    image_prompts = tuple(
        ImagePromptRequest(
            **{
                **each,
                "mask": left.pop(0) or None,
                "pictures": tuple(left.pop(0) for _ in range(each["pictures"])),
            }
        )
        for each in head["image_prompts"]
    )
    return controls, regions, image_prompts


def _without(
    given: ControlRequest | RegionRequest | ImagePromptRequest, *names: str
) -> dict[str, Any]:
    return {f.name: getattr(given, f.name) for f in fields(given) if f.name not in names}


def _transparent(image: Image.Image, mask: Image.Image) -> Image.Image:
    """Return a picture that is transparent where a mask, stretched over it, is white."""
    covered = image.convert("RGBA")
    white = gray_of(mask, image.height, image.width)
    covered.putalpha(Image.fromarray(255 - white))
    return covered
