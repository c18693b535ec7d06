"""Sheets over options: what a cell shows, which calls cells share, and what is refused."""

import shutil

import numpy as np
import pytest
from PIL import Image

from engine.backends.settings import BackendSettings
from engine.errors import RequestError
from runtime import Pipeline, Request, adapted_model, grid
from runtime.images.previews import side_by_side
from tests.support.named_requests import write_lora


@pytest.fixture(scope="module")
def pipeline():
    settings = BackendSettings(backend="cpu", threads=1)
    with Pipeline.load("pictogram", settings=settings) as pipeline:
        yield pipeline


def test_cells_share_calls_across_samplers_and_are_what_they_are_alone(pipeline, monkeypatch):
    fields = {"prompt": "a cat", "seed": 1}
    wishes = [
        {"sampler": sampler, "num_inference_steps": steps, "guidance_scale": scale}
        for sampler in ("ddim", "euler_a")
        for steps, scale in ((2, 3.0), (3, 5.0))
    ] + [{"num_inference_steps": 2, "guidance_scale": 1.0}]
    step_rows, sizes = adapted_model.step_rows, []

    def count(rows, engine, **options):
        sizes.append(len(rows))
        step_rows(rows, engine, **options)

    monkeypatch.setattr(adapted_model, "step_rows", count)
    requests = [Request(**fields, **wish) for wish in wishes]
    drawn = sorted(pipeline.draw(requests), key=lambda image: image.request)
    images = [each.image for each in drawn]
    assert sizes == [4, 4, 2, 1, 1]
    for image, wish in zip(images, wishes, strict=True):
        (alone,) = pipeline(**fields, **wish).images
        np.testing.assert_array_equal(image, alone)


@pytest.fixture
def with_adapters(tmp_path):
    path = write_lora(tmp_path)
    path.rename(tmp_path / "a.safetensors")
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    settings = BackendSettings(backend="cpu", threads=1)
    return Pipeline.load("pictogram", lora_dir=tmp_path, settings=settings)


def test_requests_of_different_adapters_are_drawn_apart(with_adapters):
    prompts = ["a cat<lora:a:1>", "a cat<lora:b:0.3>", "a cat"]
    fields = {"seed": 1, "num_inference_steps": 2}
    requests = [Request(prompt=prompt, **fields) for prompt in prompts]
    for drawn in list(with_adapters.draw(requests)):
        (alone,) = with_adapters(prompts[drawn.request], **fields).images
        np.testing.assert_array_equal(drawn.image, alone)


def test_alternatives_of_different_adapters_are_refused(with_adapters):
    prompt = "a cat{<lora:a:1>|<lora:b:1>}"
    requests = [Request(prompt=prompt, seed=seed, num_inference_steps=1) for seed in range(8)]
    with pytest.raises(RequestError, match="choose different adapters"):
        list(with_adapters.draw(requests))


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    axes = ("--x", "steps=1,2", "--y", "seed=3,4,5", "--z", 'negative-prompt="a, b",c')
    assert grid.main(["a cat", *axes, "--threads", "1", "--backend", "cpu", "-o", "g.png"]) == 0
    assert capsys.readouterr().out.split() == ["g-1.png", "g-2.png"]
    with Image.open("g-1.png") as sheet:
        assert sheet.width > 2 * 128
        assert sheet.height > 3 * 128


def test_words_of_the_prompt_are_an_axis(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn = []

    def draw(self, requests):
        drawn.extend((request.prompt, request.negative_prompt) for request in requests)
        return draw_requests(self, requests)

    draw_requests = Pipeline.draw
    monkeypatch.setattr(Pipeline, "draw", draw)
    told = ["a red cat", "--negative-prompt", "red hat, dog", "--steps", "1", "--backend", "cpu"]
    axes = ["--x", 'prompt=red,"dark, blue"', "--y", "prompt=dog,cup"]
    assert grid.main([*told, *axes, "-o", "g.png"]) == 0
    assert drawn == [
        ("a red cat", "red hat, dog"),
        ("a red cat", "red hat, cup"),
        ("a dark, blue cat", "dark, blue hat, dog"),
        ("a dark, blue cat", "dark, blue hat, cup"),
    ]


def test_labels_stand_beside_the_pictures():
    pictures = [[Image.new("RGB", (64, 64), "red")] * 2] * 2
    plain, labelled = side_by_side(pictures), side_by_side(pictures, ("x 1", "x 2"), ("y 1", "y 2"))
    left, top = labelled.width - plain.width, labelled.height - plain.height
    assert left > 0
    assert top > 0
    np.testing.assert_array_equal(labelled.crop((left, top, *labelled.size)), plain)
    beside = np.asarray(labelled.crop((0, top, left, labelled.height)))
    assert (beside < 128).any(), "there is text"


def test_an_option_that_a_sheet_cannot_heed_is_refused(capsys):
    assert grid.main(["a cat", "--x", "steps=1,2", "--watermark", "abc"]) == 2
    assert "--watermark is for `latentrt draw`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("axis", "said"),
    [
        ("model=a,b", "model is no axis"),
        ("backend=cpu", "backend is no axis"),
        ("num-images=1,2", "num-images is no axis"),
        ("plain-prompt=1", "plain-prompt is no axis"),
        ("nosuch=1", "nosuch is no axis"),
        ("steps", "is no axis"),
        ("steps=", "is no axis"),
        ("sampler=ddim,nosuch", "nosuch"),
        ("prompt=dog,bird", "'dog' is in neither the prompt nor"),
        ("seed=" + ",".join(map(str, range(257))), "257 cells"),
    ],
)
def test_what_is_refused(axis, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert grid.main(["a cat", "--x", axis]) == 2
    assert said in capsys.readouterr().err
