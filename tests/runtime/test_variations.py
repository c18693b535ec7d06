"""Variation seeds, against Automatic1111's arithmetic in torch, and templates in a pipeline."""

import numpy as np
import pytest
import torch

from engine.backends.settings import BackendSettings
from engine.errors import RequestError
from runtime import Pipeline, Request
from runtime.denoising.rows import rows_of, step_rows
from runtime.noise import draw, make_noise, vary


def slerp(strength, low, high):
    """Go from one noise (C, h, w) to another as Automatic1111's `modules/rng.py` does."""
    dot = (
        torch.nn.functional.normalize(low, dim=1) * torch.nn.functional.normalize(high, dim=1)
    ).sum(1)
    if dot.mean() > 0.9995:
        return low * strength + high * (1 - strength)
    omega = torch.acos(dot)
    shares = [torch.sin(part * omega) / torch.sin(omega) for part in (1 - strength, strength)]
    return shares[0].unsqueeze(1) * low + shares[1].unsqueeze(1) * high


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("strength", [0.05, 0.5, 1.0])
def test_noise_varies_as_automatic1111s(kind, strength):
    noise, other = (draw([make_noise(kind, seed)], (4, 16, 24)) for seed in (3, 4))
    expected = slerp(strength, torch.from_numpy(noise[0]), torch.from_numpy(other[0])).numpy()
    np.testing.assert_allclose(vary(noise, other, strength)[0], expected, atol=2e-6)
    np.testing.assert_array_equal(vary(noise, noise, strength), noise)


def test_one_seed_and_variation_seeds_that_count_up():
    request = Request(prompt="a", num_images_per_prompt=3, seed=7, variation_strength=0.1)
    assert request.seeds == (7, 7, 7)
    first, *others = request.draw_variation_seeds()
    assert others == [first + 1, first + 2]
    request = Request(prompt=["a", "b"], variation_seed=9, variation_strength=0.1)
    assert request.variation_seeds == (9, 10)
    assert len(set(request.draw_seeds())) == 1
    assert Request(prompt="a", seed=1).draw_variation_seeds() == []
    for fields, said in (
        ({"variation_seed": 1}, "variation_seed came without variation_strength"),
        ({"variation_strength": 1.5}, "variation_strength is 1.5"),
        ({"variation_strength": 0.1, "variation_seed": [1, 2]}, "variation_seed has 2 numbers"),
        ({"subseed": 1}, "did you mean variation_seed"),
    ):
        with pytest.raises(RequestError, match=said):
            Request(prompt="a", **fields)


@pytest.fixture(scope="module")
def pipeline():
    settings = BackendSettings(backend="cpu", threads=1)
    with Pipeline.load("pictogram", settings=settings) as pipeline:
        yield pipeline


def test_a_picture_varies_and_is_made_again(pipeline):
    fields = {"num_inference_steps": 2, "sampler": "euler_a", "seed": 3}
    plain = pipeline("a cat", **fields)
    varied = pipeline(
        "a cat", **fields, num_images_per_prompt=2, variation_strength=0.3, variation_seed=8
    )
    pixels = [np.asarray(image).tobytes() for image in (*plain.images, *varied.images)]
    assert len(set(pixels)) == 3
    assert "variation_strength" not in plain.settings[0]
    for image, settings in zip(pixels[1:], varied.settings, strict=True):
        (again,) = pipeline(**settings).images
        assert np.asarray(again).tobytes() == image


def test_rows_keep_their_variation(pipeline):
    fields = {"num_inference_steps": 1, "seed": 3, "variation_strength": 0.3, "variation_seed": 8}
    request = Request(prompt="a cat", num_images_per_prompt=2, **fields)
    expected = pipeline("a cat", num_images_per_prompt=2, **fields)
    rows = rows_of(pipeline.plan(request))
    for row, image in zip(rows, expected.images, strict=True):
        row.enter(pipeline.start)
        step_rows([row], pipeline.engine)
        np.testing.assert_array_equal(pipeline.decode(row.latents)[0], image)


def test_a_template_is_drawn_and_its_text_kept(pipeline):
    fields = {"num_inference_steps": 1, "seed": 1}
    result = pipeline("a {red|green|blue} cat", num_images_per_prompt=4, **fields)
    prompts = [settings["prompt"] for settings in result.settings]
    assert len(set(prompts)) > 1
    for settings, image in zip(result.settings, result.images, strict=True):
        assert settings["template"] == "a {red|green|blue} cat"
        again = pipeline(settings["prompt"], seed=settings["seed"], num_inference_steps=1)
        np.testing.assert_array_equal(again.images[0], image)
    plain = pipeline("{red|green}", prompt_syntax=False, **fields)
    assert plain.settings[0]["prompt"] == "{red|green}"
