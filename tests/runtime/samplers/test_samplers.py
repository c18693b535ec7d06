from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ModelError, RequestError
from runtime.samplers import IN_SIGMA as METHODS_IN_SIGMA
from runtime.samplers import Program, discarding, program
from runtime.samplers.noise_schedule import NoiseSchedule
from tests.support.sampler_table import (
    BEGIN,
    CURVES,
    DOCUMENT,
    END,
    FLOAT32_TABLES,
    NO_SAMPLE,
    combinations,
    measure,
)
from tests.support.schedulers import (
    CLASSES,
    CONFIG,
    TWO_CALLS,
    WHOLE,
    blended_levels,
    largest_error,
    make_scheduler,
    model,
    published_curve,
    replay,
)
from tests.support.tolerances import (
    SAMPLER_BELIEF,
    SAMPLER_EXACT,
    SAMPLER_FLOAT32,
    SAMPLER_SCALES,
    SAMPLER_STEP,
    SAMPLER_TIMESTEPS,
    SIGMAS,
)

# diffusers hands torch tensors to numpy.array, which numpy 2 warns of
pytestmark = pytest.mark.filterwarnings("ignore:__array_(_|wrap__ must):DeprecationWarning")

SCHEDULE = NoiseSchedule.from_config(CONFIG)
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
SPACINGS = ["leading", "trailing", "linspace"]
IN_SIGMA = [method.__name__ for method in METHODS_IN_SIGMA]
MIDPOINTS = ["dpm2", "dpmpp_sde"]
FIRST = ["ddpm", "ddim", "euler", "euler_a", "dpmpp_2m"]  # the methods of one entry a step


def check_run(name, config, steps, schedule=None, *, strength=None, eta=0.0):
    """Compare every call with diffusers, whose tables are in float64 here."""
    error, run, timesteps, scales = largest_error(
        name, steps, schedule, strength=strength, eta=eta, config=config, tables="float64"
    )
    assert error <= SAMPLER_STEP, f"{name} {schedule} {steps=} {strength=}: {error:.1e}"
    if timesteps is not None:
        atol = SAMPLER_TIMESTEPS if name in (*TWO_CALLS, "edm_euler") else 0
        np.testing.assert_allclose(run.timesteps, timesteps, rtol=0, atol=atol)
        np.testing.assert_allclose(run.input_scales, scales, rtol=SAMPLER_SCALES)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", CLASSES)
def test_every_step_is_diffusers(name, prediction, spacing):
    if prediction == "sample" and name in NO_SAMPLE:
        pytest.skip("diffusers' scheduler does not take it")
    config = {**CONFIG, "prediction_type": prediction, "timestep_spacing": spacing}
    fewest = 2 if name in IN_SIGMA and spacing != "trailing" else 1  # of one, see below
    if name not in FIRST:
        for steps, strength in ((fewest, None), (5, None), (20, 0.6)):
            check_run(name, config, steps, strength=strength)
        return
    for steps in (fewest, 2, 5, 20, 50):
        for strength in (None, 1.0, 0.6, 0.3):
            if strength is None or int(steps * strength) >= 1:
                check_run(name, config, steps, strength=strength)


@pytest.mark.parametrize("name", IN_SIGMA)
def test_one_step_starts_at_the_highest_level(name):
    """With diffusers' spacings of one point it would start at the lowest: no picture."""
    for spacing in (*SPACINGS, None):
        for schedule in (None, *(() if name == "edm_euler" else CURVES), "karras"):
            noise = replace(SCHEDULE, timestep_spacing=spacing)
            run = program(name, noise, 1, schedule=schedule)
            highest = 80.0 if name == "edm_euler" else SCHEDULE.sigmas(np.array([999.0]))[0]
            assert run.noise_scales[0] == pytest.approx(highest, rel=1e-3)
            assert run.timesteps.size == 1


