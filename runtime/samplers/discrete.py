"""Methods that step between timesteps of training: DDPM, DDIM, PLMS, LCM and TCD.

They hold x = alpha x0 + sigma eps with alpha^2 + sigma^2 = 1 and take no sigma schedule.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from engine.errors import RequestError
from runtime.samplers.program import Array, Program, Run, predict, x0_and_eps
from runtime.schedule import NoiseSchedule

Steps = NDArray[np.int64]


def ddpm(run: Run) -> Program:
    """Ancestral sampling with the posterior's variance (Ho et al. 2020, arXiv:2006.11239, alg. 2).

    Equations 6 and 7 written in x0 and eps are DDIM's equation 12 with eta = 1, each step reaching
    to the next timestep of the run.
    """
    timesteps = run.noise.timesteps(run.num_inference_steps, "leading")[run.first :]
    reached = np.append(run.noise.alphas_cumprod[timesteps[1:].astype(int)], 1.0)
    program = _generalized_ddpm(run, timesteps, reached, 1.0)
    return replace(program, needs_noise=timesteps > 0)


def ddim(run: Run, *, eta: float = 0.0) -> Program:
    """Denoising diffusion implicit model (Song et al. 2021, arXiv:2010.02502, equations 12 and 16).

    Each step reaches T // N timesteps down, whatever the spacing, as diffusers' does.
    """
    timesteps = run.noise.timesteps(run.num_inference_steps, "leading")[run.first :]
    previous = timesteps.astype(int) - run.noise.num_train_timesteps // run.num_inference_steps
    return _generalized_ddpm(run, timesteps, _signal(run.noise, previous), eta)


def plms(run: Run) -> Program:
    """Pseudo linear multistep (PNDM; Liu et al. 2022, arXiv:2202.09778, equations 9, 11 and 12).

    The first step is made twice, the second time with the mean of the outputs at both its ends,
    so N steps are N + 1 calls. Registers: x and the three outputs before; in the first step the
    last register holds the x that it is made again from. The Runge-Kutta warm-up of the paper is
    left out, as Stable Diffusion's settings ask for (skip_prk_steps).

    Image-to-image leaves off the first calls, and with them perhaps the repeated timestep: the
    second call is a repetition all the same, as in diffusers.
    """
    spread = run.noise.timesteps(run.num_inference_steps, "leading")
    timesteps = np.insert(spread, 1, spread[1]) if spread.size > 1 else spread
    timesteps = timesteps[run.first :].astype(int)
    stride = run.noise.num_train_timesteps // run.num_inference_steps
    x, e1, e2, e3, out, _ = np.eye(6)
    zero = np.zeros(6)
    matrices = []
    for k, timestep in enumerate(timesteps):
        come, reach = (timestep, timestep - stride) if k != 1 else (timestep + stride, timestep)
        mean, base, memory = [
            (out, x, [out, zero, x]),
            ((out + e1) / 2, e3, [e1, zero, zero]),
            ((3 * out - e1) / 2, x, [out, e1, zero]),
            ((23 * out - 16 * e1 + 5 * e2) / 12, x, [out, e1, e2]),
            ((55 * out - 59 * e1 + 37 * e2 - 9 * e3) / 24, x, [out, e1, e2]),
        ][min(k, 4)]
        ends = _signal(run.noise, np.array([min(come, run.noise.num_train_timesteps - 1), reach]))
        ends = np.maximum(ends, 2.0**-24)  # zero terminal SNR, as `NoiseSchedule.sigmas`
        (alpha, next_alpha), (sigma, next_sigma) = np.sqrt(ends), np.sqrt(1 - ends)
        x0, eps = predict(run.noise, float(sigma), base, mean, float(alpha))
        matrices.append([next_alpha * x0 + next_sigma * eps, *memory])
    first = run.noise.alphas_cumprod[timesteps[0]]
    return Program(
        timesteps=timesteps.astype(np.float64),
        input_scales=np.ones(timesteps.size),
        matrices=np.array(matrices),
        needs_noise=np.zeros(timesteps.size, bool),
        signal_scale=0.0 if run.start is None else float(np.sqrt(first)),
        noise_scale=1.0 if run.start is None else float(np.sqrt(1 - first)),
    )


def lcm(run: Run) -> Program:
    """Multistep consistency sampling (Luo et al. 2023, arXiv:2310.04378, algorithm 3).

    The consistency function c_skip x + c_out x0 has sigma_data = 0.5 and counts time tenfold; all
    but the last step noise its value again.
    """
    timesteps = _distilled(run)[run.first :]
    signal = run.noise.alphas_cumprod[timesteps]
    reached = np.append(signal[1:], 1.0)
    alpha, sigma = np.sqrt(signal), np.sqrt(1 - signal)
    scaled = 10.0 * timesteps
    skip, keep = 0.25 / (scaled**2 + 0.25), scaled / np.sqrt(scaled**2 + 0.25)
    onward, fresh = np.sqrt(reached), np.sqrt(1 - reached)
    weights = np.stack([onward * (keep + skip * alpha), onward * skip * sigma, fresh], axis=1)
    draws = np.arange(timesteps.size) < timesteps.size - 1
    return _first_order(run, timesteps.astype(np.float64), weights, draws)


def tcd(run: Run, *, eta: float = 0.0) -> Program:
    """Trajectory consistency distillation (Zheng et al. 2024, arXiv:2402.19159, algorithm 4).

    A step goes down to timestep s = (1 - eta) t' by DDIM and back up to t' by noise; eta is the
    paper's gamma. The last step ends at the first entry of the table, as diffusers' does.
    """
    timesteps = _distilled(run)[run.first :]
    onward = np.append(timesteps[1:], 0)
    down = np.floor(np.float32(1 - eta) * onward.astype(np.float32)).astype(int)
    reached, below = run.noise.alphas_cumprod[onward], run.noise.alphas_cumprod[down]
    weights = np.stack(
        [
            np.sqrt(reached),
            np.sqrt(reached / below) * np.sqrt(1 - below),
            np.sqrt(1 - reached / below),
        ],
        axis=1,
    )
    draws = (np.arange(timesteps.size) < timesteps.size - 1) & (eta > 0)
    return _first_order(run, timesteps.astype(np.float64), weights, draws)


def _distilled(run: Run) -> Steps:
    """Return the N of the 50 timesteps that consistency models are distilled on, falling."""
    steps, total, trained = run.num_inference_steps, run.noise.num_train_timesteps, 50
    run.noise.timesteps(steps, "linspace", fractional=True)  # checks the number
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


def _generalized_ddpm(run: Run, timesteps: Array, reached: Array, eta: float) -> Program:
    """Build DDIM's equations 12 and 16; `reached` (N,) is alphas_cumprod after each step."""
    signal = run.noise.alphas_cumprod[timesteps.astype(int)]
    variance = eta**2 * (1 - reached) / (1 - signal) * (1 - signal / reached)
    on_eps = np.sqrt(np.maximum(1 - reached - variance, 0))
    weights = np.stack([np.sqrt(reached), on_eps, np.sqrt(variance)], axis=1)
    return _first_order(run, timesteps, weights, np.full(timesteps.shape, eta > 0))


def _first_order(run: Run, timesteps: Array, weights: Array, draws: NDArray[np.bool_]) -> Program:
    """Build x' = weights [x0; eps; n]; weights: (N, 3)."""
    signal = run.noise.alphas_cumprod[timesteps.astype(int)]
    alpha, sigma = np.sqrt(signal), np.sqrt(1 - signal)
    on_x_and_out = weights[:, None, :2] @ x0_and_eps(run.noise, alpha, sigma)
    return Program(
        timesteps=timesteps,
        input_scales=np.ones(timesteps.size),
        matrices=np.concatenate([on_x_and_out, weights[:, None, 2:]], axis=2),
        needs_noise=draws,
        signal_scale=0.0 if run.start is None else float(alpha[0]),
        noise_scale=1.0 if run.start is None else float(sigma[0]),
    )
