"""Methods that step in sigma, of k-diffusion and of Karras et al.: they hold x = x0 + sigma eps.

A method with two calls of the UNet in a step makes two entries of the program in each step but the
last, which goes to sigma 0 and is Euler's: N steps are 2 N - 1 calls.
"""

from collections.abc import Callable, Iterator

import numpy as np

from engine.errors import RequestError
from runtime.samplers.discrete import EVEN_STEPS
from runtime.samplers.program import Array, Call, Run, predict
from runtime.samplers.sigma_schedules import exponential, karras, levels, steps, timestep_of


def euler(run: Run) -> Iterator[Call]:
    """Euler steps along the ODE in sigma (Karras et al. 2022, arXiv:2206.00364, algorithm 1)."""
    x, out, _ = np.eye(3)
    for timestep, sigma, reached in steps(*levels(run)):
        x0, eps = predict(run.noise_schedule, sigma, x, out)
        yield Call(timestep, sigma, [x0 + reached * eps])


def euler_a(run: Run) -> Iterator[Call]:
    """Euler's method with ancestral noise (k-diffusion, `sample_euler_ancestral`)."""
    x, out, n = np.eye(3)
    for timestep, sigma, reached in steps(*levels(run)):
        down, up = ancestral_step(sigma, reached)
        x0, eps = predict(run.noise_schedule, sigma, x, out)
        yield Call(timestep, sigma, [x0 + down * eps + up * n], True)


def heun(run: Run) -> Iterator[Call]:
    """Heun's second-order steps in sigma (Karras et al. 2022, arXiv:2206.00364, algorithm 1)."""
    timesteps, sigmas = levels(run)
    if sigmas[-1] > 0:
        timesteps = np.append(timesteps, timestep_of(run.noise_schedule, sigmas[-1]))
    x, base, slope, out, _ = np.eye(5)
    for k, (timestep, sigma, reached) in enumerate(steps(timesteps[: sigmas.size - 1], sigmas)):
        _, eps = predict(run.noise_schedule, sigma, x, out)
        yield Call(timestep, sigma, [x + (reached - sigma) * eps, x, eps])
        if reached > 0:
            _, eps = predict(run.noise_schedule, reached, x, out)
            moved = base + (reached - sigma) * (slope + eps) / 2
            yield Call(timesteps[k + 1], reached, [moved, base, slope])


def dpm2(run: Run) -> Iterator[Call]:
    """DPM-Solver-2 in sigma (Lu et al. 2022, arXiv:2206.00927, algorithm 1; k-diffusion's form).

    The slope of a step is taken at the geometric mean of its ends.
    """
    return _midpoint(run, ancestral=False)


def dpm2_a(run: Run) -> Iterator[Call]:
    """DPM-Solver-2 down to sigma_down, then noise (k-diffusion, `sample_dpm_2_ancestral`)."""
    return _midpoint(run, ancestral=True)


def dpmpp_2s_a(run: Run) -> Iterator[Call]:
    """DPM-Solver++(2S) down to sigma_down, then noise (arXiv:2211.01095, algorithm 1, r = 1/2).

    As k-diffusion's `sample_dpmpp_2s_ancestral`.
    """
    return _midpoint(run, ancestral=True, on_x0=True)


def dpmpp_sde(run: Run) -> Iterator[Call]:
    """DPM-Solver++ for the SDE, with a stochastic midpoint (k-diffusion, `sample_dpmpp_sde`).

    Both halves of a step draw noise, and the draws are independent: no Brownian tree is grown.
    """
    x, base, out, n = np.eye(4)
    for timestep, sigma, reached in steps(*levels(run)):
        middle = np.sqrt(sigma * reached)
        down, up = ancestral_step(sigma, middle)
        x0, _ = predict(run.noise_schedule, sigma, x, out)
        moved = x0 + down / sigma * (x - x0) + up * n
        yield Call(timestep, sigma, [moved, x], bool(reached > 0))
        if reached > 0:
            down, up = ancestral_step(sigma, reached)
            x0, _ = predict(run.noise_schedule, middle, x, out)
            moved = x0 + down / sigma * (base - x0) + up * n
            yield Call(float(timestep_of(run.noise_schedule, middle)), middle, [moved, base], True)


