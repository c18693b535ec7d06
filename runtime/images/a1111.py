"""Automatic1111's "parameters": the text in a PNG that says what the picture was made with.

    a red apple
    Negative prompt: blurry
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 512x512

The prompts come as they are, `<lora:name:weight>` included; the last line holds the rest as
"name: value", a value as a JSON text where a comma or a colon is in it. Automatic1111, Forge and
the galleries of pictures read it from a PNG's text chunk of the name `PARAMETERS_KEY`; here
`a1111_reader` does.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

from runtime.conditioning.syntax import escape
from runtime.images.upscaling import MODES, is_trained
from runtime.samplers import resolve
from runtime.samplers.noise_schedule import TIMESTEP_SPACINGS
from runtime.samplers.sigma_schedules import DISCARD

__all__ = [
    *("AUTOMATIC", "DISCARDS", "OWN_SCHEDULES", "PARAMETERS_KEY"),
    *("SAMPLER_LABELS", "SCHEDULE_LABELS"),
    *("format_parameters", "schedule_label", "split_prompts"),
]

PARAMETERS_KEY = "parameters"
AUTOMATIC = "Automatic"
DISCARDS = "Discard penultimate sigma"  # of any sampler, by an option; it is written where on

# Automatic1111's names; what it lacks keeps ours.
SAMPLER_LABELS: Mapping[str, str] = {
    **{name: name.upper() for name in ("ddpm", "ddim", "plms", "lcm", "lms", "dpm2")},
    **{"euler": "Euler", "euler_a": "Euler a", "heun": "Heun", "dpm2_a": "DPM2 a"},
    **{"dpmpp_2m": "DPM++ 2M", "dpmpp_2m_sde": "DPM++ 2M SDE", "dpmpp_3m_sde": "DPM++ 3M SDE"},
    **{"dpmpp_sde": "DPM++ SDE", "dpmpp_2s_a": "DPM++ 2S a", "unipc": "UniPC"},
}
SCHEDULE_LABELS: Mapping[str | None, str] = {
    None: AUTOMATIC,
    **{name: name.title() for name in ("karras", "exponential", "beta", "simple", "normal")},
    **{"sgm_uniform": "SGM Uniform", "a1111_kl_optimal": "KL Optimal", "leading": "DDIM"},
    "a1111_align_your_steps": "Align Your Steps",
}
# What it has in the place of others, which end elsewhere or are for another model.
_LIKE = {
    "kl_optimal": "KL Optimal",
    **dict.fromkeys(("align_your_steps", "align_your_steps_xl"), "Align Your Steps"),
    "a1111_align_your_steps_xl": "Align Your Steps",
    "comfyui_beta": "Beta",
}
NOISE_LABELS: Mapping[str, str] = {"cpu": "CPU", "cuda": "NV"}  # NV is CUDA's on every machine

HIRES_FIELDS: Mapping[str, tuple[str, Callable[[str], float]]] = {
    "Hires upscale": ("scale", float),
    "Hires steps": ("num_inference_steps", int),
    "Denoising strength": ("strength", float),
}
# Its schedules of samplers that have one of their own where the type is "Automatic"; of the others
# it is "Uniform" (modules/sd_samplers_kdiffusion.py)
OWN_SCHEDULES: Mapping[str, str] = {
    **dict.fromkeys(("dpmpp_2m", "dpmpp_sde", "dpmpp_2s_a", "dpm2", "dpm2_a"), "karras"),
    **dict.fromkeys(("dpmpp_2m_sde", "dpmpp_3m_sde"), "exponential"),
}
# Samplers that take any of its schedules: whose last level but one it leaves out, which are told
# timesteps here and fractions there, and the others.
LEAVES_ONE_OUT = ("dpm2", "dpm2_a", "dpmpp_3m_sde")
_OF_WHOLE_TIMESTEPS = ("dpmpp_2m", "dpmpp_2m_sde")
_IN_SIGMA = ("euler", "euler_a", "heun", "lms", "dpmpp_sde", "dpmpp_2s_a")
_TIMESTEPS = 1000  # of the models that it draws with
NEGATIVE = "Negative prompt:"
OURS = "latentrt"


def format_parameters(settings: Mapping[str, Any]) -> str:
    """Write settings as Automatic1111 does.

    Prompts that its way of writing would change (a line that begins with "Negative prompt:",
    blanks at the ends of lines) follow once more in the last line, where it and we read them whole.
    A prompt that is no syntax is escaped. Settings that it has no name for are left out.

    Args:
        settings: `prompt` and `sampler`, and any of those that `parse_parameters` returns, with
            `model` a name or a path, `timestep_spacing` the model's, and `latentrt` our version

    Raises:
        RequestError: the sampler or its schedule is unknown.
    """
    prompt, negative = str(settings["prompt"]), str(settings.get("negative_prompt", ""))
    if not settings.get("prompt_syntax", True):
        prompt, negative = escape(prompt), escape(negative)
    text = f"{prompt}\n{NEGATIVE} {negative}" if negative else prompt
    fields = [f"{name}: {_quoted(value)}" for name, value in _fields(settings).items()]
    if split_prompts(text) != (prompt, negative):
        fields += [f"Prompt: {_json(prompt)}", f"{NEGATIVE} {_json(negative)}"]
    return f"{text}\n{', '.join(fields)}".strip()


def _fields(settings: Mapping[str, Any]) -> dict[str, str | float]:
    """Name what the last line holds, in Automatic1111's order."""
    sampler, schedule = resolve(settings["sampler"], settings.get("schedule"))
    scale, model = settings.get("guidance_scale"), settings.get("model")
    size = (settings.get("width"), settings.get("height"))
    steps, spacing = settings.get("num_inference_steps"), settings.get("timestep_spacing")
    label = schedule_label(sampler, schedule, spacing, steps)
    means = SCHEDULE_LABELS.get(schedule) == label
    discards = str(schedule).endswith(DISCARD) and sampler not in LEAVES_ONE_OUT
    fields = {
        "Steps": steps,
        "Sampler": SAMPLER_LABELS.get(sampler, sampler),
        "Schedule type": label,
        DISCARDS: discards or None,
        "CFG scale": scale if isinstance(scale, int | float) else None,  # it knows no curves
        "Seed": settings.get("seed"),
        "Variation seed": settings.get("variation_seed"),
        "Variation seed strength": settings.get("variation_strength") or None,
        "Size": None if None in size else f"{size[0]}x{size[1]}",
        "Model": None if model is None else _model_name(str(model)),
        "Denoising strength": settings.get("strength"),
        "Clip skip": None if settings.get("clip_skip") == 1 else settings.get("clip_skip"),
        **_hires_fields(settings.get("hires") or {}),
        "Schedule": None if means else schedule or AUTOMATIC,  # which it passes over
        "RNG": NOISE_LABELS[settings.get("noise", "cpu")],
        "Version": f"{OURS} {settings.get('latentrt', '')}".strip(),
    }
    return {name: value for name, value in fields.items() if value is not None}


