"""The x0 that the model predicted at a call, found again from what the call made of it."""

import numpy as np
import pytest
from PIL import Image

from engine.backends.settings import BackendSettings
from runtime import Pipeline, Request
from runtime.denoising.latents import solved_x0
from runtime.samplers import SAMPLERS, program
from runtime.samplers.noise_schedule import NoiseSchedule
from runtime.samplers.program import predict
from tests.support.pictures import drawing
from tests.support.tolerances import DENOISED


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_the_model_believed_in_is_found_again(sampler, prediction_type):
    """Run a toy model along every sampler, and compare with x0 of its own output."""
    schedule = NoiseSchedule.from_config(
        {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        | {"prediction_type": prediction_type, "steps_offset": 1}
    )
    steps, random = program(sampler, schedule, 7), np.random.default_rng(2)
    x0_row, _ = predict(schedule, 0.8, *np.eye(2), 0.6)
    registers = np.zeros((2, steps.matrices.shape[1], 4, 8, 8), np.float32)
    registers[:, 0] = steps.initial_noise * random.standard_normal((2, 4, 8, 8))
    for matrix, scale in zip(steps.matrices, steps.input_scales, strict=True):
        x, noise = registers[:, 0], random.standard_normal((2, 4, 8, 8)).astype(np.float32)
        out = np.tanh(2 * scale * x)
        stacked = np.concatenate([registers, out[:, None], noise[:, None]], axis=1)
        after = np.einsum("ij,bjchw->bichw", matrix, stacked).astype(np.float32)
        inputs = {
            "registers": registers,
            "matrices": np.stack([matrix, matrix]).astype(np.float32),
            "noise": noise,
            "outside": np.zeros((2, len(matrix) + 2), np.float32),
        }
        found = solved_x0(inputs, after[:, 0], x0_row)
        assert found.dtype == np.float32
        expected = x0_row[0] * x + x0_row[1] * out
        largest = max(np.abs(x).max(), np.abs(after[:, 0]).max())
        assert np.abs(found - expected).max() <= DENOISED / abs(matrix[0, -2]) * largest
        registers = after


@pytest.mark.parametrize("sampler", ["euler", "heun", "unipc"])
def test_the_last_thing_believed_in_is_the_picture(sampler):
    pipeline = Pipeline.load("pictogram", settings=BackendSettings(threads=1))
    plan = pipeline.plan(Request(prompt="house", sampler=sampler, seed=1, num_inference_steps=4))
    seen = list(pipeline.denoise(plan))
    scale = np.abs(seen[-1].latents).max()
    assert np.abs(seen[-1].denoised() - seen[-1].latents).max() <= DENOISED * scale
    assert not np.allclose(seen[0].denoised(), seen[0].latents, atol=0.1 * scale)
    assert np.abs(seen[0].denoised()).max() < 4 * scale


def test_outside_a_mask_it_is_the_picture_that_stays():
    pipeline = Pipeline.load("pictogram", settings=BackendSettings(threads=1))
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    options = {"image": drawing(64, 64), "mask": Image.fromarray(mask), "num_inference_steps": 3}
    plan = pipeline.plan(Request(prompt="house", sampler="euler_a", seed=1, **options))
    first, *_, last = pipeline.denoise(plan)
    kept = first.denoised()[..., :4]
    np.testing.assert_array_equal(kept, last.latents[..., :4])
    assert not np.array_equal(first.denoised()[..., 4:], last.latents[..., 4:])


@pytest.mark.parametrize("sampler", ["euler_a", "dpmpp_sde", "lcm"])
def test_noise_drawn_ahead_is_that_of_each_call(monkeypatch, sampler):
    pipeline = Pipeline.load("pictogram", settings=BackendSettings(threads=1))
    options = {"prompt": ["a", "b"], "sampler": sampler, "seed": 1, "num_inference_steps": 5}
    drawn = []
    for ahead in (1, 2**14, 2**24):  # one call, two calls, all at once
        monkeypatch.setattr("runtime.noise.AHEAD_BYTES", ahead)
        *_, last = pipeline.denoise(pipeline.plan(Request(**options)))
        drawn.append(last.latents)
    np.testing.assert_array_equal(drawn[0], drawn[1])
    np.testing.assert_array_equal(drawn[0], drawn[2])
