"""Multistep methods in lambda = -log sigma: DPM-Solver++, DEIS and UniPC.

They are written for x = x0 + sigma eps, where DPM-Solver++'s alpha is 1 and exp(-h) the ratio of
the sigmas of a step's ends, and are turned to the unit variance that their papers hold x at.
h is the length of a step in lambda, r that of another step in units of h.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from runtime.samplers.program import Array, Call, Run, predict
from runtime.samplers.sigma_schedules import levels, steps

UNIPC_END = 0.001  # the sigma that ComfyUI puts in the place of 0


def dpmpp_2m(run: Run) -> Iterator[Call]:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2).

    Registers: x and the previous step's x0. The first step has no previous x0 and the last step
    ends at lambda = infinity, so both are first order, which is DDIM.
    """
    return _two_values(run, sde=False)


def dpmpp_2m_sde(run: Run) -> Iterator[Call]:
    """SDE-DPM-Solver++(2M), midpoint (arXiv:2211.01095, appendix on SDE solvers).

    The noise of the steps is independent, as in diffusers: no Brownian tree is grown.
    """
    return _two_values(run, sde=True)


def dpmpp_3m_sde(run: Run) -> Iterator[Call]:
    """DPM-Solver++(3M) for the SDE (k-diffusion, `sample_dpmpp_3m_sde`, eta = 1).

    Third order in x0 from its last two values, second order in the second step. diffusers'
    third-order SDE update is another one: its weight of the second difference tends to -1 where
    the expansion asks for 0, and it falls back to second order before the end.
    """
    timesteps, sigmas = levels(run, whole=True)
    lengths = _lengths(sigmas)
    x, old, older, out, n = np.eye(5)
    for k, timestep in enumerate(timesteps):
        x0, _ = predict(run.noise_schedule, sigmas[k], x, out)
        kept = (sigmas[k + 1] / sigmas[k]) ** 2
        moved = x0 + kept * (x - x0) + sigmas[k + 1] * np.sqrt(1 - kept) * n
        if 0 < k < lengths.size:
            h = 2 * lengths[k]
            phi_2 = 1 - (1 - kept) / h
            r = lengths[k - 1] / lengths[k]
            slope = (x0 - old) / r
            if k > 1:
                r_old = lengths[k - 2] / lengths[k]
                bend = (slope - (old - older) / r_old) / (r + r_old)
                slope = slope + r * bend
                moved = moved - (phi_2 / h - 0.5) * bend
            moved = moved + phi_2 * slope
        yield Call(timestep, sigmas[k], [moved, x0, old], True)


def dpmpp_2s(run: Run) -> Iterator[Call]:
    """DPM-Solver++(2S), one call a step (Lu et al. 2022, arXiv:2211.01095, algorithm 1).

    Steps come in pairs: the first goes to a point inside, DDIM's way, and the second starts again
    from where the pair began. The last step is first order, and with N even the last two. diffusers
    spreads its timesteps by "linspace", whatever the model says, and so does this.
    """
    spread = replace(run.noise_schedule, timestep_spacing="linspace")
    run = replace(run, noise_schedule=spread)
    timesteps, sigmas = levels(run, whole=True)
    ahead = _ahead(sigmas)
    x, base, old, out, _ = np.eye(5)
    for k, timestep in enumerate(timesteps):
        x0, _ = predict(run.noise_schedule, sigmas[k], x, out)
        if (run.first + k) % 2 == 1 and 0 < k < timesteps.size - 1:
            mean = old + (0.5 + ahead[k]) * (x0 - old)
            moved = mean + sigmas[k + 1] / sigmas[k - 1] * (base - mean)
        else:
            moved = x0 + sigmas[k + 1] / sigmas[k] * (x - x0)
        yield Call(timestep, sigmas[k], [moved, x, x0])


def deis(run: Run) -> Iterator[Call]:
    """Exponential integrator of order 2 (Zhang and Chen 2022, arXiv:2204.13902, equation 15).

    eps is linear in log sigma and integrated over sigma. As diffusers' the run ends above 0: at
    the first sigma of the model's table, or where the schedule ends, which wastes the last call.
    """
    timesteps, sigmas = levels(run, whole=True)
    if sigmas[-1] == 0:
        sigmas[-1] = sigmas[-2] if run.schedule else run.noise_schedule.sigmas(np.zeros(1))[0]
    x, old, out, _ = np.eye(4)
    for k, timestep in enumerate(timesteps):
        sigma, reached = sigmas[k], sigmas[k + 1]
        _, eps = predict(run.noise_schedule, sigma, x, out)
        moved = x + (reached - sigma) * eps
        if k > 0 and (k < timesteps.size - 1 or run.num_inference_steps >= 15):
            # the integral of log(s / sigma) / log(sigma / before) over s from sigma to reached
            area = reached * np.log(reached / sigma) - (reached - sigma)
            moved = moved + area / np.log(sigma / sigmas[k - 1]) * (eps - old)
        if k == timesteps.size - 1:
            moved = moved / np.hypot(1, reached)  # left at unit variance, above sigma 0
        yield Call(timestep, sigma, [moved, eps])


def unipc(run: Run) -> Iterator[Call]:
    """UniPC of order 2 on x0, B(h) = e^h - 1 (Zhao et al. 2023, arXiv:2302.04867, algorithm 8).

    Every call first corrects the step that led to it and then predicts the next one. Registers: x
    as predicted, x before that step, and the two x0 before.
    """
    timesteps, sigmas = levels(run, whole=True)
    lengths, ahead = _lengths(sigmas), _ahead(sigmas)
    x, base, old, older, out, _ = np.eye(6)
    for k, timestep in enumerate(timesteps):
        x0, _ = predict(run.noise_schedule, sigmas[k], x, out)
        here = x
        if k > 0:
            ratio = sigmas[k] / sigmas[k - 1]
            bend = _correction(k, lengths, x0, old, older)
            here = old + ratio * (base - old) + (1 - ratio) * bend
        mean = x0 + ahead[k] * (x0 - old)
        moved = mean + sigmas[k + 1] / sigmas[k] * (here - mean)
        yield Call(timestep, sigmas[k], [moved, here, x0, old])


