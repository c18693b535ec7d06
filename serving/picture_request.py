"""What a caller wants drawn, in numbers, texts and bytes that can go to another process."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from PIL import Image

from engine.errors import RequestError
from runtime.checks import check_choice
from runtime.conditioning.syntax import compose
from runtime.images.upscaling import UPSCALERS, Hires
from runtime.request import OF_A_MASK, Request
from serving.errors import BadRequestError, TooLargeError
from serving.limits import Limits
from serving.masking import fill_masked, invert_mask
from serving.steering import (
    ControlRequest,
    ImagePromptRequest,
    RegionRequest,
    Steering,
    packed,
    pictures_of,
    unpacked,
)
from serving.uploads import decode, size_of, transparency_as_mask

PIXELS = 512 * 512  # of the picture whose step is one unit of work
GROUPS = 2
CONTROL_SHARE = 0.4  # of a step that a ControlNet takes beside it, a UNet's way down and middle
SEEING = 0.2  # steps that encoding an image prompt takes: ViT-H's operations by a guided step's
# Control characters, which a picture's file could not keep as text, and halves of characters.
NO_TEXT = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
DEFAULT_STEPS = 20  # for an estimate, where neither request nor model says


@dataclass(frozen=True, kw_only=True)
class PictureRequest:
    """A request as it goes to the engine; the seeds are drawn, so it is the same picture always.

    fields: of `runtime.request.Request`, as JSON has them, without image and mask
    image, mask: files as they were sent, checked by their headers
    mask_by_alpha: whether transparency of the mask, or of the image where there is no mask, says
        where to paint, as in OpenAI's API; a mask without any is white there, as everywhere here
    mask_inverted: whether the mask is black where the image is painted anew
    fill_masked: whether the run starts from blurred surroundings under the mask
    model: a name of the operator's; loras: names with weights
    controls, regions, image_prompts: what steers it, areas with texts of their own, and pictures
        that are attended to
    hires_upscaler: the operator's upscaler of hires fix, whose file only the engine knows
    exact: whether every step is computed alone
    preview_every: steps between previews, 0 for none
    format: "PNG", "JPEG" or "WEBP"; quality: 1 to 100, of the latter two
    """

    fields: Mapping[str, Any]
    model: str
    image: bytes | None = field(default=None, repr=False)
    mask: bytes | None = field(default=None, repr=False)
    mask_by_alpha: bool = False
    mask_inverted: bool = False
    fill_masked: bool = False
    loras: Sequence[tuple[str, float]] = ()
    controls: Sequence[ControlRequest] = ()
    regions: Sequence[RegionRequest] = ()
    image_prompts: Sequence[ImagePromptRequest] = ()
    hires_upscaler: str | None = None
    exact: bool = False
    preview_every: int = 0
    format: str = "PNG"
    quality: int = 95

    def request(self, upscalers: Mapping[str, Path] | None = None) -> Request:
        """Make the request of the runtime; decodes the pictures.

        upscalers: the operator's files, by the names that requests know them by
        Raises RequestError, and BadRequestError for a picture that is not whole.
        """
        image = None if self.image is None else decode("image", self.image)
        mask = None if self.mask is None else decode("mask", self.mask)
        if self.mask_by_alpha and image is not None:
            mask = transparency_as_mask(image if mask is None else mask) or mask
            image = image.convert("RGB")  # what is transparent in it keeps its colours
        if mask is not None and self.mask_inverted:
            mask = invert_mask(mask)
        if image is not None and mask is not None and self.fill_masked:
            image = fill_masked(image, mask)
        made = self._made(image, mask, decoded=True)
        if made.hires is None or self.hires_upscaler is None or upscalers is None:
            return made
        file = str(upscalers[self.hires_upscaler])
        return replace(made, hires=replace(made.hires, upscaler=file))

    def _made(
        self, image: Image.Image | None, mask: Image.Image | None, *, decoded: bool
    ) -> Request:
        # Transparency is looked for where there is no mask, and may be none.
        left_out = OF_A_MASK if self.mask_by_alpha and mask is None else {}
        fields = {
            **{name: value for name, value in self.fields.items() if name not in left_out},
            "controls": [control.control(decoded=decoded) for control in self.controls],
            "regions": [region.region(decoded=decoded) for region in self.regions],
            "image_prompts": [each.image_prompt(decoded=decoded) for each in self.image_prompts],
        }
        return _request(fields, image, mask)

    def checked(self, limits: Limits) -> Self:
        """Return the request with its seeds drawn.

        Raises RequestError for what no model could draw; BadRequestError or TooLargeError
        beyond a limit.
        """
        sizes = {
            name: size_of(name, data, limits.upload_pixels)
            for name, data in (("image", self.image), ("mask", self.mask))
            if data is not None
        }
        _most("controls", len(self.controls), limits.controls, "pictures that steer")
        _most("regions", len(self.regions), limits.parts, "regions")
        seen = sum(len(prompt.pictures) for prompt in self.image_prompts)
        _most("image_prompts", seen, limits.image_prompts, "pictures")
        for name, data in pictures_of(self.steering):
            size_of(name, data, limits.upload_pixels)
        stand_in = Image.new("1", (8, 8)) if self.image is not None else None
        request = self._made(stand_in, stand_in if self.mask else None, decoded=False)
        seeds: dict[str, Any] = {"seed": request.draw_seeds()}
        if request.variation_strength:
            seeds["variation_seed"] = request.draw_variation_seeds()
        drawn = replace(self, fields={**self.fields, **seeds})
        _check(request, sizes, limits, self)
        if drawn.work > limits.work:
            raise TooLargeError(
                f"the request is {drawn.work:.0f} steps of 512 x 512 pixels' work, all pictures "
                f"together; up to {limits.work:.0f} are taken"
            )
        return drawn

    @cached_property
    def count(self) -> int:
        """How many pictures it is."""
        return int(self.fields.get("num_images_per_prompt") or 1)

    @cached_property
    def work(self) -> float:
        """About what it takes, all pictures together, in guided steps of 512 by 512 pixels."""
        given = self.fields
        sides = [given.get(name) for name in ("height", "width")]
        if None in sides and self.image is not None:
            sides = list(size_of("image", self.image, 2**62))
        pixels = float(sides[0] or 512) * float(sides[1] or 512)
        steps = float(given.get("num_inference_steps") or DEFAULT_STEPS)
        texts = [given.get("prompt", ""), *(region.prompt for region in self.regions)]
        parts = sum(str(text).count("AND") + 1 for text in texts)
        perturbed = parts if given.get("pag_scale") else 0
        groups = 1 + parts + perturbed + (given.get("negative_scale") is not None)
        work = steps * pixels / PIXELS * groups / GROUPS
        work *= 1 + CONTROL_SHARE * len(self.controls)
        if hires := given.get("hires"):
            again = float(hires.get("num_inference_steps") or steps) * hires.get("strength", 0.6)
            work *= 1 + again / steps * float(hires.get("scale", 2.0)) ** 2
        seen = sum(len(prompt.pictures) for prompt in self.image_prompts)
        return work * self.count + SEEING * seen

    @property
    def steering(self) -> Steering:
        """All that steers it."""
        return self.controls, self.regions, self.image_prompts

    def packed(self) -> tuple[bytes, list[bytes]]:
        """Return all but the pictures as JSON, and the pictures, empty for none."""
        steering, pictures = packed(self.steering)
        head = {each.name: getattr(self, each.name) for each in fields(self)}
        head |= {"image": None, "mask": None, **steering}
        return json.dumps(head).encode(), [self.image or b"", self.mask or b"", *pictures]

    @classmethod
    def unpacked(cls, head: bytes, pictures: Sequence[bytes]) -> Self:
        """Return the request that was packed."""
        given = json.loads(head)
        image, mask = (data or None for data in pictures[:2])
        controls, regions, image_prompts = unpacked(given, pictures[2:])
        loras = tuple((name, weight) for name, weight in given.pop("loras"))
        given |= {"loras": loras, "controls": controls, "regions": regions}
        given["image_prompts"] = image_prompts
        return cls(**{**given, "image": image, "mask": mask})


def _request(
    given: Mapping[str, Any], image: Image.Image | None, mask: Image.Image | None
) -> Request:
    fields = {**given, "image": image, "mask": mask}
    if fields.get("hires") is not None:
        # Of a stranger no path is followed, nor is it told which files there are.
        check_choice("hires.upscaler", fields["hires"].get("upscaler", UPSCALERS[0]), UPSCALERS)
        fields["hires"] = Hires(**fields["hires"])
    return Request(**fields)


def _check(
    request: Request,
    sizes: Mapping[str, tuple[int, int]],
    limits: Limits,
    picture_request: PictureRequest,
) -> None:
    """Refuse what is beyond a server's limits, each named by its field."""
    if not isinstance(request.prompt, str) or not isinstance(request.negative_prompt, str):
        raise BadRequestError("prompt and negative_prompt are one text each here", param="prompt")
    for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt)):
        _check_text(name, text, limits)
    hires = request.hires
    steps = {"num_inference_steps": request.num_inference_steps}
    if hires is not None:
        steps["hires"] = hires.num_inference_steps
    for name, count in steps.items():
        _most(name, count or 0, limits.steps, "steps")
    _most("num_images_per_prompt", request.num_images_per_prompt, limits.pictures, "pictures")
    adapters = len(picture_request.loras) + len(request.adapters)
    _most("loras", adapters, limits.loras, "adapters")
    width, height = _sides(request, sizes.get("image"))
    for name, side in (("height", height), ("width", width)):
        _most(name, side, limits.side, "pixels")
    _most("size", height * width, limits.pixels, "pixels, height times width")
    try:
        parts, _ = request.composed()
        areas = [piece for region in request.regions for piece in compose(region.prompt)]
    except RequestError as error:
        raise BadRequestError(str(error), param="prompt") from None
    _most("prompt", len(parts), limits.parts, "parts joined with AND")
    _most("regions", len(areas), limits.parts, "texts and parts joined with AND")
    for region in request.regions:
        _check_text("regions", region.prompt, limits)


def _check_text(name: str, text: str, limits: Limits) -> None:
    _most(name, len(text), limits.prompt_characters, "characters")
    if unwritable := NO_TEXT.search(text):
        raise BadRequestError(
            f"{name} holds the character {unwritable[0]!a}, which no file can hold", param=name
        )


def _sides(request: Request, sent: tuple[int, int] | None) -> tuple[float, float]:
    """Return the width and height of the largest run, as far as the request says; 0 if not."""
    width, height = sent or (0, 0)
    if request.extend is not None:
        left, top, right, bottom = request.extend
        width, height = width + left + right, height + top + bottom
    scale = 1.0 if request.hires is None else request.hires.scale
    return (request.width or width) * scale, (request.height or height) * scale


def _most(name: str, value: float, most: float, what: str) -> None:
    if value > most:
        raise BadRequestError(
            f"{name} has {value:g} {what}; up to {most:g} are taken here",
            code="too_much",
            param=name,
        )
