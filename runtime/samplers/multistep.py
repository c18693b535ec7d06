"""Multistep methods in lambda = -log sigma: DPM-Solver++, DEIS and UniPC.

They are written for x = x0 + sigma eps, where DPM-Solver++'s alpha is 1 and exp(-h) the ratio of
the sigmas of a step's ends, and are turned to the unit variance that their papers hold x at.
h is the length of a step in lambda, r that of another step in units of h.
"""

from dataclasses import replace

import numpy as np

from runtime.samplers.program import Array, Call, Program, Run, predict, variance_preserving
from runtime.samplers.sigmas import CURVES, whole_levels


def dpmpp_2m(run: Run) -> Program:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2).

    Registers: x and the previous step's x0. The first step has no previous x0 and the last step
    ends at lambda = infinity, so both are first order, which is DDIM.
    """
    timesteps, sigmas = whole_levels(run)
    steps = _lengths(sigmas)
    x, old, out, _ = np.eye(4)
    calls = []
    for k, timestep in enumerate(timesteps):
        x0, _ = predict(run.noise, sigmas[k], x, out)
        ahead = steps[k] / (2 * steps[k - 1]) if 0 < k < timesteps.size - 1 else 0.0  # 1 / (2 r)
        mean = x0 + ahead * (x0 - old)
        moved = mean + sigmas[k + 1] / sigmas[k] * (x - mean)
        calls.append(Call(timestep, sigmas[k], [moved, x0]))
    return variance_preserving(run, calls)


def dpmpp_2m_sde(run: Run) -> Program:
    """SDE-DPM-Solver++(2M), midpoint (arXiv:2211.01095, appendix on SDE solvers).

    The noise of the steps is independent, as in diffusers: no Brownian tree is grown.
    """
    timesteps, sigmas = whole_levels(run)
    steps = _lengths(sigmas)
    x, old, out, n = np.eye(4)
    calls = []
    for k, timestep in enumerate(timesteps):
        x0, _ = predict(run.noise, sigmas[k], x, out)
        ahead = steps[k] / (2 * steps[k - 1]) if 0 < k < timesteps.size - 1 else 0.0
        mean = x0 + ahead * (x0 - old)
        kept = (sigmas[k + 1] / sigmas[k]) ** 2  # exp(-2 h)
        moved = mean + kept * (x - mean) + sigmas[k + 1] * np.sqrt(1 - kept) * n
        calls.append(Call(timestep, sigmas[k], [moved, x0], True))
    return variance_preserving(run, calls)


def dpmpp_3m_sde(run: Run) -> Program:
    """DPM-Solver++(3M) for the SDE (k-diffusion, `sample_dpmpp_3m_sde`, eta = 1).

    Third order in x0 from its last two values, second order in the second step. diffusers'
    third-order SDE update is another one: its weight of the second difference tends to -1 where
    the expansion asks for 0, and it falls back to second order before the end.
    """
    timesteps, sigmas = whole_levels(run)
    steps = _lengths(sigmas)
    x, old, older, out, n = np.eye(5)
    calls = []
    for k, timestep in enumerate(timesteps):
        x0, _ = predict(run.noise, sigmas[k], x, out)
        kept = (sigmas[k + 1] / sigmas[k]) ** 2
        moved = x0 + kept * (x - x0) + sigmas[k + 1] * np.sqrt(1 - kept) * n
        if 0 < k < timesteps.size - 1:
            h = 2 * steps[k]
            phi_2 = 1 - (1 - kept) / h
            r = steps[k - 1] / steps[k]
            slope = (x0 - old) / r
            if k > 1:
                r_old = steps[k - 2] / steps[k]
                bend = (slope - (old - older) / r_old) / (r + r_old)
                slope = slope + r * bend
                moved = moved - (phi_2 / h - 0.5) * bend
            moved = moved + phi_2 * slope
        calls.append(Call(timestep, sigmas[k], [moved, x0, old if k else 0 * x], True))
    return variance_preserving(run, calls)


def dpmpp_2s(run: Run) -> Program:
    """DPM-Solver++(2S), one call a step (Lu et al. 2022, arXiv:2211.01095, algorithm 1).

    Steps come in pairs: the first goes to a point inside, DDIM's way, and the second starts again
    from where the pair began. The last step is first order, and with N even the last two. diffusers
    spreads its timesteps by "linspace", whatever the model says, and so does this.
    """
    run = replace(run, noise=replace(run.noise, timestep_spacing="linspace"))
    timesteps, sigmas = whole_levels(run)
    steps = _lengths(sigmas)
    x, base, old, out, _ = np.eye(5)
    calls = []
    for k, timestep in enumerate(timesteps):
        x0, _ = predict(run.noise, sigmas[k], x, out)
        second = (run.first + k) % 2 == 1 and 0 < k < timesteps.size - 1
        if second:
            whole = steps[k] + steps[k - 1]
            mean = old + whole / (2 * steps[k - 1]) * (x0 - old)
            moved = mean + sigmas[k + 1] / sigmas[k - 1] * (base - mean)
        else:
            moved = x0 + sigmas[k + 1] / sigmas[k] * (x - x0)
        calls.append(Call(timestep, sigmas[k], [moved, x, x0]))
    return variance_preserving(run, calls)


def deis(run: Run) -> Program:
    """Exponential integrator of order 2 (Zhang and Chen 2022, arXiv:2204.13902, equation 15).

    eps is linear in log sigma and integrated over sigma. As diffusers' the run ends above 0: at
    the first sigma of the model's table, or where the schedule ends, which wastes the last call.
    """
    timesteps, sigmas = whole_levels(run)
    sigmas[-1] = sigmas[-2] if run.schedule in CURVES else run.noise.sigmas(np.zeros(1))[0]
    x, old, out, _ = np.eye(4)
    calls = []
    for k, timestep in enumerate(timesteps):
        sigma, reached = sigmas[k], sigmas[k + 1]
        _, eps = predict(run.noise, sigma, x, out)
        moved = x + (reached - sigma) * eps
        if k > 0 and (k < timesteps.size - 1 or run.num_inference_steps >= 15):
            # the integral of log(s / sigma) / log(sigma / before) over s from sigma to reached
            area = reached * np.log(reached / sigma) - (reached - sigma)
            moved = moved + area / np.log(sigma / sigmas[k - 1]) * (eps - old)
        calls.append(Call(timestep, sigma, [moved, eps]))
    return variance_preserving(run, calls, sigmas[-1])


def unipc(run: Run) -> Program:
    """UniPC of order 2 on x0, B(h) = e^h - 1 (Zhao et al. 2023, arXiv:2302.04867, algorithm 8).

    Every call first corrects the step that led to it and then predicts the next one. Registers: x
    as predicted, x before that step, and the two x0 before.
    """
    timesteps, sigmas = whole_levels(run)
    steps = _lengths(sigmas)
    x, base, old, older, out, _ = np.eye(6)
    calls = []
    for k, timestep in enumerate(timesteps):
        x0, _ = predict(run.noise, sigmas[k], x, out)
        here = x
        if k > 0:
            ratio = sigmas[k] / sigmas[k - 1]
            here = old + ratio * (base - old) + (1 - ratio) * _correction(k, steps, x0, old, older)
        mean = x0
        if 0 < k < timesteps.size - 1:
            mean = x0 + steps[k] / (2 * steps[k - 1]) * (x0 - old)
        moved = mean + sigmas[k + 1] / sigmas[k] * (here - mean)
        calls.append(Call(timestep, sigmas[k], [moved, here, x0, old if k else 0 * x]))
    return variance_preserving(run, calls)


def _correction(k: int, steps: Array, x0: Array, old: Array, older: Array) -> Array:
    """Return UniC's weighted differences of x0 over the step that led to call k.

    Order 1 in the first step, else 2: the two weights solve R rho = b (equation 12).
    """
    if k == 1:
        return (x0 - old) / 2
    h = -steps[k - 1]
    r = -steps[k - 2] / steps[k - 1]
    phi_2 = np.expm1(h) / h - 1
    phi_3 = phi_2 / h - 1 / 2
    b = np.array([phi_2, 2 * phi_3]) / np.expm1(h)
    rho = np.linalg.solve(np.array([[1, 1], [r, 1]]), b)
    result: Array = rho[0] * (older - old) / r + rho[1] * (x0 - old)
    return result


def _lengths(sigmas: Array) -> Array:
    """Return each step's h; the last, to sigma 0, is infinite and not asked for."""
    return np.append(-np.diff(np.log(sigmas[:-1])), np.inf)