@pytest.mark.parametrize("name", ["a1111_align_your_steps", "a1111_align_your_steps_xl"])
@pytest.mark.parametrize("steps", [10, 11, 20])
def test_levels_of_automatic1111(name, steps):
    run = program("euler", SCHEDULE, steps, schedule=name)
    np.testing.assert_allclose(run.noise_scales[:-1], published_curve(name, steps), rtol=1e-9)


OF_ONE_MORE = {
    "karras": lambda high, low, n: np.append(
        np.linspace(high ** (1 / 7), low ** (1 / 7), n) ** 7, 0
    ),
    "exponential": lambda high, low, n: np.append(np.geomspace(high, low, n), 0),
    "simple": lambda high, low, n: np.append(published_curve("simple", n), 0),
    "a1111_kl_optimal": lambda high, low, n: published_curve("a1111_kl_optimal", n),
}


@pytest.mark.parametrize("spacing", [None, "leading", "trailing"])
@pytest.mark.parametrize("schedule", OF_ONE_MORE)
@pytest.mark.parametrize(("steps", "strength"), [(1, None), (2, None), (10, None), (10, 0.5)])
def test_the_last_level_but_one_is_left_out(schedule, spacing, steps, strength):
    """As Automatic1111's `get_sigmas` with discard_next_to_last_sigma."""
    table = SCHEDULE.sigmas(np.arange(1000.0))
    more = OF_ONE_MORE[schedule](table[-1], table[0], steps + 1)
    expected = np.delete(more, -2)[0 if strength is None else steps // 2 :]
    noise = replace(SCHEDULE, timestep_spacing=spacing)
    run = program("euler", noise, steps, schedule=f"{schedule}_discard", strength=strength)
    scales = [*expected[:-1], 0.0]  # where x stands at the end is written as the end
    np.testing.assert_allclose(run.noise_scales, scales, rtol=1e-9)
    told = np.interp(np.log(expected[:-1]), np.log(table), np.arange(1000.0))
    np.testing.assert_allclose(run.timesteps, told, atol=1e-6)
    twice = program("dpm2", noise, steps, schedule=f"{schedule} discard", strength=strength)
    np.testing.assert_allclose(twice.timesteps[::2], told, atol=1e-6)


def test_an_even_schedule_without_its_last_level_is_sgm_uniform():
    assert discarding("normal") == "sgm_uniform"
    names = ("normal_discard", "sgm_uniform")
    runs = [program("dpm2", SCHEDULE, 9, schedule=name) for name in names]
    np.testing.assert_allclose(runs[0].noise_scales, runs[1].noise_scales, rtol=1e-12)
    assert discarding("karras") == "karras_discard"
    assert (discarding(None), discarding("leading")) == (None, "leading")


def test_comfyuis_beta():
    """Rounded levels that ComfyUI's scheduler gave for 10 steps of this table."""
    run = program("euler", SCHEDULE, 10, schedule="comfyui_beta")
    theirs = [14.6, 11.5, 7.4, 4.4, 2.6, 1.6, 1.0, 0.66, 0.40, 0.20]
    np.testing.assert_allclose(run.noise_scales[:-1], theirs, rtol=0.03)
    np.testing.assert_array_equal(run.timesteps, np.rint(run.timesteps))
    with pytest.raises(RequestError, match="400 steps along comfyui_beta are of 3"):
        program("euler", SCHEDULE, 400, schedule="comfyui_beta")


def automatic1111_ends(x, k, sigmas, x0, before):
    """Return x after a step of k-diffusion's DPM++ 2M, whose last step is one like the others."""
    h = np.log(sigmas[k] / sigmas[k + 1])
    if before is not None:
        ratio = np.log(sigmas[k - 1] / sigmas[k]) / h
        x0 = (1 + 1 / (2 * ratio)) * x0 - before / (2 * ratio)
    return sigmas[k + 1] / sigmas[k] * x - np.expm1(-h) * x0


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm2", "dpmpp_2m"])
def test_automatic1111s_kl_optimal_ends_above_zero(sampler):
    """As k-diffusion's methods run where the last sigma is not 0."""
    sigmas = published_curve("a1111_kl_optimal", 7)
    run = program(sampler, SCHEDULE, 7, schedule="a1111_kl_optimal")
    told = iter(run.timesteps)

    def denoise(x, sigma):
        return x - sigma * model(x / np.hypot(1, sigma), next(told))

    x = replay(run)[0] * (np.hypot(1, sigmas[0]) if sampler == "dpmpp_2m" else 1)
    before = None
    for k, (sigma, reached) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma)
        slope = (x - x0) / sigma
        if sampler == "dpmpp_2m":
            x, before = automatic1111_ends(x, k, sigmas, x0, before), x0
        elif sampler == "heun":
            moved = x + (reached - sigma) * slope
            slope = (slope + (moved - denoise(moved, reached)) / reached) / 2
            x = x + (reached - sigma) * slope
        elif sampler == "dpm2":
            middle = np.sqrt(sigma * reached)
            inner = x + (middle - sigma) * slope
            x = x + (reached - sigma) * (inner - denoise(inner, middle)) / middle
        else:
            x = x + (reached - sigma) * slope
    assert next(told, None) is None
    np.testing.assert_allclose(replay(run)[-1], x, rtol=0, atol=SAMPLER_EXACT * np.abs(x).max())


