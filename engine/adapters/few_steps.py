"""Adapters that distil a model to few steps, and what is drawn with then."""

from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType

from engine.adapters.choice import AdapterChoice
from engine.checkpoints.few_steps import find_variant_of_adapter
from engine.model import Model

__all__ = ["with_few_steps"]


def with_few_steps(model: Model, choices: Sequence[AdapterChoice]) -> tuple[Model, str]:
    """Return a model as its adapters distil it to few steps, and why; itself and "" where none do.

    The first whose name tells so counts, if it is added to the UNet at all.
    """
    for choice in choices:
        variant = find_variant_of_adapter(choice.path, model.family.variants)
        if variant and choice.unet > 0:
            distilled = replace(
                model,
                variant=variant,
                scheduler=MappingProxyType({**model.scheduler, **variant.scheduler}),
                steps=variant.steps[1],
                guidance_scale=variant.guidance_scale,
            )
            return distilled, (
                f"{choice.path.name} distils to few steps ({variant.name}), from its name: "
                f"{distilled.steps} steps and a guidance scale of {variant.guidance_scale:g} are "
                "taken where nothing else is asked for"
            )
    return model, ""