def schedule_label(
    sampler: str, schedule: str | None, spacing: str | None, steps: int | None
) -> str:
    """Return the schedule type whose noise levels in Automatic1111 are a run's, or come nearest.

    Its "Automatic" is not the model's own schedule where a sampler has one of its own there.
    schedule: by our names, None for the model's own, which spaces timesteps as `spacing` says; of
        models that say nothing all the samplers below take "linspace"
    """
    if schedule is not None and schedule not in TIMESTEP_SPACINGS:
        schedule = schedule.removesuffix(DISCARD)
        return SCHEDULE_LABELS.get(schedule) or _LIKE.get(schedule, schedule)
    even, label = schedule or spacing or "linspace", AUTOMATIC
    if sampler in _OF_WHOLE_TIMESTEPS:
        label = "Simple" if even == "trailing" else "SGM Uniform"
    elif sampler in LEAVES_ONE_OUT:
        label = "Uniform"
    elif sampler in _IN_SIGMA:
        divides = steps and len(range(1, _TIMESTEPS, max(_TIMESTEPS // steps, 1))) == steps
        label = {"leading": "DDIM", "trailing": "Simple"}.get(even, "Uniform")
        label = label if divides or label != "DDIM" else "Uniform"  # it would run a step more
    return AUTOMATIC if label == "Uniform" and sampler not in OWN_SCHEDULES else label


def _hires_fields(hires: Mapping[str, Any]) -> dict[str, Any]:
    if not hires:
        return {}
    labels = {ours: label.capitalize() for label, ours in MODES.items()}
    upscaler = str(hires.get("upscaler"))
    label = PurePath(upscaler).stem if is_trained(upscaler) else upscaler.capitalize()
    named = {"Hires upscaler": labels.get(upscaler, label)}
    return {name: hires[key] for name, (key, _) in HIRES_FIELDS.items() if key in hires} | named


def split_prompts(text: str) -> tuple[str, str]:
    """Split what precedes the last line as Automatic1111 does: stripped line by line."""
    lines = [line.strip() for line in text.strip().split("\n")]
    starts = (i for i, line in enumerate(lines) if line.startswith(NEGATIVE))
    first = next(starts, len(lines))
    negative = [line.removeprefix(NEGATIVE).strip() for line in lines[first:]]
    return "\n".join(lines[:first]).lstrip("\n"), "\n".join(negative).lstrip("\n")


def _model_name(model: str) -> str:
    """Return the name of a file without its ending, or of a folder."""
    name = PurePath(model).name or model
    return name.removesuffix(".safetensors").removesuffix(".ckpt")


def _quoted(value: str | float) -> str:
    text = str(value)
    if isinstance(value, float) and value.is_integer():
        text = str(int(value))
    return _json(text) if re.search(r'[,:"\n]', text) else text


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
