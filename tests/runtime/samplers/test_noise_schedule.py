import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ModelError, RequestError
from runtime.samplers.noise_schedule import NoiseSchedule
from tests.support.tolerances import NOISE_SCHEDULE, SIGMAS

# diffusers hands torch tensors to numpy.array, which numpy 2 warns of
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STABLE_DIFFUSION_1 = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
LINEAR = {"beta_schedule": "linear", "clip_sample": False}
COSINE = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False}
TRAINED = {
    "num_train_timesteps": 50,
    "trained_betas": np.linspace(0.001, 0.3, 50).tolist(),
    "clip_sample": False,
}

# The families of timesteps: diffusers' classes, and how `NoiseSchedule.timesteps` is asked.
FAMILIES = {
    "ddpm": ([DDIMScheduler, DDPMScheduler], "leading", {}),
    "euler": (
        [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler],
        "linspace",
        {"fractional": True},
    ),
    "dpm-solver": ([DPMSolverMultistepScheduler], "linspace", {"omit_end": True}),
}


@pytest.mark.parametrize("config", [STABLE_DIFFUSION_1, LINEAR, COSINE, TRAINED])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_table_is_diffusers(config, zero_snr):
    config = {**config, "rescale_betas_zero_snr": zero_snr}
    table = NoiseSchedule.from_config(config).alphas_cumprod
    expected = DDIMScheduler.from_config(config).alphas_cumprod.double().numpy()
    assert table.dtype == np.float64
    assert table.shape == expected.shape
    assert (table[-1] == 0) == zero_snr
    # rescaling subtracts the last from its float32 neighbours: compare what is left of the signal
    np.testing.assert_allclose(
        np.sqrt(table), np.sqrt(expected), rtol=NOISE_SCHEDULE, atol=1e-6 * zero_snr
    )


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", None])
@pytest.mark.parametrize("family", FAMILIES)
def test_timesteps_are_diffusers_exactly(family, spacing):
    classes, default, options = FAMILIES[family]
    for total, offset in [(1000, 0), (1000, 1), (100, 1), (37, 0)]:
        config = {**LINEAR, "num_train_timesteps": total, "steps_offset": offset}
        if spacing:
            config["timestep_spacing"] = spacing
        schedule = NoiseSchedule.from_config(config)
        for scheduler in (cls.from_config(config) for cls in classes):
            for n in [*range(1, 31), 50, 61, 64, 100, 103, 250, 333, 499, 500, 700, 998, 999]:
                if n >= total:
                    break
                scheduler.set_timesteps(n)
                # diffusers adds a step at timestep -1 for 61 or 103 trailing steps of 1000
                expected = scheduler.timesteps.double().numpy()[:n]
                if expected[0] > total - 1:  # diffusers goes past the table
                    with pytest.raises(RequestError, match="do not fit"):
                        schedule.timesteps(n, default, **options)
                    continue
                actual = schedule.timesteps(n, default, **options)
                np.testing.assert_array_equal(actual, expected)
                assert actual.dtype == np.float64


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_sigmas_are_diffusers(spacing, zero_snr):
    config = {
        **STABLE_DIFFUSION_1,
        "timestep_spacing": spacing,
        "rescale_betas_zero_snr": zero_snr,
    }
    schedule, scheduler = (
        cls.from_config(config) for cls in (NoiseSchedule, EulerDiscreteScheduler)
    )
    for n in [1, 2, 7, 20, 50]:
        scheduler.set_timesteps(n)
        sigmas = schedule.sigmas(schedule.timesteps(n, "linspace", fractional=True))
        np.testing.assert_allclose(sigmas, scheduler.sigmas[:-1].numpy(), rtol=SIGMAS)


def test_absent_fields_have_diffusers_defaults():
    schedule = NoiseSchedule.from_config({"beta_schedule": "linear"})
    defaults = DDIMScheduler().config
    assert schedule.num_train_timesteps == defaults.num_train_timesteps
    assert schedule.prediction_type == defaults.prediction_type
    assert schedule.steps_offset == defaults.steps_offset
    assert schedule.set_alpha_to_one == defaults.set_alpha_to_one
    assert schedule.timestep_spacing is None


def test_stable_diffusion_names_no_spacing_so_that_samplers_differ():
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION_1)
    assert schedule.timesteps(2, "leading").tolist() == [501, 1]
    assert schedule.timesteps(2, "linspace", fractional=True).tolist() == [999, 0]
    assert schedule.timesteps(2, "linspace", omit_end=True).tolist() == [999, 500]