def comfyui_uni_pc(run: Run) -> Iterator[Call]:
    """UniPC of order 3 on x0, B(h) = h, as ComfyUI's `uni_pc` (arXiv:2302.04867, algorithm 8)."""
    return _third_order_unipc(run, lambda h: h)


def comfyui_uni_pc_bh2(run: Run) -> Iterator[Call]:
    """As `comfyui_uni_pc` with B(h) = e^h - 1: ComfyUI's `uni_pc_bh2`."""
    return _third_order_unipc(run, np.expm1)


def _third_order_unipc(run: Run, b_of: Callable[[float], float]) -> Iterator[Call]:
    """Build UniPC as comfy/extra_samplers/uni_pc.py runs it: up to order 3, down to sigma 0.001.

    The order of a step is what values there are for, and falls to 2 and 1 before the end.
    Registers: x as predicted, x before that step, and the three x0 before.
    """
    timesteps, sigmas = levels(run, whole=True)
    if sigmas[-1] == 0:
        sigmas[-1] = UNIPC_END
    lambdas, last = -np.log(sigmas), timesteps.size
    most = max(1, min(3, last - 1))
    orders = [min(most, k, last + 1 - k) for k in range(last + 1)]  # of the step that leads to k
    x, base, *values, out, _ = np.eye(7)
    for k, timestep in enumerate(timesteps):
        x0, _ = predict(run.noise_schedule, sigmas[k], x, out)
        here = x
        if k > 0:
            here = _unipc_step(base, values[: orders[k]], lambdas[: k + 1], b_of, x0)
        values = [x0, *values[:2]]
        moved = _unipc_step(here, values[: orders[k + 1]], lambdas[: k + 2], b_of)
        yield Call(timestep, sigmas[k], [moved, here, *values])
        values = [*np.eye(7)[2:5]]


def _unipc_step(
    x: Array,
    values: Sequence[Array],
    lambdas: Array,
    b_of: Callable[[float], float],
    reached: Array | None = None,
) -> Array:
    """Return x after a step: predicted (equation 3) or, where x0 is known there, corrected.

    values: x0 of the last calls, newest first, as many as the order; lambdas: up to the step's end;
    reached: x0 at its end
    """
    order, end, here = len(values), lambdas[-1], lambdas[-2]
    h = here - end
    ratios = (lambdas[-2 - np.arange(1, order)] - here) / -h
    differences = [(v - values[0]) / r for v, r in zip(values[1:], ratios, strict=True)]
    b, phi, factorial = [], np.expm1(h) / h - 1, 1.0
    for i in range(1, order + 1):
        b.append(phi * factorial / b_of(h))
        factorial *= i + 1
        phi = phi / h - 1 / factorial
    if reached is not None:
        ratios = np.append(ratios, 1.0)
        differences.append(reached - values[0])
    size = len(differences)
    if order == 1 + (reached is None):  # the paper's simplification
        weights = np.full(size, 0.5)
    else:
        weights = np.linalg.solve(np.vander(ratios, size, increasing=True).T, b[:size])
    bend = sum((w * d for w, d in zip(weights, differences, strict=True)), 0 * x)
    moved: Array = np.exp(h) * x - np.expm1(h) * values[0] - b_of(h) * bend
    return moved


def _two_values(run: Run, *, sde: bool) -> Iterator[Call]:
    """Build DPM-Solver++(2M): a step takes x0 to be linear in lambda through its last values."""
    timesteps, sigmas = levels(run, whole=True)
    ahead = _ahead(sigmas)
    x, old, out, n = np.eye(4)
    for k, (timestep, sigma, reached) in enumerate(steps(timesteps, sigmas)):
        x0, _ = predict(run.noise_schedule, sigma, x, out)
        mean = x0 + ahead[k] * (x0 - old)
        kept = reached / sigma  # exp(-h)
        moved = mean + kept * (x - mean)
        if sde:
            moved = mean + kept**2 * (x - mean) + reached * np.sqrt(1 - kept**2) * n
        yield Call(timestep, sigma, [moved, x0], sde)


def _correction(k: int, lengths: Array, x0: Array, old: Array, older: Array) -> Array:
    """Return UniC's weighted differences of x0 over the step that led to call k.

    Order 1 in the first step, else 2: the two weights solve R rho = b (equation 12).
    """
    if k == 1:
        return (x0 - old) / 2
    h, r = -lengths[k - 1], -lengths[k - 2] / lengths[k - 1]
    phi_2 = np.expm1(h) / h - 1
    phi_3 = phi_2 / h - 1 / 2
    b = np.array([phi_2, 2 * phi_3]) / np.expm1(h)
    rho = np.linalg.solve(np.array([[1, 1], [r, 1]]), b)
    result: Array = rho[0] * (older - old) / r + rho[1] * (x0 - old)
    return result


def _lengths(sigmas: Array) -> Array:
    """Return h of every step, but of a last one that goes to sigma 0 and is infinite."""
    return -np.diff(np.log(sigmas[sigmas > 0]))


def _ahead(sigmas: Array) -> Array:
    """Return each step's 1 / (2 r): how far ahead x0 is extrapolated.

    The first is 0, and so is the last where it goes to sigma 0.
    """
    lengths = _lengths(sigmas)
    return np.pad(lengths[1:] / (2 * lengths[:-1]), (1, int(sigmas[-1] == 0)))
