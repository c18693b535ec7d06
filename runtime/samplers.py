"""Samplers: each published method as the list of matrices that one run applies.

A step of every method is linear in what it remembers, in the model's output and in noise,

    R' = M_k [R; out; n]        R = [x, h_1, ..., h_(r-1)], at first x and zeros

so a sampler is a function from a noise schedule and a number of steps to a `Program` of the M_k.

Legend
    x, x0, eps     the latent; its clean part and its noise, as the model sees them
    alpha, sigma   x = alpha x0 + sigma eps; alpha^2 + sigma^2 = 1, or alpha = 1 for Euler
    out            the (guided) prediction of eps, of x0, or of v = alpha eps - sigma x0
    n              fresh noise; eta, 0 to 1: the share of DDPM's noise that DDIM adds

The methods share their leading arguments: the model's schedule; N steps, 1 to T; and `start`, None
for pure noise (text-to-image) or the index of the first step to run, 0 to N - 1, from noised
latents (image-to-image). Timesteps and noise draws are those of diffusers' scheduler; steps that do
not fit the schedule raise RequestError.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from engine.errors import ModelError, RequestError
from runtime.schedule import NoiseSchedule

__all__ = ["SAMPLERS", "Program", "ddim", "ddpm", "dpmpp_2m", "euler", "euler_a", "program"]

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Program:
    """One run of a sampler: what the loop reads at each of its N steps.

    Attributes:
        timesteps: (N,), float64: what the UNet is told; whole, or fractional for Euler
        input_scales: (N,), float64: the UNet sees input_scale x
        matrices: (N, r, r + 2), float64: M_k on [R; out; n]
        needs_noise: (N,), bool: whether n is drawn, even to weigh 0 (draws are consecutive)
        signal_scale, noise_scale: x starts as signal_scale latents + noise_scale noise; there
            are no latents, and signal_scale is 0, in text-to-image
    """

    timesteps: Array
    input_scales: Array
    matrices: Array
    needs_noise: NDArray[np.bool_]
    signal_scale: float
    noise_scale: float

    def __post_init__(self) -> None:
        """Check the shapes against each other, and that every number is finite."""
        steps, registers, columns = self.matrices.shape
        tables = (self.timesteps, self.input_scales, self.needs_noise)
        if steps < 1 or columns != registers + 2 or any(t.shape != (steps,) for t in tables):
            shapes = ", ".join(str(table.shape) for table in (*tables, self.matrices))
            raise ValueError(f"a program needs (N,), (N,), (N,) and (N, r, r + 2), not {shapes}")
        if not np.isfinite(self.matrices).all():
            raise ValueError("a program's matrices must be finite")


def ddpm(schedule: NoiseSchedule, num_inference_steps: int, start: int | None = None) -> Program:
    """Ancestral sampling with the posterior's variance (Ho et al. 2020, arXiv:2006.11239, alg. 2).

    Equations 6 and 7 written in x0 and eps are DDIM's equation 12 with eta = 1, each step reaching
    to the next timestep of the run.
    """
    timesteps = schedule.timesteps(num_inference_steps, "leading")[start or 0 :]
    reached = np.append(schedule.alphas_cumprod[timesteps[1:].astype(int)], 1.0)
    run = _generalized_ddpm(schedule, timesteps, reached, 1.0, start)
    return replace(run, needs_noise=timesteps > 0)


def ddim(
    schedule: NoiseSchedule, num_inference_steps: int, start: int | None = None, *, eta: float = 0.0
) -> Program:
    """Denoising diffusion implicit model (Song et al. 2021, arXiv:2010.02502, equations 12 and 16).

    Each step reaches T // N timesteps down, whatever the spacing, as diffusers' does.
    """
    timesteps = schedule.timesteps(num_inference_steps, "leading")[start or 0 :]
    previous = timesteps.astype(int) - schedule.num_train_timesteps // num_inference_steps
    final = 1.0 if schedule.set_alpha_to_one else schedule.alphas_cumprod[0]
    reached = np.where(previous >= 0, schedule.alphas_cumprod[previous.clip(0)], final)
    return _generalized_ddpm(schedule, timesteps, reached, eta, start)


def euler(schedule: NoiseSchedule, num_inference_steps: int, start: int | None = None) -> Program:
    """Euler steps along the ODE in sigma (Karras et al. 2022, arXiv:2206.00364, algorithm 1)."""
    return _euler(schedule, num_inference_steps, start, ancestral=False)


def euler_a(schedule: NoiseSchedule, num_inference_steps: int, start: int | None = None) -> Program:
    """Euler's method with ancestral noise (k-diffusion, `sample_euler_ancestral`).

    A step goes down to sigma_down and back up by sigma_up of noise, the variance of DDPM's step
    (arXiv:2006.11239, equation 7) in sigma: sigma_down^2 + sigma_up^2 = sigma_next^2.
    """
    return _euler(schedule, num_inference_steps, start, ancestral=True)


def dpmpp_2m(
    schedule: NoiseSchedule, num_inference_steps: int, start: int | None = None
) -> Program:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2).

    Registers: x and the previous step's x0. The first step has no previous x0 and the last step
    ends at lambda = infinity, so both are first order, which is DDIM.
    """
    timesteps = schedule.timesteps(num_inference_steps, "linspace", omit_end=True)[start or 0 :]
    ratios = np.append(schedule.sigmas(timesteps), 0.0)  # sigma / alpha = exp(-lambda)
    alphas = 1 / np.sqrt(1 + ratios**2)
    sigmas = ratios * alphas
    steps = np.diff(-np.log(ratios[:-1]))  # h
    lead = np.zeros(timesteps.size)  # 1 / (2 r): how far x0 is extrapolated
    lead[1:-1] = steps[1:] / (2 * steps[:-1])
    gain = alphas[1:] * (1 - ratios[1:] / ratios[:-1])  # -alpha_t (exp(-h) - 1)
    x0 = _x0_and_eps(schedule, alphas[:-1], sigmas[:-1])[:, 0]  # (N, 2) on [x; out]
    matrices = np.zeros((timesteps.size, 2, 4))
    matrices[:, 0, [0, 2]] = (gain * (1 + lead))[:, None] * x0
    matrices[:, 0, 0] += sigmas[1:] / sigmas[:-1]
    matrices[:, 0, 1] = -gain * lead
    matrices[:, 1, [0, 2]] = x0
    return Program(
        timesteps=timesteps,
        input_scales=np.ones(timesteps.size),
        matrices=matrices,
        needs_noise=np.zeros(timesteps.size, bool),
        signal_scale=0.0 if start is None else float(alphas[0]),
        noise_scale=1.0 if start is None else float(sigmas[0]),
    )


