"""Models distilled to few steps: what their authors recommend, in place of a family's own."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from engine.checkpoints.families.base import Variant

__all__ = ["DMD2", "EMBEDDED_GUIDANCE", "HYPER", "LCM", "LIGHTNING", "TCD", "TURBO", "XL_TURBO"]

_TRAILING: Mapping[str, Any] = MappingProxyType(
    {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
)

TURBO = Variant(  # Sauer et al. 2023, arXiv:2311.17042
    name="turbo", steps=(1, 4), guidance_scale=1.0, scheduler=_TRAILING
)
XL_TURBO = Variant(
    name="turbo",
    steps=(1, 4),
    guidance_scale=1.0,
    scheduler=MappingProxyType({**_TRAILING, "_class_name": "EulerAncestralDiscreteScheduler"}),
    sample_size=64,
)
LIGHTNING = Variant(  # Lin et al. 2024, arXiv:2402.13929
    name="lightning", steps=(4, 8), guidance_scale=1.0, scheduler=_TRAILING
)
HYPER = Variant(  # Ren et al. 2024, arXiv:2404.13686
    name="hyper",
    steps=(4, 8),
    guidance_scale=1.0,
    scheduler=MappingProxyType({**_TRAILING, "_class_name": "DDIMScheduler"}),
)
LCM = Variant(  # Luo et al. 2023, arXiv:2310.04378
    name="lcm",
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
)
TCD = Variant(  # Zheng et al. 2024, arXiv:2402.19159
    name="tcd",
    steps=(4, 8),
    guidance_scale=1.0,
    scheduler=MappingProxyType({**LCM.scheduler, "_class_name": "TCDScheduler"}),
)
# Yin et al. 2024, arXiv:2405.14867; trained for the timesteps 999, 749, 499 and 249, which 4 of 100
# evenly spaced ones are.
DMD2 = Variant(
    name="dmd2",
    steps=(4, 4),
    guidance_scale=1.0,
    scheduler=MappingProxyType({**LCM.scheduler, "original_inference_steps": 100}),
)
EMBEDDED_GUIDANCE = 8.0  # what an LCM that is told its guidance (`time_cond_proj_dim`) wants
