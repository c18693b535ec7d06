"""Sigma schedules: which noise levels the steps of a run visit, beside the sampler's own spacing.

Legend
    sigma   noise per unit of signal; the UNet is told the timestep whose sigma is nearest
    N       the number of steps; a last sigma, 0, follows the N of a schedule
"""

from collections.abc import Callable, Mapping

import numpy as np

from runtime.samplers.program import Array, Run
from runtime.schedule import TIMESTEP_SPACINGS, NoiseSchedule

Curve = Callable[[NoiseSchedule, int, float, float], Array]

# Sabour et al. 2024, arXiv:2404.14507: the authors' tables for 10 steps of SD 1.5 and of SDXL
AYS = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
AYS_XL = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)


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


def align_your_steps(_: NoiseSchedule, n: int, _high: float, _low: float) -> Array:
    """Optimised levels for SD 1.5, log-linear between them (arXiv:2404.14507, appendix)."""
    return _log_linear(AYS, n)


def align_your_steps_xl(_: NoiseSchedule, n: int, _high: float, _low: float) -> Array:
    """Optimised levels for SDXL, log-linear between them (arXiv:2404.14507, appendix)."""
    return _log_linear(AYS_XL, n)


CURVES: Mapping[str | None, Curve] = {
    curve.__name__: curve
    for curve in (
        *(karras, exponential, beta, simple, sgm_uniform),
        *(kl_optimal, align_your_steps, align_your_steps_xl),
    )
}
SCHEDULES = (*TIMESTEP_SPACINGS, *(str(name) for name in CURVES))


def fractional_levels(run: Run, *, round_karras: bool = False) -> tuple[Array, Array]:
    """Return timesteps (N,), whole or not, and sigmas (N + 1,) for a method that steps in sigma.

    A schedule reaches from the first to the last sigma of the model's spacing, as in diffusers.
    """
    timesteps = run.noise.timesteps(run.num_inference_steps, "linspace", fractional=True)
    sigmas = run.noise.sigmas(timesteps)
    if run.schedule in CURVES:
        curve = CURVES[run.schedule]
        sigmas = curve(run.noise, run.num_inference_steps, sigmas[0], sigmas[-1])
        timesteps = timestep_of(run.noise, sigmas)
        if round_karras and curve is karras:
            timesteps = timesteps.round()
    return timesteps[run.first :], np.append(sigmas, 0.0)[run.first :]


def whole_levels(run: Run) -> tuple[Array, Array]:
    """Return whole timesteps (N,) and sigmas (N + 1,) for DPM-Solver and its like.

    A schedule reaches over the model's whole table, as in diffusers, which also drops the
    fractions of the timesteps that belong to `exponential` and `beta`.
    """
    if run.schedule in CURVES:
        n, last = run.num_inference_steps, run.noise.num_train_timesteps - 1
        run.noise.timesteps(n, "linspace", fractional=True)  # checks the number
        curve = CURVES[run.schedule]
        sigmas = curve(run.noise, n, *run.noise.sigmas(np.array([last, 0.0])))
        timesteps = timestep_of(run.noise, sigmas)
        if curve in (exponential, beta):  # whose highest timestep diffusers' float32 puts lower
            timesteps = np.floor(timesteps - 1e-3).clip(0)
        timesteps = timesteps.round()
    else:
        timesteps = run.noise.timesteps(run.num_inference_steps, "linspace", omit_end=True)
        sigmas = run.noise.sigmas(timesteps)
    return timesteps[run.first :], np.append(sigmas, 0.0)[run.first :]


def timestep_of(noise: NoiseSchedule, sigmas: Array) -> Array:
    """Interpolate the timestep of each sigma, linearly in log sigma, 0 to T - 1."""
    table = np.arange(noise.num_train_timesteps, dtype=np.float64)
    return np.interp(np.log(np.maximum(sigmas, 1e-10)), np.log(noise.sigmas(table)), table)


def _log_linear(levels: tuple[float, ...], n: int) -> Array:
    """Spread the N + 1 ends of N steps over a table of levels; the last one, 0, is left off."""
    given = np.linspace(0, 1, len(levels))
    return np.exp(np.interp(np.linspace(0, 1, n + 1), given, np.log(levels)))[:-1]


def _beta_quantiles(shares: Array) -> Array:
    """Invert the distribution function of Beta(0.6, 0.6), for shares (N,) from 0 to 1.

    With t = w^5 its density t^-0.4 (1 - t)^-0.4 dt is the smooth 5 w^2 (1 - w^5)^-0.4 dw up to
    the middle, which Gauss's rule integrates and bisection inverts; the rest is its mirror image.
    """
    nodes, weights = np.polynomial.legendre.leggauss(40)

    def mass(w: Array) -> Array:
        at = w[:, None] * (nodes + 1) / 2
        area: Array = (at**2 * (1 - at**5) ** -0.4) @ weights * w / 2
        return area

    wanted = np.minimum(shares, 1 - shares) * 2 * mass(np.array([0.5**0.2]))
    low, high = np.zeros_like(shares), np.full_like(shares, 0.5**0.2)
    for _ in range(60):
        middle = (low + high) / 2
        below = mass(middle) < wanted
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    tail = np.where(wanted > 0, high, 0.0) ** 5
    return np.where(shares <= 0.5, tail, 1 - tail)
