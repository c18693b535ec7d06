"""The families of models that one architecture each makes, and what is told of them in public.

Facts that no weight holds: the noise schedule, the size of pictures in training, which hidden
states the UNet attends to, how many steps a distilled model wants. The schedules are those of the
published `scheduler_config.json` files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from engine.configs.diffusion import XL_SCALING_FACTOR

__all__ = ["EMBEDDED_GUIDANCE", "FAMILIES", "VARIANTS", "Family", "FamilyName", "Variant"]

FamilyName = Literal["sd1", "sd2", "xl", "xl-refiner"]
Context = Literal["last_hidden_state", "penultimate_hidden_state"]

# What every one of them was trained with (Rombach et al. 2022, arXiv:2112.10752, and its code:
# `linear_start`, `linear_end` and the square of what lies evenly between their roots).
_SCHEDULE: Mapping[str, Any] = {
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
_XL_SCHEDULE: Mapping[str, Any] = {
    **_SCHEDULE,
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What the models of one architecture share beside it.

    context: which output of the text encoders the UNet attends to
    scheduler: a `scheduler_config.json`, before what single models have of their own
    sample_size: side of the latents in training
    scaling_factor: of the latents
    """

    name: FamilyName
    title: str
    context: Context
    scheduler: Mapping[str, Any]
    sample_size: int
    scaling_factor: float = 0.18215


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A model distilled to few steps: what its authors recommend.

    steps: from, to; guidance_scale: 1 is none
    scheduler, sample_size: what replaces the family's
    """

    name: str
    families: tuple[FamilyName, ...]
    steps: tuple[int, int]
    guidance_scale: float
    scheduler: Mapping[str, Any]
    sample_size: int | None = None


FAMILIES: Mapping[FamilyName, Family] = MappingProxyType(
    {
        family.name: family
        for family in (
            Family(
                name="sd1",
                title="Stable Diffusion 1.x",
                context="last_hidden_state",
                scheduler=MappingProxyType({"_class_name": "PNDMScheduler", **_SCHEDULE}),
                sample_size=64,
            ),
            Family(
                name="sd2",
                title="Stable Diffusion 2.x",
                context="last_hidden_state",
                scheduler=MappingProxyType({"_class_name": "DDIMScheduler", **_SCHEDULE}),
                sample_size=64,
            ),
            Family(
                name="xl",
                title="Stable Diffusion XL",
                context="penultimate_hidden_state",
                scheduler=MappingProxyType(_XL_SCHEDULE),
                sample_size=128,
                scaling_factor=XL_SCALING_FACTOR,
            ),
            Family(
                name="xl-refiner",
                title="Stable Diffusion XL refiner",
                context="penultimate_hidden_state",
                scheduler=MappingProxyType(_XL_SCHEDULE),
                sample_size=128,
                scaling_factor=XL_SCALING_FACTOR,
            ),
        )
    }
)

_EVERY: tuple[FamilyName, ...] = ("sd1", "sd2", "xl", "xl-refiner")
_TRAILING = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}

VARIANTS = (
    Variant(  # Sauer et al. 2023, arXiv:2311.17042
        name="turbo",
        families=("sd1", "sd2"),
        steps=(1, 4),
        guidance_scale=1.0,
        scheduler=MappingProxyType(_TRAILING),
    ),
    Variant(
        name="turbo",
        families=("xl", "xl-refiner"),
        steps=(1, 4),
        guidance_scale=1.0,
        scheduler=MappingProxyType({**_TRAILING, "_class_name": "EulerAncestralDiscreteScheduler"}),
        sample_size=64,
    ),
    Variant(  # Lin et al. 2024, arXiv:2402.13929
        name="lightning",
        families=_EVERY,
        steps=(4, 8),
        guidance_scale=1.0,
        scheduler=MappingProxyType(_TRAILING),
    ),
    Variant(  # Ren et al. 2024, arXiv:2404.13686
        name="hyper",
        families=_EVERY,
        steps=(4, 8),
        guidance_scale=1.0,
        scheduler=MappingProxyType({**_TRAILING, "_class_name": "DDIMScheduler"}),
    ),
    Variant(  # Luo et al. 2023, arXiv:2310.04378
        name="lcm",
        families=_EVERY,
        steps=(4, 8),
        guidance_scale=1.0,
        scheduler=MappingProxyType(
            {
                "_class_name": "LCMScheduler",
                "original_inference_steps": 50,
                "set_alpha_to_one": True,
                "steps_offset": 0,
                "timestep_scaling": 10.0,
                "timestep_spacing": "leading",
            }
        ),
    ),
)
EMBEDDED_GUIDANCE = 8.0  # what an LCM that is told its guidance (`time_cond_proj_dim`) wants
