"""What a sampler makes: the matrices of one run, and the pieces that they are put together from.

A method is written as its paper writes it, on the rows of an identity matrix: with
`x, old, out, n = np.eye(4)` the expression `x + step * out` is the row of a matrix that computes
it. Every method but those of `runtime.samplers.discrete` is written for x = x0 + sigma eps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.errors import ModelError
from runtime.samplers.noise_schedule import NoiseSchedule

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Program:
    """One run of a sampler: what the loop reads at each of its N calls of the UNet.

    Attributes:
        timesteps: (N,), float64: what the UNet is told; whole or fractional
        input_scales: (N,), float64: the UNet sees input_scale x
        matrices: (N, r, r + 2), float64: M_k on [R; out; n]
        needs_noise: (N,), bool: whether n is drawn, even to weigh 0 (draws are consecutive)
        signal_scales, noise_scales: (N + 1,), float64: where x stands, signal_scale x0 +
            noise_scale eps, at each call of the UNet and, last, at the end: (1, 0), even where a
            method stops short of it. Image-to-image starts at the first of them
        unconditional: (N, r) or None, float64: what the unconditional output adds to each register
        initial_noise: text-to-image starts as initial_noise times noise, at "leading" spacing
            more than the first of noise_scales
    """

    timesteps: Array
    input_scales: Array
    matrices: Array
    needs_noise: NDArray[np.bool_]
    signal_scales: Array
    noise_scales: Array
    initial_noise: float
    unconditional: Array | None = None

    def __post_init__(self) -> None:
        """Check the shapes against each other, and that every number is finite."""
        steps, registers, columns = self.matrices.shape
        tables = (self.timesteps, self.input_scales, self.needs_noise)
        levels = (self.signal_scales[1:], self.noise_scales[1:])
        fit = all(table.shape == (steps,) for table in (*tables, *levels))
        if steps < 1 or columns != registers + 2 or not fit:
            shapes = ", ".join(str(t.shape) for t in (*tables, *levels, self.matrices))
            raise ValueError(f"a program needs five times (N,) and (N, r, r + 2), not {shapes}")
        if not np.isfinite(self.matrices).all():
            raise ValueError("a program's matrices must be finite")

    def blended(self) -> tuple[Array, Array]:
        """Return matrices (N, r + 2, r + 4) and `outside` (N, r + 4) that keep an image.

        After every call the latents outside the mask are the image's own, noised as the next call
        expects them, as diffusers does with the starting noise every time. That is linear in two
        more registers, the last, which hold the image's latents and the starting noise throughout.
        """
        steps, registers, _ = self.matrices.shape
        matrices = np.zeros((steps, registers + 2, registers + 4))
        matrices[:, :registers, :registers] = self.matrices[:, :, :registers]
        matrices[:, :registers, -2:] = self.matrices[:, :, registers:]
        outside = np.zeros((steps, registers + 4))
        for kept, scales in enumerate((self.signal_scales, self.noise_scales), start=registers):
            matrices[:, kept, kept] = 1.0
            outside[:, kept] = scales[1:]
        return matrices, outside


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What every sampler is given.

    Attributes:
        noise_schedule: the model's noise schedule
        num_inference_steps: N, 1 to T
        first: the first step to run, 0 to N - 1
        schedule: a name of `runtime.samplers.sigma_schedules.CURVES`, or None for timesteps that
            are spaced as `noise_schedule` says
    """

    noise_schedule: NoiseSchedule
    num_inference_steps: int
    first: int = 0
    schedule: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of the UNet and what follows from it.

    timestep: what the UNet is told; rows: what each register becomes, on [R; out; n] or, with the
    unconditional output, on [R; out; n; uncond], and x itself first; draws: whether n is drawn;
    sigma, alpha: x = alpha x0 + sigma eps when the UNet sees it; sigma_data: the deviation of x0
    that its input is scaled for
    """

    timestep: float
    sigma: float
    rows: Sequence[Array]
    draws: bool = False
    alpha: float = 1.0
    sigma_data: float = 1.0


def predict(
    noise_schedule: NoiseSchedule, sigma: float, x: Array, out: Array, alpha: float = 1.0
) -> tuple[Array, Array]:
    """Return the rows of x0 and eps from those of x = alpha x0 + sigma eps and of out.

    A row is (r + 2,) in float64: what is taken of every register, of out and of the noise.

    Raises:
        ModelError: alpha is 0, and the model predicts eps.
    """
    if noise_schedule.prediction_type == "sample":
        return out, (x - alpha * out) / sigma
    if noise_schedule.prediction_type == "v_prediction":
        norm = np.hypot(alpha, sigma)  # v is defined at norm 1
        x, alpha, sigma = x / norm, alpha / norm, sigma / norm
        return alpha * x - sigma * out, sigma * x + alpha * out
    if alpha == 0:
        raise ModelError(
            "the schedule ends in pure noise (rescale_betas_zero_snr), where no x0 follows "
            "from a predicted epsilon; take sampler euler, or a model of v_prediction"
        )
    return (x - sigma * out) / alpha, out


def assemble(run: Run, calls: Sequence[Call], *, exploding: bool) -> Program:
    """Put calls together for a loop that holds x as they write it (exploding) or at unit variance.

    k-diffusion's methods are the former, those of training's timesteps and DPM-Solver the latter.
    """
    alphas = np.array([*(call.alpha for call in calls), 1.0])
    sigmas = np.array([*(call.sigma for call in calls), 0.0])
    matrices = np.array([np.stack(call.rows) for call in calls])
    unconditional = None
    if matrices.shape[2] > matrices.shape[1] + 2:
        unconditional, matrices = matrices[:, :, -1].copy(), matrices[:, :, :-1]
    matrices[0, :, 1:-2] = 0  # nothing is remembered yet
    held, input_scales, initial_noise = np.ones_like(sigmas), np.ones(len(calls)), 1.0
    if exploding:
        data = calls[0].sigma_data
        input_scales = 1 / np.hypot(sigmas[:-1], data)
        # diffusers' init_noise_sigma: at "leading" spacing the variance of signal and noise
        unit = run.noise_schedule.timestep_spacing == "leading" or data != 1
        initial_noise = float(np.hypot(sigmas[0], unit))
    else:
        held = 1 / np.hypot(alphas, sigmas)
        matrices[:, :, 0] /= held[:-1, None]
        matrices[:, 0] *= held[1:, None]
        if unconditional is not None:
            unconditional[:, 0] *= held[1:]
    return Program(
        timesteps=np.array([call.timestep for call in calls], np.float64),
        input_scales=input_scales,
        matrices=matrices,
        needs_noise=np.array([call.draws for call in calls]),
        signal_scales=held * alphas,
        noise_scales=held * sigmas,
        initial_noise=initial_noise,
        unconditional=unconditional,
    )
