"""Methods that step between timesteps of training: DDPM, DDIM, PLMS, LCM and TCD.

They hold x = alpha x0 + sigma eps with alpha^2 + sigma^2 = 1 and take no sigma schedule.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from engine.errors import RequestError
from runtime.samplers.noise_schedule import NoiseSchedule
from runtime.samplers.program import Array, Call, Run, predict

Steps = NDArray[np.int64]
Draws = NDArray[np.bool_]

# Adams and Bashforth's weights of the last four slopes, at orders 1 to 4
EVEN_STEPS = np.array([[24, 0, 0, 0], [36, -12, 0, 0], [46, -32, 10, 0], [55, -59, 37, -9]]) / 24


def ddpm(run: Run) -> Iterator[Call]:
    """Ancestral sampling with the posterior's variance (Ho et al. 2020, arXiv:2006.11239, alg. 2).

    Equations 6 and 7 written in x0 and eps are DDIM's equation 12 with eta = 1, each step reaching
    to the next timestep of the run.
    """
    timesteps = _whole(run)[run.first :]
    reached = np.append(run.noise_schedule.alphas_cumprod[timesteps[1:]], 1.0)
    return _generalized_ddpm(run, timesteps, reached, 1.0, timesteps > 0)


def ddim(run: Run, *, eta: float = 0.0) -> Iterator[Call]:
    """Denoising diffusion implicit model (Song et al. 2021, arXiv:2010.02502, equations 12 and 16).

    Each step reaches T // N timesteps down, whatever the spacing, as diffusers' does.
    """
    timesteps, reached = ddim_levels(run)
    draws = np.full(timesteps.shape, eta > 0)
    return _generalized_ddpm(run, timesteps, reached, eta, draws)


def ddim_levels(run: Run) -> tuple[Steps, Array]:
    """Return DDIM's timesteps (N,) and alphas_cumprod after each step, (N,)."""
    timesteps = _whole(run)[run.first :]
    previous = timesteps - run.noise_schedule.num_train_timesteps // run.num_inference_steps
    return timesteps, _signal(run.noise_schedule, previous)


def plms(run: Run) -> Iterator[Call]:
    """Pseudo linear multistep (PNDM; Liu et al. 2022, arXiv:2202.09778, equations 9, 11 and 12).

    The first step is made twice, the second time with the mean of the outputs at both its ends,
    so N steps are N + 1 calls. Registers: x and the three outputs before; in the first step the
    last register holds the x that it is made again from. The Runge-Kutta warm-up of the paper is
    left out, as Stable Diffusion's settings ask for (skip_prk_steps).

    Image-to-image leaves off the first calls, and with them perhaps the repeated timestep: the
    second call is a repetition all the same, as in diffusers.
    """
    spread = _whole(run)
    timesteps = np.insert(spread, 1, spread[1]) if spread.size > 1 else spread
    total = run.noise_schedule.num_train_timesteps
    stride = total // run.num_inference_steps
    x, e1, e2, e3, out, _ = np.eye(6)
    for k, timestep in enumerate(timesteps[run.first :]):
        if k == 1:
            mean, base, memory = (out + e1) / 2, e3, [e1, e2, e3]
            ends = [min(timestep + stride, total - 1), timestep]
        else:
            mean = EVEN_STEPS[np.clip(k - 1, 0, 3)] @ np.stack([out, e1, e2, e3])
            base, memory = x, [out, e1, e2 if k else x]
            ends = [timestep, timestep - stride]
        # zero terminal SNR, as `NoiseSchedule.sigmas`
        signal = np.maximum(_signal(run.noise_schedule, np.array(ends)), 2.0**-24)
        (alpha, next_alpha), (sigma, next_sigma) = np.sqrt(signal), np.sqrt(1 - signal)
        x0, eps = predict(run.noise_schedule, sigma, base, mean, alpha)
        rows = [next_alpha * x0 + next_sigma * eps, *memory]
        at = run.noise_schedule.alphas_cumprod[timestep]
        yield Call(timestep, np.sqrt(1 - at), rows, alpha=np.sqrt(at))


