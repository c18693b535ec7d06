"""The noise schedule: how much signal and noise a latent holds at each timestep of training.

Legend
    T                the number of timesteps the model was trained with
    beta_t           the variance that the forward process adds at timestep t
    alphas_cumprod   the product of (1 - beta_s) over s <= t: the signal's share of the variance,
                     x_t = sqrt(alphas_cumprod_t) x0 + sqrt(1 - alphas_cumprod_t) eps
                     (Ho et al. 2020, arXiv:2006.11239, equation 4)
    sigma            noise per unit of signal, sqrt((1 - alphas_cumprod) / alphas_cumprod)
                     (Karras et al. 2022, arXiv:2206.00364)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from engine.errors import ModelError, RequestError

__all__ = ["NoiseSchedule", "PredictionType", "TimestepSpacing"]

Array = NDArray[np.float64]
PredictionType = Literal["epsilon", "v_prediction", "sample"]
TimestepSpacing = Literal["leading", "trailing", "linspace"]

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")

# Fields that would make diffusers leave the samplers of this package, and the values that do not.
# Those that only tune one method (`solver_order`, `algorithm_type`, ...) are that method's own
# matter: the sampler's name says which method runs.
EXPECTED_FIELDS: Mapping[str, object] = {
    "clip_sample": False,
    "thresholding": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "final_sigmas_type": "zero",
    "variance_type": "fixed_small",
    "lambda_min_clipped": -math.inf,
}

_ZERO_SNR_FLOOR = 2.0**-24  # diffusers' stand-in for alphas_cumprod = 0 wherever it divides by it


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NoiseSchedule:
    """What a model's ``scheduler/scheduler_config.json`` says about the model.

    Attributes:
        alphas_cumprod: (T,), float64, falling; only the last may be 0 (zero terminal SNR)
        prediction_type: what the UNet predicts: the noise eps, v = alpha eps - sigma x0 (Salimans
            and Ho 2022, arXiv:2202.00512), or x0 ("sample")
        timestep_spacing: how the timesteps of a short run lie in 0 to T - 1 (Lin et al. 2023,
            arXiv:2305.08891, table 2); None where the model does not say: then each sampler takes
            its own default, as in diffusers
        steps_offset: added to timesteps of "leading" spacing
        set_alpha_to_one: whether the last step of DDIM ends at alphas_cumprod = 1 or at its first
            entry
        original_inference_steps: the timesteps, evenly spaced, that a consistency model was
            distilled on

    Raises:
        ModelError: a field is outside what is listed above.
    """

    alphas_cumprod: Array
    prediction_type: PredictionType = "epsilon"
    timestep_spacing: TimestepSpacing | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    original_inference_steps: int = 50

    def __post_init__(self) -> None:
        """Check every field; make the table read-only."""
        _check_choice("prediction_type", self.prediction_type, PREDICTION_TYPES)
        if self.timestep_spacing is not None:
            _check_choice("timestep_spacing", self.timestep_spacing, TIMESTEP_SPACINGS)
        if type(self.steps_offset) is not int or self.steps_offset < 0:
            raise ModelError(f"steps_offset is {self.steps_offset!r}; it must be an integer >= 0")
        if type(self.original_inference_steps) is not int or self.original_inference_steps < 1:
            raise ModelError(
                f"original_inference_steps is {self.original_inference_steps!r}; it must be an "
                "integer >= 1"
            )
        table = np.array(self.alphas_cumprod, np.float64)
        if table.ndim != 1 or table.size == 0 or not _falls(table):
            raise ModelError(
                "the noise schedule must fall strictly from below 1 to 0 or above in at least one "
                "timestep; check the beta fields of scheduler_config.json"
            )
        table.flags.writeable = False
        object.__setattr__(self, "alphas_cumprod", table)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read diffusers' ``scheduler_config.json``; a field absent or null has diffusers' default.

        ``clip_sample`` is the exception: diffusers' DDIM and DDPM default to True, but its Stable
        Diffusion pipelines turn it off (latents are not confined to -1 to 1), and so absent means
        False here. An explicit True is refused: clipping is not linear, and a sampler here is a
        list of matrices.

        Raises:
            ModelError: the file asks for what the samplers here do not do, or a value is unknown.
        """
        config = {key: value for key, value in config.items() if value is not None}
        if "beta_schedule" not in config and "trained_betas" not in config:
            raise ModelError(
                f"scheduler_config.json, of {config.get('_class_name', 'no class')}, names no "
                f"beta_schedule; a discrete-time diffusion model is needed (flow matching and EDM "
                f"models are not), with one of {', '.join(BETA_SCHEDULES)}"
            )
        for key, expected in EXPECTED_FIELDS.items():
            if config.get(key, expected) != expected:
                why = "clipping is not linear, " if key in ("clip_sample", "thresholding") else ""
                raise ModelError(
                    f"scheduler_config.json has {key}={config[key]!r}; {why}the samplers here do "
                    f"only {expected!r}: set it so, or remove it, to sample without"
                )
        alphas_cumprod = np.cumprod(1 - _betas(config), dtype=np.float64)
        if config.get("rescale_betas_zero_snr", False):
            alphas_cumprod = _rescale_to_zero_snr(alphas_cumprod)
        return cls(
            alphas_cumprod=alphas_cumprod,
            prediction_type=config.get("prediction_type", "epsilon"),
            timestep_spacing=config.get("timestep_spacing"),
            steps_offset=config.get("steps_offset", 0),
            set_alpha_to_one=bool(config.get("set_alpha_to_one", True)),
            original_inference_steps=config.get("original_inference_steps", 50),
        )

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return self.alphas_cumprod.size

    def timesteps(
        self,
        num_inference_steps: int,
        default_spacing: TimestepSpacing,
        *,
        fractional: bool = False,
        omit_end: bool = False,
    ) -> Array:
        """Spread the steps of one run over the timesteps of training, as diffusers does.

        Args:
            num_inference_steps: N, 1 to T
            default_spacing: the sampler's own, for a model that names none
            fractional: leave "linspace" unrounded (float32 values), as the Euler methods do
            omit_end: spread N + 1 and leave the last one off, as DPM-Solver does

        Returns:
            (N,), float64, falling

        Raises:
            RequestError: N is not in that range, or N steps do not fit between 0 and T - 1.
        """
        n, total = num_inference_steps, self.num_train_timesteps
        if type(n) is not int or not 1 <= n <= total:
            raise RequestError(
                f"num_inference_steps is {n!r}; this model allows whole numbers from 1 to {total}"
            )
        spacing = self.timestep_spacing or default_spacing
        points = n + omit_end
        if spacing == "linspace":
            # float32 first: the fractional timesteps that diffusers gives to the UNet are float32
            ascending = np.linspace(0, total - 1, points, dtype=np.float32 if fractional else None)
            timesteps = (ascending if fractional else ascending.round())[::-1][:n]
        elif spacing == "leading":
            timesteps = (np.arange(points) * (total // points))[::-1][:n] + self.steps_offset
        else:
            # [:n]: for some N (61 of 1000) the float step makes arange, and diffusers, go to -1
            timesteps = np.arange(total, 0, -total / n)[:n].round() - 1
        timesteps = timesteps.astype(np.float64)
        if timesteps[0] > total - 1 or np.any(np.diff(timesteps) >= 0):
            raise RequestError(
                f"{n} steps of {spacing!r} spacing do not fit between timestep "
                f"{self.steps_offset if spacing == 'leading' else 0} and {total - 1}; "
                f"ask for fewer steps"
            )
        return timesteps

    def sigmas(self, timesteps: Array) -> Array:
        """Interpolate noise per unit of signal, sqrt((1 - alphas_cumprod) / alphas_cumprod).

        Args:
            timesteps: (N,), float64, 0 to T - 1, whole or fractional

        Returns:
            (N,), float64; at zero terminal SNR 4096 in place of infinity, as in diffusers
        """
        signal = np.where(self.alphas_cumprod == 0, _ZERO_SNR_FLOOR, self.alphas_cumprod)
        table = np.sqrt((1 - signal) / signal)
        return np.interp(timesteps, np.arange(self.num_train_timesteps), table)


def _falls(table: Array) -> bool:
    return bool(table[0] < 1 and table[-1] >= 0 and np.all(np.diff(table) < 0))


def _check_choice(field: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ModelError(
            f"scheduler_config.json has {field}={value!r}; known are {', '.join(allowed)}"
        )


def _betas(config: Mapping[str, Any]) -> Array:
    """Return (T,) float64 betas: as trained, or along one of the named curves."""
    total = config.get("num_train_timesteps", 1000)
    kind = config.get("beta_schedule", "linear")
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    if type(total) is not int or total < 1:
        raise ModelError(f"num_train_timesteps is {total!r}; it must be an integer >= 1")
    _check_choice("beta_schedule", kind, BETA_SCHEDULES)
    try:
        if "trained_betas" in config:
            betas = np.asarray(config["trained_betas"], np.float64)
        elif kind == "squaredcos_cap_v2":
            # Nichol and Dhariwal 2021, arXiv:2102.09672, equation 17
            curve = np.cos((np.arange(total + 1) / total + 0.008) / 1.008 * np.pi / 2) ** 2
            betas = np.minimum(1 - curve[1:] / curve[:-1], 0.999)
        elif kind == "scaled_linear":
            betas = np.linspace(math.sqrt(start), math.sqrt(end), total) ** 2
        elif kind == "sigmoid":  # as diffusers' DDPMScheduler has it, from GeoDiff
            betas = start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, total)))
        else:
            betas = np.linspace(start, end, total)
    except (TypeError, ValueError) as error:
        raise ModelError(f"the betas of scheduler_config.json are not numbers: {error}") from error
    if betas.shape != (total,) or not np.all((betas > 0) & (betas < 1)):
        raise ModelError(
            f"scheduler_config.json gives betas of shape {betas.shape}; it must give "
            f"{total} (num_train_timesteps), each above 0 and below 1"
        )
    return betas


def _rescale_to_zero_snr(alphas_cumprod: Array) -> Array:
    """Shift and scale the signal so that the last timestep has none (arXiv:2305.08891, alg. 1)."""
    signal = np.sqrt(alphas_cumprod)
    shifted: Array = (signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))
    return shifted**2
