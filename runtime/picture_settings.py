"""What makes each picture of a request again: the fields that files, answers and results keep.

And notes on what of a request changes nothing in them.
"""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from runtime.checks import OneOrMore, several
from runtime.control import NONE
from runtime.request import OF_AN_IMAGE, Request

__all__ = ["picture_settings", "unheard_notes"]


def picture_settings(
    request: Request, seeds: Sequence[int], variation_seeds: Sequence[int], size: tuple[int, int]
) -> list[dict[str, Any]]:
    """Return for every picture the fields of the request that make it again, ready for JSON.

    request: that leaves nothing open but its size; size: height and width
    seeds, variation_seeds: of each picture, the latter empty where none varies
    """
    own = {"prompt", "negative_prompt", "num_images_per_prompt", "preset", "image", "mask"}
    own |= {"regions", "controls", "image_prompts", "seed", "variation_seed"}
    own |= set() if variation_seeds else {"variation_strength"}
    shared = {
        f.name: getattr(request, f.name) for f in fields(request) if f.init and f.name not in own
    }
    if request.hires is not None:
        hires = {f.name: getattr(request.hires, f.name) for f in fields(request.hires)}
        shared["hires"] = {**hires, "upscaler": Path(request.hires.upscaler).name}
    if request.controls:
        shared["controls"] = [control.text for control in request.controls]
        shared["control_modes"] = [control.mode for control in request.controls]
        types = [control.type or NONE for control in request.controls]
        if any(name != NONE for name in types):
            shared["control_types"] = types
        if any(control.preprocessor is not None for control in request.controls):
            made = [control.preprocessor_text for control in request.controls]
            shared["control_preprocessors"] = made
    if request.image_prompts:
        shared["image_prompts"] = [prompt.text for prompt in request.image_prompts]
    if request.image is None:  # with one, its own size is drawn where none is given
        shared = {k: v for k, v in shared.items() if k not in OF_AN_IMAGE}
        shared |= {"height": size[0], "width": size[1]}
    texts = zip(request.prompts, request.negative_prompts, strict=True)
    each = [pair for pair in texts for _ in range(request.num_images_per_prompt)]
    varied = [{"variation_seed": seed} for seed in variation_seeds] or [{}] * len(each)
    return [
        {"prompt": prompt, "negative_prompt": negative, "seed": seed, **variation, **shared}
        for (prompt, negative), seed, variation in zip(each, seeds, varied, strict=True)
    ]


def unheard_notes(request: Request, scale: OneOrMore[float], *, is_guided: bool) -> list[str]:
    """Return notes on what a request says of guidance in vain.

    scale: of the run, a number or several; is_guided: whether it moves away from anything
    """
    negative = any(text.strip() for text in request.negative_prompts)
    if is_guided:
        vain = request.negative_scale is not None and not negative
        return ["negative_scale changes nothing without a negative prompt"] if vain else []
    guides = any(each > 1 for each in several(scale))  # where the interval lets it
    asked = {
        "the negative prompt": negative,
        "negative_scale": request.negative_scale is not None,
        "guidance_rescale": bool(request.guidance_rescale),
        "guidance_interval": tuple(request.guidance_interval) != (0.0, 1.0) and not guides,
    }
    return [
        f"{name} changes nothing: at this guidance scale only the prompt is seen"
        for name, is_asked in asked.items()
        if is_asked
    ]