def lcm(run: Run) -> Iterator[Call]:
    """Multistep consistency sampling (Luo et al. 2023, arXiv:2310.04378, algorithm 3).

    The consistency function c_skip x + c_out x0 has sigma_data = 0.5 and counts time tenfold; all
    but the last step noise its value again.
    """
    timesteps = _distilled(run)[run.first :]
    signal = run.noise_schedule.alphas_cumprod[timesteps]
    reached = np.append(signal[1:], 1.0)
    alpha, sigma = np.sqrt(signal), np.sqrt(1 - signal)
    skip = 0.25 / ((10.0 * timesteps) ** 2 + 0.25)
    keep = np.sqrt(1 - skip)
    onward, fresh = np.sqrt(reached), np.sqrt(1 - reached)
    weights = np.array([onward * (keep + skip * alpha), onward * skip * sigma, fresh])
    return _first_order(run, timesteps, weights, timesteps > timesteps[-1])


def tcd(run: Run, *, eta: float = 0.0) -> Iterator[Call]:
    """Trajectory consistency distillation (Zheng et al. 2024, arXiv:2402.19159, algorithm 4).

    A step goes down to timestep s = (1 - eta) t' by DDIM and back up to t' by noise; eta is the
    paper's gamma. The last step ends at the first entry of the table, as diffusers' does.
    """
    timesteps = _distilled(run)[run.first :]
    onward = np.append(timesteps[1:], 0)
    down = np.floor(np.float32(1 - eta) * onward.astype(np.float32)).astype(int)
    reached, below = (
        run.noise_schedule.alphas_cumprod[onward],
        run.noise_schedule.alphas_cumprod[down],
    )
    rise = reached / below
    weights = np.sqrt([reached, rise * (1 - below), 1 - rise])
    return _first_order(run, timesteps, weights, (timesteps > timesteps[-1]) & (eta > 0))


def _whole(run: Run) -> Steps:
    return run.noise_schedule.timesteps(run.num_inference_steps, "leading").astype(np.int64)


def _distilled(run: Run) -> Steps:
    """Return N of the timesteps that a consistency model was distilled on, mostly 50, falling."""
    steps, total = run.num_inference_steps, run.noise_schedule.num_train_timesteps
    trained = run.noise_schedule.original_inference_steps
    run.noise_schedule.timesteps(steps, "linspace", fractional=True)  # checks the number
    if steps > trained or total < trained:
        raise RequestError(
            f"{steps} steps of {total} timesteps do not fit: samplers lcm and tcd "
            f"make up to {trained} steps, of models with at least as many timesteps"
        )
    falling = (np.arange(trained, 0, -1) * (total // trained)) - 1
    chosen = np.linspace(0, trained, steps, endpoint=False).astype(np.int64)
    return falling[chosen]


def _signal(noise: NoiseSchedule, timesteps: Steps) -> Array:
    """Return alphas_cumprod at timesteps (N,); below 0 it is where DDIM's last step ends."""
    final = 1.0 if noise.set_alpha_to_one else noise.alphas_cumprod[0]
    return np.where(timesteps >= 0, noise.alphas_cumprod[timesteps.clip(0)], final)


def _generalized_ddpm(
    run: Run, timesteps: Steps, reached: Array, eta: float, draws: Draws
) -> Iterator[Call]:
    """Build DDIM's equations 12 and 16; `reached` (N,) is alphas_cumprod after each step."""
    signal = run.noise_schedule.alphas_cumprod[timesteps]
    variance = eta**2 * (1 - reached) / (1 - signal) * (1 - signal / reached)
    on_eps = np.maximum(1 - reached - variance, 0)
    return _first_order(run, timesteps, np.sqrt([reached, on_eps, variance]), draws)


def _first_order(run: Run, timesteps: Steps, weights: Array, draws: Draws) -> Iterator[Call]:
    """Build x' = weights [x0; eps; n]; weights: (3, N)."""
    x, out, n = np.eye(3)
    for k, signal in enumerate(run.noise_schedule.alphas_cumprod[timesteps]):
        alpha, sigma = np.sqrt(signal), np.sqrt(1 - signal)
        x0, eps = predict(run.noise_schedule, sigma, x, out, alpha)
        moved = weights[:, k] @ np.stack([x0, eps, n])
        yield Call(timesteps[k], sigma, [moved], draws[k], alpha)
