from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from diffusers.schedulers import (
    scheduling_ddim,
    scheduling_ddpm,
    scheduling_euler_ancestral_discrete,
)
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ModelError, RequestError
from runtime.noise import TorchNoise
from runtime.samplers import SAMPLERS, Program, program
from runtime.schedule import NoiseSchedule
from tests.schedulers import SCHEDULERS
from tests.tolerances import SAMPLER_EXACT, SAMPLER_SCALES, SAMPLER_STEP, SAMPLER_STEP_COSINE

# diffusers hands torch tensors to numpy.array, which numpy 2 warns of
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPE = (1, 4, 5, 6)  # 120 numbers: not a multiple of torch's 16
SEED = 1234
LATENTS = np.random.default_rng(5).normal(size=SHAPE)
CONFIG = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
SCHEDULE = NoiseSchedule.from_config(CONFIG)
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
SPACINGS = ["leading", "trailing", "linspace"]


def model(x, timestep):
    """Stand in for the UNet: smooth, nonlinear, different at every timestep."""
    return np.tanh(0.9 * x + np.sin(timestep / 150)) + 0.3 * np.cos(2 * x)


def replay(run: Program, predict=model, latents=LATENTS, seed=SEED):
    """Run a program in float64: x at the start and after every step."""
    noise = TorchNoise(seed)
    registers = np.zeros((run.matrices.shape[1], *latents.shape))
    registers[0] = run.signal_scale * latents + run.noise_scale * noise.normal(latents.shape)
    trajectory = [registers[0]]
    for k, matrix in enumerate(run.matrices):
        out = predict(run.input_scales[k] * registers[0], run.timesteps[k])
        fresh = noise.normal(latents.shape) if run.needs_noise[k] else np.zeros(latents.shape)
        registers = np.einsum("ij,j...->i...", matrix, np.stack([*registers, out, fresh]))
        trajectory.append(registers[0])
    return trajectory


@pytest.fixture(autouse=True)
def _draw_float32(monkeypatch):
    """Let diffusers step in float64 on the float32 noise that it draws in a real run."""

    def draw(shape, generator, device, dtype):
        return torch.randn(shape, generator=generator).to(dtype)

    for module in (scheduling_ddim, scheduling_ddpm, scheduling_euler_ancestral_discrete):
        monkeypatch.setattr(module, "randn_tensor", draw)


def make_scheduler(name, config):
    # diffusers' Euler a knows no "sample": `reference` turns x0 into eps before its step
    if name == "euler_a" and config.get("prediction_type") == "sample":
        config = {**config, "prediction_type": "epsilon"}
    return getattr(diffusers, SCHEDULERS[name]).from_config(config)


def reference(scheduler, steps, *, strength=None, predicts_x0=False, **options):
    """Run diffusers' scheduler as its pipelines do: timesteps, input scales, and the trajectory."""
    generator = torch.Generator().manual_seed(SEED)
    scheduler.set_timesteps(steps)
    noise = torch.randn(SHAPE, generator=generator).double()
    if strength is None:
        timesteps, x = scheduler.timesteps, noise * scheduler.init_noise_sigma
    else:
        timesteps, _ = StableDiffusionImg2ImgPipeline.get_timesteps(
            SimpleNamespace(scheduler=scheduler), steps, strength, "cpu"
        )
        x = scheduler.add_noise(torch.from_numpy(LATENTS), noise, timesteps[:1])
    scales, trajectory = [], [x.numpy()]
    for timestep in timesteps:
        scale = scheduler.scale_model_input(torch.ones((), dtype=torch.float64), timestep)
        scaled = scheduler.scale_model_input(x, timestep)
        out = torch.from_numpy(model(scaled.numpy(), timestep.item()))
        if predicts_x0:
            out = (x - out) / scheduler.sigmas[scheduler.step_index]
        if isinstance(scheduler, diffusers.DPMSolverMultistepScheduler):
            x = scheduler.step(out, timestep, x).prev_sample
        else:
            x = scheduler.step(out, timestep, x, generator=generator, **options).prev_sample
        scales.append(scale.item())
        trajectory.append(x.numpy())
    return timesteps.numpy(), scales, trajectory


