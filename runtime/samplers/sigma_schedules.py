"""Sigma schedules: which noise levels the steps of a run visit, beside the sampler's own spacing.

Legend
    sigma   noise per unit of signal; the UNet is told the timestep whose sigma is nearest
    N       the number of steps; a last sigma, 0, follows the N of a schedule
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np

from runtime.samplers.noise_schedule import TIMESTEP_SPACINGS, NoiseSchedule
from runtime.samplers.program import Array, Run

Curve = Callable[[NoiseSchedule, int, float, float], Array]

# Sabour et al. 2024, arXiv:2404.14507, appendix: the levels for 10 steps of SD 1.5 and of SDXL
ALIGN_YOUR_STEPS = {
    "": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "_xl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
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


def kl_optimal(_: NoiseSchedule, n: int, high: float, low: float) -> Array:
    """Even in arctan sigma (Sabour et al. 2024, arXiv:2404.14507, equation 9)."""
    return np.tan(np.linspace(np.arctan(high), np.arctan(low), n))


def simple(noise: NoiseSchedule, n: int, _high: float, _low: float) -> Array:
    """Every T / N-th sigma of the model's table, from the last one down (ComfyUI's `simple`)."""
    total = noise.num_train_timesteps
    return noise.sigmas(total - 1 - np.floor(np.arange(n) * (total / n)))


def sgm_uniform(noise: NoiseSchedule, n: int, _high: float, _low: float) -> Array:
    """N + 1 even timesteps without the last one (`sgm_uniform` of ComfyUI and A1111)."""
    table = np.arange(noise.num_train_timesteps)
    timesteps = np.linspace(table[-1], 0, n + 1)[:-1]
    return np.exp(np.interp(timesteps, table, np.log(noise.sigmas(table.astype(np.float64)))))


def align_your_steps(model: str, _: NoiseSchedule, n: int, _high: float, _low: float) -> Array:
    """Published levels, log-linear between them: N + 1, of which the last, 0, is left off."""
    table = np.log(ALIGN_YOUR_STEPS[model])
    given = np.linspace(0, 1, table.size)
    return np.exp(np.interp(np.linspace(0, 1, n + 1), given, table))[:-1]


CURVES: Mapping[str, Curve] = {
    **{f.__name__: f for f in (karras, exponential, beta, simple, sgm_uniform, kl_optimal)},
    **{f"align_your_steps{model}": partial(align_your_steps, model) for model in ALIGN_YOUR_STEPS},
}
SCHEDULES = (*TIMESTEP_SPACINGS, *CURVES)


def levels(run: Run, *, whole: bool = False, round_karras: bool = False) -> tuple[Array, Array]:
    """Return timesteps (N,) and sigmas (N + 1,); whole timesteps for DPM-Solver and its like.

    A schedule reaches from the first to the last sigma of the model's spacing or, where timesteps
    are whole, of the model's table: all of this is as in diffusers, which also drops the fractions
    of the timesteps that belong to `exponential` and `beta`.
    """
    noise, n, spaced = run.noise_schedule, run.num_inference_steps, whole and run.schedule is None
    timesteps = noise.timesteps(n, "linspace", fractional=not spaced, omit_end=spaced)
    sigmas = noise.sigmas(timesteps)
    if run.schedule is not None:
        ends = noise.sigmas(np.array([noise.num_train_timesteps - 1, 0.0])) if whole else sigmas
        sigmas = CURVES[run.schedule](noise, n, ends[0], ends[-1])
        timesteps = timestep_of(noise, sigmas)
        if whole and run.schedule in ("exponential", "beta"):
            # the next lower one, and of a whole one too, which diffusers' float32 puts lower
            timesteps = (timesteps - 0.501).clip(0)
        if whole or (round_karras and run.schedule == "karras"):
            timesteps = timesteps.round()
    return timesteps[run.first :], np.append(sigmas, 0.0)[run.first :]


def steps(timesteps: Array, sigmas: Array) -> Iterator[tuple[float, float, float]]:
    """Walk through a run: each step's timestep, its sigma and the sigma that it reaches."""
    return zip(timesteps, sigmas[:-1], sigmas[1:], strict=True)


def timestep_of(noise: NoiseSchedule, sigma: Array) -> Array:
    """Interpolate the timestep of a sigma, linearly in log sigma, 0 to T - 1."""
    table = np.arange(noise.num_train_timesteps, dtype=np.float64)
    return np.interp(np.log(np.maximum(sigma, 1e-10)), np.log(noise.sigmas(table)), table)


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
