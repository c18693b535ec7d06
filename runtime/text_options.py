"""The options of `python -m runtime` on the text and its guidance: what argparse takes of each."""

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from runtime.plan import GUIDANCE_SCALE

__all__ = ["TEXT_OPTIONS", "read_numbers"]


def read_numbers(kind: Callable[[str], Any], separator: str, count: int | None, text: str) -> Any:
    """Read numbers with something between them; a single one stays alone, if count is None.

    Raises ArgumentTypeError for others.
    """
    try:
        values = tuple(kind(part) for part in text.split(separator))
    except ValueError:
        values = ()
    if not values or (count and len(values) != count):
        noun = "whole number" if kind is int else "number"
        wanted = f"{count} {noun}s" if count else f"a {noun}, or several"
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted} with {separator!r} between")
    return values if count or len(values) > 1 else values[0]


TEXT_OPTIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "--guidance-scale": {
            "type": partial(read_numbers, float, ":", None),
            "metavar": "S[:S]",
            "help": "how closely to follow the text; 1 turns guidance off, 7:3 falls from 7 to 3 "
            f"(default: {GUIDANCE_SCALE}, or what a distilled model is made for)",
        },
        "--guidance-rescale": {
            "type": float,
            "metavar": "X",
            "help": "0 to 1; 0.7 against burnt colours at high scales (default: 0)",
        },
        "--guidance-interval": {
            "type": partial(read_numbers, float, ":", 2),
            "default": (0.0, 1.0),
            "metavar": "A:B",
            "help": "the part of the steps that is guided, such as 0:0.8; the rest costs half",
        },
        "--negative-scale": {
            "type": float,
            "metavar": "S",
            "help": "a scale of its own for the negative prompt (default: that of the guidance)",
        },
        "--pag-scale": {
            "type": float,
            "metavar": "P",
            "help": "perturbed-attention guidance beside the other, such as 3 (default: none)",
        },
        "--apg": {
            "type": partial(read_numbers, float, ":", 3),
            "metavar": "ETA:R:M",
            "help": "projected guidance at high scales: how much is taken of what is parallel, the "
            "largest norm (0: any) and the momentum, such as 0:15:-0.5",
        },
        "--plain-prompt": {
            "dest": "prompt_syntax",
            "action": "store_false",
            "help": "take brackets in prompts as text; (word:1.3) and its kin are syntax otherwise",
        },
        "--clean-prompt": {
            "action": "store_true",
            "help": "resolve HTML entities and curly quotes, as CLIP's original tokenizer does",
        },
        "--clip-skip": {
            "type": int,
            "default": 1,
            "metavar": "N",
            "help": "2 leaves out the text encoder's last layer (default: %(default)s)",
        },
    }
)