def check_run(name, config, steps, *, strength=None, eta=0.0):
    cosine = config["beta_schedule"] == "squaredcos_cap_v2"
    tolerance = SAMPLER_STEP_COSINE if cosine else SAMPLER_STEP
    options = {"eta": eta} if name == "ddim" else {}
    predicts_x0 = name == "euler_a" and config.get("prediction_type") == "sample"
    timesteps, scales, expected = reference(
        make_scheduler(name, config), steps, strength=strength, predicts_x0=predicts_x0, **options
    )
    run = program(name, NoiseSchedule.from_config(config), steps, strength=strength, **options)
    np.testing.assert_array_equal(run.timesteps, timesteps)
    np.testing.assert_allclose(run.input_scales, scales, rtol=SAMPLER_SCALES)
    for k, (x, reference_x) in enumerate(zip(replay(run), expected, strict=True)):
        atol = tolerance * np.abs(reference_x).max()
        message = f"{steps=} {strength=} after step {k}"
        np.testing.assert_allclose(x, reference_x, rtol=0, atol=atol, err_msg=message)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_is_diffusers(name, prediction, spacing):
    config = {**CONFIG, "prediction_type": prediction, "timestep_spacing": spacing}
    for steps in (1, 2, 5, 20, 50):
        for strength in (None, 1.0, 0.6, 0.3):
            if strength is None or int(steps * strength) >= 1:
                check_run(name, config, steps, strength=strength)


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_with_noise_is_diffusers(prediction, eta, set_alpha_to_one):
    config = {**CONFIG, "prediction_type": prediction, "set_alpha_to_one": set_alpha_to_one}
    for spacing in SPACINGS:
        for steps, strength in [(1, None), (7, None), (20, 0.5)]:
            spaced = {**config, "timestep_spacing": spacing}
            check_run("ddim", spaced, steps, strength=strength, eta=eta)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_model_without_spacing_gets_each_samplers_own(name):
    # as a user of diffusers swaps schedulers: PNDM's own default spacing is not handed on
    config = diffusers.PNDMScheduler.from_config(CONFIG).config
    timesteps, _, _ = reference(make_scheduler(name, config), 10)
    assert program(name, SCHEDULE, 10).timesteps.tolist() == timesteps.tolist()
    for strength in (None, 0.7):
        check_run(name, CONFIG, 10, strength=strength)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    "curve",
    [
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
        {"num_train_timesteps": 40, "trained_betas": np.linspace(0.001, 0.3, 40).tolist()},
    ],
)
def test_every_beta_schedule_is_diffusers(name, curve):
    check_run(name, {**CONFIG, **curve, "steps_offset": 0}, 15)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_zero_terminal_snr_is_diffusers(name, prediction):
    config = {
        **CONFIG,
        "prediction_type": prediction,
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
    }
    for steps, strength in [(1, None), (5, None), (20, None), (20, 1.0), (20, 0.5)]:
        check_run(name, config, steps, strength=strength)


