"""`--upscale` of a drawn picture, and `latentrt upscale` of one that is there."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import runtime.__main__ as draw
from engine.backends.settings import BackendSettings
from engine.errors import BackendError, RequestError
from engine.store.cache import fingerprint
from latentrt.__main__ import main
from latentrt.info import find_facts
from runtime import upscale
from runtime.denoising.latents import LatentSpace
from runtime.images.files import read_settings, read_source_type
from runtime.images.upscaler import Upscaler
from runtime.images.upscaling import Hires
from runtime.pipeline import Pipeline
from runtime.request import Request
from runtime.upscaler_folder import find_choice, find_upscaler
from serving.limits import Limits
from serving.picture_request import PictureRequest
from tests.support.pictures import drawing
from tests.support.upscaler_files import COMPACT, ESRGAN, write_upscaler

SMALL = ("--height", "32", "--width", "32", "--steps", "1", "--threads", "1", "--backend", "cpu")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_upscaler(tmp_path / "up.safetensors")
    return tmp_path


def size(path):
    with Image.open(path) as image:
        return image.size


def drawn(*arguments):
    assert draw.main(["a red apple", *SMALL, "--seed", "7", *arguments]) == 0


def test_a_drawn_picture_is_the_enlarged_one(here, capsys):
    drawn("-o", "small.png")
    drawn("-o", "large.png", "--upscale", "up.safetensors")
    drawn("-o", "larger.png", "--upscale", "up.safetensors:3")
    assert capsys.readouterr().err == ""
    assert (size("small.png"), size("large.png"), size("larger.png")) == (
        (32, 32),
        (64, 64),
        (96, 96),
    )
    expected = Upscaler.load("up.safetensors")(Image.open("small.png"))
    assert np.array_equal(np.asarray(expected), np.asarray(Image.open("large.png")))


def test_all_pictures_of_a_run_are(here):
    drawn("-o", "a.png", "--upscale", "up.safetensors", "-n", "2")
    assert size("a-1.png") == size("a-2.png") == (64, 64)


def test_settings_make_it_again(here):
    drawn("-o", "a.png", "--upscale", str(here / "up.safetensors:1.5"))
    settings = read_settings("a.png")
    assert settings["upscale"] == "up.safetensors:1.5"
    assert settings["hashes"]["up.safetensors"] == fingerprint(here / "up.safetensors")
    assert (settings["height"], settings["width"]) == (32, 32)
    assert draw.main(["--again", "a.png", "-o", "b.png", "--threads", "1"]) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_again_without_the_upscaler_names_the_option(here, capsys):
    drawn("-o", "a.png", "--upscale", "up.safetensors")
    Path("up.safetensors").unlink()
    assert draw.main(["--again", "a.png"]) == 2
    said = capsys.readouterr().err
    assert "the upscaler up.safetensors" in said
    assert "--upscale" in said


def test_again_notes_another_upscaler(here, capsys):
    drawn("-o", "a.png", "--upscale", "up.safetensors")
    write_upscaler(here / "up.safetensors", seed=1)
    assert draw.main(["--again", "a.png", "-o", "b.png", "--threads", "1"]) == 0
    assert "up.safetensors is another upscaler than a.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ("missing.pth", "missing.pth"),
        ("up.safetensors:99", "the factor of an upscaler is 99.0; give a number from 1 to 16"),
        ("photo.png", "photo.png"),
        (":2", "names no upscaler"),
    ],
)
def test_what_cannot_be_used_is_said_before_a_step(here, chosen, said, capsys, monkeypatch):
    drawing(32, 32).save("photo.png")
    monkeypatch.setattr(draw.Pipeline, "load", lambda *_, **__: pytest.fail("it loaded"))
    assert draw.main(["a red apple", *SMALL, "--upscale", chosen]) == 2
    assert said in capsys.readouterr().err


def test_too_large_is_said_before_a_step(here, capsys, monkeypatch):
    monkeypatch.setattr(draw.Pipeline, "denoise", lambda *_: pytest.fail("it drew"))
    asked = ("--height", "1024", "--width", "1024", "--upscale", "up.safetensors:16")
    assert draw.main(["a red apple", *SMALL, *asked]) == 2
    assert "16384 x 16384 pixels" in capsys.readouterr().err


def test_a_picture_is_not_lost_where_enlarging_fails(here, capsys, monkeypatch):
    def fail(*_):
        raise BackendError("no memory")

    monkeypatch.setattr(Upscaler, "enlarged", fail)
    drawn("-o", "a.png", "--upscale", "up.safetensors")
    assert "note: not enlarged: no memory" in capsys.readouterr().err
    assert size("a.png") == (32, 32)


def test_a_sheet_is_not_enlarged(here, capsys):
    asked = ["grid", "a red apple", *SMALL, "--x", "steps=1,2", "--upscale", "up.safetensors"]
    assert main(asked) == 2
    assert "--upscale is for `latentrt draw`" in capsys.readouterr().err


def enlarged(*arguments):
    return main(["upscale", *map(str, arguments), "--threads", "1"])


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_photograph_is_enlarged_and_marked(here, suffix, capsys):
    drawing(30, 40).save("photo.png")
    out = here / f"out{suffix}"
    assert enlarged("photo.png", "--upscaler", "up.safetensors:1.5", "-o", out) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert size(out) == (60, 45)
    assert read_source_type(out) == "algorithmicallyEnhanced"
    assert read_settings(out)["upscale"] == "up.safetensors:1.5"
    assert enlarged("photo.png", "--upscaler", "up.safetensors", "-o", out, "--no-mark") == 0
    assert read_source_type(out) is None


def test_a_drawn_picture_keeps_what_it_was_made_with(here):
    drawn("-o", "a.png")
    drawn("-o", "b.png", "--upscale", "up.safetensors")
    assert enlarged("a.png", "--upscaler", "up.safetensors", "-o", "c.png") == 0
    assert read_source_type("c.png") == "trainedAlgorithmicMedia"
    assert read_settings("b.png") == read_settings("c.png")
    assert np.array_equal(np.asarray(Image.open("b.png")), np.asarray(Image.open("c.png")))


def test_the_second_time_is_named_as_left_out(here, capsys):
    drawn("-o", "a.png", "--upscale", "up.safetensors")
    assert enlarged("a.png", "--upscaler", "up.safetensors:1.5", "-o", "b.png") == 0
    assert size("b.png") == (96, 96)
    assert draw.main(["--again", "b.png", "-o", "c.png", "--threads", "1"]) == 0
    assert "left out of what b.png was made with: upscale (up.safetensors:1.5)" in (
        capsys.readouterr().err
    )
    assert Path("a.png").read_bytes() == Path("c.png").read_bytes()


def test_files_that_are_there_stay(here, capsys):
    drawing(32, 32).save("photo.png")
    for _ in range(2):
        assert enlarged("photo.png", "--upscaler", "up.safetensors") == 0
    names = capsys.readouterr().out.split()
    assert names == ["photo-upscaled.png", "photo-upscaled-2.png"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("none.png", "--upscaler", "up.safetensors"), "none.png cannot be read"),
        (("photo.png", "--upscaler", "none.pth"), "none.pth"),
        (("photo.png", "--upscaler", "text.pth"), "text.pth is no checkpoint"),
        (("photo.png",), "--upscaler"),
        (("photo.png", "--upscaler", "up.safetensors", "-o", "a.gif"), "a.gif ends in '.gif'"),
        (
            ("photo.png", "--upscaler", "up.safetensors", "--precision", "bfloat16"),
            "does not compute in bfloat16",
        ),
    ],
)
def test_mistakes_get_a_sentence(here, arguments, said, capsys):
    drawing(32, 32).save("photo.png")
    Path("text.pth").write_text("hello")
    try:
        status = enlarged(*arguments)
    except SystemExit as ended:  # argparse's
        status = ended.code
    assert status == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]


def test_info_tells_an_upscaler(here):
    facts = find_facts("up.safetensors")
    assert (facts["kind"], facts["scale"]) == ("upscaler", 2)
    write_upscaler(here / "esrgan.safetensors", ESRGAN)
    facts = find_facts("esrgan.safetensors")
    assert facts["architecture"]["num_block"] == ESRGAN.num_block
    assert facts["parameters"]["upscaler"] > 1000


def test_a_model_is_said_to_be_an_upscaler(here, capsys):
    shutil.copy("up.safetensors", "model.safetensors")
    assert draw.main(["a red apple", "-m", "model.safetensors"]) == 2
    assert "--upscale" in capsys.readouterr().err


def test_openvino_and_bfloat16(here):
    drawing(20, 20).save("photo.png")
    write_upscaler(here / "esrgan.safetensors", ESRGAN)
    for backend in upscale.PROCESSOR:
        out = f"{backend}.png"
        given = ("--upscaler", "esrgan.safetensors", "--backend", backend, "-o", out)
        assert enlarged("photo.png", *given) == 0
    found = [np.asarray(Image.open(f"{name}.png"), np.int16) for name in upscale.PROCESSOR]
    assert abs(found[0] - found[1]).max() <= 1
    assert COMPACT.scale == ESRGAN.scale


HIRES = ("--hires", "2", "--hires-strength", "0.5", "--hires-steps", "2")


def test_hires_fix_by_an_upscaler(here):
    """The pixels between the two runs are the upscaler's, and settings make them again."""
    drawn("-o", "lanczos.png", *HIRES)
    drawn("-o", "a.png", *HIRES, "--hires-upscaler", str(here / "up.safetensors"))
    assert size("a.png") == size("lanczos.png") == (64, 64)
    assert not np.array_equal(
        np.asarray(Image.open("a.png")), np.asarray(Image.open("lanczos.png"))
    )
    settings = read_settings("a.png")
    assert settings["hires"]["upscaler"] == "up.safetensors"
    assert settings["hashes"]["up.safetensors"] == fingerprint(here / "up.safetensors")
    with Image.open("a.png") as image:
        assert "Hires upscaler: up," in image.info["parameters"]
    assert draw.main(["--again", "a.png", "-o", "b.png", "--threads", "1"]) == 0
    assert np.array_equal(np.asarray(Image.open("a.png")), np.asarray(Image.open("b.png")))