SAMPLERS: Mapping[str, Callable[..., Program]] = {
    method.__name__: method for method in (ddpm, ddim, euler, euler_a, dpmpp_2m)
}


def program(
    name: str,
    schedule: NoiseSchedule,
    num_inference_steps: int,
    *,
    strength: float | None = None,
    eta: float = 0.0,
) -> Program:
    """Make the program of one request.

    Args:
        name: one of `SAMPLERS`
        num_inference_steps: 1 to T
        strength: None for text-to-image; for image-to-image, above 0 and at most 1:
            int(num_inference_steps * strength) steps are run, as in diffusers
        eta: 0 to 1; for "ddim" only

    Raises:
        RequestError: an argument is outside what is listed above.
        ModelError: the schedule begins at zero signal, and the model's eps says nothing about x0.
    """
    if name not in SAMPLERS:
        close = difflib.get_close_matches(str(name), SAMPLERS, n=1, cutoff=0.5)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise RequestError(f"sampler is {name!r}; choose one of {', '.join(SAMPLERS)}{hint}")
    if not 0 <= eta <= (name == "ddim"):
        raise RequestError(f"eta is {eta}; ddim allows 0 to 1, every other sampler only 0")
    options = {"eta": eta} if name == "ddim" else {}
    start = None if strength is None else _first_step(num_inference_steps, strength)
    return SAMPLERS[name](schedule, num_inference_steps, start=start, **options)