@pytest.mark.parametrize("name", ["comfyui_uni_pc", "comfyui_uni_pc_bh2"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 30])
def test_every_order_of_comfyuis_unipc(name, steps):
    assert largest_error(name, steps, "normal")[0] <= SAMPLER_STEP
    if steps > 4:
        other = replay(program("unipc", SCHEDULE, steps, schedule="normal"))[-1]
        ours = replay(program(name, SCHEDULE, steps, schedule="normal"))[-1]
        assert np.abs(ours - other).max() / np.abs(other).max() > 1e-3, "another order"


@pytest.mark.parametrize(("name", "schedule"), list(combinations()))
def test_every_schedule_is_its_oracles(name, schedule):
    inexact = schedule in FLOAT32_TABLES.get(name, ())
    assert measure(name, schedule) <= (SAMPLER_FLOAT32 if inexact else SAMPLER_STEP)
    if inexact:  # it is diffusers' tables alone that are
        assert measure(name, schedule, tables="float64") <= SAMPLER_STEP


@pytest.mark.parametrize("name", CLASSES)
def test_levels_are_those_that_diffusers_inpainting_blends_with(name):
    for schedule in (None, *(["karras"] if (name, "karras") in combinations() else [])):
        if name == "euler_a" and schedule:
            continue  # diffusers has no schedule for it
        for steps, strength in ((9, 1.0), (9, 0.6)):
            run = program(name, SCHEDULE, steps, schedule=schedule, strength=strength)
            levels = np.stack([run.signal_scales, run.noise_scales], axis=1)
            expected = blended_levels(name, steps, schedule, strength)
            if name in MIDPOINTS:
                # of the point inside a step diffusers' table says nothing, and it blends there
                # with the level of the step's end, less noise than the UNet is told
                assert np.all(levels[1:-1:2, 1] > 1.1 * expected[1:-1:2, 1])
                np.testing.assert_allclose(
                    np.hypot(*levels[1:-1:2].T), 1 / run.input_scales[1::2], rtol=SAMPLER_EXACT
                )
                np.testing.assert_array_equal(expected[1:-1:2], expected[2::2])
                levels, expected = levels[::2], expected[::2]
            np.testing.assert_allclose(levels, expected, rtol=SIGMAS)


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_with_noise_is_diffusers(prediction, eta, set_alpha_to_one):
    config = {**CONFIG, "prediction_type": prediction, "set_alpha_to_one": set_alpha_to_one}
    for spacing in SPACINGS:
        for steps, strength in [(1, None), (7, None), (20, 0.5)]:
            spaced = {**config, "timestep_spacing": spacing}
            check_run("ddim", spaced, steps, strength=strength, eta=eta)
            check_run("tcd", spaced, steps, strength=strength, eta=eta)


