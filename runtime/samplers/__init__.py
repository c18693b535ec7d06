"""Samplers: each published method as the list of matrices that one run applies.

A step of every method is linear in what it remembers, in the model's output and in noise,

    R' = M_k [R; out; n]        R = [x, h_1, ..., h_(r-1)], at first x and zeros

so a sampler is a function from a noise schedule and a number of steps to the calls of the UNet that
the M_k of a `Program` are made from.

Legend
    x, x0, eps     the latent; its clean part and its noise, as the model sees them
    alpha, sigma   x = alpha x0 + sigma eps; alpha^2 + sigma^2 = 1, or alpha = 1
    out            the (guided) prediction of eps, of x0, or of v = alpha eps - sigma x0
    n              fresh noise; eta, 0 to 1: the share of DDPM's noise that DDIM adds

Timesteps and noise draws are those of diffusers' scheduler; steps that do not fit the schedule
raise RequestError.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from engine.errors import RequestError, choice, nearest
from runtime.samplers import cfg_pp, discrete, k_diffusion, multistep
from runtime.samplers.noise_schedule import TIMESTEP_SPACINGS, NoiseSchedule, TimestepSpacing
from runtime.samplers.program import Call, Program, Run, assemble
from runtime.samplers.sigma_schedules import CURVES, DISCARD, SCHEDULES, discarding

__all__ = [
    "CFG_PP_SCALE",
    "DEFAULT_SAMPLER",
    "SAMPLERS",
    "SCHEDULES",
    "Program",
    "discarding",
    "is_cfg_pp",
    "program",
    "resolve",
    "takes",
    "takes_eta",
]

DEFAULT_SAMPLER = "ddim"
WITH_ETA = ("ddim", "tcd")

TRAINED_TIMESTEPS = (
    *(discrete.ddpm, discrete.ddim, discrete.plms, discrete.lcm, discrete.tcd),
    cfg_pp.ddim_cfg_pp,
)
IN_SIGMA = (
    *(k_diffusion.euler, k_diffusion.euler_a, k_diffusion.heun),
    *(k_diffusion.dpm2, k_diffusion.dpm2_a, k_diffusion.lms, k_diffusion.ipndm),
    *(k_diffusion.dpmpp_sde, k_diffusion.dpmpp_2s_a, k_diffusion.edm_euler),
    *(cfg_pp.euler_cfg_pp, cfg_pp.euler_a_cfg_pp, cfg_pp.dpmpp_2m_cfg_pp),
)
IN_LAMBDA = (
    *(multistep.dpmpp_2m, multistep.dpmpp_2m_sde, multistep.dpmpp_3m_sde, multistep.dpmpp_2s),
    *(multistep.deis, multistep.unipc, multistep.comfyui_uni_pc, multistep.comfyui_uni_pc_bh2),
)
SAMPLERS: Mapping[str, Callable[..., Iterator[Call]]] = {
    method.__name__: method for method in (*TRAINED_TIMESTEPS, *IN_SIGMA, *IN_LAMBDA)
}
CFG_PP_SCALE = 0.6  # what CFG++ guides with where nobody says, as its authors do

# The names that diffusers, Automatic1111 and ComfyUI give them, written as `_key` writes them.
SAMPLER_NAMES: Mapping[str, str] = {
    **{"pndm": "plms", "kdpm2": "dpm2", "kdpm2a": "dpm2_a", "dpmsolversde": "dpmpp_sde"},
    **{"dpmsolvermultistep": "dpmpp_2m", "dpmsolversinglestep": "dpmpp_2s"},
    **{"deismultistep": "deis", "unipcmultistep": "unipc"},
    "unipcbh2": "comfyui_uni_pc_bh2",
}
SCHEDULE_NAMES: Mapping[str, str | None] = {
    **{"automatic": None, "uniform": "normal", "ddimuniform": "leading"},
    **dict.fromkeys(("ays", "alignyoursteps15"), "align_your_steps"),
    **dict.fromkeys(("aysxl", "alignyourstepssdxl"), "align_your_steps_xl"),
}


def program(
    name: str,
    noise_schedule: NoiseSchedule,
    num_inference_steps: int,
    *,
    schedule: str | None = None,
    strength: float | None = None,
    eta: float = 0.0,
) -> Program:
    """Make the program of one request.

    Args:
        name: one of `SAMPLERS`, or another program's name for it, with or without a schedule:
            "DPM++ 2M Karras"
        num_inference_steps: 1 to T
        schedule: one of `SCHEDULES`, by whatever name, with "_discard" behind a curve's to leave
            out the last level but one of one more; None for the model's own
        strength: None for text-to-image; for image-to-image, above 0 and at most 1:
            int(num_inference_steps * strength) steps are run, as in diffusers
        eta: 0 to 1; for "ddim" and "tcd" only

    Raises:
        RequestError: an argument is outside what is listed above.
        ModelError: the schedule begins at zero signal, and the model's eps says nothing about x0.
    """
    sampler, curve = resolve(name, schedule)
    method = SAMPLERS[sampler]
    options: dict[str, Any] = {"eta": eta} if sampler in WITH_ETA else {}
    if not 0 <= eta <= bool(options):
        raise RequestError(f"eta is {eta}; ddim and tcd allow 0 to 1, every other sampler only 0")
    first = 0 if strength is None else _first_step(num_inference_steps, strength)
    if curve in TIMESTEP_SPACINGS:
        noise_schedule = replace(noise_schedule, timestep_spacing=cast(TimestepSpacing, curve))
        curve = None
    if method in TRAINED_TIMESTEPS and curve is not None:
        raise RequestError(
            f"sampler {sampler} steps between timesteps of the model's training and takes no "
            f"{curve!r} schedule; leave it out, or take euler or dpmpp_2m"
        )
    run = Run(
        noise_schedule=noise_schedule,
        num_inference_steps=num_inference_steps,
        first=first,
        schedule=curve,
    )
    return assemble(run, list(method(run, **options)), exploding=method in IN_SIGMA)


def is_cfg_pp(name: str) -> bool:
    """Tell whether a sampler needs the unconditional output at every call."""
    return resolve(name)[0].endswith("cfg_pp")


def resolve(name: str, schedule: str | None = None) -> tuple[str, str | None]:
    """Return the names that this package uses for a sampler and a schedule.

    Case, spaces, underscores and dashes do not matter. A schedule may follow the sampler's name.

    Raises:
        RequestError: a name is unknown, or a schedule is given twice and differs.
    """
    methods = {_key(known): known for known in SAMPLERS} | dict(SAMPLER_NAMES)
    all_curves = (*SCHEDULES, *(f"{curve}{DISCARD}" for curve in CURVES))
    curves: dict[str, str | None] = {_key(known): known for known in all_curves}
    curves |= SCHEDULE_NAMES
    if schedule is not None and _key(schedule) not in curves:
        raise RequestError(_unknown("schedule", schedule, SCHEDULES, curves))
    chosen = None if schedule is None else curves[_key(schedule)]
    key = _key(name)
    for suffix in ("", *sorted(filter(key.endswith, curves), key=len, reverse=True)):
        method = methods.get(_key(key.removesuffix(suffix)))
        curve = curves[suffix] if suffix else chosen
        if method is not None:
            if schedule is not None and chosen != curve:
                named = "of the model" if curve is None else repr(curve)
                raise RequestError(
                    f"sampler {name!r} names the schedule {named}, but schedule is {schedule!r}; "
                    f"give one of them"
                )
            return method, curve
    raise RequestError(_unknown("sampler", name, tuple(SAMPLERS), methods))


def takes(name: str, schedule: str) -> bool:
    """Tell whether a sampler steps along a schedule, both by whatever names."""
    try:
        sampler, curve = resolve(name, schedule)
    except RequestError:
        return False
    return curve in (None, *TIMESTEP_SPACINGS) or SAMPLERS[sampler] not in TRAINED_TIMESTEPS


def takes_eta(name: str) -> bool:
    """Tell whether a sampler, by whatever name, adds the noise that eta says."""
    try:
        return resolve(name)[0] in WITH_ETA
    except RequestError:
        return True  # what is wrong with the name is said elsewhere


def _key(name: object) -> str:
    """Write a name in lower case, without punctuation, pp for ++, a for ancestral."""
    key = str(name).lower().replace("++", "pp").replace("ancestral", "a")
    key = re.sub(r"[^a-z0-9]", "", key).removesuffix("scheduler")
    return key.removesuffix("discrete").removesuffix("gpu")


def _unknown(what: str, name: object, known: Sequence[str], keys: Mapping[str, str | None]) -> str:
    named = [key for key, value in keys.items() if value is not None]  # None is the model's own
    near = nearest(_key(name), named)
    return f"{what} is {name!r}; {choice(keys[near] if near else '', known)}"


def _first_step(num_inference_steps: int, strength: float) -> int:
    """Return the index of the first step that image-to-image runs, 0 at strength 1."""
    if not 0 < strength <= 1:
        raise RequestError(f"strength is {strength}; it must be above 0 and at most 1")
    steps = int(num_inference_steps * strength)
    if steps < 1 <= num_inference_steps:
        lowest = math.ceil(1000 / num_inference_steps) / 1000
        raise RequestError(f"strength {strength} runs no step; {lowest} is the least that runs one")
    return num_inference_steps - steps
