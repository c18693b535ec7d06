"""The options of a call, for `Pipeline.__call__` and typed callers."""

from collections.abc import Sequence
from typing import Any, Literal, TypedDict

from PIL import Image

from runtime.control import Control
from runtime.image_prompt import ImagePrompt
from runtime.images.upscaling import Hires
from runtime.regions import Region

OutputType = Literal["pil", "np", "latent"]
"""What the images of a call are: PIL's, arrays of 0 to 1, or the last latents."""


class RequestOptions(TypedDict, total=False):
    """The fields of `Request` but the prompt, as `Pipeline.__call__` takes them."""

    negative_prompt: str | Sequence[str] | None
    num_images_per_prompt: int | None
    preset: str | None
    num_inference_steps: int | None
    guidance_scale: float | Sequence[float] | None
    guidance_rescale: float | None
    guidance_interval: tuple[float, float] | None
    negative_scale: float | None
    pag_scale: float | None
    apg: tuple[float, float, float] | None
    sampler: str | None
    schedule: str | None
    height: int | None
    width: int | None
    seed: int | Sequence[int] | None
    variation_strength: float | None
    variation_seed: int | Sequence[int] | None
    noise: str | None
    image: Image.Image | None
    mask: Image.Image | str | None
    inpaint_area: str | None
    mask_padding: int | None
    mask_blur: float | None
    paste_back: bool | None
    extend: tuple[int, int, int, int] | None
    strength: float | None
    image_noise: str | None
    image_guidance_scale: float | None
    hires: Hires | None
    regions: Sequence[Region] | None
    controls: Sequence[Control] | None
    image_prompts: Sequence[ImagePrompt] | None
    seamless: str | None
    deep_shrink: float | None
    cache_interval: int | None
    eta: float | None
    prompt_syntax: bool | None
    clean_prompt: bool | None
    clip_skip: int | None


class CallOptions(RequestOptions, total=False):
    """The fields, and diffusers' other arguments (`runtime.diffusers_arguments`)."""

    output_type: OutputType | None
    generator: Any
    callback_on_step_end: Any
    callback_on_step_end_tensor_inputs: Sequence[str] | None
    latents: Any
    prompt_embeds: Any
    negative_prompt_embeds: Any
    pooled_prompt_embeds: Any
    negative_pooled_prompt_embeds: Any
    return_dict: bool | None
