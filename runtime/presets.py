"""Presets: steps, guidance, sampler, schedule and size for four ways to draw, by kind of model.

`fast`, `balanced` and `quality` follow one curve from the noise to the picture, with DPM++ 2M, so
at one size a seed keeps its picture and more steps refine it. `creative` draws fresh noise at every
step and guides less, so its pictures vary more. A model distilled to few steps keeps to what it was
distilled for, whatever the preset.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from engine.checkpoints.families import FAMILIES
from engine.checkpoints.families.base import Preset, Presets
from engine.errors import RequestError
from engine.model import Model
from runtime.checks import check_choice
from runtime.samplers import resolve

__all__ = ["PRESETS", "Preset", "describe_presets", "preset", "variant_sampler"]

PRESETS: Mapping[str, str] = MappingProxyType(
    {
        "fast": "a draft",
        "balanced": "for most pictures",
        "quality": "as balanced, refined by more steps",
        "creative": "fresh noise at every step and less guidance",
    }
)


KINDS: Mapping[str, tuple[Preset, ...]] = MappingProxyType(
    {
        presets.title: tuple(getattr(presets, name) for name in PRESETS)
        for family in FAMILIES.values()
        for presets in (family.presets, family.v_presets)
        if presets
    }
)
FEW_STEPS, CONSISTENCY_STEPS = 4, 8  # of a distilled model that states none
ANY_STEPS = ("lcm", "tcd", "euler_a")  # what is sampled so was distilled for any small number


def preset(name: str, model: Model) -> Preset:
    """Return what a preset means for a model.

    Raises RequestError for a name that is not in `PRESETS`.
    """
    check_choice("preset", name, tuple(PRESETS))
    if _is_distilled(model):
        return _distilled(name, model)
    chosen: Preset = getattr(_presets(model), name)
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


def _presets(model: Model) -> Presets:
    family = model.family
    predicts_v = model.scheduler.get("prediction_type") == "v_prediction"
    return family.v_presets if family.v_presets and predicts_v else family.presets


def variant_sampler(model: Model) -> str:
    """Return the sampler of a model that was distilled to few steps."""
    try:
        return resolve(str(model.scheduler.get("_class_name")))[0]
    except RequestError:  # a scheduler that is none of the samplers here
        return "euler"


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
    sampler = variant_sampler(model)
    steps = model.steps or (CONSISTENCY_STEPS if sampler in ("lcm", "tcd") else FEW_STEPS)
    if name == "fast" and sampler in ANY_STEPS:
        steps = max(steps // 2, 1)
    scale = model.guidance_scale or 1.0
    return Preset(num_inference_steps=steps, guidance_scale=scale, sampler=sampler)
