"""Sheets over options: what a cell shows, which calls cells share, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.backends.settings import BackendSettings
from engine.errors import RequestError
from runtime import Pipeline, Request, adapted_model, grid
from runtime import __main__ as command
from runtime.images.a1111_reader import parse_parameters
from runtime.images.exif import texts_of
from runtime.images.files import read_settings, read_source_type
from runtime.images.previews import side_by_side
from runtime.options import FIELDS
from tests.support.named_requests import write_lora
from tests.support.pictures import drawing
from tests.support.upscaler_files import write_upscaler


@pytest.fixture(scope="module")
def pipeline():
    settings = BackendSettings(backend="cpu", threads=1)
    with Pipeline.load("pictogram", settings=settings) as pipeline:
        yield pipeline


def test_cells_share_calls_across_samplers_and_are_what_they_are_alone(pipeline, monkeypatch):
    fields = {"prompt": "a cat", "seed": 1}
    chosen = [
        {"sampler": sampler, "num_inference_steps": steps, "guidance_scale": scale}
        for sampler in ("ddim", "euler_a")
        for steps, scale in ((2, 3.0), (3, 5.0))
    ] + [{"num_inference_steps": 2, "guidance_scale": 1.0}]
    step_rows, sizes = adapted_model.step_rows, []

    def count(rows, engine, **options):
        sizes.append(len(rows))
        step_rows(rows, engine, **options)

    monkeypatch.setattr(adapted_model, "step_rows", count)
    requests = [Request(**fields, **choice) for choice in chosen]
    drawn = sorted(pipeline.draw(requests), key=lambda image: image.request)
    images = [each.image for each in drawn]
    assert sizes == [4, 4, 2, 1, 1]
    for image, choice in zip(images, chosen, strict=True):
        (alone,) = pipeline(**fields, **choice).images
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

    def draw(self, requests, **options):
        drawn.extend((request.prompt, request.negative_prompt) for request in requests)
        return draw_requests(self, requests, **options)

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


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Run in a folder of its own; collects the requests that sheets are drawn of."""
    monkeypatch.chdir(tmp_path)
    requests, draw = [], Pipeline.draw

    def note(self, those, **options):
        requests.extend(those)
        return draw(self, those, **options)

    monkeypatch.setattr(Pipeline, "draw", note)
    return requests


def as_json(requests):
    fields = [{field: getattr(r, field) for field in FIELDS} for r in requests]
    return json.loads(json.dumps(fields, default=str))


SMALL = ("--steps", "1", "--backend", "cpu", "--threads", "1", "--height", "32", "--width", "32")


@pytest.mark.parametrize(
    ("axes", "options"),
    [
        (["--x", "steps=1,2", "--y", "guidance_scale=3,5:2"], []),
        (["--x", 'prompt=red,"dark, blue"'], ["--negative-prompt", "x", "--preset", "fast"]),
        (["--x", 'negative-prompt="a ""b"", c",d', "--z", "seed=3,4"], []),
        (["--x", "seed=-1,-1"], ["--plain-prompt"]),
        (["--x", "variation-strength=0.1,0.2", "--y", "num_inference_steps=1,2"], ["--seed", "-1"]),
        (["--x", "hires-strength=0.5,1"], ["--hires", "1.5", "--hires-steps", "2"]),
        (["--x", "sampler=euler,DPM++ 2M Karras"], ["--mask-blur", "4"]),
    ],
)
def test_a_sheet_says_what_makes_it_again(asked, axes, options):
    suffix = ".webp" if options else ".png"
    assert grid.main(["a red cat", *axes, *options, *SMALL, "-o", f"a{suffix}"]) == 0
    first, sheets = list(asked), sorted(path for path in Path().iterdir())
    asked.clear()
    assert grid.main(["--again", str(sheets[-1]), "--threads", "1", "-o", f"b{suffix}"]) == 0
    assert as_json(asked) == as_json(first)
    assert len({request.seed for request in first}) == (2 if "seed=" in str(axes) else 1)
    for sheet in sheets:
        assert sheet.read_bytes() == Path(f"b{sheet.name[1:]}").read_bytes()
        assert read_source_type(sheet) == "trainedAlgorithmicMedia"
        with Image.open(sheet) as file:
            parameters = parse_parameters(texts_of(file)["parameters"])
        assert (parameters["width"], parameters["height"]) == (32, 32), "of its first cell"
        settings = read_settings(sheet)
        assert parameters["seed"] == settings["first_cell"]["seed"]
        assert settings["x"].startswith(axes[1].partition("=")[0])
        assert settings["hashes"].keys() == {"pictogram"}


