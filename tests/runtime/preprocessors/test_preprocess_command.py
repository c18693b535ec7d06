"""`latentrt preprocess`: the hint it writes, and what it refuses."""

import numpy as np
import pytest
from PIL import Image

from latentrt.__main__ import main
from runtime.preprocessors.named import PREPROCESSORS, Blur, Canny, Scribble, inpaint_hint
from tests.support.pictures import drawing

PICTURE = drawing(40, 56)
PIXELS = np.asarray(PICTURE)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PICTURE.save("photo.png")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["canny"], Canny()(PIXELS)),
        (["canny", "--low", "30", "--high", "60.5", "--l2-norm"], None),
        (["scribble", "--threshold", "8"], Scribble(threshold=8)(PIXELS)),
        (["blur", "--sigma", "2"], Blur(sigma=2)(PIXELS)),
    ],
)
def test_a_hint_is_written_as_large_as_the_picture(arguments, expected, capsys):
    if expected is None:
        expected = Canny(low=30, high=60.5, l2_norm=True)(PIXELS)
    assert main(["preprocess", *arguments, "photo.png", "--out", "hint.png"]) == 0
    assert capsys.readouterr().out == "hint.png\n"
    assert np.array_equal(np.asarray(Image.open("hint.png")), expected)


def test_what_is_painted_anew_is_transparent_in_the_hint():
    mask = Image.new("L", (28, 20))
    mask.paste(255, (0, 0, 14, 20))
    mask.save("mask.png")
    given = ["preprocess", "inpaint", "photo.png", "--mask", "mask.png", "-o", "hint.webp"]
    assert main(given) == 0
    assert main([*given[:-1], "hint.png"]) == 0
    hint = np.asarray(Image.open("hint.png"))
    assert np.array_equal(hint[..., :3], PIXELS)
    stretched = np.zeros((40, 56), np.uint8)
    stretched[:, :28] = 255
    assert np.array_equal(hint[..., 3] == 0, inpaint_hint(PIXELS, stretched)[..., 0] < 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["depth", "photo.png"], "there is no preprocessor 'depth'; choose one of canny, scribble"),
        (
            ["canny", "photo.png", "--sigma", "3"],
            "--sigma is no option of canny; it has --high, --l2",
        ),
        (["gray", "photo.png", "--low", "3"], "--low is no option of gray; it has none"),
        (["canny", "photo.png", "--low", "-3"], "low is -3.0; give a number from 0"),
        (["canny", "nowhere.png"], "the image nowhere.png cannot be read"),
        (["inpaint", "photo.png"], "inpaint came without --mask"),
        (["gone.onnx", "photo.png"], "gone.onnx cannot be read (No such file"),
        (["photo.onnx", "photo.png"], "photo.onnx is no ONNX file"),
        (["photo.onnx", "photo.png", "--mask", "photo.png"], "--mask is no option of photo.onnx"),
    ],
)
def test_what_cannot_be_made_is_one_line(arguments, message, here, capsys):
    PICTURE.save("photo.png")
    (here / "photo.onnx").write_bytes((here / "photo.png").read_bytes())
    assert main(["preprocess", *arguments, "--out", "hint.png"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1
    assert not (here / "hint.png").exists()


def test_other_outputs_are_refused(here, capsys):
    assert main(["preprocess", "gray", "photo.png", "--out", "hint.txt"]) == 2
    assert "ends in '.txt'" in capsys.readouterr().err
    Image.new("L", (8, 8), 255).save("mask.png")
    arguments = ["preprocess", "inpaint", "photo.png", "--mask", "mask.png", "--out", "hint.jpg"]
    assert main(arguments) == 2
    assert "hint.jpg has no transparency" in capsys.readouterr().err


def test_the_help_names_every_preprocessor(capsys):
    with pytest.raises(SystemExit):
        main(["preprocess", "--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in (*PREPROCESSORS, "inpaint", "ONNX"))
