import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import runtime.__main__ as command
import runtime.terminal as signs
from engine.backends.settings import BackendSettings
from engine.model import find_model
from runtime import Pipeline, options
from runtime.images.files import read_settings
from tests.support.named_requests import write_lora
from tests.support.pictures import drawing

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
        preexec_fn=_heeding_interrupts if os.name == "posix" else None,
    )


def _heeding_interrupts():
    # A shell starts what runs in its background deaf to them, and tests may run there.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def refuse(capsys, *arguments):
    """Run what must fail; return the one sentence that it says."""
    assert command.main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert "Traceback" not in said.err
    return said.err


def pixels(path):
    with Image.open(path) as file:
        return file.tobytes()


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
    assert (settings.pop("backend"), settings.pop("precision")) == ("cpu", "float32")
    assert settings.pop("device") is None
    assert list(settings.pop("hashes")) == ["pictogram"]
    made_of = {name: settings.pop(name) for name in ("vae", "loras", "lora_dir", "embeddings")}
    assert made_of == {"vae": None, "loras": [], "lora_dir": None, "embeddings": []}
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


def test_seeds_draw_as_many_pictures_and_any(here):
    assert command.main(["a", *QUICK, "--seed", "9,7", "--out", "a.png"]) == 0
    assert [read_settings(here / f"a-{i}.png")["seed"] for i in (1, 2)] == [9, 7]
    for name in ("b.png", "c.png"):
        assert command.main(["a", *QUICK, "--seed", "-1", "--out", name]) == 0
    assert command.main(["a", *QUICK, "--seed=-1,7", "--out", "d.png"]) == 0
    drawn = [read_settings(here / name)["seed"] for name in ("b.png", "c.png", "d-1.png")]
    assert len(set(drawn)) == 3
    assert all(0 <= seed < 2**32 for seed in drawn)
    assert read_settings(here / "d-2.png")["seed"] == 7


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
    flags = (
        "--image",
        "start.jpg",
        "--strength",
        "0.5",
        "--steps",
        "2",
        "--out",
        "b.png",
    )
    assert command.main(["a", *QUICK, *flags]) == 0
    settings = read_settings(here / "b.png")
    assert (settings["image"], settings["strength"]) == ("start.jpg", 0.5)
    assert (settings["height"], settings["width"]) == (None, None), "the image's own"
    with Image.open("b.png") as file:
        assert file.size == (96, 64)
        assert "Size: 96x64" in file.text["parameters"]


def test_a_mask_and_a_larger_canvas(here):
    drawing(64, 96).save("start.png")
    mask = Image.new("L", (96, 64))
    mask.paste(255, (48, 0, 96, 64))
    mask.save("mask.png")
    flags = ("--image", "start.png", "--mask", "mask.png", "--extend", "0,16,0,0")
    assert command.main(["a", *QUICK, *flags, "--out", "b.png"]) == 0
    with Image.open("b.png") as file:
        assert file.size == (96, 80)
        kept = np.asarray(file)[48:, :16]
    np.testing.assert_array_equal(kept, np.asarray(drawing(64, 96))[32:, :16])
    settings = read_settings(here / "b.png")
    assert (settings["strength"], settings["extend"]) == (1.0, [0, 16, 0, 0])
    assert command.main(["--again", "b.png", "--threads", "1", "--out", "c.png"]) == 0
    with Image.open("b.png") as first, Image.open("c.png") as again:
        np.testing.assert_array_equal(first, again)


def test_the_same_picture_again(here, capsys):
    flags = (
        "--guidance-scale",
        "4:2",
        "--guidance-interval",
        "0:0.9",
        "--sampler",
        "euler a",
    )
    flags += ("--hires", "1.5", "--hires-upscaler", "bilinear", "--noise", "cuda")
    flags += ("--plain-prompt", "--negative-prompt", "blue", "--clip-skip", "2")
    flags += ("--cache-interval", "2")
    threads = ("--threads", "1")
    drawn = ("a (red) apple", *flags, "--steps", "3", *threads, "--num-images", "2")
    assert command.main([*drawn, "--out", "a.png"]) == 0
    assert command.main(["--again", "a-2.png", *threads, "--out", "b.png"]) == 0
    with Image.open("a-2.png") as first, Image.open("b.png") as again:
        assert first.size == again.size == (192, 192)
        np.testing.assert_array_equal(first, again)
        assert "Sampler: Euler a" in first.text["parameters"]
    assert command.main(["--again", "b.png", *threads, "--out", "c.png"]) == 0
    assert command.main(["--again", "b.png", *threads, "--seed", "5", "--out", "d.png"]) == 0
    pictures = [np.asarray(Image.open(name)) for name in ("b.png", "c.png", "d.png")]
    np.testing.assert_array_equal(*pictures[:2])
    assert not np.array_equal(*pictures[1:])
    before, after = (read_settings(here / name) for name in ("b.png", "d.png"))
    assert (after["seed"], after["cache_interval"]) == (5, 2)
    assert before | {"seed": 5} == after