def test_the_pixels_of_hires_fix_are_the_upscalers(here, monkeypatch):
    pipeline = Pipeline.load("pictogram", settings=BackendSettings(threads=1, backend="cpu"))
    hires = Hires(scale=2, strength=0.5, num_inference_steps=2, upscaler="up.safetensors")
    request = Request(prompt="a", seed=7, height=32, width=32, num_inference_steps=1, hires=hires)
    first, second = pipeline.plan(request).runs()
    state = pipeline.start(first)
    for inputs in first.steps():
        state = pipeline.step(state, inputs)
    seen, encode = [], LatentSpace._encode

    def note(space, pixels, rngs):
        seen.append(pixels)
        return encode(space, pixels, rngs)

    monkeypatch.setattr(LatentSpace, "_encode", note)
    pipeline.start(second, state.latents)
    (decoded,) = pipeline.decode(state.latents)
    expected = Upscaler.load("up.safetensors", settings=BackendSettings(threads=1))(decoded)
    assert np.array_equal(seen[0][0], np.asarray(expected))


def test_again_looks_for_hires_upscalers_by_name(here, capsys):
    drawn("-o", "a.png", *HIRES, "--hires-upscaler", "up.safetensors")
    write_upscaler(here / "up.safetensors", seed=1)
    assert draw.main(["--again", "a.png", "-o", "b.png", "--threads", "1"]) == 0
    assert "up.safetensors is another upscaler" in capsys.readouterr().err
    Path("up.safetensors").unlink()
    assert draw.main(["--again", "a.png", "-o", "b.png", "--threads", "1"]) == 0
    assert "'up.safetensors' of a.png is not here; lanczos enlarges" in capsys.readouterr().err