@pytest.mark.parametrize("name", FIRST)
def test_a_model_without_spacing_gets_each_samplers_own(name):
    # as a user of diffusers swaps schedulers: PNDM's own default spacing is not handed on
    scheduler = make_scheduler(name, make_scheduler("plms", CONFIG).config)
    scheduler.set_timesteps(10)
    assert program(name, SCHEDULE, 10).timesteps.tolist() == scheduler.timesteps.tolist()
    for strength in (None, 0.7):
        check_run(name, CONFIG, 10, strength=strength)


@pytest.mark.parametrize("name", sorted(set(CLASSES) - {"lcm", "tcd"}))
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


@pytest.mark.parametrize("name", [*FIRST, "lcm", "tcd", "unipc"])
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


NOISES = st.builds(
    lambda total, **fields: NoiseSchedule(
        alphas_cumprod=np.cumprod(1 - np.linspace(0.0008, 12 / total, total)), **fields
    ),
    total=st.integers(30, 1200),
    prediction_type=st.sampled_from(PREDICTIONS),
    timestep_spacing=st.sampled_from([*SPACINGS, None]),
    steps_offset=st.integers(0, 1),
    set_alpha_to_one=st.booleans(),
)
NAMES = st.sampled_from(list(combinations()))
STEPS = st.integers(1, 15)
STRENGTHS = st.none() | st.floats(0.07, 1)


def count_calls(name, steps):
    return 2 * steps - 1 if name in TWO_CALLS else steps


@given(NAMES, NOISES, STEPS, STRENGTHS)
def test_programs_are_whole(chosen, noise, steps, strength):
    (name, schedule), options = chosen, {}
    if name in ("lcm", "tcd") and noise.num_train_timesteps < 50:
        return
    if strength is not None and int(steps * strength) < 1:
        strength = 1.0
    options = {"schedule": schedule, "strength": strength}
    run = program(name, noise, steps, **options)
    count = steps if strength is None else int(steps * strength)
    if name == "plms":
        assert run.timesteps.size in (count, count + 1)
    else:
        assert run.timesteps.size == count_calls(name, count)
    registers = run.matrices.shape[1]
    assert registers <= (5 if name.startswith("comfyui") else 4)
    assert run.matrices.shape == (run.timesteps.size, registers, registers + 2)
    assert run.matrices.dtype == run.timesteps.dtype == run.input_scales.dtype == np.float64
    assert np.isfinite(run.matrices).all()
    if name not in ("dpm2_a", "dpmpp_2s_a"):  # whose midpoint, on the way down, may lie lower
        # those of a curve are rounded, as diffusers does, and their midpoints are not
        assert np.all(np.diff(run.timesteps) <= (0.5 if name in TWO_CALLS and schedule else 0))
    assert np.all((run.input_scales > 0) & (run.input_scales <= 2))
    assert run.signal_scales.shape == run.noise_scales.shape == (run.timesteps.size + 1,)
    assert (run.signal_scales[-1], run.noise_scales[-1]) == (1, 0)
    assert np.all(run.noise_scales[:-1] > 0)
    assert run.initial_noise >= run.noise_scales[0]
    # what is remembered before the first step is nothing, and must not be read
    assert not run.matrices[0, :, 1:registers].any()
    # noise that is not drawn has no weight
    assert not run.matrices[~run.needs_noise, :, -1].any()
    again = program(name, noise, steps, **options)
    np.testing.assert_array_equal(run.matrices, again.matrices)


