"""Methods that step in sigma, of k-diffusion and of Karras et al.: they hold x = x0 + sigma eps.

A method with two calls of the UNet in a step makes two entries of the program in each step but the
last, which goes to sigma 0 and is Euler's: N steps are 2 N - 1 calls.
"""

from itertools import pairwise

import numpy as np

from engine.errors import RequestError
from runtime.samplers.program import Array, Call, Program, Run, predict, variance_exploding
from runtime.samplers.sigmas import (
    exponential,
    fractional_levels,
    karras,
    timestep_of,
)
from runtime.schedule import NoiseSchedule


def euler(run: Run) -> Program:
    """Euler steps along the ODE in sigma (Karras et al. 2022, arXiv:2206.00364, algorithm 1)."""
    timesteps, sigmas = fractional_levels(run)
    x, out, _ = np.eye(3)
    calls = []
    for timestep, sigma, reached in zip(timesteps, sigmas[:-1], sigmas[1:], strict=True):
        x0, eps = predict(run.noise, sigma, x, out)
        calls.append(Call(timestep, sigma, [x0 + reached * eps]))
    return variance_exploding(run, calls)


def euler_a(run: Run) -> Program:
    """Euler's method with ancestral noise (k-diffusion, `sample_euler_ancestral`)."""
    timesteps, sigmas = fractional_levels(run)
    x, out, n = np.eye(3)
    calls = []
    for timestep, sigma, reached in zip(timesteps, sigmas[:-1], sigmas[1:], strict=True):
        down, up = _ancestral(sigma, reached)
        x0, eps = predict(run.noise, sigma, x, out)
        calls.append(Call(timestep, sigma, [x0 + down * eps + up * n], True))
    return variance_exploding(run, calls)


def heun(run: Run) -> Program:
    """Heun's second-order steps in sigma (Karras et al. 2022, arXiv:2206.00364, algorithm 1)."""
    timesteps, sigmas = fractional_levels(run)
    x, base, slope, out, _ = np.eye(5)
    zero = np.zeros(5)
    calls = []
    for k, (sigma, reached) in enumerate(pairwise(sigmas)):
        _, eps = predict(run.noise, sigma, x, out)
        calls.append(Call(timesteps[k], sigma, [x + (reached - sigma) * eps, x, eps]))
        if reached > 0:
            _, eps = predict(run.noise, reached, x, out)
            moved = base + (reached - sigma) * (slope + eps) / 2
            calls.append(Call(timesteps[k + 1], reached, [moved, zero, zero]))
    return variance_exploding(run, calls)


def dpm2(run: Run) -> Program:
    """DPM-Solver-2 in sigma (Lu et al. 2022, arXiv:2206.00927, algorithm 1; k-diffusion's form).

    The slope of a step is taken at the geometric mean of its ends.
    """
    return _midpoint(run, ancestral=False)


def dpm2_a(run: Run) -> Program:
    """DPM-Solver-2 down to sigma_down, then noise (k-diffusion, `sample_dpm_2_ancestral`)."""
    return _midpoint(run, ancestral=True)


def dpmpp_2s_a(run: Run) -> Program:
    """DPM-Solver++(2S) down to sigma_down, then noise (arXiv:2211.01095, algorithm 1, r = 1/2).

    As k-diffusion's `sample_dpmpp_2s_ancestral`.
    """
    timesteps, sigmas = fractional_levels(run)
    x, base, out, n = np.eye(4)
    calls = []
    for timestep, sigma, reached in zip(timesteps, sigmas[:-1], sigmas[1:], strict=True):
        down, up = _ancestral(sigma, reached)
        middle = np.sqrt(sigma * down)
        x0, _ = predict(run.noise, sigma, x, out)
        calls.append(Call(timestep, sigma, [x0 + middle / sigma * (x - x0), x]))
        if reached > 0:
            x0, _ = predict(run.noise, middle, x, out)
            moved = x0 + down / sigma * (base - x0) + up * n
            calls.append(Call(_timestep(run.noise, middle), middle, [moved, 0 * x], True))
    return variance_exploding(run, calls)


def dpmpp_sde(run: Run) -> Program:
    """DPM-Solver++ for the SDE, with a stochastic midpoint (k-diffusion, `sample_dpmpp_sde`).

    Both halves of a step draw noise, and the draws are independent: no Brownian tree is grown.
    """
    timesteps, sigmas = fractional_levels(run)
    x, base, out, n = np.eye(4)
    calls = []
    for timestep, sigma, reached in zip(timesteps, sigmas[:-1], sigmas[1:], strict=True):
        x0, _ = predict(run.noise, sigma, x, out)
        middle = np.sqrt(sigma * reached)
        if reached == 0:
            calls.append(Call(timestep, sigma, [x0, 0 * x]))
            continue
        down, up = _ancestral(sigma, middle)
        calls.append(Call(timestep, sigma, [x0 + down / sigma * (x - x0) + up * n, x], True))
        down, up = _ancestral(sigma, reached)
        x0, _ = predict(run.noise, middle, x, out)
        moved = x0 + down / sigma * (base - x0) + up * n
        calls.append(Call(_timestep(run.noise, middle), middle, [moved, 0 * x], True))
    return variance_exploding(run, calls)


