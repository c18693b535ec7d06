"""CFG++: what is taken off a step is what the model sees without the text.

(Chung et al. 2024, arXiv:2406.08070, algorithm 2.) A step goes to the picture that the guided
output predicts, and back to the next noise level along the eps of the unconditional output, so that
guidance never leaves the data's manifold and scales of 0 to 1 are enough. Rows have one column more
than those of other methods, for the unconditional output; the second register is the guided x0.
"""

from collections.abc import Iterator

import numpy as np

from runtime.samplers.discrete import ddim_levels
from runtime.samplers.k_diffusion import ancestral_step
from runtime.samplers.program import Call, Run, predict
from runtime.samplers.sigma_schedules import levels, steps


def ddim_cfg_pp(run: Run) -> Iterator[Call]:
    """CFG++ of DDIM, as the paper has it (algorithm 2, lines 4 to 7)."""
    x, _, out, _, uncond = np.eye(5)
    timesteps, reached = ddim_levels(run)
    for timestep, ends in zip(timesteps, reached, strict=True):
        signal = run.noise_schedule.alphas_cumprod[timestep]
        alpha, sigma = np.sqrt(signal), np.sqrt(1 - signal)
        x0, _ = predict(run.noise_schedule, sigma, x, out, alpha)
        _, eps = predict(run.noise_schedule, sigma, x, uncond, alpha)
        moved = np.sqrt(ends) * x0 + np.sqrt(1 - ends) * eps
        yield Call(timestep, sigma, [moved, x0], alpha=alpha)


def euler_cfg_pp(run: Run) -> Iterator[Call]:
    """CFG++ of Euler's method in sigma (ComfyUI, `sample_euler_cfg_pp`)."""
    x, _, out, _, uncond = np.eye(5)
    for timestep, sigma, reached in steps(*levels(run)):
        x0, _ = predict(run.noise_schedule, sigma, x, out)
        _, eps = predict(run.noise_schedule, sigma, x, uncond)
        yield Call(timestep, sigma, [x0 + reached * eps, x0])


def euler_a_cfg_pp(run: Run) -> Iterator[Call]:
    """The same with ancestral noise (ComfyUI, `sample_euler_ancestral_cfg_pp`)."""
    x, _, out, n, uncond = np.eye(5)
    for timestep, sigma, reached in steps(*levels(run)):
        down, up = ancestral_step(sigma, reached)
        x0, _ = predict(run.noise_schedule, sigma, x, out)
        _, eps = predict(run.noise_schedule, sigma, x, uncond)
        yield Call(timestep, sigma, [x0 + down * eps + up * n, x0], True)


def dpmpp_2m_cfg_pp(run: Run) -> Iterator[Call]:
    """CFG++ of DPM-Solver++(2M) (ComfyUI, `sample_dpmpp_2m_cfg_pp`).

    The third register is the unconditional x0 of the call before.
    """
    x, _, before, out, _, uncond = np.eye(6)
    timesteps, sigmas = levels(run)
    for k, (timestep, sigma, reached) in enumerate(steps(timesteps, sigmas)):
        x0, _ = predict(run.noise_schedule, sigma, x, out)
        x0_uncond, eps = predict(run.noise_schedule, sigma, x, uncond)
        moved = x0 + reached * eps
        if k and reached > 0:
            length, last = np.log(sigma / reached), np.log(sigmas[k - 1] / sigma)
            moved = moved + (1 - reached / sigma) * length / (2 * last) * (x0 - before)
        yield Call(timestep, sigma, [moved, x0, x0_uncond])
