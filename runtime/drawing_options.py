"""The options of `python -m runtime` on how pictures are drawn: what argparse takes of each."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from engine.graphs.seamless import AXES
from runtime.noise import NOISES
from runtime.plan import STEPS
from runtime.presets import PRESETS
from runtime.samplers import DEFAULT_SAMPLER, SAMPLERS, SCHEDULES
from runtime.text_options import read_numbers

__all__ = ["DRAWING_OPTIONS"]

DRAWING_OPTIONS: Sequence[tuple[tuple[str, ...], Mapping[str, Any]]] = (
    (
        ("--preset",),
        {"metavar": "NAME", "help": f"one of {', '.join(PRESETS)}; see below"},
    ),
    (
        ("--sampler",),
        {"metavar": "NAME", "help": f"one of {', '.join(SAMPLERS)} (default: {DEFAULT_SAMPLER})"},
    ),
    (
        ("--schedule",),
        {"metavar": "NAME", "help": f"one of {', '.join(SCHEDULES)} (default: the model's own)"},
    ),
    (
        ("--steps",),
        {
            "dest": "num_inference_steps",
            "type": int,
            "metavar": "N",
            "help": f"denoising steps (default: {STEPS}, or what a distilled model is made for)",
        },
    ),
    (
        ("--cache-interval",),
        {
            "type": int,
            "default": 1,
            "metavar": "N",
            "help": "compute the whole UNet at every Nth call only: faster, less exact "
            "(default: %(default)s)",
        },
    ),
    (
        ("--seamless",),
        {
            "choices": tuple(AXES),
            "help": "join opposite edges of the picture: left and right, top and bottom, or all",
        },
    ),
    (
        ("--deep-shrink",),
        {
            "type": float,
            "metavar": "X",
            "help": "the first part of the steps, such as 0.35, in which the UNet's lower levels "
            "see half the sides: larger pictures than the model was trained on",
        },
    ),
    (
        ("--eta",),
        {
            "type": float,
            "default": 0.0,
            "metavar": "X",
            "help": "noise that ddim and tcd add, 0 to 1 (default: %(default)s)",
        },
    ),
    (
        ("--height",),
        {"type": int, "metavar": "PIXELS", "help": "a multiple of 8 (default: the model's own)"},
    ),
    (
        ("--width",),
        {"type": int, "metavar": "PIXELS", "help": "a multiple of 8 (default: the model's own)"},
    ),
    (
        (
            "-s",
            "--seed",
        ),
        {
            "type": partial(read_numbers, int, ",", None),
            "metavar": "N",
            "help": "the same seed gives the same picture; with commas one for each picture, "
            "-1 for any",
        },
    ),
    (
        ("--variation-strength",),
        {
            "type": float,
            "default": 0.0,
            "metavar": "X",
            "help": "0 to 1: how far from the seed's noise to --variation-seed's (default: 0)",
        },
    ),
    (
        ("--variation-seed",),
        {
            "type": partial(read_numbers, int, ",", None),
            "metavar": "N",
            "help": "whose noise pictures of one seed vary by; counts up for several pictures",
        },
    ),
    (
        ("--noise",),
        {
            "choices": tuple(NOISES),
            "default": "cpu",
            "help": "whose random numbers a seed means: torch's on the processor, or on a GPU, as "
            "Automatic1111's (default: %(default)s)",
        },
    ),
    (
        (
            "-n",
            "--num-images",
        ),
        {
            "dest": "num_images_per_prompt",
            "type": int,
            "default": 1,
            "metavar": "N",
            "help": "pictures to draw, with seeds that count up (default: %(default)s)",
        },
    ),
    (
        ("--batch-size",),
        {
            "type": int,
            "metavar": "N",
            "help": "pictures to draw at once, the others after them (default: by memory, up to 4)",
        },
    ),
)
