"""A family: the models of one architecture, and what is told of them in public.

Facts that no weight holds stand beside what the weights tell: the noise schedule, the size of
pictures in training, which hidden states the UNet attends to. The schedules are those of the
published `scheduler_config.json` files.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from re import Pattern
from types import MappingProxyType
from typing import Any, Literal

from engine.checkpoints.architecture import Stored
from engine.checkpoints.component import ComponentName
from engine.checkpoints.parts import PartLayout
from engine.configs.base import Config

__all__ = [
    "SCALING_FACTOR",
    "SCHEDULE",
    "Context",
    "Family",
    "PredictionType",
    "Preset",
    "Presets",
    "Variant",
    "choice",
    "has",
]

Context = Literal["last_hidden_state", "penultimate_hidden_state"]
PredictionType = Literal["epsilon", "v_prediction", "sample"]

SCALING_FACTOR = 0.18215  # of the latents of Stable Diffusion 1 and 2
# What every one of them was trained with (Rombach et al. 2022, arXiv:2112.10752, and its code:
# `linear_start`, `linear_end` and the square of what lies evenly between their roots).
SCHEDULE: Mapping[str, Any] = MappingProxyType(
    {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "prediction_type": "epsilon",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """What a request takes where the user gave no value.

    num_inference_steps, guidance_scale, guidance_rescale, sampler, schedule: a request's
    size: side in pixels, or None for the model's own
    """

    num_inference_steps: int
    guidance_scale: float
    sampler: str
    schedule: str | None = None
    guidance_rescale: float = 0.0
    size: int | None = None


def choice(
    steps: int,
    scale: float,
    sampler: str = "dpmpp_2m",
    schedule: str | None = None,
    size: int | None = None,
) -> Preset:
    """Return a preset, on one line of a family's table."""
    return Preset(
        num_inference_steps=steps,
        guidance_scale=scale,
        sampler=sampler,
        schedule=schedule,
        size=size,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Presets:
    """The four ways to draw with one kind of model; title: what a command's help calls the kind.

    Guidance is what the models' authors draw with, or near it.
    """

    title: str
    fast: Preset
    balanced: Preset
    quality: Preset
    creative: Preset


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A model distilled to few steps: what its authors recommend.

    steps: from, to; guidance_scale: 1 is none
    scheduler, sample_size: what replaces the family's
    """

    name: str
    steps: tuple[int, int]
    guidance_scale: float
    scheduler: Mapping[str, Any]
    sample_size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What the models of one architecture have in common.

    recognises: whether a file of the original layout, read without a prefix, is of this family
    unet: the fields of a UNet's configuration that tell the family of a folder
    parts: how files keep the parts, in the order in which they are read: text encoders first
    pipelines: what diffusers calls the family, before the task and "Pipeline"
    context: which output of the text encoders the UNet attends to
    zeros_for_empty_prompt: whether an empty negative prompt stands for a text of zeros
    scheduler: a `scheduler_config.json`, before what single models have of their own
    prediction_type: of most of its models, where nothing says what one predicts
    prediction_names: patterns of files' names by which the family's models say it
    sample_size: side of the latents in training; v_sample_size: of models that predict v
    scaling_factor: of the latents
    presets, v_presets: the second of models that predict v, where those differ
    variants: its models distilled to few steps
    published: architectures whose graphs ship, by component; every text encoder is one
    """

    name: str
    title: str
    recognises: Callable[[Stored], bool]
    unet: Mapping[str, Any]
    parts: Mapping[ComponentName, PartLayout[Any]]
    pipelines: tuple[str, ...]
    context: Context = "last_hidden_state"
    zeros_for_empty_prompt: bool = False
    scheduler: Mapping[str, Any]
    prediction_type: PredictionType = "epsilon"
    prediction_names: tuple[tuple[Pattern[str], PredictionType], ...] = ()
    sample_size: int
    v_sample_size: int | None = None
    scaling_factor: float = SCALING_FACTOR
    presets: Presets
    v_presets: Presets | None = None
    variants: tuple[Variant, ...] = ()
    published: Mapping[ComponentName, tuple[Config, ...]] = field(default_factory=dict)


def has(file: Stored, prefixes: tuple[str, ...]) -> bool:
    """Tell whether a file has tensors under one of these prefixes."""
    return any(prefix.rstrip(".") in file for prefix in prefixes)
