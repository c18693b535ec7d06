"""The control that ships: by its name, of any picture, and the same picture again."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from engine.backends.settings import BackendSettings
from engine.checkpoints.formats.files import open_weights
from engine.errors import ModelError
from engine.shipped import CONTROLS, shipped_controls
from export.info import describe
from runtime import Control, Pipeline, Result
from runtime.__main__ import main
from runtime.images.files import read_settings
from runtime.preprocessors.named import Canny
from serving.options import engine_settings, make_parser

MAX_BYTES = 4 * 2**20
PROMPT, SIDE = "a red apple", 128
FIELDS = {"num_inference_steps": 12, "sampler": "ddim", "seed": 1, "num_images_per_prompt": 2}


def apple() -> Image.Image:
    """Draw a round thing with a stalk, in colours of its own."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    brush = ImageDraw.Draw(image)
    brush.ellipse((12, 36, 100, 120), fill=(40, 90, 200))
    brush.rectangle((52, 12, 60, 36), fill=(20, 20, 20))
    return image


@pytest.fixture(scope="module")
def pipeline():
    settings = BackendSettings(backend="cpu", threads=1)
    with Pipeline.load(settings=settings, controls="edges") as pipeline:
        yield pipeline


def lines(image: Image.Image) -> np.ndarray:
    return Canny()(np.asarray(image.convert("RGB")))[..., 0] > 0


def near(found: np.ndarray) -> np.ndarray:
    """Return where a line or one of its neighbours is."""
    around = np.pad(found, 1)
    height, width = found.shape
    shifts = [around[y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return np.any(shifts, axis=0)


def followed(result: Result) -> float:
    """Return the part of the apple's edges that pictures have, at one pixel."""
    wanted = lines(apple())
    return float(np.mean([(wanted & near(lines(i))).sum() / wanted.sum() for i in result.images]))


def test_pictures_follow_the_edges_of_any_picture(pipeline):
    control = Control(net="edges", image=apple())
    steered = pipeline(PROMPT, controls=[control], **FIELDS)
    plain = pipeline(PROMPT, **FIELDS)
    assert followed(steered) > followed(plain) + 0.25
    hint = Image.fromarray(Canny()(np.asarray(apple())))
    taken = Control(net="edges", image=hint, preprocessor="none")
    again = pipeline(PROMPT, controls=[taken], **FIELDS)
    for one, other in zip(steered.images, again.images, strict=True):
        assert np.array_equal(one, other), "edges finds edges itself unless it is told otherwise"


def test_the_command_line_and_the_same_picture_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    apple().save("apple.png")
    shared = ["--backend", "cpu", "--threads", "1"]
    asked = [PROMPT, "--control", "edges", "--control-image", "apple.png", "--steps", "2", *shared]
    assert main([*asked, "--seed", "1", "--out", "one.png"]) == 0
    said = read_settings(tmp_path / "one.png")
    assert (said["controls"], said["control_preprocessors"]) == (["edges"], ["canny"])
    assert {"edges", "apple.png"} <= said["hashes"].keys()
    assert main(["--again", "one.png", *shared, "--out", "again.png"]) == 0
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    plain = [*asked, "--seed", "1", "--preprocessor", "none", "--out", "plain.png"]
    assert main(plain) == 0
    assert read_settings(tmp_path / "plain.png")["control_preprocessors"] == ["none"]
    assert main(["--again", "plain.png", *shared, "--out", "plain-again.png"]) == 0
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "plain-again.png").read_bytes()
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "one.png").read_bytes()


def test_what_the_file_says_and_takes():
    file = CONTROLS / "edges.safetensors"
    assert shipped_controls() == {"edges": file}
    assert file.stat().st_size <= MAX_BYTES
    assert open_weights(file).metadata["preprocessor"] == "canny"
    facts = describe("edges")
    assert (facts["kind"], facts["preprocessor"]) == ("control-LoRA", "canny")
    assert not facts["notes"]


def test_a_name_that_is_none_says_what_ships(pipeline):
    with pytest.raises(ModelError, match=r"edgse does not exist; .* that ships \(edges\)"):
        pipeline.set_controls("edgse")
    assert pipeline.control_nets.names == ("edges",), "it stays"


def test_the_server_has_it_beside_the_model_that_ships(tmp_path):
    settings = engine_settings(make_parser("serve").parse_args([]))
    assert settings.controls == {"edges": str(CONTROLS / "edges.safetensors")}
    other = tmp_path / "other.safetensors"
    other.touch()
    own = engine_settings(make_parser("serve").parse_args(["--control", f"edges={other}"]))
    assert own.controls == {"edges": str(other)}