def test_a_schedule_is_frozen_and_its_table_read_only():
    betas = np.array([0.1, 0.2])
    schedule = NoiseSchedule(alphas_cumprod=np.cumprod(1 - betas))
    with pytest.raises(FrozenInstanceError):
        schedule.steps_offset = 1
    with pytest.raises(ValueError, match="read-only"):
        schedule.alphas_cumprod[0] = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta_schedule": "quadratic"}, "beta_schedule='quadratic'; known are linear"),
        ({"beta_schedule": None, "_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatch"),
        ({"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
        ({"timestep_spacing": "karras"}, "timestep_spacing='karras'"),
        ({"steps_offset": -1}, "steps_offset is -1"),
        ({"steps_offset": "1"}, "steps_offset is '1'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0"),
        ({"num_train_timesteps": 2.5}, "num_train_timesteps is 2.5"),
        ({"clip_sample": True}, "clip_sample=True; clipping is not linear"),
        ({"thresholding": True}, "thresholding=True; clipping is not linear"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas=True"),
        ({"interpolation_type": "log_linear"}, "interpolation_type='log_linear'"),
        ({"final_sigmas_type": "sigma_min"}, "final_sigmas_type='sigma_min'"),
        ({"variance_type": "learned_range"}, "variance_type='learned_range'"),
        ({"lambda_min_clipped": -5.1}, "lambda_min_clipped=-5.1"),
        ({"beta_end": 1.5}, "each above 0 and below 1"),
        ({"beta_start": 0.0, "beta_end": 0.0}, "each above 0 and below 1"),
        ({"beta_start": -1.0}, "not numbers"),
        ({"beta_end": "much"}, "not numbers"),
        ({"trained_betas": [0.1, 0.2]}, r"shape \(2,\)"),
        ({"trained_betas": ["a"]}, "not numbers"),
        ({"trained_betas": [math.nan] * 1000}, "each above 0 and below 1"),
    ],
)
def test_a_config_that_cannot_be_followed_is_refused(change, message):
    with pytest.raises(ModelError, match=message):
        NoiseSchedule.from_config({**STABLE_DIFFUSION_1, **change})


@pytest.mark.parametrize(
    "table",
    [
        np.array([]),
        np.array([[0.5]]),
        np.array([0.5, 0.6]),
        np.array([1.0, 0.5]),
        np.array([0.5, -0.1]),
        np.array([0.5, np.nan]),
    ],
)
def test_a_table_that_does_not_fall_is_refused(table):
    with pytest.raises(ModelError, match="must fall"):
        NoiseSchedule(alphas_cumprod=table)


@pytest.mark.parametrize("n", [0, -1, 1001, 2.0, "20", True])
def test_a_number_of_steps_outside_the_models_is_refused(n):
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION_1)
    with pytest.raises(RequestError, match=r"num_inference_steps is .* 1 to 1000"):
        schedule.timesteps(n, "leading")


@pytest.mark.parametrize(
    ("spacing", "options"),
    [("leading", {}), ("leading", {"omit_end": True}), ("linspace", {"omit_end": True})],
)
def test_steps_that_leave_the_table_or_repeat_are_refused(spacing, options):
    schedule = NoiseSchedule.from_config({**STABLE_DIFFUSION_1, "timestep_spacing": spacing})
    with pytest.raises(RequestError, match=r"1000 steps .* do not fit .* ask for fewer"):
        schedule.timesteps(1000, "leading", **options)


@given(
    total=st.integers(1, 3000),
    share=st.floats(0, 0.95),
    spacing=st.sampled_from(["leading", "trailing", "linspace"]),
    options=st.sampled_from([{}, {"fractional": True}, {"omit_end": True}]),
)
def test_timesteps_fall_inside_the_table(total, share, spacing, options):
    n = max(1, int(total * share))
    schedule = NoiseSchedule(
        alphas_cumprod=np.linspace(0.999, 0.001, total), timestep_spacing=spacing
    )
    timesteps = schedule.timesteps(n, "leading", **options)
    assert timesteps.shape == (n,)
    assert np.all(np.diff(timesteps) < 0)
    assert timesteps[0] <= total - 1
    assert timesteps[-1] >= 0
    if "fractional" not in options:
        np.testing.assert_array_equal(timesteps, timesteps.round())