@given(NAMES, NOISES, STEPS, STRENGTHS)
def test_a_perfect_model_is_believed(chosen, noise, steps, strength):
    name, schedule = chosen
    if strength is not None and int(steps * strength) < 1:
        strength = 1.0
    whole = noise.num_train_timesteps % steps == 0
    if name == "ddim" and not (noise.set_alpha_to_one and whole):
        return  # its last step then stops short of x0, as diffusers' does
    if name.startswith("comfyui") or schedule == "a1111_kl_optimal":
        return
    if name in ("plms", "lcm", "tcd", "deis", "edm_euler") or (name in WHOLE and schedule):
        return  # so do these; or the timestep that the model is told is rounded
    x0 = np.random.default_rng(0).normal(size=(2, 3))
    ratio = np.sqrt(1 / noise.alphas_cumprod - 1)
    run = program(name, noise, steps, schedule=schedule, strength=strength)
    if (name == "dpm2" and schedule == "karras") or (name == "dpm2_a" and schedule == "karras"):
        return

    def predict(scaled_x, timestep):
        table = np.arange(ratio.size)
        if schedule or name in TWO_CALLS:
            sigma = np.exp(np.interp(timestep, table, np.log(ratio)))
        else:
            sigma = np.interp(timestep, table, ratio)
        signal, noise_share = 1 / np.hypot(1, sigma), sigma / np.hypot(1, sigma)
        eps = (scaled_x - signal * x0) / noise_share
        outputs = {"epsilon": eps, "sample": x0, "v_prediction": signal * eps - noise_share * x0}
        return outputs[noise.prediction_type]

    *_, last = replay(run, predict, None if strength is None else x0, x0.shape)
    exact = schedule is None and name not in TWO_CALLS
    atol = SAMPLER_EXACT if exact else SAMPLER_BELIEF
    np.testing.assert_allclose(last, x0, rtol=0, atol=atol)


@given(NOISES, STEPS)
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
        (("eulr", 20), {}, "sampler is 'eulr'; did you mean 'euler'. There are ddpm, "),
        (("DPM++ 4M", 20), {}, "sampler is 'DPM.*; did you mean 'dpmpp_2m'. There are ddpm, "),
        (("euler kaas", 20), {}, "sampler is 'euler kaas'; "),
        (("euler", 20), {"schedule": "karas"}, "schedule is 'karas'; .*did you mean 'karras'"),
        (("euler", 20), {"schedule": "automatc"}, "schedule is 'automatc'; ((?!None).)*$"),
        (("euler auto", 20), {}, "sampler is 'euler auto'; ((?!None).)*$"),
        (("Euler Automatic", 9), {"schedule": "karras"}, "names the schedule of the model, but"),
        (("euler karras", 20), {"schedule": "beta"}, "names the schedule 'karras', but schedule"),
        (("ddim", 20), {"schedule": "karras"}, "ddim steps between timesteps .* no 'karras'"),
        (("edm_euler", 20), {"schedule": "beta"}, "edm_euler takes karras or exponential"),
        (("lcm", 51), {}, "51 steps of 1000 timesteps do not fit"),
        (("karras", 20), {}, "sampler is 'karras'"),
        ((None, 20), {}, "sampler is None"),
        (("euler", 0), {}, "num_inference_steps is 0"),
        (("euler", 0), {"strength": 0.5}, "num_inference_steps is 0"),
        (("euler", 1001), {}, "num_inference_steps is 1001; .* from 1 to 1000"),
        (("dpmpp_2m", 1000), {}, "1000 steps"),
        (("euler", 20), {"strength": 0.0}, "strength is 0.0"),
        (("euler", 20), {"strength": 1.01}, "strength is 1.01"),
        (("euler", 20), {"strength": float("nan")}, "strength is nan"),
        (("euler", 20), {"strength": 0.04}, "runs no step; 0.05 is the least"),
        (("ddim", 20), {"eta": -0.1}, "eta is -0.1; ddim and tcd allow 0 to 1"),
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


