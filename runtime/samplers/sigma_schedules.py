"""Sigma schedules: which noise levels the steps of a run visit, beside the sampler's own spacing.

Legend
    sigma   noise per unit of signal; the UNet is told the timestep whose sigma is nearest
    N       the number of steps; a last sigma, 0, follows the N of a schedule
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from engine.errors import RequestError
from runtime.samplers.noise_schedule import TIMESTEP_SPACINGS, NoiseSchedule
from runtime.samplers.program import Array, Run

Curve = Callable[[NoiseSchedule, int, float, float], Array]

# Sabour et al. 2024, arXiv:2404.14507: the levels for 10 steps of SD 1.5 and of SDXL, as ComfyUI
# has them (comfy_extras/nodes_align_your_steps.py), and rounded as in the paper's appendix, which
# Automatic1111 took them from (modules/sd_schedulers.py)
ALIGN_YOUR_STEPS = {
    "align_your_steps": (
        *(14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177, 1.3943805092),
        *(0.9642583904, 0.6523686016, 0.3977456272, 0.1515232662, 0.0291671582),
    ),
    "align_your_steps_xl": (
        *(14.6146412293, 6.3184485287, 3.7681790315, 2.1811480769, 1.3405244945, 0.8620721141),
        *(0.5550693289, 0.3798540708, 0.2332364134, 0.1114188177, 0.0291671582),
    ),
    "a1111_align_your_steps": (
        *(14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    ),
    "a1111_align_your_steps_xl": (
        *(14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    ),
}


def karras(_: NoiseSchedule, n: int, high: float, low: float) -> Array:
    """Even in sigma^(1/7) (Karras et al. 2022, arXiv:2206.00364, equation 5, rho = 7)."""
    return np.linspace(high ** (1 / 7), low ** (1 / 7), n) ** 7


def exponential(_: NoiseSchedule, n: int, high: float, low: float) -> Array:
    """Even in log sigma (k-diffusion, `get_sigmas_exponential`)."""
    return np.exp(np.linspace(np.log(high), np.log(low), n))


def beta(_: NoiseSchedule, n: int, high: float, low: float) -> Array:
    """Quantiles of Beta(0.6, 0.6) from high to low (arXiv:2407.12173, section 4, as diffusers)."""
    return low + _beta_quantiles(1 - np.linspace(0, 1, n)) * (high - low)


def comfyui_beta(noise: NoiseSchedule, n: int, _high: float, _low: float) -> Array:
    """Sigmas (n,) of Beta(0.6, 0.6)'s quantiles over the timesteps (ComfyUI's `beta`).

    Raises RequestError for so many steps that two are of one timestep, which ComfyUI leaves out.
    """
    last = noise.num_train_timesteps - 1
    timesteps = np.rint(_beta_quantiles(1 - np.arange(n) / n) * last)
    if len(set(timesteps)) < n:
        raise RequestError(
            f"{n} steps along comfyui_beta are of {len(set(timesteps))} timesteps; take fewer"
        )
    return noise.sigmas(timesteps)


def kl_optimal(_: NoiseSchedule, n: int, high: float, low: float) -> Array:
    """Even in arctan sigma (Sabour et al. 2024, arXiv:2404.14507, equation 9; as ComfyUI)."""
    return np.tan(np.linspace(np.arctan(high), np.arctan(low), n))


def a1111_kl_optimal(_: NoiseSchedule, n: int, high: float, low: float) -> Array:
    """As `kl_optimal` in n steps down to the lowest level, where Automatic1111 ends: (n + 1,)."""
    return np.tan(np.linspace(np.arctan(high), np.arctan(low), n + 1))


def simple(noise: NoiseSchedule, n: int, _high: float, _low: float) -> Array:
    """Every T / n-th sigma (n,) of the model's table, from the last down (ComfyUI's `simple`)."""
    total = noise.num_train_timesteps
    return noise.sigmas(total - 1 - np.floor(np.arange(n) * (total / n)))


def normal(noise: NoiseSchedule, n: int, _high: float, _low: float) -> Array:
    """Sigmas (n,) of even timesteps from the last to the first (ComfyUI's and A1111's `normal`)."""
    return _sigmas_at(noise, np.linspace(noise.num_train_timesteps - 1, 0, n))


def sgm_uniform(noise: NoiseSchedule, n: int, _high: float, _low: float) -> Array:
    """Sigmas (n,) of n + 1 even timesteps but the last (ComfyUI's and A1111's `sgm_uniform`)."""
    return _sigmas_at(noise, np.linspace(noise.num_train_timesteps - 1, 0, n + 1)[:-1])


def align_your_steps(name: str, _: NoiseSchedule, n: int, _high: float, _low: float) -> Array:
    """Published levels, log-linear between them: (n + 1,), of which the last is left off for 0.

    Automatic1111 spreads N over them, and steps from the lowest to 0.
    """
    table = np.log(ALIGN_YOUR_STEPS[name])
    points = n if name.startswith("a1111") else n + 1
    given = np.linspace(0, 1, table.size)
    return np.exp(np.interp(np.linspace(0, 1, points), given, table))[:n]


CURVES: Mapping[str, Curve] = {
    **{f.__name__: f for f in (karras, exponential, beta, normal, simple, sgm_uniform)},
    **{f.__name__: f for f in (kl_optimal, a1111_kl_optimal, comfyui_beta)},
    **{name: partial(align_your_steps, name) for name in ALIGN_YOUR_STEPS},
}
SCHEDULES = (*TIMESTEP_SPACINGS, *CURVES)
# Behind a curve's name: of one level more, the last but one is left out, which Automatic1111 calls
# "discard next-to-last sigma" and ComfyUI "discard penultimate sigma"
DISCARD = "_discard"


def discarding(schedule: str | None) -> str | None:
    """Return the schedule whose last level but one is left out, where it is a curve."""
    if schedule == "normal":
        return "sgm_uniform"  # which that is
    return f"{schedule}{DISCARD}" if schedule in CURVES else schedule


def levels(run: Run, *, whole: bool = False, round_karras: bool = False) -> tuple[Array, Array]:
    """Return timesteps (N,) and sigmas (N + 1,); whole timesteps for DPM-Solver and its like.

    The last sigma is 0 but for `a1111_kl_optimal`. A single step of a method in sigma starts at the
    highest level; diffusers' spacings would start it at the lowest, where nothing is drawn.
    The schedules that diffusers has reach from the first to the last sigma of the model's spacing
    or, where timesteps are whole, of the model's table: all of this is as in diffusers, which also
    drops the fractions of the timesteps that belong to `exponential` and `beta`. The others reach
    over the table, as in the programs that they come from; so does a curve of which one is left
    out, whose timesteps are fractions there too.
    """
    if run.schedule is not None and run.schedule.endswith(DISCARD):
        longer = replace(
            run,
            num_inference_steps=run.num_inference_steps + 1,
            schedule=run.schedule.removesuffix(DISCARD),
            noise_schedule=replace(run.noise_schedule, timestep_spacing="linspace"),
        )
        timesteps, sigmas = levels(longer, whole=whole)
        return timesteps[:-1], np.append(sigmas[:-2], sigmas[-1])
    noise, n, spaced = run.noise_schedule, run.num_inference_steps, whole and run.schedule is None
    timesteps = noise.timesteps(n, "linspace", fractional=not spaced, omit_end=spaced)
    table_ends = np.array([noise.num_train_timesteps - 1, 0.0])
    if n == 1 and not whole:
        timesteps = table_ends[:1]
    sigmas = noise.sigmas(timesteps)
    if run.schedule is not None:
        of_table = whole or n == 1 or run.schedule not in ("karras", "exponential", "beta")
        ends = noise.sigmas(table_ends) if of_table else sigmas
        sigmas = CURVES[run.schedule](noise, n, ends[0], ends[-1])
        timesteps = timestep_of(noise, sigmas[:n])
        if whole and run.schedule in ("exponential", "beta"):
            # the next lower one, and of a whole one too, which diffusers' float32 puts lower
            timesteps = (timesteps - 0.501).clip(0)
        if whole or (round_karras and run.schedule == "karras"):
            # half-way between two, the lower one, on every machine, as in diffusers' float32
            timesteps = (timesteps - 1e-6).clip(0).round()
    return timesteps[run.first :], np.append(sigmas, 0.0)[run.first : n + 1]


def steps(timesteps: Array, sigmas: Array) -> Iterator[tuple[float, float, float]]:
    """Walk through timesteps (n,) and sigmas (n + 1,): a timestep, its sigma, the one reached."""
    return zip(timesteps, sigmas[:-1], sigmas[1:], strict=True)


def timestep_of(noise: NoiseSchedule, sigma: Array) -> Array:
    """Interpolate the timesteps, 0 to T - 1, of sigmas of any shape, linearly in log sigma."""
    table = np.arange(noise.num_train_timesteps, dtype=np.float64)
    return np.interp(np.log(np.maximum(sigma, 1e-10)), np.log(noise.sigmas(table)), table)


def _sigmas_at(noise: NoiseSchedule, timesteps: Array) -> Array:
    """Interpolate the sigmas of timesteps, linearly in log sigma, as k-diffusion does."""
    table = np.arange(noise.num_train_timesteps, dtype=np.float64)
    return np.exp(np.interp(timesteps, table, np.log(noise.sigmas(table))))


def _beta_quantiles(shares: Array) -> Array:
    """Invert the distribution function of Beta(0.6, 0.6), for shares (N,) from 0 to 1.

    With t = w^5 its density t^-0.4 (1 - t)^-0.4 dt is the smooth 5 w^2 (1 - w^5)^-0.4 dw up to
    the middle, which trapezoids sum and interpolation inverts; the rest is its mirror image.
    """
    w = np.linspace(0, 0.5**0.2, 100_001)
    density = w**2 * (1 - w**5) ** -0.4
    mass = np.append(0.0, np.cumsum(density[1:] + density[:-1]))
    tail: Array = np.interp(np.minimum(shares, 1 - shares) * 2 * mass[-1], mass, w) ** 5
    return np.where(shares <= 0.5, tail, 1 - tail)
