"""Every command that writes pictures marks them: by XMP, a signature, a watermark."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentrt.__main__ import main
from runtime.images.credentials import Credentials, describe_credentials
from runtime.images.files import read_settings, read_source_type
from runtime.images.watermark import read_watermark
from runtime.pipeline import Pipeline
from tests.support.certificates import write_certificates
from tests.support.pictures import drawing
from tests.support.upscaler_files import write_upscaler

ONE = ("--steps", "1", "--backend", "cpu", "--threads", "1")
TINY = ("--height", "32", "--width", "32")
SIGNED = ("--c2pa-cert", "es256-chain.pem", "--c2pa-key", "es256-key.pem")
COMMANDS = {
    "draw": (("draw", "a red apple", "--seed", "7", *ONE, "-o", "out.png"), "out.png"),
    "grid": (("grid", "a red apple", "--x", "seed=7,8", *ONE, "-o", "out.webp"), "out.webp"),
    "sheets": (
        ("grid", "a", "--x", "seed=7,8", "--z", "steps=1,2", *ONE[2:], "-o", "o.jpg"),
        "o-2.jpg",
    ),
    "batch": (("batch", "lines.txt", "--seed", "7", *ONE, "-o", "out"), "out/000001.png"),
    "upscale": (("upscale", "p.png", "--upscaler", "up.safetensors", "-o", "out.jpg"), "out.jpg"),
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("lines.txt").write_text("a red apple\n")
    drawing(128, 128).save("p.png")
    return tmp_path


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_signs_and_watermarks_when_asked(name, capsys):
    pytest.importorskip("c2pa")
    write_certificates(Path())
    write_upscaler(Path("up.safetensors"), scale=0)
    command, path = COMMANDS[name]
    assert main([*command, *SIGNED, "--watermark", "SDV2"]) == 0, capsys.readouterr().err
    said = describe_credentials(Path(path))
    assert said["verified"] == "yes, nothing has changed since"
    assert said["source"] == read_source_type(path)
    with Image.open(path) as image:
        assert read_watermark(image) == "SDV2"
    assert read_settings(path)["watermark"] == "SDV2"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_pair_that_does_not_sign_is_found_before_a_picture_is_drawn(name, capsys, monkeypatch):
    pytest.importorskip("c2pa")
    write_certificates(Path())
    Path("other").mkdir()
    other = write_certificates(Path("other"))[1]
    write_upscaler(Path("up.safetensors"))
    monkeypatch.setattr(Pipeline, "load", lambda *_, **__: pytest.fail("it was loaded"))
    command, _ = COMMANDS[name]
    before = {*Path().rglob("*.*")}
    assert main([*command, *SIGNED[:3], str(other)]) == 2
    error = capsys.readouterr().err
    assert "cannot be signed" in error
    assert error.count("\n") == 1
    assert {*Path().rglob("*.*")} == before


@pytest.mark.parametrize("name", COMMANDS)
def test_a_half_of_a_pair_and_a_long_watermark_are_refused(name, capsys):
    command, _ = COMMANDS[name]
    assert main([*command, "--c2pa-cert", "es256-chain.pem"]) == 2
    assert main([*command, "--watermark", "SDV25"]) == 2
    error = capsys.readouterr().err
    assert "--c2pa-cert and --c2pa-key belong together" in error
    assert "give 1 to 4 printable ASCII characters" in error


def test_a_missing_library_is_found_before_a_picture_is_drawn(capsys, monkeypatch):
    pytest.importorskip("cryptography")
    write_certificates(Path())
    monkeypatch.setitem(__import__("sys").modules, "c2pa", None)
    monkeypatch.setattr(Pipeline, "load", lambda *_, **__: pytest.fail("it was loaded"))
    assert main([*COMMANDS["grid"][0], *SIGNED]) == 2
    assert "content credentials need c2pa-python" in capsys.readouterr().err


def test_a_picture_too_small_for_a_watermark_is_found_before_a_step(capsys, monkeypatch):
    monkeypatch.setattr(Pipeline, "denoise", lambda *_: pytest.fail("a step was made"))
    monkeypatch.setattr(Pipeline, "step_rows", lambda *_: pytest.fail("a step was made"))
    marked = ("--watermark", "A")
    assert main(["a", *ONE, *TINY, *marked, "-o", "a.png"]) == 2
    assert main(["batch", "lines.txt", *ONE, *TINY, *marked, "-o", "out"]) == 1
    said = capsys.readouterr()
    assert said.err.count("draw a larger one") == 2
    (record,) = map(json.loads, Path("out/manifest.jsonl").read_text().splitlines())
    assert "draw a larger one" in record["error"]
    photo = ("--image", "p.png", "--height", "32", "--width", "32")
    assert main(["a", *ONE, *photo, *marked, "-o", "a.png"]) == 2
    cells = ("--z", "seed=1,2", "--height", "16")
    assert main(["grid", "a", "--x", "width=8,16", *ONE, *cells, *marked, "-o", "g.png"]) == 2
    assert "a watermark needs 64 blocks" in capsys.readouterr().err
    assert not list(Path().glob("*[ag].png"))


def test_an_enlarged_picture_may_be_large_enough(capsys):
    write_upscaler(Path("up.safetensors"), scale=0)
    enlarged = ("--upscale", "up.safetensors:2", "--watermark", "A")
    assert main(["a", *ONE, "--height", "40", "--width", "40", *enlarged, "-o", "a.png"]) == 0


def test_transparency_outlives_a_watermark():
    picture = drawing(128, 128).convert("RGBA")
    alpha = Image.fromarray(np.arange(128 * 128, dtype=np.uint8).reshape(128, 128))
    picture.putalpha(alpha)
    picture.save("p.png")
    write_upscaler(Path("up.safetensors"), scale=0)
    command = ("upscale", "p.png", "--upscaler", "up.safetensors")
    assert main([*command, "-o", "plain.png"]) == 0
    assert main([*command, "--watermark", "SDV2", "-o", "marked.png"]) == 0
    with Image.open("plain.png") as plain, Image.open("marked.png") as marked:
        np.testing.assert_array_equal(plain.getchannel("A"), marked.getchannel("A"))
        assert read_watermark(marked) == "SDV2"


def test_a_signer_that_works_says_nothing():
    pytest.importorskip("c2pa")
    Credentials.read(*write_certificates(Path())).check()
