"""Models distilled to few steps: what their authors recommend, in place of the family's own."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

__all__ = ["EMBEDDED_GUIDANCE", "VARIANTS", "Variant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A model distilled to few steps: what its authors recommend.

    steps: from, to; guidance_scale: 1 is none
    scheduler, sample_size: what replaces the family's
    """

    name: str
    families: tuple[str, ...]
    steps: tuple[int, int]
    guidance_scale: float
    scheduler: Mapping[str, Any]
    sample_size: int | None = None


_EVERY = ("sd1", "sd2", "xl", "xl-refiner")
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
