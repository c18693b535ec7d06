"""What Automatic1111 calls samplers, schedulers and upscalers.

Facts of its `modules/sd_samplers_kdiffusion.py` and `modules/sd_schedulers.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import choice
from runtime.images.a1111 import AUTOMATIC, SAMPLER_LABELS
from runtime.images.a1111_reader import UPSCALER_FILES, a1111_method
from runtime.images.upscaling import MODES, PIXELS
from runtime.samplers import SAMPLERS
from serving.errors import BadRequestError
from serving.http.fields import Catalog

DEFAULT_SAMPLER = "Euler"
SCHEDULERS: Mapping[str, str] = {
    **{name: name.title() for name in ("automatic", "uniform", "karras", "exponential")},
    **{"sgm_uniform": "SGM Uniform", "kl_optimal": "KL Optimal"},
    **{"align_your_steps": "Align Your Steps", "simple": "Simple", "normal": "Normal"},
    **{"ddim": "DDIM", "beta": "Beta"},
}
ALIASES: Mapping[str, str] = {
    "sgmuniform": "SGM Uniform",
    "polyexponential": "Exponential",  # with the rho of 1 that it has there, the same numbers
}
RHO: Mapping[str, float] = {"karras": 7.0}
LATENT_MODES = {name.capitalize(): ours for name, ours in MODES.items()}
# Its fields, by the runtime's names, for what is refused.
FIELDS: Mapping[str, str] = {
    **{
        "num_inference_steps": "steps",
        "guidance_scale": "cfg_scale",
        "strength": "denoising_strength",
    },
    **{"num_images_per_prompt": "batch_size", "seamless": "tiling", "image": "init_images"},
    **{"sampler": "sampler_name", "schedule": "scheduler", "noise": "randn_source"},
    **{"variation_seed": "subseed", "variation_strength": "subseed_strength"},
    **{"clip_skip": "CLIP_stop_at_last_layers", "controls": "alwayson_scripts"},
    "model": "sd_model_checkpoint",
    **{"image_prompts": "alwayson_scripts", "inpaint_area": "inpaint_full_res"},
    **{"mask_padding": "inpaint_full_res_padding", "hires": "enable_hr"},
    **{
        "hires.scale": "hr_scale",
        "hires.strength": "denoising_strength",
        "hires.upscaler": "hr_upscaler",
    },
    "hires.num_inference_steps": "hr_second_pass_steps",
}
UPSCALERS = ("None", "Lanczos")  # both resize by Lanczos in hires fix


def method(name: str | None, scheduler: str | None) -> tuple[str | None, str | None]:
    """Return our sampler and schedule; None where neither is said.

    Names that are unknown come back as they are, and the request is refused for them.
    """
    given = (scheduler or AUTOMATIC).strip()
    labels = {**SCHEDULERS, **{label.lower(): label for label in SCHEDULERS.values()}, **ALIASES}
    label = labels.get(given.lower(), given)
    if not name and label == AUTOMATIC:
        return None, None
    return a1111_method(name or DEFAULT_SAMPLER, label)


def upscaler(name: str | None, catalog: Catalog) -> str:
    """Return our name of an upscaler of hires fix, or the operator's. Raises BadRequestError."""
    if name is None or name in LATENT_MODES:
        return LATENT_MODES[name or "Latent"]
    if name in UPSCALERS:
        return PIXELS
    return trained_upscaler(name, catalog, "hr_upscaler", (*UPSCALERS, *LATENT_MODES))


def trained_upscaler(name: str, catalog: Catalog, param: str, others: Sequence[str]) -> str:
    """Return the name of an operator's upscaler; that of Automatic1111 for its file is one, too.

    others: that the field may name. Raises BadRequestError.
    """
    wanted = UPSCALER_FILES.get(name.lower(), name).lower()
    for known in catalog.upscalers:
        if known.lower() == wanted:
            return known
    said = choice(name, (*others, *catalog.upscalers))
    raise BadRequestError(f"{param} is {name[:60]!r}; {said}", param=param)


def list_samplers() -> list[dict[str, Any]]:
    """Return the answer of /samplers."""
    return [
        {"name": SAMPLER_LABELS.get(name, name), "aliases": [name], "options": {}}
        for name in SAMPLERS
    ]


def list_schedulers() -> list[dict[str, Any]]:
    """Return the answer of /schedulers."""
    return [
        {
            "name": name,
            "label": label,
            "aliases": [other for other, known in ALIASES.items() if known == label] or None,
            "default_rho": RHO.get(name, -1.0),
            "need_inner_model": name in ("uniform", "sgm_uniform", "simple", "normal", "ddim"),
        }
        for name, label in SCHEDULERS.items()
    ]


def list_upscalers(catalog: Catalog) -> list[dict[str, Any]]:
    """Return the answer of /upscalers."""
    empty = {"model_name": None, "model_path": None, "model_url": None, "scale": 4}
    return [{"name": name, **empty} for name in (*UPSCALERS, *catalog.upscalers)]
