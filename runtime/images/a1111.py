"""Automatic1111's "parameters": the text in a PNG that says what the picture was made with.

    a red apple
    Negative prompt: blurry
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 512x512

The prompts come as they are, `<lora:name:weight>` included; the last line holds the rest as
"name: value", a value as a JSON text where a comma or a colon is in it. Automatic1111, Forge and
the galleries of pictures read it from a PNG's text chunk of the name `PARAMETERS_KEY`.
"""

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import PurePath
from typing import Any

from engine.errors import RequestError
from runtime.conditioning.syntax import escape
from runtime.images.upscaling import MODES, PIXELS, is_trained
from runtime.samplers import SAMPLERS, TRAINED_TIMESTEPS, resolve

__all__ = [
    *("AUTOMATIC", "PARAMETERS_KEY", "SAMPLER_LABELS", "SCHEDULE_LABELS"),
    *("a1111_method", "format_parameters", "parameter_fields", "parse_parameters"),
]

PARAMETERS_KEY = "parameters"
AUTOMATIC = "Automatic"

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
    **{"sgm_uniform": "SGM Uniform", "a1111_kl_optimal": "KL Optimal"},
    "a1111_align_your_steps": "Align Your Steps",
}
# Its own names of files, in lower case; others it calls by their files' names.
UPSCALER_FILES = {
    "r-esrgan 4x+": "RealESRGAN_x4plus",
    "r-esrgan 4x+ anime6b": "RealESRGAN_x4plus_anime_6B",
    "r-esrgan 2x+": "RealESRGAN_x2plus",
    "r-esrgan general 4xv3": "realesr-general-x4v3",
    "r-esrgan animevideo": "realesr-animevideov3",
}
NOISE_LABELS: Mapping[str, str] = {"cpu": "CPU", "cuda": "NV"}  # NV is CUDA's on every machine

_NUMBERS: Mapping[str, tuple[str, Callable[[str], float]]] = {
    "Steps": ("num_inference_steps", int),
    "CFG scale": ("guidance_scale", float),
    "Seed": ("seed", int),
    "Variation seed": ("variation_seed", int),
    "Variation seed strength": ("variation_strength", float),
    "Denoising strength": ("strength", float),
    "Clip skip": ("clip_skip", int),
    "Mask blur": ("mask_blur", float),
}
_KNOWN = {*_NUMBERS, "Sampler", "Schedule type", "Size", "Model", "Model hash", "RNG", "Version"}
_HIRES: Mapping[str, tuple[str, Callable[[str], float]]] = {
    "Hires upscale": ("scale", float),
    "Hires steps": ("num_inference_steps", int),
    "Denoising strength": ("strength", float),
}
# Fields that change no picture, or that other fields repeat.
_SILENT = {
    *("Version", "Model hash", "Hashes", "VAE hash", "TI hashes", "Lora hashes", "User", "Parser"),
    *("Created Date", "Civitai metadata", "Civitai resources", "Device", "TE", "Unet", "Guidance"),
    *("Mask mode", "Masked content", "Inpaint area", "Masked area padding", "App", "Pipeline"),
}
_RESOURCES = re.compile(r"Civitai resources: (\[.*)")
_ADAPTER = re.compile(r"<lora:([^:>]{1,200})")
_STABLE_DIFFUSION_CPP = "stable-diffusion.cpp"
# The schedules of samplers that do not take the model's own where the type is "Automatic"
# (modules/sd_samplers_kdiffusion.py)
_OWN_SCHEDULES: Mapping[str, str] = {
    **dict.fromkeys(("dpmpp_2m", "dpmpp_sde", "dpmpp_2s_a", "dpm2", "dpm2_a"), "karras"),
    **dict.fromkeys(("dpmpp_2m_sde", "dpmpp_3m_sde"), "exponential"),
}
_OWN_SPACING = ("ddim", "plms", "unipc")  # whatever schedule Automatic1111 writes beside them
_OTHER_SCHEDULES = {
    **{"DDIM": "leading", "Turbo": "trailing"},
    **{"KL Optimal": "a1111_kl_optimal", "Align Your Steps": "a1111_align_your_steps"},
}
_NEGATIVE = "Negative prompt:"
_OURS = "latentrt"
# Possessive, and every stretch up to a comma is read once whether it is a field or not.
_FIELD = re.compile(
    r'(?:\s*+([^:,"]++):\s*+("(?:\\.|[^\\"])*+"(?=\s*+(?:,|$))|[^,]*+)|[^,]*+)\s*+(?:,|$)'
)


