"""What a user asks for, checked before anything is computed."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from numbers import Integral, Real
from types import MappingProxyType
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.errors import RequestError
from engine.graphs.seamless import AXES
from runtime.checks import (
    check_apg,
    check_choice,
    check_extend,
    check_given,
    check_image,
    check_interval,
    check_names,
    check_number,
    check_scale,
    check_sides,
    check_without,
    texts,
)
from runtime.conditioning import alternatives
from runtime.conditioning.names import MARKS, AdapterTag, take_names
from runtime.conditioning.syntax import compose_all, escape
from runtime.control import Control, checked_controls
from runtime.image_prompt import ImagePrompt, checked_image_prompts
from runtime.images.canvas import ALPHA, BLUR, MAX_BLUR, MAX_SIDE, transparency
from runtime.images.files import upright
from runtime.images.image_noise import check_image_noise
from runtime.images.upscaling import MAX_STEPS, Hires
from runtime.noise import NOISES, draw_seeds, seeds_of
from runtime.presets import PRESETS
from runtime.regions import Region, check_regions
from runtime.samplers import DEFAULT_SAMPLER, resolve

MAX_IMAGES = 256
MAX_CLIP_SKIP = 2  # the graphs give the states of the last two layers
MAX_SCALE = 1000
WHOLE, MASKED = AREAS = ("whole", "masked")  # what inpainting draws
PADDING = 32  # pixels around a mask
# Fields that cannot act without another, with what they are then.
OF_AN_AREA: Mapping[str, object] = MappingProxyType({"mask_padding": PADDING})
OF_A_MASK: Mapping[str, object] = MappingProxyType(
    {"inpaint_area": WHOLE, **OF_AN_AREA, "mask_blur": BLUR, "paste_back": True}
)
_OTHERS = ("strength", "mask", "extend", "image_noise", "image_guidance_scale")
OF_AN_IMAGE: Mapping[str, object] = MappingProxyType({**dict.fromkeys(_OTHERS), **OF_A_MASK})
NO_WORDS: Mapping[str, str] = MappingProxyType({})


def idle_fields(
    image: object, mask: object, extend: object, inpaint_area: object
) -> tuple[str, Mapping[str, object]]:
    """Return what is lacking for some fields on an image to act, and these; "" for nothing."""
    if image is None:
        return "image", OF_AN_IMAGE
    if mask is None and extend is None:
        return "mask", OF_A_MASK
    return ("", NO_WORDS) if inpaint_area == MASKED else (f'inpaint_area="{MASKED}"', OF_AN_AREA)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One call of a pipeline; names and meanings are those of diffusers where it has them.

    It is checked when it is made, as far as that needs no model, and None takes a field's default.
    Raises RequestError, also for a name that is not a field.

    prompt, negative_prompt: a text or one text for each picture
    num_images_per_prompt: pictures drawn of every prompt, with seeds that count up
    preset: "fast", "balanced", "quality" or "creative": what stands in for each None below
    num_inference_steps: None takes what the model is made for, or 20
    guidance_scale: s of `uncond + s · (cond − uncond)`; up to 1 nothing is guided; several numbers
        are a curve over the run; None takes what the model is made for, or 5
    guidance_rescale: 0 to 1, how far the guided output is brought back to the spread of the
        text's own, against pictures that are burnt; None takes 0
    guidance_interval: the part of the run that is guided; the rest costs half
    negative_scale: how far to move from the negative prompt beside moving to the prompt, from the
        empty one between them; None lets the negative prompt take the empty one's place
    pag_scale: how far to move from what the UNet sees without its middle's attention (PAG)
    apg: eta, the threshold (0 for none) and the momentum of projected guidance (APG)
    sampler: None takes "ddim"
    schedule: the sigma schedule, such as "karras"; None for the model's own
    height, width: in pixels, multiples of 8; None takes the image's, whatever it is, or what the
        model was trained on
    seed: of the first picture, or one for each; None draws one
    variation_strength: how far the starting noise goes from the seed's to that of variation_seed,
        from 0 to 1, on a sphere (Automatic1111's subseed strength)
    variation_seed: of the first picture, or one for each; None draws one. With a strength one seed
        is that of all pictures, and the variation seeds count up
    noise: whose random numbers a seed means, torch's on the "cpu" or on "cuda"
    image: where image-to-image starts from; it is turned as its camera says, and where height and
        width are None, the result has its size
    mask: where it is white the image is painted anew, where it is black it stays; "alpha" paints
        where the image is transparent
    inpaint_area: "whole" draws the whole image, "masked" the mask's surroundings alone, enlarged to
        height and width, and lays them back
    mask_padding: pixels around the mask that "masked" draws too
    mask_blur: pixels over which the new picture fades into the old one
    paste_back: whether the image's own pixels come back outside the mask; False hands out what the
        model made of them
    extend: pixels by which the canvas reaches beyond the image, left, top, right and bottom; they
        are painted anew
    strength: how far from the image to go, above 0 and up to 1; None takes 0.8, and 1 where
        something is painted anew
    image_guidance_scale: how closely a model that edits keeps to the image, from 1; None takes 1.5
    image_noise: that the image gets first, "gaussian:VARIANCE" or "salt-pepper:SHARE", 0 to 1
    hires: a second, larger run; controls: pictures that steer, by ControlNets of the pipeline
    image_prompts: pictures that are attended to beside the text, by IP-Adapters of the pipeline
    regions: areas that have texts of their own; elsewhere the prompt counts
    seamless: "x", "y" or "both": the axes along which copies of the picture join without a seam
    deep_shrink: the first part of the calls, whose lower levels see half the sides, such as 0.35
    cache_interval: the UNet runs whole at every so many calls and around the deep features of the
        last of these in between (DeepCache): from 3 on twice as fast or more, and less exact; 1
        always runs it whole
    eta: of DDIM and TCD, 0 draws no noise
    prompt_syntax: whether prompts are read as `runtime.conditioning.syntax` says, or every
        character is text
    clean_prompt: whether HTML entities and curly quotes in prompts are resolved, as by CLIP's
        original tokenizer
    clip_skip: 1, or 2 to leave out the text encoder's last layer, as XL does anyway (its number in
        Automatic1111; in diffusers it is one less)

    Made of these: prompts, negative_prompts, one text for each group of pictures; seeds and
    variation_seeds, one for each picture, None where none was given.
    """

    prompt: str | Sequence[str]
    negative_prompt: str | Sequence[str] = ""
    num_images_per_prompt: int = 1
    preset: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | Sequence[float] | None = None
    guidance_rescale: float | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    negative_scale: float | None = None
    pag_scale: float | None = None
    apg: tuple[float, float, float] | None = None
    sampler: str | None = None
    schedule: str | None = None
    height: int | None = None
    width: int | None = None
    seed: int | Sequence[int] | None = None
    variation_strength: float = 0.0
    variation_seed: int | Sequence[int] | None = None
    noise: str = "cpu"
    image: Image.Image | None = None
    mask: Image.Image | str | None = None
    inpaint_area: str = WHOLE
    mask_padding: int = PADDING
    mask_blur: float = BLUR
    paste_back: bool = True
    extend: tuple[int, int, int, int] | None = None
    strength: float | None = None
    image_noise: str | None = None
    image_guidance_scale: float | None = None
    hires: Hires | None = None
    regions: Sequence[Region] = ()
    controls: Sequence[Control] = ()
    image_prompts: Sequence[ImagePrompt] = ()
    seamless: str | None = None
    deep_shrink: float | None = None
    cache_interval: int = 1
    eta: float = 0.0
    prompt_syntax: bool = True
    clean_prompt: bool = False
    clip_skip: int = 1
    prompts: tuple[str, ...] = field(init=False, repr=False, compare=False)
    negative_prompts: tuple[str, ...] = field(init=False, repr=False, compare=False)
    seeds: tuple[int, ...] | None = field(init=False, repr=False, compare=False)
    variation_seeds: tuple[int, ...] | None = field(init=False, repr=False, compare=False)

    def __new__(cls, *arguments: object, **options: object) -> Self:
        """Refuse names that are no fields, before a dataclass does it in other words."""
        if arguments:
            raise RequestError("a request's fields are given by name; write Request(prompt=...)")
        check_names(options, [f.name for f in fields(cls) if f.init])
        return object.__new__(cls)

    def __post_init__(self) -> None:
        """Fill in defaults, and refuse what no model could fulfil."""
        for each in fields(self):
            if each.init and getattr(self, each.name) is None:
                if each.default is MISSING:
                    raise RequestError(f"{each.name} is None; give a text or a list of texts")
                object.__setattr__(self, each.name, each.default)
        self._check_method()
        self._check_guidance()
        self._check_image()
        if self.regions != ():
            check_regions(self.regions, prompt_syntax=self.prompt_syntax)
        controls = checked_controls(self.controls) if self.controls != () else ()
        object.__setattr__(self, "controls", controls)
        if self.image_prompts != ():
            object.__setattr__(self, "image_prompts", checked_image_prompts(self.image_prompts))
        object.__setattr__(self, "prompts", self._prompts())
        object.__setattr__(self, "negative_prompts", self._negative_prompts())
        check_number("variation_strength", self.variation_strength, Real, 0, 1)
        if self.variation_seed is not None and not self.variation_strength:
            raise RequestError("variation_seed came without variation_strength; give it above 0")
        count, step = len(self.prompts) * self.num_images_per_prompt, not self.variation_strength
        varied = seeds_of("variation_seed", self.variation_seed, count, 1)
        object.__setattr__(self, "seeds", seeds_of("seed", self.seed, count, int(step)))
        object.__setattr__(self, "variation_seeds", varied)

    def _check_method(self) -> None:
        check_given("num_inference_steps", self.num_inference_steps, Integral, 1, MAX_STEPS)
        for name, example in (("preset", "fast"), ("sampler", "ddim"), ("schedule", "karras")):
            if not isinstance(getattr(self, name), str | None):
                raise RequestError(
                    f"{name} is {getattr(self, name)!r}; give a name, such as {example!r}"
                )
        if self.preset is not None:
            check_choice("preset", self.preset, tuple(PRESETS))
        if self.seamless is not None:
            check_choice("seamless", self.seamless, tuple(AXES))
        if self.sampler is not None or self.schedule is not None:
            resolve(self.sampler or DEFAULT_SAMPLER, self.schedule)
        check_number("cache_interval", self.cache_interval, Integral, 1, MAX_STEPS)
        check_given("deep_shrink", self.deep_shrink, Real, 0, 1)
        check_number("eta", self.eta, Real, 0, 1)
        check_number("clip_skip", self.clip_skip, Integral, 1, MAX_CLIP_SKIP)
        for name in ("prompt_syntax", "clean_prompt", "paste_back"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} is {getattr(self, name)!r}; give True or False")
        check_number("num_images_per_prompt", self.num_images_per_prompt, Integral, 1, MAX_IMAGES)
        check_choice("noise", self.noise, tuple(NOISES))
        for name in ("height", "width"):
            check_given(name, getattr(self, name), Integral, 1, MAX_SIDE)

    def _check_guidance(self) -> None:
        if self.guidance_scale is not None:
            check_scale("guidance_scale", self.guidance_scale, MAX_SCALE)
        check_given("guidance_rescale", self.guidance_rescale, Real, 0, 1)
        check_given("negative_scale", self.negative_scale, Real, 0, MAX_SCALE)
        check_given("pag_scale", self.pag_scale, Real, 0, MAX_SCALE)
        if self.apg is not None:
            check_apg(self.apg)
        check_interval("guidance_interval", self.guidance_interval)

    def _check_image(self) -> None:
        check_choice("inpaint_area", self.inpaint_area, AREAS)
        check_number("mask_padding", self.mask_padding, Integral, 0, MAX_SIDE)
        check_number("mask_blur", self.mask_blur, Real, 0, MAX_BLUR)
        check_given("strength", self.strength, Real, 0, 1)
        if self.image_noise is not None:
            check_image_noise(self.image_noise, self.strength, bool(self.mask or self.extend))
        check_given("image_guidance_scale", self.image_guidance_scale, Real, 1, MAX_SCALE)
        check_without(*idle_fields(self.image, self.mask, self.extend, self.inpaint_area), self)
        for name in ("image", "mask"):
            image = getattr(self, name)
            if image is not None and not (name == "mask" and image == ALPHA):
                check_image(name, image)
                object.__setattr__(self, name, upright(image))
        if self.mask == ALPHA:
            assert self.image is not None
            object.__setattr__(self, "mask", transparency(self.image))
            object.__setattr__(self, "image", self.image.convert("RGB"))
        if self.inpaint_area == MASKED and self.mask is None:
            raise RequestError('inpaint_area is "masked" without a mask; give what to paint anew')
        if self.extend is not None:
            check_extend(self.extend)
        if self.hires is not None and not isinstance(self.hires, Hires):
            raise RequestError(f"hires is {self.hires!r}; give Hires(scale=2.0)")
        if self.hires is not None and (self.mask is not None or self.extend is not None):
            raise RequestError("hires and a mask came together; enlarge first, then paint anew")

    def _prompts(self) -> tuple[str, ...]:
        prompts = [self.prompt] if isinstance(self.prompt, str) else texts("prompt", self.prompt)
        if not prompts:
            raise RequestError("prompt is an empty list; give one text or several")
        return tuple(prompts)

    def _negative_prompts(self) -> tuple[str, ...]:
        count = len(self.prompts)
        if isinstance(self.negative_prompt, str):
            return (self.negative_prompt,) * count
        if len(negative := texts("negative_prompt", self.negative_prompt)) != count:
            raise RequestError(
                f"negative_prompt has {len(negative)} texts and prompt has {count}; "
                "give one text, or as many as there are prompts"
            )
        return tuple(negative)

    def draw_seeds(self) -> list[int]:
        """Return one seed for each picture: those given, or counting up from one that is drawn.

        With a variation strength what is drawn is that of all pictures.
        """
        return self._drawn(self.seeds, 0 if self.variation_strength else 1)

    def draw_variation_seeds(self) -> list[int]:
        """Return one variation seed for each picture, likewise; none without a strength."""
        return self._drawn(self.variation_seeds, 1) if self.variation_strength else []

    def _drawn(self, given: Sequence[int] | None, step: int) -> list[int]:
        count = len(self.prompts) * self.num_images_per_prompt
        return draw_seeds(count, step) if given is None else list(given)

    @property
    def adapters(self) -> tuple[AdapterTag, ...]:
        """The adapters that the prompts name."""
        texts = dict.fromkeys(self.prompts) if self.names_files else ()
        return tuple(tag for text in texts for tag in take_names(text, NO_WORDS).adapters)

    @property
    def is_template(self) -> bool:
        """Whether a text may hold alternatives or wildcards."""
        texts = (*self.prompts, *self.negative_prompts)
        return self.prompt_syntax and any(map(alternatives.MARKS.search, texts))

    @property
    def names_files(self) -> bool:
        """Whether a text may name an adapter, or a word of textual inversion."""
        texts = (*self.prompts, *self.negative_prompts)
        return self.prompt_syntax and any(map(MARKS.search, texts))

    def composed(
        self, words: Mapping[str, str] = NO_WORDS
    ) -> tuple[list[list[str]], NDArray[np.float64]]:
        """Return the parts of the prompts that AND joins, (m, P) texts, and what each counts.

        All prompts get as many parts as the longest has; those that a prompt lacks count 0. Raises
        RequestError for more parts than can be drawn together.
        words: that the model was taught, as `take_names` has them
        """
        return compose_all(self.written(self.prompts, words))

    def written(self, texts: Sequence[str], words: Mapping[str, str] = NO_WORDS) -> list[str]:
        """Return texts as the encoder is to read them: without names, or all syntax escaped."""
        if not self.prompt_syntax:
            return [escape(text) for text in texts]
        return [take_names(text, words).text if MARKS.search(text) else text for text in texts]

    def size(self, default: tuple[int, int], multiple: int) -> tuple[int, int]:
        """Return height and width in pixels: those given, or the default's.

        Both must be multiples of `multiple`. Raises RequestError otherwise.
        """
        height = default[0] if self.height is None else self.height
        width = default[1] if self.width is None else self.width
        check_sides(height, width, multiple, MAX_SIDE)
        return int(height), int(width)
