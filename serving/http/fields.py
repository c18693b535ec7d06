"""The fields of a request, as every API takes them, and the request that they make."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field

from serving.engine_settings import EngineSettings
from serving.errors import BadRequestError, NotFoundError
from serving.limits import Limits
from serving.picture_request import PictureRequest
from serving.steering import ControlRequest, RegionRequest
from serving.uploads import read_base64

Numbers = float | list[float]


class HiresFields(BaseModel):
    """A second, larger run."""

    model_config = ConfigDict(extra="forbid")

    scale: float = 2.0
    strength: float = 0.6
    num_inference_steps: int | None = None
    upscaler: str = "lanczos"


class ControlFields(BaseModel):
    """A picture that steers, base64 of a file, and the net of the operator's that sees it.

    weight: a number, or several as a curve over the run; preprocessor: what makes of the picture
    what the net sees, such as "canny" or "canny:low=50,high=120"
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str
    picture: str = Field(repr=False)
    weight: Numbers = 1.0
    start: float = 0.0
    end: float = 1.0
    mode: str = "balanced"
    preprocessor: str | None = None


class RegionFields(BaseModel):
    """An area with a text of its own; mask: base64 of a picture that is white there."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: str
    mask: str = Field(repr=False)
    weight: float = 1.0


class DrawingFields(BaseModel):
    """What `runtime.request.Request` calls by the same names, in JSON; null takes the default."""

    negative_prompt: str | None = None
    preset: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: Numbers | None = None
    guidance_rescale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    negative_scale: float | None = None
    pag_scale: float | None = None
    apg: tuple[float, float, float] | None = None
    sampler: str | None = None
    schedule: str | None = None
    height: int | None = None
    width: int | None = None
    seed: int | list[int] | None = None
    variation_strength: float | None = None
    variation_seed: int | list[int] | None = None
    noise: str | None = None
    inpaint_area: str | None = None
    mask_padding: int | None = None
    mask_blur: float | None = None
    paste_back: bool | None = None
    extend: tuple[int, int, int, int] | None = None
    strength: float | None = None
    image_noise: str | None = None
    image_guidance_scale: float | None = None
    hires: HiresFields | None = None
    seamless: str | None = None
    deep_shrink: float | None = None
    cache_interval: int | None = None
    eta: float | None = None
    prompt_syntax: bool | None = None
    clean_prompt: bool | None = None
    clip_skip: int | None = None

    def of_request(self) -> dict[str, Any]:
        """Return those that were given, by the runtime's names."""
        names = DrawingFields.model_fields
        given = self.model_dump(include=set(names), exclude_none=True)
        return dict(given)


class Picture(DrawingFields):
    """A request of the native API. What it leaves out is chosen as `latentrt draw` chooses it.

    A picture is base64 of a PNG, JPEG or WebP file; a mask is white where the image is painted
    anew. `exact` computes every step alone; `deadline_s` is how long it may take in all; a higher
    `priority` goes before your own others.
    """

    model_config = ConfigDict(extra="forbid")

    prompt: str
    model: str | None = None
    num_images_per_prompt: int | None = None
    loras: dict[str, float] = Field(default_factory=dict)
    controls: list[ControlFields] = Field(default_factory=list)
    regions: list[RegionFields] = Field(default_factory=list)
    image: str | None = None
    mask: str | None = None
    format: str = "png"
    quality: int = 95
    exact: bool = False
    preview_every: int = 0
    priority: int = 0
    deadline_s: float | None = None


class OpenAIFields(DrawingFields):
    """What OpenAI's clients send, and our own names beside; what is neither is not looked at."""

    model_config = ConfigDict(extra="ignore")

    prompt: str = ""
    model: str | None = None
    n: int | None = None
    size: str | None = None
    response_format: str | None = None
    output_format: str | None = None
    output_compression: int | None = None
    background: str | None = None
    stream: bool | None = None
    partial_images: int | None = None
    loras: dict[str, float] = Field(default_factory=dict)
    controls: list[ControlFields] = Field(default_factory=list)
    regions: list[RegionFields] = Field(default_factory=list)
    exact: bool = False


