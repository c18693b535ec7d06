"""Presets: steps, guidance, sampler, schedule and size for four ways to draw, by kind of model.

`fast`, `balanced` and `quality` follow one curve from the noise to the picture, with DPM++ 2M, so
at one size a seed keeps its picture and more steps refine it. `creative` draws fresh noise at every
step and guides less, so its pictures vary more. A model distilled to few steps keeps to what it was
distilled for, whatever the preset.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from engine.errors import RequestError
from engine.model import Model
from runtime.samplers import resolve

__all__ = ["PRESETS", "Preset", "describe_presets", "preset"]

PRESETS: Mapping[str, str] = MappingProxyType(
    {
        "fast": "a draft",
        "balanced": "for most pictures",
        "quality": "as balanced, refined by more steps",
        "creative": "fresh noise at every step and less guidance",
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


def _choice(
    steps: int,
    scale: float,
    sampler: str = "dpmpp_2m",
    schedule: str | None = None,
    size: int | None = None,
) -> Preset:
    return Preset(
        num_inference_steps=steps,
        guidance_scale=scale,
        sampler=sampler,
        schedule=schedule,
        size=size,
    )


AYS, AYS_XL = "align_your_steps", "align_your_steps_xl"
# In the order of PRESETS. Guidance is what the models' authors draw with, or near it.
KINDS: Mapping[str, tuple[Preset, ...]] = MappingProxyType(
    {
        # Measured: 32, 37 and 41 dB from the picture of 100 steps; at 10 steps karras has 28.
        "pictogram": (
            _choice(10, 5.0),
            _choice(20, 5.0),
            _choice(50, 5.0),
            _choice(30, 3.5, "euler_a"),
        ),
        # 10 steps are what the tables of arXiv:2404.14507 were found for, with SD 1.5 and SDXL.
        "Stable Diffusion": (
            _choice(10, 7.5, schedule=AYS),
            _choice(25, 7.5, schedule="karras"),
            _choice(50, 7.5, schedule="karras"),
            _choice(30, 5.5, "euler_a"),
        ),
        # Its tables are for predicted noise, and Karras's levels need 15 steps with DPM++ 2M.
        "Stable Diffusion predicting v": (
            _choice(15, 7.5, schedule="karras"),
            _choice(25, 7.5, schedule="karras"),
            _choice(50, 7.5, schedule="karras"),
            _choice(30, 5.5, "euler_a"),
        ),
        # Of 768 pixels instead of 1024: 0.56 of the work; smaller ones lose what XL is made for.
        "Stable Diffusion XL": (
            _choice(10, 5.0, schedule=AYS_XL, size=768),
            _choice(25, 5.0, schedule="karras"),
            _choice(50, 5.0, schedule="karras"),
            _choice(30, 4.0, "euler_a"),
        ),
        # From a picture: strength is the share of the steps that are run.
        "Stable Diffusion XL refiner": (
            _choice(20, 5.0, schedule="karras"),
            _choice(30, 5.0, schedule="karras"),
            _choice(50, 5.0, schedule="karras"),
            _choice(30, 4.0, "euler_a"),
        ),
    }
)
FEW_STEPS, CONSISTENCY_STEPS = 4, 8  # of a distilled model that states none
ANY_STEPS = ("lcm", "tcd", "euler_a")  # what is sampled so was distilled for any small number


def preset(name: str, model: Model) -> Preset:
    """Return what a preset means for a model.

    Raises RequestError for a name that is not in `PRESETS`.
    """
    if name not in tuple(PRESETS):  # an unhashable name is unknown too
        raise RequestError(f"preset is {name!r}; choose one of {', '.join(PRESETS)}")
    if _is_distilled(model):
        return _distilled(name, model)
    chosen = dict(zip(PRESETS, KINDS[_kind(model)], strict=True))[name]
    if model.scheduler.get("rescale_betas_zero_snr"):
        # Lin et al. 2023, arXiv:2305.08891: the first step must see pure noise, and guidance is
        # rescaled. Other schedules would start later, or spend the steps where sigma is 4096.
        return replace(chosen, schedule="trailing", guidance_rescale=0.7)
    return chosen


def describe_presets() -> str:
    """Return lines for a command's help: every preset, for every kind of model."""
    lines = []
    for i, (name, purpose) in enumerate(PRESETS.items()):
        lines.append(f"{name}: {purpose}")
        lines += [f"  {kind}: {_describe(row[i])}" for kind, row in KINDS.items()]
    lines.append("A model distilled to few steps keeps its own steps, guidance and sampler.")
    return "\n".join(lines)


def _describe(choice: Preset) -> str:
    sampler = " ".join(filter(None, (choice.sampler, choice.schedule)))
    size = f", {choice.size} px" if choice.size else ""
    return f"{choice.num_inference_steps} × {sampler}, guidance {choice.guidance_scale:g}{size}"


def _kind(model: Model) -> str:
    if model.is_xl:
        refines = model.unet.addition_time_ids == 5
        return "Stable Diffusion XL refiner" if refines else "Stable Diffusion XL"
    if model.unet.addition_embed_type == "text":
        return "pictogram"
    if model.scheduler.get("prediction_type") == "v_prediction":
        return "Stable Diffusion predicting v"
    return "Stable Diffusion"


def _is_distilled(model: Model) -> bool:
    """Tell by what a file's name said, by an embedded guidance, or by the published schedulers."""
    config = model.scheduler
    return bool(
        model.steps
        or model.unet.time_cond_proj_dim
        or config.get("_class_name") in ("LCMScheduler", "TCDScheduler")
        # Turbo, Lightning and Hyper; of other models only those of zero SNR, which predict v.
        or (
            config.get("timestep_spacing") == "trailing"
            and config.get("prediction_type", "epsilon") == "epsilon"
            and not config.get("rescale_betas_zero_snr")
        )
    )


def _distilled(name: str, model: Model) -> Preset:
    """Keep to the model's own; `fast` halves the steps where any small number works."""
    try:
        sampler, _ = resolve(str(model.scheduler.get("_class_name")))
    except RequestError:  # a scheduler that is none of the samplers here
        sampler = "euler"
    steps = model.steps or (CONSISTENCY_STEPS if sampler in ("lcm", "tcd") else FEW_STEPS)
    if name == "fast" and sampler in ANY_STEPS:
        steps = max(steps // 2, 1)
    scale = model.guidance_scale or 1.0
    return Preset(num_inference_steps=steps, guidance_scale=scale, sampler=sampler)
