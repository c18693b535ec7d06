"""Deep shrink: the first calls see half the sides below the first level, as Kohya has it."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel

from engine.backends.settings import BackendSettings
from engine.engines import Engines
from engine.errors import GraphError, RequestError
from engine.model import Model, find_model
from runtime import Control, Hires, ImagePrompt, Pipeline, Request
from runtime.__main__ import main
from runtime.images.files import read_settings
from tests.support.pictures import drawing, same
from tests.support.tolerances import CHECKPOINT_RTOL

SETTINGS = BackendSettings(threads=1, backend="cpu")
FIELDS = {"num_inference_steps": 4, "guidance_scale": 5.0, "height": 64, "width": 96}
PROMPT, SEED = "a red apple, fluent style", 3


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.load(settings=SETTINGS, precision="float32")


def draw(pipeline, **fields):
    return pipeline(PROMPT, **{"seed": SEED, "sampler": "ddim", **FIELDS, **fields}).images[0]


@pytest.fixture(scope="module")
def shrunk_unet():
    """Shrink diffusers' UNet by hooks: behind the first level, and where sizes meet again."""
    unet = UNet2DConditionModel.from_pretrained(find_model("pictogram") / "unet").eval()

    def halve(module, arguments, given):
        given = dict(zip(("hidden_states",), arguments, strict=False)) | given
        size = [side // 2 for side in given["hidden_states"].shape[2:]]
        small = F.interpolate(given["hidden_states"], size=size, mode="bicubic")
        return (), {**given, "hidden_states": small}

    unet.down_blocks[1].register_forward_pre_hook(halve, with_kwargs=True)
    return unet


def joined(tensors, dim=0, *, cat=torch.cat):
    """Enlarge what is smaller than the skip beside it, as a patch of the way up does."""
    tensors = list(tensors)
    if len(tensors) == 2 and tensors[0].ndim == 4 and tensors[0].shape[2:] != tensors[1].shape[2:]:
        tensors[0] = F.interpolate(tensors[0], size=tensors[1].shape[2:], mode="bicubic")
    return cat(tensors, dim=dim)


@pytest.mark.parametrize("backend", ["cpu", "openvino"])
@pytest.mark.parametrize("sides", [(16, 16), (32, 24)])
def test_a_shrunk_step_is_that_of_a_shrunk_unet(shrunk_unet, monkeypatch, backend, sides):
    if backend == "openvino":
        pytest.importorskip("openvino")
    model = Model.open(find_model("pictogram"))
    settings = BackendSettings(threads=1, backend=backend)
    engines = Engines.choose(model, settings=settings, precision="float32")
    random = np.random.default_rng(1)
    x = random.standard_normal((1, 8, *sides)).astype(np.float32)
    context = random.standard_normal((1, 1, 9, model.unet.cross_attention_dim)).astype(np.float32)
    given = {
        "registers": x[:, None],
        "matrices": np.array([[[0, 1, 0]]], np.float32),
        "timestep": np.array([500], np.float32),
        "input_scale": np.ones(1, np.float32),
        "context": context,
        "guidance": np.ones((1, 1, 1, 1, 1), np.float32),
        "guidance_rescale": np.zeros(1, np.float32),
        "noise": np.zeros_like(x),
        "mask": np.ones((1, 1, *sides), np.float32),
        "outside": np.zeros((1, 3), np.float32),
    }
    outputs = engines.engine("step_shrunk").run(given)
    monkeypatch.setattr(torch, "cat", joined)
    with torch.no_grad():
        expected = shrunk_unet(
            torch.from_numpy(x), torch.tensor([500.0]), torch.from_numpy(context[0])
        ).sample.numpy()
    found = outputs["next_registers"][:, 0]
    assert np.linalg.norm(found - expected) <= CHECKPOINT_RTOL * np.linalg.norm(expected)
    plain = engines.engine("step").run(given)
    apart = np.linalg.norm(plain["next_registers"][:, 0] - expected)
    assert apart > 0.05 * np.linalg.norm(expected)
    assert outputs["deep"].shape == plain["deep"].shape


def test_the_first_calls_are_shrunk(pipeline):
    plan = pipeline.plan(Request(prompt=PROMPT, deep_shrink=0.5, **FIELDS))
    assert [step.part for step in plan.steps()] == ["step_shrunk"] * 2 + ["step"] * 2
    kept = pipeline.plan(Request(prompt=PROMPT, deep_shrink=0.5, cache_interval=2, **FIELDS))
    parts = ["step_shrunk", "step_shallow", "step", "step_shallow"]
    assert [step.part for step in kept.steps()] == parts
    assert same(draw(pipeline, deep_shrink=0.0), draw(pipeline))
    with pytest.raises(RequestError, match=r"0\.1 of 4 calls shrinks none; 0\.25 is the least"):
        draw(pipeline, deep_shrink=0.1)
    assert not same(draw(pipeline, deep_shrink=0.5), draw(pipeline))
    assert not same(draw(pipeline, deep_shrink=0.5), draw(pipeline, deep_shrink=1.0))


def test_rows_are_what_they_are_alone(pipeline):
    unlike = (
        {},
        {"deep_shrink": 0.5},
        {"deep_shrink": 0.25, "sampler": "euler"},
        {"deep_shrink": 0.5, "pag_scale": 2.0, "apg": (0.0, 5.0, 0.0)},
        {"deep_shrink": 0.5, "cache_interval": 2},
    )
    requests = [
        Request(**{"prompt": PROMPT, "seed": i, "sampler": "ddim", **FIELDS, **fields})
        for i, fields in enumerate(unlike)
    ]
    together = {drawn.request: drawn.image for drawn in pipeline.draw(requests, batch_size=4)}
    for i, fields in enumerate(unlike):
        assert same(together[i], draw(pipeline, seed=i, **fields)), fields


def test_what_cannot_be_is_one_sentence(pipeline):
    with pytest.raises(RequestError, match="deep_shrink is 2; give a number from 0 to 1"):
        Request(prompt=PROMPT, deep_shrink=2)
    with pytest.raises(RequestError, match="deep_shrink and seamless came together"):
        draw(pipeline, deep_shrink=0.5, seamless="x")
    with pytest.raises(RequestError, match="deep_shrink and hires came together"):
        draw(pipeline, deep_shrink=0.5, hires=Hires())
    other = Pipeline.load(settings=SETTINGS)
    other._steering = type("Any", (), {"completed": lambda _, request: request})()
    control = Control(net="a", image=drawing(64, 64))
    with pytest.raises(RequestError, match="deep_shrink and controls came together"):
        draw(other, deep_shrink=0.5, controls=[control])
    with pytest.raises(RequestError, match="deep_shrink and image_prompts came together"):
        draw(other, deep_shrink=0.5, image_prompts=[ImagePrompt(image=drawing(64, 64))])
    other.engines.settings = BackendSettings(backend="tensorrt")
    with pytest.raises(RequestError, match="tensorrt draws with plain graphs alone"):
        other.plan(Request(prompt=PROMPT, deep_shrink=0.5))


def test_a_graph_that_does_not_ship_says_what_makes_it(pipeline, tmp_path):
    other = Pipeline.load(settings=SETTINGS, precision="float32")
    other.engines.folders = (tmp_path,)
    with pytest.raises(GraphError, match=r"export .* --parts step_shrunk --precision float32"):
        other.engine("step_shrunk")


def test_the_command_line_and_the_same_picture_again(tmp_path):
    shared = ["--backend", "cpu", "--threads", "1"]
    asked = [PROMPT, "--steps", "2", "--height", "64", "--width", "64", "--seed", "1", *shared]
    first, again = tmp_path / "one.png", tmp_path / "again.png"
    assert main([*asked, "--deep-shrink", "0.5", "--out", str(first)]) == 0
    assert read_settings(Path(first))["deep_shrink"] == 0.5
    assert main(["--again", str(first), *shared, "--out", str(again)]) == 0
    assert first.read_bytes() == again.read_bytes()
