"""Adapters and words that prompts name, as a pipeline draws with them."""

import numpy as np
import pytest

from engine.backends.settings import BackendSettings
from engine.errors import RequestError
from runtime import Pipeline
from tests.support.named_requests import write_lora


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    write_lora(folder).rename(folder / "ink.safetensors")
    return folder


@pytest.fixture(scope="module")
def pipeline(folder):
    settings = BackendSettings(backend="cpu", threads=1)
    with Pipeline.load("pictogram", lora_dir=folder, settings=settings) as pipeline:
        yield pipeline


def draw(pipeline, prompt, **fields):
    result = pipeline(prompt, seed=1, num_inference_steps=1, **fields)
    return np.asarray(result.images[0]).tobytes(), list(result.notes)


def test_an_adapter_is_on_for_the_calls_that_name_it(pipeline, folder):
    base, _ = draw(pipeline, "a cat")
    named, notes = draw(pipeline, "a cat<lora:ink:0.8>")
    assert notes == []
    assert draw(pipeline, "a cat") == (base, []), "and off for others, bit for bit"
    pipeline.set_loras([f"{folder / 'ink.safetensors'}:0.8"])
    assert draw(pipeline, "a cat") == (named, []) != (base, [])
    assert draw(pipeline, "a cat<lora:ink:0.1>") == (named, []), "what is given is not named too"
    pipeline.set_loras([])
    assert draw(pipeline, "a cat") == (base, [])


def test_settings_keep_the_prompt_as_it_is_written(pipeline):
    result = pipeline("a cat<lora:ink:0.8>", seed=1, num_inference_steps=1)
    assert result.settings[0]["prompt"] == "a cat<lora:ink:0.8>"


def test_what_is_not_there_changes_nothing_and_is_said(pipeline):
    base, _ = draw(pipeline, "a cat")
    for text in ("<lora:gone:1>", "embedding:gone", "<gone>", "<hypernet:gone:1>"):
        drawn, (note,) = draw(pipeline, f"a cat {text}")
        assert drawn == base
        assert note.startswith(text)
    _, notes = draw(pipeline, "a cat", negative_prompt="embedding:gone <lora:ink:1>")
    assert len(notes) == 2


def test_a_negative_prompt_that_nothing_moves_away_from_is_said(pipeline):
    base, notes = draw(pipeline, "a cat", guidance_scale=1.0)
    assert notes == []
    drawn, (note,) = draw(pipeline, "a cat", guidance_scale=1.0, negative_prompt="blurry")
    assert drawn == base
    assert note.startswith("the negative prompt changes nothing")
    for fields in ({"guidance_scale": 1.5}, {"sampler": "euler_cfg_pp"}):
        assert draw(pipeline, "a cat", negative_prompt="blurry", **fields)[1] == []
    assert draw(pipeline, "a cat", guidance_scale=1.0, negative_prompt=" ")[1] == []


@pytest.mark.parametrize(
    ("field", "value", "acts"),
    [
        ("guidance_rescale", 0.7, {"guidance_scale": 3.0}),
        ("guidance_interval", (0.0, 0.5), {"guidance_scale": 3.0}),
        ("negative_scale", 2.0, {"guidance_scale": 3.0, "negative_prompt": "blurry"}),
    ],
)
def test_guidance_that_changes_nothing_is_said(pipeline, field, value, acts):
    base, _ = draw(pipeline, "a cat", guidance_scale=1.0)
    drawn, (note,) = draw(pipeline, "a cat", guidance_scale=1.0, **{field: value})
    assert drawn == base
    assert note.startswith(f"{field} changes nothing: ")
    assert draw(pipeline, "a cat", **acts, **{field: value})[1] == []
    if field == "negative_scale":
        (note,) = draw(pipeline, "a cat", guidance_scale=3.0, negative_scale=value)[1]
        assert note == "negative_scale changes nothing without a negative prompt"


def test_a_stray_field_is_refused(pipeline):
    for field in ({"strength": 0.5}, {"mask_blur": 2.0}, {"paste_back": False}):
        with pytest.raises(RequestError, match=f"{next(iter(field))} came without image"):
            pipeline("a cat", **field)