def format_parameters(settings: Mapping[str, Any]) -> str:
    """Write settings as Automatic1111 does.

    Prompts that its way of writing would change (a line that begins with "Negative prompt:",
    blanks at the ends of lines) follow once more in the last line, where it and we read them whole.
    A prompt that is no syntax is escaped. Settings that it has no name for are left out.

    Args:
        settings: `prompt` and `sampler`, and any of those that `parse_parameters` returns, with
            `model` a name or a path, and `latentrt` our version

    Raises:
        RequestError: the sampler or its schedule is unknown.
    """
    prompt, negative = str(settings["prompt"]), str(settings.get("negative_prompt", ""))
    if not settings.get("prompt_syntax", True):
        prompt, negative = escape(prompt), escape(negative)
    text = f"{prompt}\n{_NEGATIVE} {negative}" if negative else prompt
    fields = [f"{name}: {_quoted(value)}" for name, value in _fields(settings).items()]
    if _prompts(text) != (prompt, negative):
        fields += [f"Prompt: {_json(prompt)}", f"{_NEGATIVE} {_json(negative)}"]
    return f"{text}\n{', '.join(fields)}".strip()


def parse_parameters(text: str) -> dict[str, Any]:
    """Read settings from a text of ours, of Automatic1111 or of Forge; other texts give {}.

    stable-diffusion.cpp and Civitai write such texts, too.

    What a field does not say takes Automatic1111's default: noise of its "GPU", CLIP skip 1, and
    for samplers that step in sigma evenly spaced timesteps. A sampler or schedule that is unknown
    here keeps its name, so that a request with it is refused and says so; so does an upscaler.
    What else the text names is in `left_out`, by its names: fields that are not known here,
    adapters, the words of textual inversions.

    Returns:
        those that the text names of prompt, negative_prompt, num_inference_steps, sampler,
        schedule, guidance_scale, seed, width, height, strength, clip_skip, noise; hires, a
        dictionary of the fields of `Hires`; model_name and vae_name, which name them but not their
        files; left_out
    """
    head, last, fields = _split(text)
    if not fields:
        return {}
    prompt, negative = _prompts(head)
    settings: dict[str, Any] = {
        "prompt": fields.get("Prompt", prompt),
        "negative_prompt": fields.get(_NEGATIVE[:-1], negative),
        "clip_skip": 1,
        "noise": "cpu" if fields.get("RNG", "").upper() == "CPU" else "cuda",
    }
    settings |= _numbers(fields, _NUMBERS)
    if "Hires upscale" in fields:
        settings.pop("strength", None)  # of the second run
        label = fields.get("Hires upscaler", "Latent")
        known = MODES | UPSCALER_FILES | {PIXELS: PIXELS}
        upscaler = known.get(label.lower(), label)
        settings["hires"] = _numbers(fields, _HIRES) | {"upscaler": upscaler}
    with suppress(ValueError):
        settings["width"], settings["height"] = map(int, fields.get("Size", "").split("x"))
    for name, key in (("Model", "model_name"), ("VAE", "vae_name")):
        if fields.get(name, "None") != "None":
            settings[key] = fields[name]
    if "Sampler" in fields:
        settings["sampler"], settings["schedule"] = _method(fields)
    left = _left_out(fields, settings)
    if resources := _RESOURCES.search(last):
        model, others = _civitai(resources[1])
        settings |= {"model_name": model} if model else {}
        left |= {"Civitai resources": others} if others else {}
    return {**settings, "left_out": left} if left else settings


def parameter_fields(text: str) -> dict[str, str]:
    """Return what a text says by Automatic1111's names, as its API answers; other texts give {}.

    "Prompt" and "Negative prompt" are among the names; "Size" comes as "Size-1" and "Size-2".
    """
    head, _, fields = _split(text)
    if not fields:
        return {}
    prompt, negative = _prompts(head)
    width, crossed, height = fields.get("Size", "").partition("x")
    sides = {"Size-1": width, "Size-2": height} if crossed else {}
    named = {name: value for name, value in fields.items() if name and name != "Size"}
    return {"Prompt": prompt, _NEGATIVE[:-1]: negative, **named, **sides}


def _split(text: str) -> tuple[str, str, dict[str, str]]:
    """Return the prompts, the last line, and what it holds by its names; {} if it is another's."""
    head, _, last = text.strip().rpartition("\n")
    fields = {name.strip(): _unquoted(value.strip()) for name, value in _FIELD.findall(last)}
    return head, last, fields if len(fields.keys() & _KNOWN) >= 3 else {}


def _civitai(text: str) -> tuple[str, str]:
    """Return the names of the checkpoint and of all else in Civitai's list of what was used."""
    found: Any = []
    with suppress(ValueError, RecursionError):
        found, _ = json.JSONDecoder().raw_decode(text)
    named = [(each.get("type"), str(each.get("modelName", ""))) for each in found]
    model = next((name for kind, name in named if kind == "checkpoint"), "")
    return model, ", ".join(name for kind, name in named if kind != "checkpoint")


