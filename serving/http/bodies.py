"""The bodies of requests, as every API takes them."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

Numbers = float | list[float]


class HiresFields(BaseModel):
    """A second, larger run; upscaler: of pixels or of latents, or one of the operator's by name."""

    model_config = ConfigDict(extra="forbid")

    scale: float = 2.0
    strength: float = 0.6
    num_inference_steps: int | None = None
    upscaler: str = "lanczos"


class ControlFields(BaseModel):
    """A picture that steers, base64 of a file, and the net of the operator's that sees it.

    weight: a number, or several as a curve over the run; type: what the picture is, of a union of
    ControlNets, such as "depth"; preprocessor: what makes of the picture what the net sees, such as
    "canny" or "canny:low=50,high=120"
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str
    picture: str = Field(repr=False)
    weight: Numbers = 1.0
    start: float = 0.0
    end: float = 1.0
    mode: str = "balanced"
    type: str | None = None
    preprocessor: str | None = None


class RegionFields(BaseModel):
    """An area with a text of its own; mask: base64 of a picture that is white there."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: str
    mask: str = Field(repr=False)
    weight: float = 1.0


class ImagePromptFields(BaseModel):
    """A picture that is attended to beside the text, or several as one, and the IP-Adapter's name.

    mask: base64 of a picture that is white where it counts; scale: a number, or several as a curve
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str
    picture: str | list[str] = Field(repr=False)
    mask: str | None = Field(default=None, repr=False)
    scale: Numbers = 1.0
    start: float = 0.0
    end: float = 1.0


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
    `priority` goes before your own others. `quality` is of a JPEG or WebP, 95 where it is left out.
    """

    model_config = ConfigDict(extra="forbid")

    prompt: str
    model: str | None = None
    num_images_per_prompt: int | None = None
    loras: dict[str, float] = Field(default_factory=dict)
    controls: list[ControlFields] = Field(default_factory=list)
    regions: list[RegionFields] = Field(default_factory=list)
    image_prompts: list[ImagePromptFields] = Field(default_factory=list)
    image: str | None = None
    mask: str | None = None
    format: str = "png"
    quality: int | None = None
    exact: bool = False
    preview_every: int = 0
    priority: int = 0
    deadline_s: float | None = None


class Upscaling(BaseModel):
    """A picture that is to be enlarged; upscaler: one of the operator's by name, or "lanczos".

    factor: how many times larger the sides become, 1 to 16; left out as many as the upscaler makes
    quality: of a JPEG or WebP, 95 where it is left out
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    image: str = Field(repr=False)
    upscaler: str
    factor: float | None = None
    format: str = "png"
    quality: int | None = None
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
    image_prompts: list[ImagePromptFields] = Field(default_factory=list)
    exact: bool = False


class Generation(OpenAIFields):
    """The body of /v1/images/generations."""

    prompt: str
