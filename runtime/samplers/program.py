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
from runtime.schedule import NoiseSchedule

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Program:
    """One run of a sampler: what the loop reads at each of its N calls of the UNet.

    Attributes:
        timesteps: (N,), float64: what the UNet is told; whole or fractional
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What every sampler is given.

    Attributes:
        noise: the model's noise schedule
        num_inference_steps: N, 1 to T
        start: None for pure noise (text-to-image), or the first step to run from noised latents
            (image-to-image), 0 to N - 1
        schedule: a name of `runtime.samplers.sigmas.CURVES`, or None for timesteps that are spaced
            as `noise` says
    """

    noise: NoiseSchedule
    num_inference_steps: int
    start: int | None = None
    schedule: str | None = None

    @property
    def first(self) -> int:
        """The first step to run, 0 for pure noise."""
        return self.start or 0


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of the UNet and what follows from it.

    timestep, sigma: where x stands when the UNet sees it; rows: what each register becomes, on
    [R; out; n], and x itself first; draws: whether n is drawn
    """

    timestep: float
    sigma: float
    rows: Sequence[Array]
    draws: bool = False


def x0_and_eps(noise: NoiseSchedule, alpha: Array, sigma: Array) -> Array:
    """Return (N, 2, 2): rows x0 and eps of x = alpha x0 + sigma eps, on columns x and out."""
    zero, one = np.zeros_like(alpha), np.ones_like(alpha)
    if noise.prediction_type == "epsilon":
        if not alpha.all():
            raise ModelError(
                "the schedule ends in pure noise (rescale_betas_zero_snr), where no x0 follows "
                "from a predicted epsilon; take sampler euler, or a model of v_prediction"
            )
        rows = [[1 / alpha, -sigma / alpha], [zero, one]]
    elif noise.prediction_type == "sample":
        rows = [[zero, one], [1 / sigma, -alpha / sigma]]
    else:
        norm = np.hypot(alpha, sigma)  # v is defined at norm 1
        rows = [[alpha / norm**2, -sigma / norm], [sigma / norm**2, alpha / norm]]
    return np.moveaxis(np.array(rows), -1, 0)


def predict(
    noise: NoiseSchedule, sigma: float, x: Array, out: Array, alpha: float = 1.0
) -> tuple[Array, Array]:
    """Return the rows of x0 and eps from those of x = alpha x0 + sigma eps and of out."""
    x0, eps = x0_and_eps(noise, np.array([alpha]), np.array([sigma]))[0] @ np.stack([x, out])
    return x0, eps


def variance_exploding(run: Run, calls: Sequence[Call], *, sigma_data: float = 1.0) -> Program:
    """Put calls together for a loop that holds x = x0 + sigma eps, as k-diffusion's does."""
    sigma = np.array([call.sigma for call in calls])
    # diffusers' init_noise_sigma: at "leading" spacing the noise keeps a unit of signal's variance
    leading = run.noise.timestep_spacing == "leading"
    pure_noise = np.hypot(sigma[0], 1) if leading or sigma_data != 1 else sigma[0]
    return Program(
        timesteps=np.array([call.timestep for call in calls], np.float64),
        input_scales=1 / np.hypot(sigma, sigma_data),
        matrices=np.array([np.stack(call.rows) for call in calls]),
        needs_noise=np.array([call.draws for call in calls]),
        signal_scale=0.0 if run.start is None else 1.0,
        noise_scale=float(pure_noise if run.start is None else sigma[0]),
    )


def variance_preserving(run: Run, calls: Sequence[Call], last_sigma: float = 0) -> Program:
    """Put calls together for a loop that holds x / sqrt(1 + sigma^2), as DPM-Solver's does."""
    sigmas = np.append([call.sigma for call in calls], last_sigma)
    scales = 1 / np.hypot(sigmas, 1)
    matrices = np.array([np.stack(call.rows) for call in calls])
    matrices[:, :, 0] /= scales[:-1, None]
    matrices[:, 0] *= scales[1:, None]
    return Program(
        timesteps=np.array([call.timestep for call in calls], np.float64),
        input_scales=np.ones(len(calls)),
        matrices=matrices,
        needs_noise=np.array([call.draws for call in calls]),
        signal_scale=0.0 if run.start is None else float(scales[0]),
        noise_scale=1.0 if run.start is None else float(sigmas[0] * scales[0]),
    )