def test_again_from_parameters_of_automatic1111(here):
    text = "a house\nNegative prompt: red\nSteps: 2, Sampler: Euler, Seed: 3, Size: 64x96, RNG: GPU"
    chunk = PngInfo()
    chunk.add_text("parameters", text)
    Image.new("RGB", (8, 8)).save("theirs.png", pnginfo=chunk)
    assert command.main(["--again", "theirs.png", "--threads", "1", "--out", "a.png"]) == 0
    settings = read_settings(here / "a.png")
    assert settings["prompt"] == "a house"
    assert [settings[k] for k in ("sampler", "schedule", "noise")] == ["euler", "normal", "cuda"]
    with Image.open("a.png") as file:
        assert file.size == (64, 96)


def test_again_from_a_picture_that_does_not_say(here, capsys):
    Image.new("RGB", (8, 8)).save("plain.png")
    assert "does not say what it was made with" in refuse(capsys, "--again", "plain.png")
    assert "cannot be read" in refuse(capsys, "--again", "missing.png")
    chunk = PngInfo()
    chunk.add_text("latentrt", json.dumps({"prompt": 3, "hires": {"scale": "x"}, "seed": {}}))
    Image.new("RGB", (8, 8)).save("odd.png", pnginfo=chunk)
    assert "prompt is 3, which it cannot be" in refuse(capsys, "--again", "odd.png")
    assert files(here) == ["odd.png", "plain.png"]


@pytest.mark.parametrize(
    "odd",
    [
        {"model": 7},
        {"model": ["a"]},
        {"loras": "a"},
        {"loras": [3]},
        {"vae": 3},
        {"precision": []},
        {"embeddings": [{}]},
        {"threads": "x"},
        {"height": [8]},
        {"image": 5},
        {"image": "missing.png"},
        {"guidance_interval": {}},
        {"sampler": {}},
        {"extend": ["a", 0, 0, 0]},
        {"prompt": {}},
        {"hires": {"scale": "x"}},
        {"hires": 3},
        {"noise": "x"},
        {"preview_steps": "1", "animation": "x.webp", "again": "odd.png", "out": "y.png"},
    ],
    ids=str,
)
def test_settings_of_a_stranger_are_not_trusted(here, capsys, odd):
    chunk = PngInfo()
    chunk.add_text("latentrt", json.dumps({"prompt": "a", "num_inference_steps": 1} | odd))
    Image.new("RGB", (8, 8)).save("odd.png", pnginfo=chunk)
    status = command.main(["--again", "odd.png", "--out", "a.png"])
    said = capsys.readouterr().err
    assert status == 0 or (status == 2 and said.startswith("error: ") and said.count("\n") == 1)
    assert status == 2 or odd.keys() & {"threads", "preview_steps", "hires"}, "no settings"
    assert set(files(here)) <= {"a.png", "odd.png"}


def test_steps_beside_each_other_and_an_animation(here, capsys):
    flags = ("--steps", "3", "--preview-steps", "1,3", "--animation", "a.webp")
    assert command.main(["house", *QUICK, *flags, "--num-images", "2", "--out", "a.png"]) == 0
    names = ["a-1.png", "a-2.png", "a-1.webp", "a-2.webp", "a-1-steps.png"]
    assert capsys.readouterr().out.split() == names
    assert files(here) == sorted(names)
    with Image.open("a-1-steps.png") as strip, Image.open("a-2.png") as second:
        assert strip.width == 2 * 128 + 4
        last = strip.crop((132, strip.height - 128, 260, strip.height))
        np.testing.assert_array_equal(last, second)
    with Image.open("a-2.webp") as animation:
        assert animation.n_frames == 3
        assert animation.size == (128, 128)


def test_a_preset(here):
    assert command.main(["a", "--preset", "fast", "--threads", "1", "--out", "a.png"]) == 0
    settings = read_settings(here / "a.png")
    assert (settings["sampler"], settings["num_inference_steps"]) == ("dpmpp_2m", 10)