@pytest.fixture
def folder(here):
    place = here / "upscalers"
    (place / "deeper").mkdir(parents=True)
    write_upscaler(place / "RealESRGAN_x4plus.safetensors")
    write_upscaler(place / "deeper" / "Sharp.safetensors", ESRGAN, seed=1)
    return place


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("sharp", "deeper/Sharp"),
        ("Sharp.safetensors", "deeper/Sharp"),
        ("realesrgan_x4plus", "RealESRGAN_x4plus"),
        ("R-ESRGAN 4x+", "RealESRGAN_x4plus"),
    ],
)
def test_a_folders_upscalers_are_named(folder, name, file):
    assert find_upscaler(name, folder) == str(folder / f"{file}.safetensors")
    assert find_upscaler("up.safetensors", folder) == "up.safetensors", "a file is one itself"
    assert find_choice(f"{name}:1.5", folder) == str(folder / f"{file}.safetensors:1.5")


def test_every_command_finds_them(here, folder, capsys):
    named = ("--upscaler-dir", "upscalers")
    drawn("-o", "a.png", *HIRES, "--hires-upscaler", "sharp", "--upscale", "sharp:1.5", *named)
    file = "upscalers/deeper/Sharp.safetensors"
    drawn("-o", "b.png", *HIRES, "--hires-upscaler", file, "--upscale", f"{file}:1.5")
    assert np.array_equal(np.asarray(Image.open("a.png")), np.asarray(Image.open("b.png")))
    settings = read_settings("a.png")
    assert settings["hashes"]["Sharp.safetensors"] == fingerprint(here / file)
    shutil.move(file, "upscalers/Sharp.safetensors")
    asked = ["--again", "a.png", "-o", "c.png", "--threads", "1", *named]
    assert draw.main(asked) == 0
    assert Path("c.png").read_bytes() == Path("a.png").read_bytes()
    assert enlarged("a.png", "--upscaler", "sharp", "-o", "d.png", *named) == 0
    assert read_settings("d.png")["left_out"]["upscale"] == "Sharp.safetensors"
    twice = {"scale": 2, "upscaler": "sharp", "num_inference_steps": 2}
    lines = [{"prompt": "a", "hires": twice}, {"prompt": "b"}]
    lines.append({"prompt": "c", "hires": {"scale": 2, "upscaler": "none such"}})
    Path("lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    small = ("--height", "32", "--width", "32", "--steps", "1", "--threads", "1")
    assert main(["batch", "lines.jsonl", "--out", "drawn", *small, *named]) == 1
    assert sorted(size(path) for path in Path("drawn").glob("*.png")) == [(32, 32), (64, 64)]
    assert "line 3 is passed over: there is no upscaler 'none such' in" in capsys.readouterr().err
    sheet = ["grid", "a", *small, *HIRES, *named, "--x", "hires-upscaler=sharp,lanczos"]
    assert main([*sheet, "-o", "sheet.png"]) == 0
    assert read_settings("sheet.png")["x"] == "hires-upscaler=sharp,lanczos"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--upscale", "shrap"), "no upscaler 'shrap' in upscalers; did you mean 'Sharp'?"),
        ((*HIRES, "--hires-upscaler", "x\0y"), "there is no upscaler 'x\\x00y' in upscalers"),
        (("--upscale", "sharp", "--upscaler-dir", "gone"), "--upscaler-dir gone is no folder"),
    ],
)
def test_what_a_folder_has_not_is_one_sentence(folder, arguments, said, capsys):
    assert draw.main(["a", *SMALL, "--upscaler-dir", "upscalers", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_again_finds_automatic1111s_upscaler(here, capsys):
    text = (
        "a castle\nSteps: 1, Sampler: Euler a, CFG scale: 7, Seed: 3, Size: 32x32, "
        "Denoising strength: 0.5, Hires upscale: 2, Hires steps: 2, Hires upscaler: {}"
    )
    for label, file in (("4x-UltraSharp", "4x-UltraSharp.pth"), ("R-ESRGAN 4x+", None)):
        chunk = PngInfo()
        chunk.add_text("parameters", text.format(label))
        Image.new("RGB", (8, 8)).save("theirs.png", pnginfo=chunk)
        write_upscaler(here / (file or "RealESRGAN_x4plus.pth"))
        assert draw.main(["--again", "theirs.png", "-o", "b.png", "--threads", "1"]) == 0
        assert "is not here; lanczos" not in capsys.readouterr().err
        assert read_settings("b.png")["hires"]["upscaler"].startswith(label[:2].replace("R-", "Re"))


@pytest.mark.parametrize("name", ["esrgan", "", "a\0b", "x" * 5000, "."])
def test_what_hires_cannot_enlarge_by(name):
    with pytest.raises(RequestError, match=r"choose one of lanczos, .* or give the path"):
        Hires(upscaler=name)


def test_a_server_follows_no_path(here):
    fields = {"prompt": "a", "hires": {"upscaler": "up.safetensors"}}
    with pytest.raises(RequestError, match="choose one of lanczos"):
        PictureRequest(fields=fields, model="pictogram").checked(Limits())


def test_a_damaged_upscaler_of_hires_is_found_before_a_step(here, capsys, monkeypatch):
    monkeypatch.setattr(draw.Pipeline, "denoise", lambda *_: pytest.fail("it drew"))
    Path("bad.pth").write_bytes(b"x" * 100)
    asked = ("a", *SMALL, *HIRES, "--hires-upscaler")
    assert draw.main([*asked, "bad.pth"]) == 2
    assert "bad.pth is no checkpoint" in capsys.readouterr().err


def test_a_picture_of_a_sampler_that_is_not_here_is_enlarged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chunk = PngInfo()
    chunk.add_text("parameters", "a\nSteps: 2, Sampler: Restart, Seed: 1, Size: 8x8, Version: v1.9")
    drawing(64, 64).save("theirs.png", pnginfo=chunk)
    write_upscaler(tmp_path / "up.safetensors")
    given = ["theirs.png", "--upscaler", "up.safetensors", "--threads", "1", "-o", "a.png"]
    assert upscale.main(given) == 0
    assert read_settings("a.png")["sampler"] == "Restart"
