"""`--again`: what is found is drawn, what is given wins, and what cannot be is said."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import runtime.__main__ as command
from engine.model import find_model
from engine.store.cache import fingerprint
from runtime import found_settings, options
from runtime.images.files import read_settings
from tests.support.named_requests import write_lora
from tests.support.pictures import drawing

SMALL = ("--height", "32", "--width", "32", "--steps", "1", "--threads", "1", "--backend", "cpu")
ONE = ("--threads", "1")
A1111 = "a castle{}\nSteps: 1, Sampler: Euler a, CFG scale: 7, Seed: 3, Size: 32x32, "


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def theirs(text, name="theirs.png"):
    chunk = PngInfo()
    chunk.add_text("parameters", text)
    Image.new("RGB", (8, 8)).save(name, pnginfo=chunk)
    return name


def notes(capsys, *arguments):
    """Draw; return the notes."""
    assert command.main([*arguments, *ONE]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("note: ") for line in lines)
    return "\n".join(lines)


def refused(capsys, *arguments):
    assert command.main([*arguments, *ONE]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_marked_file_of_every_format_is_the_same_file_again(here, suffix):
    asked = ("a (red:1.2) apple", *SMALL, "--seed", "9", "--negative-prompt", "née")
    assert command.main([*asked, "--out", f"a{suffix}"]) == 0
    assert command.main(["--again", f"a{suffix}", *ONE, "--out", f"b{suffix}"]) == 0
    assert (here / f"a{suffix}").read_bytes() == (here / f"b{suffix}").read_bytes()


@pytest.mark.parametrize(
    ("field", "left_out"),
    [
        ("ENSD: 31337", "ENSD (31337)"),
        ("Face restoration: CodeFormer", "Face restoration (CodeFormer)"),
        ("ADetailer model: face_yolov8n.pt", "ADetailer model (face_yolov8n.pt)"),
        ('ControlNet 0: "Module: canny, Weight: 1"', "ControlNet 0 (Module: canny, Weight: 1)"),
        ('Lora hashes: "ink: 7c6b"', "LoRA (ink: 7c6b)"),
        ("Eta: 0.5", "Eta (0.5)"),
        ("Tiling: True", "Tiling (True)"),
    ],
)
def test_what_is_not_carried_out_is_named(capsys, field, left_out):
    said = notes(capsys, "--again", theirs(A1111.format("") + f"{field}, Version: v1.10"))
    assert said == f"note: left out of what theirs.png was made with: {left_out}"


def test_nothing_is_named_where_all_is_carried_out(capsys):
    text = A1111.format("") + "Model hash: 6ce0161689, Eta: 0, Version: v1.10"
    assert notes(capsys, "--again", theirs(text)) == ""


def test_a_model_that_is_not_here_is_named(here, capsys):
    text = A1111.format(" <lora:ink:0.8>") + "Model: v1-5, VAE: fine.pt"
    said = notes(capsys, "--again", theirs(text))
    assert "with the model 'v1-5', which is not here; pictogram draws" in said
    assert "with the autoencoder 'fine.pt', which is not here; the model's own" in said
    assert "LoRA (ink)" in said
    assert "'v1-5'" not in notes(capsys, "--again", "theirs.png", "--model", "pictogram")


@pytest.mark.parametrize("place", [".", "pictures"])
def test_a_model_is_found_by_its_name(here, capsys, place):
    """In the working folder, or beside the picture."""
    (here / "pictures").mkdir()
    shutil.copytree(find_model("pictogram"), here / place / "v1-5")
    picture = theirs(A1111.format("") + "Model: v1-5", "pictures/theirs.png")
    assert notes(capsys, "--again", picture, "--out", "a.png") == ""
    assert read_settings("a.png")["model"] == "v1-5"


def test_an_upscaler_that_is_not_here_is_named(capsys):
    hires = "Denoising strength: 0.9, Hires upscale: 1.5, Hires steps: 2, Hires upscaler: 4x-Ultra"
    said = notes(capsys, "--again", theirs(A1111.format("") + hires), "--out", "a.png")
    assert said == "note: the upscaler '4x-Ultra' of theirs.png is not here; lanczos enlarges"
    assert read_settings("a.png")["hires"]["upscaler"] == "lanczos"


def test_files_are_kept_as_names_and_hashes_and_found_beside_the_picture(here, capsys):
    (here / "work").mkdir()
    drawing(40, 32).save("work/start.png")
    lora = write_lora(here / "work")
    flags = ("--image", str(here / "work" / "start.png"), "--lora", f"{lora}:0.5")
    asked = ("a", *SMALL[4:], "--strength", "1", "--seed", "1", *flags)
    assert command.main([*asked, "--out", "work/a.png"]) == 0
    settings = read_settings("work/a.png")
    assert (settings["image"], settings["loras"]) == ("start.png", ["lora.safetensors:0.5"])
    assert settings["hashes"] == {
        "pictogram": fingerprint(find_model("pictogram")),
        "start.png": fingerprint(here / "work" / "start.png"),
        "lora.safetensors": fingerprint(lora),
    }
    assert str(here) not in json.dumps(settings), "no path of this machine"
    capsys.readouterr()
    assert notes(capsys, "--again", "work/a.png", "--out", "work/b.png") == ""
    np.testing.assert_array_equal(Image.open("work/a.png"), Image.open("work/b.png"))
    drawing(40, 32).rotate(180).save("work/start.png")
    said = notes(capsys, "--again", "work/a.png", "--out", "work/b.png")
    assert "start.png is another picture than" in said
    Path("work/start.png").rename("other.png")
    said = refused(capsys, "--again", "work/a.png")
    assert "drawn with the picture start.png, which is neither" in said
    assert said.endswith("give it with --image\n")
    (here / "lora.safetensors").write_bytes(lora.read_bytes())
    lora.unlink()
    again = ("--again", "work/a.png", "--image", "other.png", "--out", "c.png")
    assert notes(capsys, *again) == "", "an option wins over what was found"
    assert read_settings("c.png")["image"] == "other.png"
    (here / "lora.safetensors").unlink()
    assert "give it with --lora" in refused(capsys, *again)


def test_regions_are_kept_with_the_names_of_their_masks(here, capsys):
    (here / "work").mkdir()
    for name, box in (("left", (0, 0, 16, 32)), ("right", (16, 0, 32, 32))):
        mask = Image.new("L", (32, 32))
        mask.paste(255, box)
        mask.save(f"work/{name}.png")
    regions = ("--region", "work/left.png", "a red car", "--region", "work/right.png:0.5", "a: b")
    asked = ("a house", *SMALL, "--seed", "1")
    assert command.main([*asked, *regions, "--out", "work/a.png"]) == 0
    assert command.main([*asked, "--out", "work/plain.png"]) == 0
    settings = read_settings("work/a.png")
    assert settings["regions"] == [["left.png", "a red car"], ["right.png:0.5", "a: b"]]
    assert {"left.png", "right.png"} < set(settings["hashes"])
    assert "regions" not in read_settings("work/plain.png")
    capsys.readouterr()
    assert notes(capsys, "--again", "work/a.png", "--out", "work/b.png") == ""
    drawn, again, plain = (np.asarray(Image.open(f"work/{n}.png")) for n in ("a", "b", "plain"))
    np.testing.assert_array_equal(drawn, again)
    assert (drawn != plain).any()
    Image.new("L", (32, 32), 255).save("work/left.png")
    said = notes(capsys, "--again", "work/a.png", "--out", "work/b.png")
    assert "left.png is another mask of a region than" in said
    Path("work/right.png").unlink()
    said = refused(capsys, "--again", "work/a.png")
    assert "drawn with the mask of a region right.png, which is neither" in said
    assert said.endswith("give it with --region\n")


@pytest.mark.parametrize(
    "regions", [{}, "left.png", [["left.png"]], [["a", "b", "c"]], [["a", 3]], ["ab"], [[[], []]]]
)
def test_regions_that_cannot_be_are_refused(here, capsys, regions):
    chunk = PngInfo()
    settings = {"prompt": "a", "num_inference_steps": 1, "regions": regions}
    chunk.add_itxt("latentrt", json.dumps(settings))
    Image.new("RGB", (8, 8)).save("odd.png", pnginfo=chunk)
    assert "says that regions is" in refused(capsys, "--again", "odd.png")


def test_what_is_given_wins_over_what_is_found(here, capsys):
    asked = ("a", *SMALL, "--seed", "1", "--hires", "1.25", "--guidance-scale", "3:2")
    asked += ("--steps", "2")
    assert command.main([*asked, "--out", "a.png"]) == 0
    changes = ("--guidance-scale", "5", "--seed", "2", "--hires-strength", "1")
    assert command.main(["--again", "a.png", "a hat", *ONE, *changes, "--out", "b.png"]) == 0
    before, after = (read_settings(name) for name in ("a.png", "b.png"))
    hires = {**before["hires"], "strength": 1.0}
    expected = {"prompt": "a hat", "seed": 2, "guidance_scale": 5.0, "hires": hires}
    assert after == {**before, **expected}


@pytest.mark.parametrize("path", ["/etc/passwd", "..", "../../x.png", "C:\\x\\photo.png", "\0", ""])
def test_a_strangers_path_leads_nowhere(here, capsys, path):
    (here / "sub").mkdir()
    settings = {"prompt": "a", "num_inference_steps": 1, "image": path, "mask": path}
    chunk = PngInfo()
    chunk.add_itxt("latentrt", json.dumps(settings))
    Image.new("RGB", (8, 8)).save("sub/odd.png", pnginfo=chunk)
    said = refused(capsys, "--again", "sub/odd.png")
    assert "which is neither in the working folder nor beside the picture" in said
    assert said.count("\n") == 1
    drawing(32, 32).save("photo.png")
    if "photo" in path:
        assert "give it with --image" not in refused(
            capsys, "--again", "sub/odd.png", "--mask", "x"
        )


def test_a_fingerprint_tells_files_and_folders_apart(here):
    def written(size, at, name="a.safetensors"):
        data = bytearray(size)
        data[at] = 1
        (here / name).write_bytes(data)
        return fingerprint(here / name)

    marks = {written(2**18, at) for at in (0, 2**17, 2**18 - 1)} | {written(3, 0), written(4, 0)}
    assert len(marks) == 5
    folder = here / "model"
    folder.mkdir()
    written(9, 1, "model/a.safetensors")
    before = fingerprint(folder)
    (folder / "notes.txt").write_text("x")
    assert fingerprint(folder) == before
    written(9, 2, "model/a.safetensors")
    assert fingerprint(folder) != before


def test_every_option_that_names_a_file_is_kept_by_its_name():
    parser = options.make_parser("x")
    named = {a.dest for a in parser._actions if a.type is Path and a.dest in options.AGAIN}
    assert named <= set(found_settings.FILES)


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("loras", "a.safetensors:0.5", ("a.safetensors", ":0.5")),
        ("embeddings", "a.pt=word", ("a.pt", "=word")),
        ("embeddings", "a.pt", ("a.pt", "")),
        ("vae", "a=b:1", ("a=b:1", "")),
        ("regions", ["left.png:0.5", "a: b"], ("left.png", ":0.5")),
        ("regions", ["left:right.png", "a"], ("left:right.png", "")),
    ],
)
def test_what_stands_behind_a_file_is_parted_from_it(name, text, parts):
    assert found_settings.parted(name, text) == parts


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--sampler", "euler"], {"sampler": "euler", "schedule": "karras"}),
        (["--sampler", "ddim"], {"sampler": "ddim", "schedule": None}),
        (["--sampler", "lcm"], {"sampler": "lcm", "schedule": None}),
        (["--sampler", "Euler Exponential"], {"sampler": "Euler Exponential", "schedule": None}),
        (["--sampler", "DPM++ 2M Karras"], {"schedule": "karras"}),
        (["--sampler", "ddim", "--schedule", "trailing"], {"schedule": "trailing"}),
        (["--preset", "fast"], {"sampler": "dpmpp_2m", "num_inference_steps": 10}),
        (["--preset", "fast", "--steps", "2"], {"num_inference_steps": 2}),
        (["--variation-strength", "0"], {"variation_seed": None}),
    ],
)
def test_what_is_given_wins_and_what_clashes_with_it_gives_way(capsys, given, expected):
    text = (
        "a\nSteps: 1, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 3, "
        "Size: 32x32, Variation seed: 4, Variation seed strength: 0.2, Version: v1.10"
    )
    said = notes(capsys, "--again", theirs(text), *given, "--backend", "cpu", "--out", "a.png")
    settings = read_settings("a.png")
    assert {name: settings.get(name) for name in expected} == expected
    left = "theirs.png has the schedule 'karras', which" in said
    assert left == (given[1] in ("ddim", "lcm", "Euler Exponential") and len(given) == 2)


def test_a_sampler_without_eta_gives_it_up():
    asked = ("a", *SMALL, "--seed", "1", "--sampler", "ddim", "--eta", "0.5", "--out", "a.png")
    assert command.main(asked) == 0
    assert command.main(["--again", "a.png", "--sampler", "euler", *ONE, "--out", "b.png"]) == 0
    assert read_settings("b.png")["eta"] == 0
    assert command.main(["--again", "a.png", "--sampler", "tcd", *ONE, "--out", "b.png"]) == 0
    assert read_settings("b.png")["eta"] == 0.5


@pytest.mark.parametrize(
    ("fields", "needed"),
    [
        ("Denoising strength: 0.6", "--image"),
        ("Denoising strength: 0.6, Mask blur: 4, Inpaint area: Only masked", "--image and --mask"),
    ],
)
def test_a_picture_of_another_programs_picture_needs_that(capsys, fields, needed):
    picture = theirs(A1111.format("") + f"{fields}, Masked area padding: 8, Version: v1.10")
    said = refused(capsys, "--again", picture)
    assert said == (
        f"error: theirs.png was drawn from a picture that it does not hold; give {needed}\n"
    )
    drawing(40, 32).save("photo.png")
    Image.new("L", (32, 40), 255).save("mask.png")
    given = ["--image", "photo.png", *(["--mask", "mask.png"] if "mask" in needed else [])]
    assert notes(capsys, "--again", picture, *given, "--steps", "2", "--out", "a.png") == ""
    if "mask" in needed:
        settings = read_settings("a.png")
        assert (settings["inpaint_area"], settings["mask_padding"]) == ("masked", 8)


def test_an_older_hires_fix_needs_no_picture(capsys):
    text = A1111.format("") + "Denoising strength: 0.7, First pass size: 16x16"
    assert "left out" in notes(capsys, "--again", theirs(text))


def test_more_clip_skip_than_there_is_is_named(capsys):
    said = notes(capsys, "--again", theirs(A1111.format("") + "Clip skip: 4"), "--out", "a.png")
    assert said == "note: left out of what theirs.png was made with: Clip skip (4)"
    assert read_settings("a.png")["clip_skip"] == 2
