import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import runtime.__main__ as command
from engine.backends import BackendSettings
from engine.models import find_model
from runtime import Pipeline
from runtime.images import read_settings
from tests.pictures import drawing

ROOT = Path(__file__).parents[2]
QUICK = ("--steps", "1", "--threads", "1", "--seed", "7")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def copied(here):
    """Copy the model that ships; its weights are links."""
    source = find_model("pictogram")
    shutil.copytree(source, here / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    for path in source.rglob("*.safetensors"):
        (here / "model" / path.relative_to(source)).symlink_to(path)
    return here / "model"


def start(*arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "runtime", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=environment,
    )


def refuse(capsys, *arguments):
    """Run what must fail; return the one sentence that it says."""
    assert command.main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert "Traceback" not in said.err
    return said.err


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_picture_and_nothing_but_its_path(here, capsys):
    assert command.main(["a red apple", *QUICK, "--out", "apple.png"]) == 0
    assert capsys.readouterr() == ("apple.png\n", "")
    assert files(here) == ["apple.png"]


def test_the_picture_is_the_pipelines(here):
    arguments = ("--negative-prompt", "blue", "--guidance-scale", "2", "--sampler", "euler_a")
    assert command.main(["apple", *QUICK, *arguments, "--height", "64", "--out", "a.png"]) == 0
    settings = read_settings(here / "a.png")
    assert settings.pop("precision") == "float32"
    made_of = {name: settings.pop(name) for name in ("vae", "loras", "embeddings")}
    assert made_of == {"vae": None, "loras": [], "embeddings": []}
    assert settings.pop("prediction_type") is None
    assert settings.pop("latentrt")
    prompt = settings.pop("prompt")
    assert prompt == "apple"
    one = BackendSettings(threads=1)  # more would sum in another order
    image = Pipeline.load(settings.pop("model"), settings=one)(prompt, **settings).images[0]
    with Image.open(here / "a.png") as file:
        assert file.size == (128, 64)
        np.testing.assert_array_equal(file, image)


def test_several_pictures_are_numbered(here, capsys):
    assert command.main(["a", *QUICK, "--num-images", "3", "--out", "a.png"]) == 0
    names = ["a-1.png", "a-2.png", "a-3.png"]
    assert capsys.readouterr().out.splitlines() == names
    assert files(here) == names
    assert [read_settings(here / name)["seed"] for name in names] == [7, 8, 9]


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A Red  Apple, please!", "a-red-apple-please-7.png"),
        ("../../etc/passwd", "etc-passwd-7.png"),
        ("🍎", "picture-7.png"),
        ("", "picture-7.png"),
        ("x" * 500, "x" * 60 + "-7.png"),
        ("苹" * 300, "苹" * 20 + "-7.png"),
    ],
)
def test_default_names(here, capsys, prompt, name):
    assert command.main([prompt, *QUICK]) == 0
    assert capsys.readouterr().out == name + "\n"
    assert files(here) == [name]


def test_from_an_image(here, capsys):
    drawing(64, 96).save("start.jpg")
    wishes = ("--image", "start.jpg", "--strength", "0.5", "--steps", "2", "--out", "b.png")
    assert command.main(["a", *QUICK, *wishes]) == 0
    settings = read_settings(here / "b.png")
    assert (settings["image"], settings["strength"]) == ("start.jpg", 0.5)
    assert (settings["height"], settings["width"]) == (64, 96)


@pytest.mark.parametrize("name", ["a.jpg", "a.webp"])
def test_other_formats(here, name):
    assert command.main(["a", *QUICK, "--out", name]) == 0
    assert files(here) == [name]


