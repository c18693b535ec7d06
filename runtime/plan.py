"""What a pipeline knows before, during and after the loop: plan, progress, result."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.samplers import Program

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Progress:
    """The state after a step, for progress and previews.

    step: 1 to total; latents: (B, C, height // 8, width // 8) float32
    """

    step: int
    total: int
    latents: Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """The pictures, in the order of the prompts, and what they were made with.

    seeds: one for each picture; warnings: sentences for the user
    """

    images: list[Image.Image]
    seeds: list[int]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """Everything that is known of a request before the first step."""

    program: Program
    conditioning: Mapping[str, Array]  # inputs of the first step, of `runtime.conditioning`
    num_inference_steps: int
    guidance_scale: float
    seeds: list[int]
    height: int  # pixels
    width: int
    image: Image.Image | None
    warnings: tuple[str, ...]
    changes: Mapping[int, Mapping[str, Array]] = field(default_factory=dict)
    """By steps, counted from 0: what takes the place of conditioning there and after."""