def _first_step(num_inference_steps: int, strength: float) -> int:
    """Return the index of the first step that image-to-image runs, 0 at strength 1."""
    if not 0 < strength <= 1:
        raise RequestError(f"strength is {strength}; it must be above 0 and at most 1")
    steps = int(num_inference_steps * strength)
    if steps < 1 <= num_inference_steps:
        least = math.ceil(1000 / num_inference_steps) / 1000
        raise RequestError(f"strength {strength} runs no step; {least} is the least that runs one")
    return num_inference_steps - steps


def _x0_and_eps(schedule: NoiseSchedule, alpha: Array, sigma: Array) -> Array:
    """Return (N, 2, 2): rows x0 and eps of x = alpha x0 + sigma eps, on columns x and out."""
    zero, one = np.zeros_like(alpha), np.ones_like(alpha)
    if schedule.prediction_type == "epsilon":
        if not alpha.all():
            raise ModelError(
                "the schedule ends in pure noise (rescale_betas_zero_snr), where no x0 follows "
                "from a predicted epsilon; take sampler euler, or a model of v_prediction"
            )
        rows = [[1 / alpha, -sigma / alpha], [zero, one]]
    elif schedule.prediction_type == "sample":
        rows = [[zero, one], [1 / sigma, -alpha / sigma]]
    else:
        norm = np.hypot(alpha, sigma)  # v is defined at norm 1
        rows = [[alpha / norm**2, -sigma / norm], [sigma / norm**2, alpha / norm]]
    return np.moveaxis(np.array(rows), -1, 0)


def _first_order(schedule: NoiseSchedule, alpha: Array, sigma: Array, weights: Array) -> Array:
    """Return (N, 1, 3) matrices of x' = weights [x0; eps; n]; weights: (N, 3)."""
    on_x_and_out = weights[:, None, :2] @ _x0_and_eps(schedule, alpha, sigma)
    return np.concatenate([on_x_and_out, weights[:, None, 2:]], axis=2)


def _generalized_ddpm(
    schedule: NoiseSchedule, timesteps: Array, reached: Array, eta: float, start: int | None
) -> Program:
    """Build DDIM's equations 12 and 16; `reached` (N,) is alphas_cumprod after each step."""
    signal = schedule.alphas_cumprod[timesteps.astype(int)]
    alpha, sigma = np.sqrt(signal), np.sqrt(1 - signal)
    variance = eta**2 * (1 - reached) / (1 - signal) * (1 - signal / reached)
    on_eps = np.sqrt(np.maximum(1 - reached - variance, 0))
    weights = np.stack([np.sqrt(reached), on_eps, np.sqrt(variance)], axis=1)
    return Program(
        timesteps=timesteps,
        input_scales=np.ones(timesteps.size),
        matrices=_first_order(schedule, alpha, sigma, weights),
        needs_noise=np.full(timesteps.shape, eta > 0),
        signal_scale=0.0 if start is None else float(alpha[0]),
        noise_scale=1.0 if start is None else float(sigma[0]),
    )


def _euler(
    schedule: NoiseSchedule, num_inference_steps: int, start: int | None, *, ancestral: bool
) -> Program:
    """Build x' = x0 + down eps + up n, Euler's x + (down - sigma) (x - x0) / sigma + up n."""
    timesteps = schedule.timesteps(num_inference_steps, "linspace", fractional=True)[start or 0 :]
    sigma = schedule.sigmas(timesteps)
    reached = np.append(sigma[1:], 0.0)
    down = reached**2 / sigma if ancestral else reached
    one, up = np.ones_like(sigma), np.sqrt(reached**2 - down**2)
    norm = np.sqrt(sigma**2 + 1)
    # diffusers' init_noise_sigma: at "leading" spacing the noise keeps a unit of signal's variance
    pure_noise = norm[0] if schedule.timestep_spacing == "leading" else sigma[0]
    return Program(
        timesteps=timesteps,
        input_scales=1 / norm,
        matrices=_first_order(schedule, one, sigma, np.stack([one, down, up], axis=1)),
        needs_noise=np.full(timesteps.shape, ancestral),
        signal_scale=0.0 if start is None else 1.0,
        noise_scale=float(pure_noise if start is None else sigma[0]),
    )
