"""The fields of `Request` as keyword arguments, for `Pipeline.__call__` and typed callers."""

from collections.abc import Sequence
from typing import TypedDict

from PIL import Image

from runtime.images.upscaling import Hires


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
    sampler: str | None
    schedule: str | None
    height: int | None
    width: int | None
    seed: int | Sequence[int] | None
    variation_strength: float | None
    variation_seed: int | Sequence[int] | None
    noise: str | None
    image: Image.Image | None
    mask: Image.Image | None
    mask_blur: float | None
    paste_back: bool | None
    extend: tuple[int, int, int, int] | None
    strength: float | None
    hires: Hires | None
    cache_interval: int | None
    eta: float | None
    prompt_syntax: bool | None
    clean_prompt: bool | None
    clip_skip: int | None
