"""`--safety-checker`: pictures that are found unsafe are flagged, blurred or not written."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import runtime.__main__ as draw
from latentrt.__main__ import main
from runtime.images.files import read_settings
from runtime.images.safety import SafetyChecker, SafetyVerdict, blurred
from tests.support.upscaler_files import write_upscaler

SMALL = ("--height", "64", "--width", "64", "--steps", "1", "--threads", "1", "--backend", "cpu")
ARGUMENTS = ("a red apple", *SMALL, "--seed", "7")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Work in a folder of its own, with a checker that flags every second picture."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "safety_checker").mkdir()
    verdicts = [SafetyVerdict(concepts=(3,), special=()), SafetyVerdict(concepts=(), special=(1,))]
    checker = iter(verdicts * 10)
    monkeypatch.setattr(SafetyChecker, "load", lambda folder, settings: lambda _: next(checker))
    return tmp_path


def run(*arguments):
    return draw.main([*ARGUMENTS, "--safety-checker", "safety_checker", *arguments])


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture
def plain(here):
    assert draw.main([*ARGUMENTS, "-n", "2", "-o", "plain.png"]) == 0
    return [Image.fromarray(pixels(f"plain-{i}.png")) for i in (1, 2)]


def test_a_flagged_picture_is_written_and_says_so(plain, capsys):
    assert run("-n", "2", "-o", "a.png") == 0
    for i, image in enumerate(plain, 1):
        assert np.array_equal(pixels(f"a-{i}.png"), np.asarray(image))
    assert read_settings("a-1.png")["safety"] == "flagged"
    assert "safety" not in read_settings("a-2.png")
    assert capsys.readouterr().err == "note: a-1.png: the safety checker finds it unsafe\n"


def test_a_note_names_the_file_that_was_written(capsys):
    Path("a-red-apple-7.png").touch()
    assert run() == 0
    assert capsys.readouterr().err.startswith("note: a-red-apple-7-2.png: the safety checker")


def test_a_blurred_picture(plain, capsys):
    assert run("-n", "2", "-o", "a.png", "--safety-action", "blur") == 0
    assert np.array_equal(pixels("a-1.png"), np.asarray(blurred(plain[0])))
    assert np.array_equal(pixels("a-2.png"), np.asarray(plain[1]))
    assert read_settings("a-1.png")["safety"] == "blurred"
    assert capsys.readouterr().err.endswith("finds it unsafe, and it is blurred\n")


def test_a_blurred_picture_is_enlarged_blurred(here, plain):
    write_upscaler(here / "up.safetensors", scale=0.0)
    assert run("-o", "a.png", "--safety-action", "blur", "--upscale", "up.safetensors") == 0
    expected = np.asarray(blurred(plain[0])).repeat(2, 0).repeat(2, 1)
    assert np.array_equal(pixels("a.png"), expected)


def test_a_refused_picture_is_not_written(here, capsys):
    assert run("-n", "3", "-o", "a.png", "--safety-action", "refuse") == 2
    assert sorted(path.name for path in here.glob("*.png")) == ["a-2.png"]
    said = capsys.readouterr()
    assert said.out == "a-2.png\n"
    assert said.err.splitlines() == [
        "note: a-1.png: not written: the safety checker finds it unsafe",
        "note: a-3.png: not written: the safety checker finds it unsafe",
        "error: 2 of 3 pictures were not written, because the safety checker finds them unsafe; "
        "take another prompt or seed",
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_groups_do_not_matter(here, batch_size):
    asked = ("-n", "3", "-o", "a.png", "--safety-action", "refuse", "--batch-size", batch_size)
    assert run(*map(str, asked)) == 2
    assert sorted(path.name for path in here.glob("*.png")) == ["a-2.png"]


@pytest.mark.parametrize("action", ["blur", "refuse"])
@pytest.mark.parametrize("preview", [("--preview-steps", "1"), ("--animation", "a.webp")])
def test_previews_do_not_show_what_is_hidden(here, action, preview, capsys):
    assert run("-o", "a.png", "--safety-action", action, *preview) == 2
    assert "came with previews, which would show what it hides" in capsys.readouterr().err
    assert not list(here.glob("a*"))


def test_an_action_without_a_checker(capsys):
    assert draw.main([*ARGUMENTS, "--safety-action", "blur"]) == 2
    assert "--safety-action came without --safety-checker" in capsys.readouterr().err


def test_nothing_is_checked_unless_asked_for(here, monkeypatch):
    monkeypatch.setattr(SafetyChecker, "load", lambda *_, **__: pytest.fail("it checked"))
    assert draw.main([*ARGUMENTS, "-o", "a.png"]) == 0


def test_a_sheet_is_not_checked(capsys):
    asked = ["grid", *ARGUMENTS, "--x", "steps=1,2", "--safety-checker", "safety_checker"]
    assert main(asked) == 2
    assert "--safety-checker is for `latentrt draw`" in capsys.readouterr().err


def test_what_is_no_checker_is_said_before_a_step(here, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.chdir(here)
    monkeypatch.setattr(draw.Pipeline, "load", lambda *_, **__: pytest.fail("it loaded"))
    assert run("-o", "a.png") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: 'safety_checker' holds no config.json")