def lms(run: Run) -> Program:
    """Linear multistep of order 4: Adams-Bashforth on uneven sigmas (k-diffusion, `sample_lms`).

    The slope is the polynomial through the last four, or as many as there are since the start.
    """
    timesteps, sigmas = fractional_levels(run)
    x, e1, e2, e3, out, _ = np.eye(6)
    calls = []
    for k, (timestep, sigma) in enumerate(zip(timesteps, sigmas[:-1], strict=True)):
        _, eps = predict(run.noise, sigma, x, out)
        order = min(k + 1, 4)
        weights = _integrals(sigmas[k - order + 1 : k + 1][::-1], sigma, sigmas[k + 1])
        moved = x + weights @ np.stack([eps, e1, e2, e3][:order])
        calls.append(Call(timestep, sigma, [moved, eps, *_shifted([e1, e2], k)]))
    return variance_exploding(run, calls)


def ipndm(run: Run) -> Program:
    """Improved PNDM: Adams-Bashforth's even-step weights from the first step on.

    Zhang and Chen 2022, arXiv:2204.13902, section 4. DDIM's step with a mean of the last eps is
    Euler's step in sigma.
    """
    timesteps, sigmas = fractional_levels(run)
    x, e1, e2, e3, out, _ = np.eye(6)
    calls = []
    for k, (timestep, sigma) in enumerate(zip(timesteps, sigmas[:-1], strict=True)):
        _, eps = predict(run.noise, sigma, x, out)
        mean = [
            eps,
            (3 * eps - e1) / 2,
            (23 * eps - 16 * e1 + 5 * e2) / 12,
            (55 * eps - 59 * e1 + 37 * e2 - 9 * e3) / 24,
        ][min(k, 3)]
        moved = x + (sigmas[k + 1] - sigma) * mean
        calls.append(Call(timestep, sigma, [moved, eps, *_shifted([e1, e2], k)]))
    return variance_exploding(run, calls)


def edm_euler(run: Run) -> Program:
    """Euler's method for models with EDM's preconditioning (arXiv:2206.00364, table 1, EDM).

    Sigma goes from 80 to 0.002, along `karras` or `exponential`; the model sees log(sigma) / 4,
    and its output is weighted with sigma_data = 0.5. The model's betas are not used.
    """
    if run.schedule not in (None, "karras", "exponential"):
        raise RequestError(f"sampler edm_euler takes karras or exponential, not {run.schedule!r}")
    fractional_levels(run)  # checks the number of steps
    curve = exponential if run.schedule == "exponential" else karras
    sigmas = np.append(curve(run.noise, run.num_inference_steps, 80.0, 0.002), 0.0)[run.first :]
    x, out, _ = np.eye(3)
    calls = []
    for sigma, reached in pairwise(sigmas):
        norm = np.hypot(sigma, 0.5)
        sign = -1 if run.noise.prediction_type == "v_prediction" else 1
        x0 = 0.25 / norm**2 * x + sign * 0.5 * sigma / norm * out
        if run.noise.prediction_type == "sample":
            x0 = out
        moved = x0 + reached / sigma * (x - x0)
        calls.append(Call(np.log(sigma) / 4, sigma, [moved]))
    return variance_exploding(run, calls, sigma_data=0.5)


def _midpoint(run: Run, *, ancestral: bool) -> Program:
    """Build Euler steps with the slope at the geometric mean of a step's ends."""
    timesteps, sigmas = fractional_levels(run, round_karras=True)
    x, base, out, n = np.eye(4)
    calls = []
    for timestep, sigma, reached in zip(timesteps, sigmas[:-1], sigmas[1:], strict=True):
        down, up = _ancestral(sigma, reached) if ancestral else (reached, 0.0)
        middle = np.sqrt(sigma * down)
        _, eps = predict(run.noise, sigma, x, out)
        calls.append(Call(timestep, sigma, [x + (middle - sigma) * eps, x]))
        if reached > 0:
            _, eps = predict(run.noise, middle, x, out)
            moved = base + (down - sigma) * eps + up * n
            calls.append(Call(_timestep(run.noise, middle), middle, [moved, 0 * x], ancestral))
    return variance_exploding(run, calls)


def _ancestral(sigma: float, reached: float) -> tuple[float, float]:
    """Return sigma_down and sigma_up: DDPM's variance (arXiv:2006.11239, equation 7) in sigma.

    sigma_down^2 + sigma_up^2 = reached^2.
    """
    down = reached**2 / sigma
    return down, float(np.sqrt(reached**2 - down**2))


def _timestep(noise: NoiseSchedule, sigma: float) -> float:
    return float(timestep_of(noise, np.array([sigma]))[0])


def _shifted(memory: list[Array], known: int) -> list[Array]:
    """Keep the `known` newest rows of memory; what was never written is not read."""
    return [row if i < known else np.zeros_like(row) for i, row in enumerate(memory)]


def _integrals(nodes: Array, low: float, high: float) -> Array:
    """Integrate each Lagrange polynomial over nodes (m,) from low to high."""
    shift, scale = low, high - low
    at = (nodes - shift) / scale  # from 0 to 1: the powers of sigma would cancel
    powers = np.vander(at, increasing=True).T
    weights = np.linalg.solve(powers, scale / np.arange(1, nodes.size + 1))
    return weights.astype(np.float64)
