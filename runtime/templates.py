"""A request whose prompts are templates becomes one with a text for each picture."""

from dataclasses import replace
from random import Random

from runtime.conditioning.alternatives import Lines, expand
from runtime.plan import Plan
from runtime.request import Request

__all__ = ["expand_request", "with_templates"]


def expand_request(request: Request, wildcards: Lines | None) -> tuple[Request, list[str]]:
    """Choose every picture's texts by its seed; also return notes on wildcards that say nothing.

    Raises RequestError as `expand` does.
    """
    seeds, variation_seeds = request.draw_seeds(), request.draw_variation_seeds()
    repeats = request.num_images_per_prompt
    prompts, negatives, notes = list[str](), list[str](), dict[str, None]()
    for index, seed in enumerate(seeds):
        random = Random(seed)
        for texts, written in (
            (prompts, request.prompts[index // repeats]),
            (negatives, request.negative_prompts[index // repeats]),
        ):
            text, said = expand(written, random, wildcards)
            texts.append(text)
            notes |= dict.fromkeys(said)
    chosen = replace(
        request,
        prompt=prompts,
        negative_prompt=negatives,
        num_images_per_prompt=1,
        seed=seeds,
        variation_seed=variation_seeds or None,
    )
    return chosen, list(notes)


def with_templates(plan: Plan, request: Request) -> Plan:
    """Return a plan whose settings name the templates that a request's texts were chosen from."""
    repeats = request.num_images_per_prompt
    each = [text for text in request.prompts for _ in range(repeats)]
    settings = [
        {**made, "template": written} if made["prompt"] != written else made
        for made, written in zip(plan.settings, each, strict=True)
    ]
    return replace(plan, settings=settings)
