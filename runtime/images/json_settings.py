"""Settings that InvokeAI and Fooocus leave in a picture: JSON by names of their own.

The first form of InvokeAI, `Dream`, is the command that drew the picture.
"""

import ast
import json
import re
import shlex
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from engine.errors import RequestError
from runtime.samplers import resolve

__all__ = ["parse_dream", "parse_fooocus", "parse_invokeai", "parse_old_invokeai"]

# The options of a Dream command that a request has, by their letter
_DREAM: dict[str, tuple[str, Callable[[str], Any]]] = {
    "s": ("num_inference_steps", int),
    "S": ("seed", int),
    "W": ("width", int),
    "H": ("height", int),
    "C": ("guidance_scale", float),
    "f": ("strength", float),
    "A": ("sampler", str),
}

# Names of what they draw, which change no picture.
_SILENT = {
    *("app_version", "generation_mode", "version", "metadata_scheme", "created_by", "positive"),
    *("base_model_hash", "refiner_model_hash", "log_scheme", "type", "rand_device"),
    *("full_prompt", "full_negative_prompt", "app_id", "model_hash", "hash", "performance"),
}
_NOTHING: tuple[Any, ...] = (None, "", "None", [], {}, False, 0, "Default (model)", "[]")


def parse_invokeai(text: str) -> dict[str, Any]:
    """Read InvokeAI's `invokeai_metadata`, {} for another text."""
    fields = _object(text)
    if "positive_prompt" not in fields:
        return {}
    rename = {
        "positive_prompt": "prompt",
        "negative_prompt": "negative_prompt",
        "steps": "num_inference_steps",
        "cfg_scale": "guidance_scale",
        "cfg_rescale_multiplier": "guidance_rescale",
        **{name: name for name in ("seed", "width", "height", "strength")},
    }
    settings = {ours: fields[name] for name, ours in rename.items() if fields.get(name) is not None}
    settings["noise"] = "cpu" if fields.get("rand_device", "cpu") == "cpu" else "cuda"
    settings["clip_skip"] = 1 + int(fields.get("clip_skip") or 0)
    model = fields.get("model")
    if isinstance(model, Mapping) and (name := model.get("name") or model.get("model_name")):
        settings["model_name"] = str(name)
    _add_sampler(settings, fields.get("scheduler"), None)
    used = {*rename, "clip_skip", "model", "scheduler", "rand_device"}
    return _with_left_out(settings, fields, used)


def parse_old_invokeai(text: str) -> dict[str, Any]:
    """Read InvokeAI's older `sd-metadata`, {} for another text."""
    fields = _object(text)
    image = fields.get("image")
    if not isinstance(image, Mapping) or "prompt" not in image:
        return {}
    prompt = image["prompt"]
    if isinstance(prompt, list):
        prompt = " ".join(str(part["prompt"]) for part in prompt)
    settings = _old_texts(str(prompt))
    for name, ours in (("steps", "num_inference_steps"), ("cfg_scale", "guidance_scale")):
        if name in image:
            settings[ours] = image[name]
    settings |= {name: image[name] for name in ("seed", "width", "height") if name in image}
    if fields.get("model_weights"):
        settings["model_name"] = str(fields["model_weights"])
    _add_sampler(settings, str(image.get("sampler", "")).removeprefix("k_"), None)
    used = {*("prompt", "steps", "cfg_scale", "seed", "width", "height", "sampler", "type")}
    return _with_left_out(settings, image, used)


def parse_dream(text: str) -> dict[str, Any]:
    """Read InvokeAI's oldest text, `"PROMPT" -s 50 -S 7 -W 512 …`, {} for another."""
    prompt, *words = shlex.split(text[:20_000])
    if not words:
        return {}
    settings, left = _old_texts(prompt), {}
    while words:
        option = words.pop(0)
        if not re.match(r"--?[A-Za-z]", option):
            return {}
        name, value = (option, "") if option.startswith("--") else (option[1], option[2:])
        if not value and words and not re.match(r"--?[A-Za-z]", words[0]):
            value = words.pop(0)
        if name in _DREAM:
            ours, read = _DREAM[name]
            settings[ours] = read(value)
        else:
            left[name if option.startswith("--") else f"-{name}"] = value
    _add_sampler(settings, str(settings.pop("sampler", "")).removeprefix("k_"), None)
    return _with_left_out(settings, left, set())


def _old_texts(prompt: str) -> dict[str, Any]:
    """Return the texts of InvokeAI 1 and 2, where words in square brackets are the negative one."""
    negative = ", ".join(part.strip() for part in re.findall(r"\[([^\[\]]*)\]", prompt))
    positive = re.sub(r"\s*\[[^\[\]]*\]", "", prompt).strip()
    return {"prompt": positive, "negative_prompt": negative, "noise": "cpu", "clip_skip": 1}


def parse_fooocus(text: str) -> dict[str, Any]:
    """Read Fooocus' own scheme, {} for another text.

    Its styles and its expansion are already in `full_prompt`, whose parts it joins by commas; its
    random numbers are torch's of the processor.
    """
    fields = _object(text)
    if "prompt" not in fields or "base_model" not in fields:
        return {}
    settings: dict[str, Any] = {"noise": "cpu"}
    for name in ("prompt", "negative_prompt"):
        whole = fields.get(f"full_{name}") or fields.get(name) or ""
        settings[name] = ", ".join(map(str, whole)) if isinstance(whole, list) else str(whole)
    for name, ours in (("steps", "num_inference_steps"), ("guidance_scale", "guidance_scale")):
        if name in fields:
            settings[ours] = fields[name]
    for name in ("seed", "clip_skip"):
        with suppress(TypeError, ValueError, KeyError):
            settings[name] = int(fields[name])
    with suppress(ValueError, SyntaxError, TypeError):
        size = str(fields.get("resolution"))[:99]
        settings["width"], settings["height"] = map(int, ast.literal_eval(size))
    settings["model_name"] = str(fields["base_model"])
    sampler = str(fields.get("sampler", "")).removesuffix("_gpu")
    _add_sampler(settings, sampler, fields.get("scheduler"))
    used = {*("prompt", "negative_prompt", "steps", "guidance_scale", "seed", "clip_skip")}
    used |= {"resolution", "base_model", "sampler", "scheduler"}
    if fields.get("full_prompt"):  # to which these have been added
        used |= {"styles", "prompt_expansion"}
    return _with_left_out(settings, fields, used)


def _object(text: str) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        found = json.loads(text)
        if isinstance(found, dict):
            return found
    return {}


def _add_sampler(settings: dict[str, Any], sampler: object, schedule: object) -> None:
    """Add both by our names; one that is not known stays, so that a request with it is refused."""
    if not sampler:
        return
    name, curve = str(sampler), str(schedule) if schedule else None
    if name.endswith("_k"):  # InvokeAI's, for Karras'
        name, curve = name[:-2], "karras"
    with suppress(RequestError):
        name, curve = resolve(name, curve)
    settings["sampler"], settings["schedule"] = name, curve


def _with_left_out(
    settings: dict[str, Any], fields: Mapping[str, Any], used: set[str]
) -> dict[str, Any]:
    """Add what was read and does not map."""
    left = {
        name: value if isinstance(value, str | int | float) else json.dumps(value)[:200]
        for name, value in fields.items()
        if name not in used | _SILENT and not any(value == nothing for nothing in _NOTHING)
    }
    return {**settings, "left_out": left} if left else settings
