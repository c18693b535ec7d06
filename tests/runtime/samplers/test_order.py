"""Deterministic samplers approach the solution of one ODE at their published order."""

import numpy as np
import pytest

from runtime.samplers import program
from runtime.samplers.noise_schedule import NoiseSchedule
from tests.support.tolerances import SAMPLER_ORDER

# The probability-flow ODE of normally distributed x0, mean 0.3 and variance 0.25, is solved in
# closed form: x(sigma) is proportional to sqrt(0.25 + sigma^2) about the mean. A fine table of
# timesteps keeps what rounds them out of sight.
MEAN, VARIANCE = 0.3, 0.25
T = 200_000
LAMBDAS = np.linspace(3.0, -2.0, T)  # log(alpha / sigma)
NOISE = NoiseSchedule(alphas_cumprod=1 / (1 + np.exp(-2 * LAMBDAS)), timestep_spacing="linspace")
ORDERS = {
    "ddim": 1,
    "euler": 1,
    "dpmpp_2m": 2,
    "dpmpp_2s": 2,
    "deis": 2,
    "heun": 2,
    "dpm2": 2,
    "unipc": 2,
    "comfyui_uni_pc": 3,
    "comfyui_uni_pc_bh2": 3,
    "ipndm": 1,  # its weights are those of even steps, and sigma's are not
    "lms": 3,  # of the four slopes, the first steps have fewer
    "plms": 2,  # its first step is of second order
}


def last_error(name, steps):
    """Return how far x0 is from the solution at the last sigma above 0, where the run stands."""
    # the program's last step, to sigma 0, is x0 itself in every method: it is left off
    run = program(name, NOISE, steps, schedule="leading" if name in LEADING else "exponential")
    registers = np.zeros((run.matrices.shape[1], 1))
    registers[0] = run.initial_noise
    ratio = np.exp(-LAMBDAS)
    preserving = bool(np.all(run.input_scales == 1))
    sigma_of = np.interp(run.timesteps, np.arange(T), ratio)
    first = sigma_of[0]
    for k in range(run.timesteps.size - 1):
        sigma = sigma_of[k]
        scaled = run.input_scales[k] * registers[0]
        x = scaled * np.hypot(1, sigma)
        eps = sigma * (x - MEAN) / (VARIANCE + sigma**2)
        registers = run.matrices[k] @ np.stack([*registers, eps, 0 * eps])
    sigma = sigma_of[-1]
    x = registers[0] * (np.hypot(1, sigma) if preserving else 1)
    begun = run.initial_noise * (np.hypot(1, first) if preserving else 1)
    exact = MEAN + (begun - MEAN) * np.sqrt((VARIANCE + sigma**2) / (VARIANCE + first**2))
    return abs(float(x[0]) - exact)


LEADING = ("ddim", "plms")  # these have no schedule: their timesteps are even in lambda anyway


@pytest.mark.parametrize(("name", "order"), ORDERS.items())
def test_the_error_falls_at_the_published_order(name, order):
    steps = np.array([33, 65, 129])  # odd: single-step pairs then end together
    if name.startswith("comfyui"):  # from 65 on what is left is the rounding of its timesteps
        steps = np.array([9, 17, 33])
    errors = np.array([last_error(name, int(n)) for n in steps])
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope > order - SAMPLER_ORDER, f"{errors}"
    assert errors[-1] < 1e-2