def _left_out(fields: Mapping[str, str], settings: Mapping[str, Any]) -> dict[str, str]:
    """Name what a text says beyond the settings; whoever carries one of these out takes it off."""
    if fields.get("Version", "").startswith(_OURS):
        return {}
    known = {*_KNOWN, *_HIRES, *_SILENT, "Prompt", "VAE", _NEGATIVE[:-1], "Hires upscaler"}
    left = {name: value for name, value in fields.items() if name and name not in known}
    if _number(left.get("Eta")) == 0:
        del left["Eta"]
    adapters = _ADAPTER.findall(settings["prompt"] + settings["negative_prompt"])
    if adapters or "Lora hashes" in fields:
        left["LoRA"] = ", ".join(adapters) or fields["Lora hashes"]
    if "TI hashes" in fields:
        left["Textual inversion"] = fields["TI hashes"]
    return left


def _number(text: str | None) -> float | None:
    with suppress(TypeError, ValueError):
        return float(text or "")
    return None


def _numbers(
    fields: Mapping[str, str], wanted: Mapping[str, tuple[str, Callable[[str], float]]]
) -> dict[str, Any]:
    """Read the numbers that are there and are numbers."""
    found = {}
    for name, (key, number) in wanted.items():
        with suppress(KeyError, ValueError):
            found[key] = number(fields[name])
    return found


def _fields(settings: Mapping[str, Any]) -> dict[str, str | float]:
    """Name what the last line holds, in Automatic1111's order."""
    sampler, schedule = resolve(settings["sampler"], settings.get("schedule"))
    scale, model = settings.get("guidance_scale"), settings.get("model")
    size = (settings.get("width"), settings.get("height"))
    fields = {
        "Steps": settings.get("num_inference_steps"),
        "Sampler": SAMPLER_LABELS.get(sampler, sampler),
        "Schedule type": SCHEDULE_LABELS.get(schedule, schedule),
        "CFG scale": scale if isinstance(scale, int | float) else None,  # it knows no curves
        "Seed": settings.get("seed"),
        "Variation seed": settings.get("variation_seed"),
        "Variation seed strength": settings.get("variation_strength") or None,
        "Size": None if None in size else f"{size[0]}x{size[1]}",
        "Model": None if model is None else _model_name(str(model)),
        "Denoising strength": settings.get("strength"),
        "Clip skip": None if settings.get("clip_skip") == 1 else settings.get("clip_skip"),
        **_hires_fields(settings.get("hires") or {}),
        "RNG": NOISE_LABELS[settings.get("noise", "cpu")],
        "Version": f"{_OURS} {settings.get('latentrt', '')}".strip(),
    }
    return {name: value for name, value in fields.items() if value is not None}


def _hires_fields(hires: Mapping[str, Any]) -> dict[str, Any]:
    if not hires:
        return {}
    labels = {ours: label.capitalize() for label, ours in MODES.items()}
    upscaler = str(hires.get("upscaler"))
    label = PurePath(upscaler).stem if is_trained(upscaler) else upscaler.capitalize()
    named = {"Hires upscaler": labels.get(upscaler, label)}
    return {name: hires[key] for name, (key, _) in _HIRES.items() if key in hires} | named


def _method(fields: Mapping[str, str]) -> tuple[str, str | None]:
    """Return the sampler and the schedule, by our names where they are known."""
    sampler, label = fields["Sampler"], fields.get("Schedule type", "")
    if fields.get("Version", "").startswith(_STABLE_DIFFUSION_CPP):
        sampler = sampler.removesuffix(" discrete")  # its name for the model's own schedule
    if not fields.get("Version", "").startswith(_OURS):
        return a1111_method(sampler, label)
    schedule = _schedule_of(label)
    try:
        return resolve(sampler, schedule)
    except RequestError:
        return sampler, schedule


def _schedule_of(label: str) -> str | None:
    given = _OTHER_SCHEDULES.get(label, label)
    return None if given in ("", AUTOMATIC) else given


def a1111_method(sampler: str, label: str = "") -> tuple[str, str | None]:
    """Return our names of Automatic1111's sampler and schedule type, of its files and its API.

    label: such as "Karras" or "Align Your Steps"; "" and "Automatic" are the sampler's own
    Names that are unknown here come back as they are.
    """
    schedule = _schedule_of(label)
    try:
        sampler, schedule = resolve(sampler, schedule)
    except RequestError:
        return sampler, schedule
    if sampler in _OWN_SPACING:
        return sampler, None
    if schedule is None and SAMPLERS[sampler] not in TRAINED_TIMESTEPS:
        # Without a label a text is of before version 1.9, whose samplers had none of their own.
        own = _OWN_SCHEDULES.get(sampler) if label == AUTOMATIC else None
        return sampler, own or "normal"  # its "Uniform", whatever the model says
    return sampler, schedule


def _prompts(text: str) -> tuple[str, str]:
    """Split what precedes the last line as Automatic1111 does: stripped line by line."""
    lines = [line.strip() for line in text.strip().split("\n")]
    starts = (i for i, line in enumerate(lines) if line.startswith(_NEGATIVE))
    first = next(starts, len(lines))
    negative = [line.removeprefix(_NEGATIVE).strip() for line in lines[first:]]
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


def _unquoted(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] == '"':
        with suppress(ValueError):
            return str(json.loads(text))
    return text
