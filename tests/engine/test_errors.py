"""Sentences of errors: the near name before the list, and a field by the name that it has there."""

import pytest

from engine.errors import choice, exit_status, nearest, renamed

NAMES = {
    "num_inference_steps": "--steps",
    "mask_blur": "--mask-blur",
    "hires.scale": "--hires",
    "hires": "--hires",
    "strength": "--strength",
    "image": "--image",
    "mask": "--mask",
    "seed": "--seed",
    "schedule": "--schedule",
    "apg": "--apg",
    "x": "--x",
}


@pytest.mark.parametrize(
    ("value", "near"),
    [("eulr", "euler"), ("EULER", "euler"), ("Karas", "Karras"), ("xyz", ""), ("", ""), (None, "")],
)
def test_the_nearest_name(value, near):
    assert nearest(value, ["euler", "Karras", "ddim"]) == near


def test_what_is_near_stands_before_the_list():
    assert choice("ddin", ["euler", "ddim"]) == "did you mean 'ddim'? There are euler, ddim"
    assert choice("", ["euler", "ddim"], or_else=", or a file") == (
        "choose one of euler, ddim, or a file"
    )


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("num_inference_steps is 0; give 1", "--steps is 0; give 1"),
        ("mask_blur came without mask; leave mask_blur out",
         "--mask-blur came without --mask; leave --mask-blur out"),
        ("strength came without image; leave strength out",
         "--strength came without --image; leave --strength out"),
        ("hires.scale is 9", "--hires is 9"),
        ("hires and a mask came together", "--hires and a mask came together"),
        ("strength 0.01 runs no step", "--strength 0.01 runs no step"),
        ("sampler 'a' names b, but schedule is 'c'", "sampler 'a' names b, but --schedule is 'c'"),
        ("apg's eta is 20; give eta", "--apg's eta is 20; give eta"),
        ("seed has 2 numbers", "--seed has 2 numbers"),
    ],
)  # fmt: skip
def test_a_field_has_the_name_of_its_option(said, wanted):
    assert renamed(said, NAMES) == wanted


@pytest.mark.parametrize(
    "said",
    [
        "the image a.png cannot be read; give a whole PNG",
        "the mask has no white area; make white what is to be painted",
        "there is no sampler 'mask_blur'; choose one of x, y",
        "/tmp/mask_blur/a.png ends in '.gif'",
        "mask_blur.png is a folder",
        "mask_blurred is 3",
        'the prompt "num_inference_steps isn\'t" is long',
        "draw a larger image",
        "run `latentrt --mask_blur`",
    ],
)
def test_what_is_no_field_stays(said):
    assert renamed(said, NAMES) == said


def test_without_names_nothing_changes():
    assert renamed("seed is 3", {}) == "seed is 3"


def test_a_file_that_is_closed_to_us_ends_in_a_sentence(capsys, tmp_path):
    def closed():
        raise PermissionError(13, "Permission denied", str(tmp_path / "a.png"))

    assert exit_status(closed) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path / 'a.png'} cannot be used (Permission denied); ")
    assert said.count("\n") == 1


def test_an_error_of_no_file_is_a_fault_of_ours():
    def wrong():
        raise OSError("what is this")

    with pytest.raises(OSError, match="what is this"):
        exit_status(wrong)
