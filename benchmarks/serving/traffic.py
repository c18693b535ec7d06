"""Requests that come by chance and do not wait for each other's answers: open-loop load."""

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from serving.limits import Limits
from serving.order import Order
from serving.picture_request import PictureRequest

STEPS = 10, 50
SAMPLERS = ("ddim", "euler_a", "lms", "dpmpp_2m", "unipc")
SCALES = (2.0, 4.0, 5.0, 7.5)
DEFAULTS: Mapping[str, Any] = {
    "num_inference_steps": 30,
    "sampler": "ddim",
    "guidance_scale": 5.0,
}
DEFAULT_SHARE = 0.7


def _mixed(rng: random.Random) -> Mapping[str, Any]:
    return {
        "num_inference_steps": rng.randint(*STEPS),
        "sampler": rng.choice(SAMPLERS),
        "guidance_scale": rng.choice(SCALES),
    }


def _mostly_equal(rng: random.Random) -> Mapping[str, Any]:
    return DEFAULTS if rng.random() < DEFAULT_SHARE else _mixed(rng)


MIXES: Mapping[str, Callable[[random.Random], Mapping[str, Any]]] = {
    "mixed": _mixed,
    "mostly equal": _mostly_equal,
    "equal": lambda rng: DEFAULTS,
}


def orders(mix: str, count: int, seed: int = 11) -> list[Order]:
    """Return so many orders of one picture each, the same for a seed."""
    rng = random.Random(seed)
    return [
        Order(
            job=str(number),
            picture_request=PictureRequest(
                fields={"prompt": f"a {number}", "seed": number, **MIXES[mix](rng)},
                model="pictogram",
            ).checked(Limits()),
        )
        for number in range(count)
    ]


def poisson(count: int, rate: float, seed: int = 12) -> list[float]:
    """Return when so many come, in seconds, at a mean rate a second."""
    rng = random.Random(seed)
    return list(accumulate(rng.expovariate(rate) for _ in range(count)))


def at_once(count: int) -> list[float]:
    """Return when they come, all at the beginning: what is drawn a second then is the capacity."""
    return [0.0] * count


def settings(order: Order, *left_out: str) -> Sequence[tuple[str, Any]]:
    """Return what two requests must have in common beside prompt and seed, and what is named."""
    fields = order.picture_request.fields
    return sorted((k, v) for k, v in fields.items() if k not in ("prompt", "seed", *left_out))
