"""Reading Automatic1111's "parameters", of its pictures, of Forge's, of Civitai's and of ours."""

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from engine.errors import RequestError
from runtime.images.a1111 import (
    AUTOMATIC,
    DISCARDS,
    HIRES_FIELDS,
    LEAVES_ONE_OUT,
    NEGATIVE,
    OURS,
    OWN_SCHEDULES,
    split_prompts,
)
from runtime.images.upscaling import MODES, PIXELS
from runtime.samplers import SAMPLERS, TRAINED_TIMESTEPS, discarding, resolve
from runtime.samplers.sigma_schedules import DISCARD

__all__ = ["a1111_method", "parameter_fields", "parse_parameters"]

# Its own names of files, in lower case; others it calls by their files' names.
UPSCALER_FILES = {
    "r-esrgan 4x+": "RealESRGAN_x4plus",
    "r-esrgan 4x+ anime6b": "RealESRGAN_x4plus_anime_6B",
    "r-esrgan 2x+": "RealESRGAN_x2plus",
    "r-esrgan general 4xv3": "realesr-general-x4v3",
    "r-esrgan animevideo": "realesr-animevideov3",
}
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
_OF_AN_AREA = {"Masked area padding": ("mask_padding", int)}
_KNOWN = {*_NUMBERS, "Sampler", "Schedule type", "Size", "Model", "Model hash", "RNG", "Version"}
# Fields that change no picture, or that other fields repeat.
_SILENT = {
    *("Version", "Model hash", "Hashes", "VAE hash", "TI hashes", "Lora hashes", "User", "Parser"),
    *("Created Date", "Civitai metadata", "Civitai resources", "Device", "TE", "Unet", "Guidance"),
    *("Mask mode", "Masked content", "Inpaint area", "Masked area padding", "App", "Pipeline"),
}
_RESOURCES = re.compile(r"Civitai resources: (\[.*)")
_ADAPTER = re.compile(r"<lora:([^:>]{1,200})")
_STABLE_DIFFUSION_CPP = "stable-diffusion.cpp"
_OWN_SPACING = ("ddim", "plms", "unipc")  # whatever schedule Automatic1111 writes beside them
_OTHER_SCHEDULES = {
    **{"DDIM": "leading", "Turbo": "trailing"},
    **{"KL Optimal": "a1111_kl_optimal", "Align Your Steps": "a1111_align_your_steps"},
}
# Possessive, and every stretch up to a comma is read once whether it is a field or not.
_FIELD = re.compile(
    r'(?:\s*+([^:,"]++):\s*+("(?:\\.|[^\\"])*+"(?=\s*+(?:,|$))|[^,]*+)|[^,]*+)\s*+(?:,|$)'
)


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
    prompt, negative = split_prompts(head)
    settings: dict[str, Any] = {
        "prompt": fields.get("Prompt", prompt),
        "negative_prompt": fields.get(NEGATIVE[:-1], negative),
        "clip_skip": 1,
        "noise": "cpu" if fields.get("RNG", "").upper() == "CPU" else "cuda",
    }
    settings |= _numbers(fields, _NUMBERS)
    if fields.get("Inpaint area") == "Only masked":
        settings |= {"inpaint_area": "masked"} | _numbers(fields, _OF_AN_AREA)
    if "First pass size" in fields:
        settings.pop("strength", None)  # of a second run, as it was before version 1.0
    if "Hires upscale" in fields:
        settings.pop("strength", None)  # of the second run
        label = fields.get("Hires upscaler", "Latent")
        known = MODES | UPSCALER_FILES | {PIXELS: PIXELS}
        upscaler = known.get(label.lower(), label)
        settings["hires"] = _numbers(fields, HIRES_FIELDS) | {"upscaler": upscaler}
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
    prompt, negative = split_prompts(head)
    width, crossed, height = fields.get("Size", "").partition("x")
    sides = {"Size-1": width, "Size-2": height} if crossed else {}
    named = {name: value for name, value in fields.items() if name and name != "Size"}
    return {"Prompt": prompt, NEGATIVE[:-1]: negative, **named, **sides}


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
    if fields.get("Version", "").startswith(OURS):
        return {}
    known = {*_KNOWN, *HIRES_FIELDS, *_SILENT, "Prompt", "VAE", NEGATIVE[:-1], "Hires upscaler"}
    left = {name: value for name, value in fields.items() if name and name not in known}
    if _number(left.get("Eta")) == 0:
        del left["Eta"]
    if str(settings.get("schedule")).endswith(DISCARD) or settings.get("schedule") == "sgm_uniform":
        left.pop(DISCARDS, None)
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


def _method(fields: Mapping[str, str]) -> tuple[str, str | None]:
    """Return the sampler and the schedule, by our names where they are known."""
    sampler, label = fields["Sampler"], fields.get("Schedule type", "")
    if fields.get("Version", "").startswith(_STABLE_DIFFUSION_CPP):
        sampler = sampler.removesuffix(" discrete")  # its name for the model's own schedule
    if not fields.get("Version", "").startswith(OURS):
        return a1111_method(sampler, label, discards=fields.get(DISCARDS) == "True")
    schedule = _schedule_of(fields.get("Schedule", label))
    try:
        return resolve(sampler, schedule)
    except RequestError:
        return sampler, schedule


def _schedule_of(label: str) -> str | None:
    given = _OTHER_SCHEDULES.get(label, label)
    return None if given in ("", AUTOMATIC) else given


def a1111_method(
    sampler: str, label: str = "", *, discards: bool = False
) -> tuple[str, str | None]:
    """Return our names of Automatic1111's sampler and schedule type, of its files and its API.

    label: such as "Karras" or "Align Your Steps"; "" and "Automatic" are the sampler's own
    discards: whether the last level but one is left out, as with some samplers it always is
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
        own = OWN_SCHEDULES.get(sampler) if label == AUTOMATIC else None
        schedule = own or "normal"  # its "Uniform", whatever the model says
    discards = discards or sampler in LEAVES_ONE_OUT
    return sampler, discarding(schedule) if discards else schedule


def _unquoted(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] == '"':
        with suppress(ValueError):
            return str(json.loads(text))
    return text