def test_a_long_prompt_needs_no_warning(capsys):
    assert command.main(["1 " * 200, *QUICK, "--out", "a.png"]) == 0
    said = capsys.readouterr()
    assert said.out == "a.png\n"
    assert "warning" not in said.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "missing"), "neither a folder or file nor one that ships"),
        (("--model", "pictogran"), "did you mean 'pictogram'"),
        (("--model", "x" * 5000), "neither a folder or file"),
        (("--model", "."), "model_index.json does not exist"),
        (("--sampler", "eular"), "did you mean 'euler'"),
        (("--sampler", ""), "choose one of ddpm, ddim"),
        (("--height", "100"), "height is 100; it must be a multiple of 8, such as 96"),
        (("--width", "0"), "width is 0"),
        (("--height", "9000"), "height is 9000"),
        (("--steps", "0"), "num_inference_steps is 0; this model allows whole numbers from 1"),
        (("--steps", "1001"), "from 1 to 1000"),
        (("--guidance-scale", "nan"), "guidance_scale is nan"),
        (("--guidance-scale", "-1"), "guidance_scale is -1"),
        (("--seed", "-1"), "seed is -1"),
        (("--num-images", "0"), "num_images_per_prompt is 0"),
        (("--threads", "0"), "threads is 0"),
        (("--strength", "0.5"), "--strength came without --image"),
        (("--image", "missing.png"), "missing.png cannot be read (No such file"),
        (("--image", "."), "cannot be read (Is a directory)"),
        (("--out", "missing/a.png"), "the folder missing does not exist"),
        (("--out", "a.gif"), "ends in '.gif'; give a name in .png"),
        (("--out", "folder.png"), "is a folder"),
        (("--out", "x" * 300 + ".png"), "File name too long"),
        (("--graphs", "missing"), "python -m export"),
        (("--precision", "float16"), "--precision float16`"),
    ],
)
def test_a_users_mistake_is_one_sentence(here, capsys, arguments, said):
    (here / "folder.png").mkdir()
    before = files(here)
    assert said in refuse(capsys, "a", *QUICK, *arguments)
    assert files(here) == before


def test_a_prompt_that_is_no_text(capsys):
    assert "surrogate" in refuse(capsys, "\udcff", *QUICK)


def test_strength_that_runs_no_step(here, capsys):
    drawing(64, 64).save("start.png")
    for strength, said in (
        ("0", "strength is 0.0"),
        ("0.001", "runs no step"),
        ("2", "strength is 2"),
    ):
        message = refuse(capsys, "a", *QUICK, "--image", "start.png", "--strength", strength)
        assert said in message


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_damaged_weights(copied, capsys, part):
    (path,) = (copied / part).glob("*.safetensors")
    whole = path.read_bytes()
    path.unlink()
    assert "holds no weights" in refuse(capsys, "a", *QUICK, "--model", copied)
    for length in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert path.name in refuse(capsys, "a", *QUICK, "--model", copied)
    assert not [path for path in copied.parent.iterdir() if path.suffix == ".png"]


def test_an_unknown_block(copied, capsys):
    path = copied / "unet" / "config.json"
    config = json.loads(path.read_text()) | {"down_block_types": ["AttnDownBlock2D"] * 3}
    path.write_text(json.dumps(config))
    assert "AttnDownBlock2D" in refuse(capsys, "a", *QUICK, "--model", copied)


def test_weights_of_another_model(copied, capsys):
    (path,) = (copied / "unet").glob("*.safetensors")
    path.unlink()
    shutil.copy(next((copied / "vae").glob("*.safetensors")), path)
    assert "lacks conv_in.weight" in refuse(capsys, "a", *QUICK, "--model", copied)


def test_an_architecture_without_a_graph(copied, capsys):
    path = copied / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"norm_eps": 0.001}))
    said = refuse(capsys, "a", *QUICK, "--model", copied)
    assert f"python -m export {copied}" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "PROMPT"),
        (("a", "--steps", "x"), "--steps: invalid int value"),
        (("a", "--stepz", "1"), "unrecognized arguments"),
        (("a", "--precision", "int4"), "invalid choice"),
    ],
)
def test_what_the_parser_refuses(capsys, arguments, said):
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(["--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    for action in command._parser()._actions:
        assert action.help, "every option is explained"
        assert all(name in said for name in action.option_strings)
    assert "pictogram" in said


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert command.main(["a", *QUICK, "--steps", "2", "--out", "a.png"]) == 0
    bar = capsys.readouterr().err
    assert bar.count("\r") == 2
    assert bar.endswith("█ step 2/2\n")


def test_interrupted(here, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "denoise", interrupt)
    assert command.main(["a", *QUICK, "--out", "a.png"]) == 130
    assert capsys.readouterr() == (
        "",
        "\ncancelled; only the pictures named above were written\n",
    )
    assert files(here) == []


def test_a_process(here):
    process = start("a red apple", *QUICK, "--out", "apple.png")
    assert process.communicate(timeout=60) == ("apple.png\n", "")
    assert process.returncode == 0
    failed = start("a", "--width", "100")
    out, err = failed.communicate(timeout=60)
    assert (failed.returncode, out) == (2, "")
    assert err.startswith("error: width is 100")
    assert err.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="there are no signals to send")
def test_a_process_that_is_interrupted(here):
    process = start("a", "--steps", "500", "--threads", "1", "--num-images", "8", "--out", "a.png")
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "diffusion_pytorch_model" not in maps.read_text():
        time.sleep(0.01)  # it draws once its weights are mapped
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "cancelled" in err
    assert "Traceback" not in err
    assert files(here) == []