def test_a_longer_prompt(here, capsys, monkeypatch):
    class Expander:
        def __call__(self, prompt, **flags):
            return f"{prompt}, glowing {flags['seed']}"

    def load(folder, **_):
        assert folder == Path("gpt2")
        return Expander()

    monkeypatch.setattr("runtime.expansion.PromptExpander.load", load)
    assert command.main(["a", *QUICK, "--expand", "gpt2", "--out", "a.png"]) == 0
    assert read_settings(here / "a.png")["prompt"] == "a, glowing 7"
    assert "note: the prompt is 'a, glowing 7'" in capsys.readouterr().err


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
        (("--steps", "0"), "--steps is 0; give a whole number from 1"),
        (("--steps", "1001"), "from 1 to 1000"),
        (("--guidance-scale", "nan"), "--guidance-scale is nan"),
        (("--guidance-scale", "-1"), "--guidance-scale is -1"),
        (("--seed", "-2"), "--seed is -2"),
        (("--num-images", "0"), "--num-images is 0"),
        (("--threads", "0"), "--threads is 0"),
        (("--strength", "0.5"), "--strength came without --image"),
        (("--image", "missing.png"), "missing.png cannot be read (No such file"),
        (("--image", "."), "cannot be read (Is a directory)"),
        (("--mask", "missing.png"), "--mask came without --image"),
        (("--extend", "8,0,0,0"), "--extend came without --image"),
        (("--preset", "best"), "preset is 'best'; choose one of fast"),
        (("--hires", "20"), "--hires is 20.0"),
        (("--cache-interval", "0"), "--cache-interval is 0; give a whole number from 1"),
        (("--cache-interval", "99"), "--cache-interval is 99; give a whole number from 1 to"),
        (("--guidance-interval", "0.9:0.1"), "must not end before it begins"),
        (("--seed", "1,2", "--num-images", "3"), "seed has 2 numbers for 3 pictures"),
        (("--preview-steps", "0,1"), "'0,1' hold '0'"),
        (("--preview-steps", "2"), "--preview-steps '2' hold '2'"),
        (("--animation", "a.gif"), "ends in '.gif'; give a name in .webp"),
        (("--animation", "a.png"), "give a name in .webp"),
        (("--expand", "missing"), "missing"),
        (("--out", "missing/a.png"), "the folder missing does not exist"),
        (("--out", "a.gif"), "ends in '.gif'; give a name in .png"),
        (("--out", ""), "the file to write has no name; give one in .png"),
        (("--threads", "100000"), "give a whole number from 1 to 1024, or leave it out"),
        (("--out", "folder.png"), "is a folder"),
        (("--out", "x" * 300 + ".png"), "File name too long"),
        (("--graphs", "missing"), "python -m export"),
        (("--graphs", "missing", "--precision", "float16"), "--precision float16`"),
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
        (("a", "--seed", "one"), "'one' is not a whole number, or several with ',' between"),
        (("a", "--extend", "1,2"), "'1,2' is not 4 whole numbers with ',' between"),
        (("a", "--noise", "mps"), "invalid choice"),
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
    for action in options.make_parser("latentrt")._actions:
        assert action.help, "every option is explained"
        assert all(name in said for name in action.option_strings)
    assert "pictogram" in said


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert command.main(["a", *QUICK, "--steps", "2", "--out", "a.png"]) == 0
    bar = capsys.readouterr().err.rpartition("\x1b[2K")[2]  # behind the line of the loading
    assert bar.count("\r") == 2
    assert bar.endswith("█ step 2/2\n")


@pytest.mark.parametrize(
    ("terminal", "said"),
    [(True, "\rloading pictogram: "), (False, "note: loading pictogram\n")],
)
def test_a_sign_of_life_while_a_model_loads(here, capsys, monkeypatch, terminal, said):
    shown, load = Event(), Pipeline.load

    def say(*arguments, **options):
        print(*arguments, **options)
        shown.set()

    def load_slowly(*arguments, **options):
        assert shown.wait(60)
        return load(*arguments, **options)

    monkeypatch.setattr(signs, "SIGNS", (0.0, 0.0))
    monkeypatch.setattr(signs, "print", say, raising=False)
    monkeypatch.setattr(Pipeline, "load", load_slowly)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert command.main(["a", *QUICK, "--out", "a.png"]) == 0
    assert capsys.readouterr().err.startswith(said)


def test_names_in_a_prompt(here, capsys):
    (here / "loras").mkdir()
    write_lora(here / "loras")
    prompt = "a cat <lora:lora:0.8> <lora:gone> embedding:bad"
    assert command.main([prompt, *QUICK, "--lora-dir", "loras", "-o", "a.png"]) == 0
    said = capsys.readouterr().err.splitlines()
    named = [["note:", "embedding:bad"], ["note:", "<lora:gone>"]]
    assert [line.split()[:2] for line in said] == named
    given = ("--lora", "loras/lora.safetensors:0.8")
    assert command.main(["a cat   ", *QUICK, *given, "-o", "given.png"]) == 0
    assert command.main(["a cat   ", *QUICK, "-o", "plain.png"]) == 0
    assert pixels("a.png") == pixels("given.png") != pixels("plain.png")
    assert command.main(["--again", "a.png", "-o", "again.png"]) == 0
    assert pixels("again.png") == pixels("a.png")


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
    assert err.startswith("error: --width is 100")
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