@pytest.mark.parametrize(
    ("name", "sampler", "schedule"),
    [
        ("DPM++ 2M Karras", "dpmpp_2m", "karras"),
        ("DPM++ 2M", "dpmpp_2m", None),
        ("dpm++ 2m sde exponential", "dpmpp_2m_sde", "exponential"),
        ("dpmpp_3m_sde_gpu", "dpmpp_3m_sde", None),
        ("DPM++ 2S a Karras", "dpmpp_2s_a", "karras"),
        ("dpmpp_2s_ancestral", "dpmpp_2s_a", None),
        ("DPM++ SDE", "dpmpp_sde", None),
        ("Euler a", "euler_a", None),
        ("euler_ancestral", "euler_a", None),
        ("DPM2 a Karras", "dpm2_a", "karras"),
        ("dpm_2_ancestral", "dpm2_a", None),
        ("LMS Karras", "lms", "karras"),
        ("uni_pc_bh2", "comfyui_uni_pc_bh2", None),
        ("ComfyUI uni_pc Normal", "comfyui_uni_pc", "normal"),
        ("PNDM", "plms", None),
        ("Heun SGM Uniform", "heun", "sgm_uniform"),
        ("DPM++ 2M Align Your Steps", "dpmpp_2m", "align_your_steps"),
        ("DPM++ 2M AYS XL", "dpmpp_2m", "align_your_steps_xl"),
        ("euler kl optimal", "euler", "kl_optimal"),
        ("Euler Normal", "euler", "normal"),
        ("DPM++ 2M Uniform", "dpmpp_2m", "normal"),
        ("Euler A1111 KL Optimal", "euler", "a1111_kl_optimal"),
        ("DDIM trailing", "ddim", "trailing"),
        ("Euler Automatic", "euler", None),
        ("DPMSolverMultistepScheduler", "dpmpp_2m", None),
        ("EulerDiscreteScheduler", "euler", None),
    ],
)
def test_names_of_other_programs_are_understood(name, sampler, schedule):
    for spelling in (name, name.upper(), name.replace(" ", "_")):
        run = program(spelling, SCHEDULE, 9)
        expected = program(sampler, SCHEDULE, 9, schedule=schedule)
        np.testing.assert_array_equal(run.matrices, expected.matrices)
        np.testing.assert_array_equal(run.timesteps, expected.timesteps)


@pytest.mark.parametrize("schedule", ["Karras", "ays", "SGM Uniform", "normal", "KL-optimal"])
def test_a_schedule_may_follow_the_name_or_be_given(schedule):
    apart = program("euler", SCHEDULE, 9, schedule=schedule)
    together = program(f"Euler {schedule}", SCHEDULE, 9)
    both = program(f"Euler {schedule}", SCHEDULE, 9, schedule=schedule)
    np.testing.assert_array_equal(apart.matrices, together.matrices)
    np.testing.assert_array_equal(apart.matrices, both.matrices)


def test_a_program_checks_itself():
    run = program("euler", SCHEDULE, 3)
    tables = {
        name: getattr(run, name)
        for name in (
            *("timesteps", "input_scales", "matrices", "needs_noise"),
            *("signal_scales", "noise_scales"),
        )
    }
    for change in (
        {"timesteps": run.timesteps[:2]},
        {"needs_noise": run.needs_noise[:, None]},
        {"noise_scales": run.noise_scales[1:]},
        {"matrices": run.matrices[:, :, :2]},
        {name: table[:0] for name, table in tables.items()},
    ):
        with pytest.raises(ValueError, match="a program needs"):
            Program(**{**tables, "initial_noise": 1.0, **change})
    with pytest.raises(ValueError, match="finite"):
        Program(**{**tables, "initial_noise": 1.0, "matrices": run.matrices * np.nan})


def test_the_documents_table_has_every_combination():
    text = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    head, _, *rows = [line.strip("| ").split(" | ") for line in text.strip().splitlines()]
    assert head == ["own", *CURVES]
    allowed, listed = set(combinations()), set()
    for name, *cells in rows:
        for schedule, cell in zip((None, *CURVES), cells, strict=True):
            if cell != "–":
                listed.add((name.strip("`"), schedule))
                inexact = schedule in FLOAT32_TABLES.get(name.strip("`"), ())
                assert cell.endswith("†") == inexact
                assert float(cell.rstrip("*†")) <= (SAMPLER_FLOAT32 if inexact else SAMPLER_STEP)
    assert listed == allowed