class Generation(OpenAIFields):
    """The body of /v1/images/generations."""

    prompt: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """What requests may name, the first model being the one that they need not name."""

    models: tuple[str, ...]
    loras: tuple[str, ...]
    controls: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: EngineSettings) -> Self:
        """Return what an engine's settings name."""
        return cls(
            models=tuple(settings.models),
            loras=tuple(settings.loras),
            controls=tuple(settings.controls),
        )

    def model(self, name: str | None) -> str:
        """Return a model's name. Raises NotFoundError for one that the operator did not list."""
        if name is None:
            return self.models[0]
        if name not in self.models:
            raise NotFoundError(
                f"there is no model {name[:100]!r}; /v1/models lists those of this server",
                code="model_not_found",
                param="model",
            )
        return name

    def adapters(self, given: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
        """Return adapters in one order. Raises NotFoundError, BadRequestError for a weight."""
        for name, weight in given.items():
            if name not in self.loras:
                raise NotFoundError(
                    f"there is no adapter {name[:100]!r} on this server",
                    code="lora_not_found",
                    param="loras",
                )
            if not -100 <= weight <= 100:
                raise BadRequestError(f"the weight of {name} is not -100 to 100", param="loras")
        return tuple(sorted(given.items()))

    def control(self, name: str, param: str = "controls") -> str:
        """Return a ControlNet's name. Raises NotFoundError for one that is not here."""
        if name not in self.controls:
            raise NotFoundError(
                f"there is no control {name[:100]!r} on this server; /api/v1/capabilities lists "
                "those that there are",
                code="control_not_found",
                param=param,
            )
        return name

    def steering(self, body: "Picture | OpenAIFields") -> dict[str, Any]:
        """Return what steers a body's pictures. Raises NotFoundError, BadRequestError."""
        return {
            "controls": tuple(
                ControlRequest(
                    net=self.control(each.name),
                    picture=read_base64("controls", each.picture),
                    **each.model_dump(exclude={"name", "picture"}),
                )
                for each in body.controls
            ),
            "regions": tuple(
                RegionRequest(
                    prompt=each.prompt, mask=read_base64("regions", each.mask), weight=each.weight
                )
                for each in body.regions
            ),
        }


FORMATS = {"png": "PNG", "jpeg": "JPEG", "jpg": "JPEG", "webp": "WEBP"}


def file_format(name: str, param: str) -> str:
    """Return Pillow's name of a format. Raises BadRequestError."""
    if name.lower() not in FORMATS:
        raise BadRequestError(f"{param} is {name[:40]!r}; choose png, jpeg or webp", param=param)
    return FORMATS[name.lower()]


def check_whole(name: str, value: int, low: int, high: int) -> int:
    """Return a number that is within bounds. Raises BadRequestError."""
    if not low <= value <= high:
        raise BadRequestError(f"{name} is {value}; give {low} to {high}", param=name)
    return value


def native_request(body: Picture, catalog: Catalog, limits: Limits) -> PictureRequest:
    """Return what a body of the native API requests, checked. Raises RefusalError, RequestError."""
    fields = {"prompt": body.prompt, **body.of_request()}
    if body.num_images_per_prompt is not None:
        fields["num_images_per_prompt"] = body.num_images_per_prompt
    check_whole("priority", body.priority, -10, 10)
    picture_request = PictureRequest(
        fields=fields,
        model=catalog.model(body.model),
        image=None if body.image is None else read_base64("image", body.image),
        mask=None if body.mask is None else read_base64("mask", body.mask),
        loras=catalog.adapters(body.loras),
        **catalog.steering(body),
        exact=body.exact,
        preview_every=check_whole("preview_every", body.preview_every, 0, limits.steps),
        format=file_format(body.format, "format"),
        quality=check_whole("quality", body.quality, 1, 100),
    )
    return picture_request.checked(limits)