def test_epsilon_at_zero_terminal_snr_is_refused_where_it_divides_by_zero():
    config = {**CONFIG, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    schedule = NoiseSchedule.from_config(config)
    for name in ("ddpm", "ddim"):
        with pytest.raises(ModelError, match="ends in pure noise"):
            program(name, schedule, 10)
        check_run(name, config, 10, strength=0.5)
    for name in ("euler", "euler_a", "dpmpp_2m"):
        check_run(name, config, 10)


SCHEDULES = st.builds(
    lambda total, **fields: NoiseSchedule(
        alphas_cumprod=np.cumprod(1 - np.linspace(0.0008, 12 / total, total)), **fields
    ),
    total=st.integers(30, 1200),
    prediction_type=st.sampled_from(PREDICTIONS),
    timestep_spacing=st.sampled_from([*SPACINGS, None]),
    steps_offset=st.integers(0, 1),
    set_alpha_to_one=st.booleans(),
)
NAMES = st.sampled_from(list(SAMPLERS))
STEPS = st.integers(1, 15)
STRENGTHS = st.none() | st.floats(0.07, 1)


@given(NAMES, SCHEDULES, STEPS, STRENGTHS)
def test_programs_are_whole(name, schedule, steps, strength):
    if strength is not None and int(steps * strength) < 1:
        strength = 1.0
    run = program(name, schedule, steps, strength=strength)
    count = steps if strength is None else int(steps * strength)
    registers = 2 if name == "dpmpp_2m" else 1
    assert run.timesteps.shape == (count,)
    assert run.matrices.shape == (count, registers, registers + 2)
    assert run.matrices.dtype == run.timesteps.dtype == run.input_scales.dtype == np.float64
    assert np.isfinite(run.matrices).all()
    assert np.all(np.diff(run.timesteps) < 0)
    assert np.all((run.input_scales > 0) & (run.input_scales <= 1))
    assert (run.signal_scale == 0) == (strength is None)
    assert run.noise_scale > 0
    # what is remembered before the first step is nothing, and must not be read
    assert not run.matrices[0, :, 1:registers].any()
    # noise that is not drawn has no weight
    assert not run.matrices[~run.needs_noise, :, -1].any()
    again = program(name, schedule, steps, strength=strength)
    np.testing.assert_array_equal(run.matrices, again.matrices)


@given(NAMES, SCHEDULES, STEPS, STRENGTHS)
def test_a_perfect_model_is_believed(name, schedule, steps, strength):
    if strength is not None and int(steps * strength) < 1:
        strength = 1.0
    whole = schedule.num_train_timesteps % steps == 0
    if name == "ddim" and not (schedule.set_alpha_to_one and whole):
        return  # its last step then stops short of x0, as diffusers' does
    x0 = np.random.default_rng(0).normal(size=(2, 3))
    ratio = np.sqrt(1 / schedule.alphas_cumprod - 1)

    def predict(scaled_x, timestep):
        sigma = np.interp(timestep, np.arange(ratio.size), ratio)
        signal, noise = 1 / np.hypot(1, sigma), sigma / np.hypot(1, sigma)
        eps = (scaled_x - signal * x0) / noise
        outputs = {"epsilon": eps, "sample": x0, "v_prediction": signal * eps - noise * x0}
        return outputs[schedule.prediction_type]

    *_, last = replay(program(name, schedule, steps, strength=strength), predict, x0)
    np.testing.assert_allclose(last, x0, rtol=0, atol=SAMPLER_EXACT)


@given(SCHEDULES, STEPS)
def test_ddpm_is_ddim_with_all_its_noise(schedule, steps):
    schedule = NoiseSchedule(
        alphas_cumprod=schedule.alphas_cumprod,
        prediction_type=schedule.prediction_type,
        timestep_spacing="leading",  # DDIM's stride is then the distance of the timesteps
    )
    ddpm, ddim = program("ddpm", schedule, steps), program("ddim", schedule, steps, eta=1)
    np.testing.assert_allclose(ddpm.matrices, ddim.matrices, rtol=SAMPLER_EXACT)
    assert ddim.needs_noise.all()
    assert ddpm.needs_noise.tolist() == [True] * (steps - 1) + [False]  # the last is timestep 0


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("eulr", 20), {}, "sampler is 'eulr'; choose one of ddpm, .*did you mean 'euler'"),
        (("DPM++ 2M", 20), {}, "sampler is 'DPM.*; choose one of ddpm, ddim, euler"),
        ((None, 20), {}, "sampler is None"),
        (("euler", 0), {}, "num_inference_steps is 0"),
        (("euler", 0), {"strength": 0.5}, "num_inference_steps is 0"),
        (("euler", 1001), {}, "num_inference_steps is 1001; .* from 1 to 1000"),
        (("dpmpp_2m", 1000), {}, "1000 steps"),
        (("euler", 20), {"strength": 0.0}, "strength is 0.0"),
        (("euler", 20), {"strength": 1.01}, "strength is 1.01"),
        (("euler", 20), {"strength": float("nan")}, "strength is nan"),
        (("euler", 20), {"strength": 0.04}, "runs no step; 0.05 is the least"),
        (("ddim", 20), {"eta": -0.1}, "eta is -0.1; ddim allows 0 to 1"),
        (("ddim", 20), {"eta": 1.1}, "eta is 1.1"),
        (("euler_a", 20), {"eta": 0.5}, "eta is 0.5; .* every other sampler only 0"),
    ],
)
def test_a_wish_that_cannot_be_fulfilled_is_refused(arguments, options, message):
    name, steps = arguments
    with pytest.raises(RequestError, match=message):
        program(name, SCHEDULE, steps, **options)


@given(st.integers(1, 999))
def test_the_least_strength_that_is_named_runs_a_step(steps):
    with pytest.raises(RequestError, match="is the least") as caught:
        program("euler", SCHEDULE, steps, strength=1e-9)
    least = float(str(caught.value).split("; ")[1].split()[0])
    assert program("euler", SCHEDULE, steps, strength=least).timesteps.size >= 1


def test_a_program_checks_itself():
    run = program("euler", SCHEDULE, 3)
    tables = {
        name: getattr(run, name)
        for name in ("timesteps", "input_scales", "matrices", "needs_noise")
    }
    scales = {"signal_scale": 0.0, "noise_scale": 1.0}
    for change in (
        {"timesteps": run.timesteps[:2]},
        {"needs_noise": run.needs_noise[:, None]},
        {"matrices": run.matrices[:, :, :2]},
        {name: table[:0] for name, table in tables.items()},
    ):
        with pytest.raises(ValueError, match="a program needs"):
            Program(**{**tables, **scales, **change})
    with pytest.raises(ValueError, match="finite"):
        Program(**{**tables, **scales, "matrices": run.matrices * np.nan})
