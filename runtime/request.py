"""What a user asks for, checked before anything is computed."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

from PIL import Image

from engine.errors import RequestError
from runtime.noise import MAX_SEED

MAX_SIDE = 8192  # pixels; a larger side is a slip of the keyboard
MAX_IMAGES = 256
MAX_CLIP_SKIP = 2  # the graphs give the states of the last two layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One call of a pipeline; names and meanings are those of diffusers.

    prompt, negative_prompt: a text or one text for each picture
    num_images_per_prompt: pictures drawn of every prompt, with seeds that count up
    num_inference_steps: None takes what the model is made for, or 20
    guidance_scale: s of `uncond + s · (cond − uncond)`; up to 1 nothing is guided; None takes
        what the model is made for, or 5
    height, width: in pixels; None takes the image's, or what the model was trained on
    seed: of the first picture; None draws one
    image: where image-to-image starts from
    strength: how far from the image to go, above 0 and up to 1
    eta: of DDIM and TCD, 0 draws no noise
    schedule: the sigma schedule, such as "karras"; None for the model's own
    prompt_syntax: whether prompts are read as `runtime.prompt` says, or every character is text
    clip_skip: 1, or 2 to leave out the text encoder's last layer, as XL does anyway (its number in
        Automatic1111; in diffusers it is one less)
    """

    prompt: str | Sequence[str]
    negative_prompt: str | Sequence[str] = ""
    num_images_per_prompt: int = 1
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    sampler: str = "ddim"
    schedule: str | None = None
    height: int | None = None
    width: int | None = None
    seed: int | None = None
    image: Image.Image | None = None
    strength: float = 0.8
    eta: float = 0.0
    prompt_syntax: bool = True
    clip_skip: int = 1

    def __post_init__(self) -> None:
        """Refuse what no model could fulfil; how many steps there may be, the schedule knows."""
        steps = self.num_inference_steps
        if steps is not None and (not isinstance(steps, Integral) or isinstance(steps, bool)):
            raise RequestError(f"num_inference_steps is {steps!r}; give a whole number")
        if not isinstance(self.sampler, str):
            raise RequestError(f"sampler is {self.sampler!r}; give a name, such as 'ddim'")
        if not isinstance(self.schedule, str | None):
            raise RequestError(f"schedule is {self.schedule!r}; give a name, such as 'karras'")
        _check_number("strength", self.strength, Real, 0, 1)
        _check_number("eta", self.eta, Real, 0, 1)
        _check_number("clip_skip", self.clip_skip, Integral, 1, MAX_CLIP_SKIP)
        if not isinstance(self.prompt_syntax, bool):
            raise RequestError(f"prompt_syntax is {self.prompt_syntax!r}; give True or False")
        if self.guidance_scale is not None:
            _check_number("guidance_scale", self.guidance_scale, Real, 0, 1000)
        _check_number("num_images_per_prompt", self.num_images_per_prompt, Integral, 1, MAX_IMAGES)
        if self.seed is not None:
            _check_number("seed", self.seed, Integral, 0, MAX_SEED)
        if self.image is not None:
            _check_image(self.image)
        if not self.prompts():
            raise RequestError("prompt is an empty list; give one text or several")
        self.negative_prompts()

    def prompts(self) -> list[str]:
        """Return the prompts as a list, one for each group of pictures."""
        return [self.prompt] if isinstance(self.prompt, str) else _texts("prompt", self.prompt)

    def negative_prompts(self) -> list[str]:
        """Return one negative prompt for each prompt."""
        count = len(self.prompts())
        if isinstance(self.negative_prompt, str):
            return [self.negative_prompt] * count
        negative = _texts("negative_prompt", self.negative_prompt)
        if len(negative) != count:
            raise RequestError(
                f"negative_prompt has {len(negative)} texts and prompt has {count}; "
                "give one text, or as many as there are prompts"
            )
        return negative

    def seeds(self) -> list[int]:
        """Return one seed for each picture, counting up from `seed` or from a drawn one."""
        first = secrets.randbelow(2**32) if self.seed is None else int(self.seed)
        count = len(self.prompts()) * self.num_images_per_prompt
        return [(first + i) % (MAX_SEED + 1) for i in range(count)]

    def size(self, default: int, multiple: int) -> tuple[int, int]:
        """Return height and width in pixels.

        `default` is the model's own side; both must be multiples of `multiple`. Raises
        RequestError otherwise.
        """
        height = width = default
        if self.image is not None:
            height, width = (
                max(side - side % multiple, multiple)
                for side in (self.image.height, self.image.width)
            )
        height = height if self.height is None else self.height
        width = width if self.width is None else self.width
        for name, side in (("height", height), ("width", width)):
            _check_number(name, side, Integral, multiple, MAX_SIDE)
            if side % multiple:
                raise RequestError(
                    f"{name} is {side}; it must be a multiple of {multiple}, "
                    f"such as {max(round(side / multiple), 1) * multiple}"
                )
        return int(height), int(width)


def _check_image(image: object) -> None:
    if not isinstance(image, Image.Image):
        raise RequestError(
            f"image came as {type(image).__name__}; give a PIL image (PIL.Image.open of a file)"
        )
    if not image.width or not image.height:
        raise RequestError(
            f"image has {image.width} x {image.height} pixels; give one with at least one"
        )
    try:
        image.load()  # PIL reads files late
    except (OSError, ValueError, SyntaxError) as error:
        raise RequestError(
            f"image cannot be read ({error}); give one whose file is whole and open"
        ) from error


def _texts(name: str, values: object) -> list[str]:
    if not isinstance(values, Sequence) or isinstance(values, bytes):
        raise RequestError(
            f"{name} came as {type(values).__name__}; give a text or a list of texts"
        )
    for value in values:
        if not isinstance(value, str):
            raise RequestError(f"{name} holds a {type(value).__name__}; every prompt is a text")
    return list(values)


def _check_number(name: str, value: object, kind: type, low: float, high: float) -> None:
    # bool counts as a number in Python, but nobody means True pixels.
    if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high:  # type: ignore[operator]
        what = "whole number" if kind is Integral else "number"
        raise RequestError(f"{name} is {value!r}; give a {what} from {low} to {high}")