def lms(run: Run) -> Iterator[Call]:
    """Linear multistep of order 4: Adams-Bashforth on uneven sigmas (k-diffusion, `sample_lms`).

    The slope is the polynomial through the last four, or as many as there are since the start.
    """
    return _last_slopes(run, lambda k, sigmas: _integrals(sigmas[max(k - 3, 0) : k + 2]))


def ipndm(run: Run) -> Iterator[Call]:
    """Improved PNDM: Adams-Bashforth's even-step weights from the first step on.

    Zhang and Chen 2022, arXiv:2204.13902, section 4. DDIM's step with a mean of the last eps is
    Euler's step in sigma.
    """
    return _last_slopes(run, lambda k, sigmas: (sigmas[k + 1] - sigmas[k]) * EVEN_STEPS[min(k, 3)])


def edm_euler(run: Run) -> Iterator[Call]:
    """Euler's method for models with EDM's preconditioning (arXiv:2206.00364, table 1, EDM).

    Sigma goes from 80 to 0.002, along `karras` or `exponential`; the model sees log(sigma) / 4,
    and its output is weighted with sigma_data = 0.5. The model's betas are not used. Raises
    RequestError for another curve.
    """
    if run.schedule not in (None, "karras", "exponential"):
        raise RequestError(f"sampler edm_euler takes karras or exponential, not {run.schedule!r}")
    levels(run)  # checks the number of steps
    curve = exponential if run.schedule == "exponential" else karras
    sigmas = np.append(curve(run.noise_schedule, run.num_inference_steps, 80.0, 0.002), 0.0)[
        run.first :
    ]
    x, out, _ = np.eye(3)
    for timestep, sigma, reached in steps(np.log(sigmas[:-1]) / 4, sigmas):
        norm = np.hypot(sigma, 0.5)
        keep, weight = 0.25 / norm**2, 0.5 * sigma / norm
        kind = run.noise_schedule.prediction_type
        x0 = (
            out if kind == "sample" else keep * x + (weight if kind == "epsilon" else -weight) * out
        )
        yield Call(timestep, sigma, [x0 + reached / sigma * (x - x0)], sigma_data=0.5)


def _midpoint(run: Run, *, ancestral: bool, on_x0: bool = False) -> Iterator[Call]:
    """Step with eps, or x0, as it is at the geometric mean of a step's ends."""
    x, base, out, n = np.eye(4)
    for timestep, sigma, reached in steps(*levels(run, round_karras=not on_x0)):
        down, up = ancestral_step(sigma, reached) if ancestral else (reached, 0.0)
        middle = np.sqrt(sigma * down)
        _, eps = predict(run.noise_schedule, sigma, x, out)
        yield Call(timestep, sigma, [x + (middle - sigma) * eps, x])
        if reached > 0:
            x0, eps = predict(run.noise_schedule, middle, x, out)
            moved = x0 + down / sigma * (base - x0) if on_x0 else base + (down - sigma) * eps
            timestep = float(timestep_of(run.noise_schedule, middle))
            yield Call(timestep, middle, [moved + up * n, base], ancestral)


def ancestral_step(sigma: float, reached: float) -> tuple[float, float]:
    """Return sigma_down and sigma_up: DDPM's variance (arXiv:2006.11239, equation 7) in sigma."""
    down = reached**2 / sigma  # down^2 + up^2 = reached^2
    return down, float(np.sqrt(reached**2 - down**2))


def _last_slopes(run: Run, weigh: Callable[[int, Array], Array]) -> Iterator[Call]:
    """Build x' = x + weigh(k, sigmas) @ eps, of at most four calls, newest first."""
    timesteps, sigmas = levels(run)
    x, e1, e2, e3, out, _ = np.eye(6)
    for k, timestep in enumerate(timesteps):
        _, eps = predict(run.noise_schedule, sigmas[k], x, out)
        weights = weigh(k, sigmas)
        moved = x + weights @ np.stack([eps, e1, e2, e3])[: weights.size]
        yield Call(timestep, sigmas[k], [moved, eps, e1, e2])


def _integrals(sigmas: Array) -> Array:
    """Integrate over the last step each Lagrange polynomial through the sigmas before its end."""
    *nodes, low, high = sigmas
    at = (np.array([low, *nodes[::-1]]) - low) / (high - low)  # the powers of sigma would cancel
    powers = np.vander(at, increasing=True).T
    weights: Array = np.linalg.solve(powers, (high - low) / np.arange(1, at.size + 1))
    return weights
