"""What a request leaves open: its preset says, then the model's authors, then the defaults here."""

from dataclasses import asdict, replace
from typing import Any

from engine.model import Model
from runtime.presets import preset, variant_sampler
from runtime.request import Request
from runtime.samplers import DEFAULT_SAMPLER

__all__ = ["GUIDANCE_SCALE", "PAINTED_STRENGTH", "STEPS", "STRENGTH", "filled_in"]

STEPS, GUIDANCE_SCALE = 20, 5.0
STRENGTH, PAINTED_STRENGTH = 0.8, 1.0  # of image-to-image, and of what is painted anew


def filled_in(request: Request, model: Model) -> Request:
    """Return a request that leaves nothing open but its size."""
    chosen = asdict(preset(request.preset, model)) if request.preset else {}
    painted = request.mask is not None or request.extend is not None
    if request.image is not None:
        chosen["size"] = None
    if request.sampler is not None:
        chosen["schedule"] = None  # it was meant for another

    def choose(name: str, *others: Any) -> Any:
        choices = (getattr(request, name), chosen.get(name), *others)
        return next((choice for choice in choices if choice is not None), None)

    return replace(
        request,
        num_inference_steps=choose("num_inference_steps", model.steps, STEPS),
        guidance_scale=choose("guidance_scale", model.guidance_scale, GUIDANCE_SCALE),
        guidance_rescale=choose("guidance_rescale", 0.0),
        sampler=choose(
            "sampler", variant_sampler(model) if model.variant else None, DEFAULT_SAMPLER
        ),
        schedule=choose("schedule"),
        height=choose("height", chosen.get("size")),
        width=choose("width", chosen.get("size")),
        strength=None
        if request.image is None
        else choose("strength", PAINTED_STRENGTH if painted else STRENGTH),
        seed=request.draw_seeds(),  # once for all runs
        variation_seed=request.draw_variation_seeds() or None,
    )