def test_what_a_sheet_is_drawn_again_with_may_change(asked, capsys):
    assert grid.main(["a red cat", "--x", "steps=1,2", *SMALL, "-o", "a.png"]) == 0
    asked.clear()
    assert (
        grid.main(["--again", "a.png", "--y", "seed=5,6", "-o", "b.png", "--negative-prompt", "x"])
        == 0
    )
    assert [(r.num_inference_steps, r.seed, r.negative_prompt) for r in asked] == [
        (1, 5, "x"), (1, 6, "x"), (2, 5, "x"), (2, 6, "x"),
    ]  # fmt: skip
    assert command.main(["a red cat", *SMALL, "--seed", "9", "-o", "one.png"]) == 0
    asked.clear()
    assert grid.main(["--again", "one.png", "--x", "guidance-scale=2,3", "-o", "c.png"]) == 0
    assert [(r.seed, r.guidance_scale) for r in asked] == [(9, 2.0), (9, 3.0)]
    capsys.readouterr()
    assert command.main(["--again", "c.png"]) == 2
    assert "is a sheet of pictures; `latentrt grid --again c.png` draws it again" in (
        capsys.readouterr().err
    )


def test_an_upscaler_of_an_axis_is_kept_by_its_name(asked, tmp_path, capsys):
    (tmp_path / "models").mkdir()
    upscaler = write_upscaler(tmp_path / "models" / "up.safetensors")
    axis = ["--x", f"hires-upscaler=lanczos,{upscaler}"]
    hires = ["--hires", "1.5", "--hires-strength", "1"]
    assert grid.main(["a", *axis, *hires, *SMALL, "-o", "models/a.png"]) == 0
    assert read_settings("models/a.png")["x"] == "hires-upscaler=lanczos,up.safetensors"
    assert grid.main(["--again", "models/a.png", "--threads", "1", "-o", "b.png"]) == 0
    assert Path("models/a.png").read_bytes() == Path("b.png").read_bytes()
    assert grid.main(["--again", "b.png", "--threads", "1"]) == 2
    assert "with the upscaler up.safetensors, which is neither" in capsys.readouterr().err


def test_cells_may_start_from_a_picture(asked):
    drawing(40, 51).save("photo.png")
    options = ["--image", "photo.png", *SMALL[2:6]]
    assert grid.main(["a", "--x", "strength=0.5,1", *options, "--steps", "2", "-o", "a.png"]) == 0
    assert [request.strength for request in asked] == [0.5, 1.0]
    assert asked[0].image is asked[1].image, "it is read once"
    with Image.open("a.png") as sheet:
        assert sheet.width == 2 * 51 + 4
    assert read_settings("a.png")["image"] == "photo.png"
    assert grid.main(["--again", "a.png", "--threads", "1", "-o", "b.png"]) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_a_default_name_is_not_overwritten_and_sheets_are_written_as_they_are_done(
    asked, capsys, monkeypatch
):
    words = ["a", "--x", "seed=1,2", "--z", "steps=1,2,3", *SMALL[2:]]
    assert grid.main(words) == 0
    draw = Pipeline.draw

    def interrupted(self, requests, **options):
        if requests[0].num_inference_steps == 3:
            raise KeyboardInterrupt
        return draw(self, requests, **options)

    monkeypatch.setattr(Pipeline, "draw", interrupted)
    assert grid.main(words) == 130
    said = capsys.readouterr()
    assert {path.name for path in Path().iterdir()} == {*said.out.split()}
    names = ["grid-1.png", "grid-2.png", "grid-3.png", "grid-1-2.png", "grid-2-2.png"]
    assert said.out.split() == names
    assert said.err.endswith("cancelled; only the sheets named above were written\n")


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
    assert grid.main(["a cat", "--x", "steps=1,2", "--upscale", "up.pth"]) == 2
    assert "--upscale is for `latentrt draw`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("axis", "said"),
    [
        ("model=a,b", "model is no axis"),
        ("backend=cpu", "backend is no axis"),
        ("num-images=1,2", "num-images is no axis"),
        ("plain-prompt=1", "plain-prompt is no axis"),
        ("image=a.png,b.png", "image is no axis"),
        ("cfg=3,5", "did you mean guidance-scale?"),
        ("scheduler=a,b", "did you mean sampler?"),
        ("step=1,2", "did you mean steps?"),
        ("strength=0.3,0.5", "--strength came without --image"),
        ("hires-steps=1,2", "--hires-steps came without --hires"),
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


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--y", "steps=3,4"], "steps is two axes"),
        (["--y", "num-inference-steps=3,4"], "steps is two axes"),
        (["--seed", "7,9"], "such as --y seed=7,9"),
        (["--num-images", "2"], "one picture a cell"),
        (["--variation-seed", "2"], "--variation-seed came without --variation-strength"),
        (["--again", "none.png"], "none.png cannot be read"),
        (["-o", "a.gif"], "ends in '.gif'"),
        (["-o", "none/a.png"], "does not exist"),
    ],
)
def test_what_is_refused_beside_the_axes(options, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert grid.main(["a cat", "--x", "steps=1,2", *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
