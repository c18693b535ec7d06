"""From a line to a request: whose word counts, which pictures may be named, and what is refused."""

import os

import pytest
from PIL import Image

from engine.errors import LatentrtError, RequestError
from runtime.batch.__main__ import make_parser
from runtime.batch.lines import Line
from runtime.batch.requests import Defaults, digest
from runtime.options import FIELDS


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("in/a.png", "out.png"):
        Image.new("RGB", (16, 24)).save(tmp_path / name)
    return tmp_path / "in"


def defaults(folder, *options, base=0):
    given = make_parser("batch").parse_args(["a.jsonl", "--out", "b", *options])
    return Defaults.of(given, base, folder)


def request(folder, *options, number=1, base=0, **fields):
    line = Line(number=number, fields={"prompt": "a", **fields})
    return defaults(folder, *options, base=base).request(line)


def test_the_line_goes_before_the_command_line(folder):
    options = ("--steps", "3", "--sampler", "euler", "--negative-prompt", "grey", "-n", "2")
    made = request(folder, *options, sampler="ddim", negative_prompt=None)
    assert (made.num_inference_steps, made.sampler, made.num_images_per_prompt) == (3, "ddim", 2)
    assert made.negative_prompt == "", "null takes the field's own default"
    assert request(folder, *options).negative_prompt == "grey"


def test_a_line_without_a_seed_has_one_by_its_number(folder):
    first, again, second = (request(folder, number=n, base=4).seeds for n in (1, 1, 2))
    assert first == again != second
    assert first != request(folder, number=1, base=5).seeds
    assert request(folder, seed=-1).seeds == request(folder).seeds
    several = request(folder, num_images_per_prompt=3).seeds
    assert several == tuple(several[0] + i for i in range(3))
    assert request(folder, seed=0).seeds == (0,)


def test_a_line_that_varies_has_a_variation_seed(folder):
    varied = [request(folder, variation_strength=0.5, number=n).variation_seeds for n in (1, 1, 2)]
    assert varied[0] == varied[1] != varied[2]


def test_a_second_run_is_an_object_or_columns(folder):
    for fields in (
        {"hires": {"scale": 1.5, "strength": 0.4}},
        {"hires_scale": 1.5, "hires_strength": 0.4},
    ):
        hires = request(folder, "--hires-upscaler", "bilinear", **fields).hires
        assert (hires.scale, hires.strength, hires.upscaler) == (1.5, 0.4, "bilinear")
    assert request(folder, "--hires", "2").hires.scale == 2
    assert request(folder, "--hires", "2", hires=None).hires is None
    assert request(folder).hires is None


@pytest.mark.parametrize(
    "fields", [{"hires": {"size": 2}}, {"hires": [2]}, {"hires_strength": 0.5}, {"hires": True}]
)
def test_a_second_run_that_is_none_is_refused(folder, fields):
    with pytest.raises(RequestError, match="hires"):
        request(folder, **fields)


def test_pictures_are_those_of_the_folder(folder):
    made = request(folder, image="a.png", mask="./a.png", strength=0.5)
    assert made.image.size == made.mask.size == (16, 24)
    looked_at = defaults(folder).request(
        Line(number=1, fields={"prompt": "a", "image": "a.png"}), with_pictures=False
    )
    assert looked_at.image.size == (8, 8), "only looked for"


@pytest.mark.parametrize(
    "name",
    ["../out.png", "missing.png", ".", "", "/etc/passwd", "\0", "a" * 9999, "link.png", "pipe.png"],
)
def test_no_other_file_is_opened(folder, name):
    (folder / "link.png").symlink_to("../out.png")
    if hasattr(os, "mkfifo"):  # not on Windows
        os.mkfifo(folder / "pipe.png")
    with pytest.raises(RequestError, match="which is no file in"):
        request(folder, image=name)


def test_the_command_lines_picture_is_for_every_line(folder):
    options = ("--image", str(folder.parent / "out.png"), "--strength", "0.4")
    assert request(folder, *options).image.size == (16, 24)
    without = request(folder, *options, image=None)
    assert (without.image, without.strength) == (None, None), "which cannot act without it"


VALUES = [{}, [], "x", -5, 1e308, True, [None], [[1]], {"a": 1}, 10**400, [1, 2, 3, 4], ["a"] * 4]


@pytest.mark.parametrize("name", [*FIELDS, "hires_scale", "hires_upscaler", "nosuch"])
def test_a_value_of_any_kind_is_a_request_or_one_sentence(folder, name):
    refused = 0
    for value in VALUES:
        try:
            request(folder, **{"image": "a.png", name: value})
        except LatentrtError:
            refused += 1
    assert refused >= 5


@pytest.mark.parametrize("text", ["a\ud800", "a\0b", "\x1b[2J"])
def test_a_text_that_no_file_can_hold_is_refused(folder, text):
    for fields in ({"prompt": text}, {"negative_prompt": text}):
        with pytest.raises(RequestError, match="holds the character"):
            request(folder, **fields)


def test_a_digest_tells_fields_whatever_their_order():
    one, other = {"prompt": "a", "seed": 1}, {"seed": 1, "prompt": "a"}
    assert digest(one) == digest(other) != digest({"prompt": "a", "seed": 2})
    for value in (float("nan"), b"a", {1: {object()}}):
        with pytest.raises(RequestError, match="cannot be written as JSON"):
            digest({"prompt": value})
