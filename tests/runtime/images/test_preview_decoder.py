"""Previews by a tiny decoder: the one that ships against the full decode, one that is brought."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import save_file

from engine.backends.settings import BackendSettings
from engine.errors import ModelError
from engine.model import Model, find_model
from runtime import Pipeline, Request
from runtime.__main__ import main
from runtime.images.previews import Preview
from tests.support.pictures import psnr
from tests.support.tolerances import TINY_PREVIEW_PSNR_DB

PROMPTS = [
    "a red apple, fluent style",
    "a sailboat, noto style",
    "cat face, flat style",
    "pizza, twemoji style",
    "snowman, noto style",
    "sunflower, fluent style",
    "rocket, twemoji style",
    "a house, flat style",
]
QUICK = ("--steps", "2", "--threads", "1", "--seed", "7")


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.load("pictogram", settings=BackendSettings(threads=1))


@pytest.fixture(scope="module")
def finished(pipeline):
    """Give latents of eight pictures and their decodes."""
    request = Request(prompt=PROMPTS, seed=7, num_inference_steps=6, sampler="dpmpp_2m")
    *_, last = pipeline.denoise(pipeline.plan(request))
    return last.latents, pipeline.decode(last.latents)


def test_the_decoder_that_ships_draws_nearly_what_the_full_one_draws(pipeline, finished):
    latents, pictures = finished
    drawn = pipeline.previews(latents)
    assert [(p.size, p.mode) for p in drawn] == [((128, 128), "RGB")] * len(PROMPTS)
    linear = Preview.fit(latents, pictures).draw(latents)
    pairs = zip(drawn, linear, pictures, strict=True)
    quality = [(psnr(tiny, picture), psnr(flat, picture)) for tiny, flat, picture in pairs]
    assert np.mean([tiny for tiny, _ in quality]) >= TINY_PREVIEW_PSNR_DB
    assert all(tiny > flat for tiny, flat in quality)


def test_latents_that_are_no_numbers_still_give_previews(pipeline):
    latents = np.zeros((2, 8, 16, 16), np.float32)
    broken = latents.copy()
    broken[0, :, 3], broken[1, :, 4] = np.nan, np.inf
    for seen, whole in zip(pipeline.previews(broken), pipeline.previews(latents), strict=True):
        assert np.array_equal(seen, whole)


def test_diffusers_decodes_with_the_same_weights(pipeline, finished):
    folder = find_model("pictogram") / "preview_decoder"
    config = json.loads((folder / "config.json").read_text())
    module = AutoencoderTiny.from_config(config).eval()
    component = pipeline.model.weights("preview_decoder")
    state = {
        name.removeprefix("decoder."): torch.from_numpy(np.array(value, np.float32))
        for name, value in component.items()
    }
    module.decoder.load_state_dict(state)
    with torch.no_grad():
        expected = module.decode(torch.from_numpy(finished[0][:1])).sample[0]
    expected = 127.5 * (expected.clamp(-1, 1).permute(1, 2, 0).numpy() + 1)
    assert np.abs(np.asarray(pipeline.previews(finished[0][:1])[0]) - expected).max() <= 1


def brought(folder):
    """Save a tiny decoder with random weights under the names of TAESD's."""
    torch.manual_seed(0)
    config = Model.open(find_model("pictogram")).config("preview_decoder")
    module = AutoencoderTiny(
        latent_channels=config.latent_channels,
        decoder_block_out_channels=config.decoder_block_out_channels,
        num_decoder_blocks=config.num_decoder_blocks,
    )
    state = module.decoder.layers.state_dict()
    path = folder / "taesd_decoder.safetensors"
    save_file(
        {f"{int(k.split('.')[0]) + 1}.{k.split('.', 1)[1]}": v for k, v in state.items()}, path
    )
    return path


def test_one_that_is_brought_stands_in_for_the_models_own(tmp_path, pipeline):
    settings = BackendSettings(threads=1)
    other = Pipeline.load("pictogram", preview_decoder=brought(tmp_path), settings=settings)
    latents = np.random.default_rng(0).normal(size=(1, 8, 8, 8)).astype(np.float32)
    (own,), (drawn,) = pipeline.previews(latents), other.previews(latents)
    assert own.size == drawn.size == (64, 64)
    assert not np.array_equal(own, drawn)
    other.set_loras([])
    assert other.decode(latents) == pipeline.decode(latents), "pictures stay what they are"


@pytest.fixture
def plain(tmp_path):
    """Copy the model that ships, without its tiny decoder."""
    left_out = shutil.ignore_patterns("preview_decoder")
    return shutil.copytree(find_model("pictogram"), tmp_path / "plain", ignore=left_out)


def test_a_model_without_one_says_what_to_give(plain):
    pipeline = Pipeline.load(plain, settings=BackendSettings(threads=1))
    with pytest.raises(ModelError, match="holds no preview_decoder; give one with --preview-dec"):
        pipeline.previews(np.zeros((1, 8, 8, 8), np.float32))


@pytest.mark.parametrize("decoder", ["own", "file"])
def test_the_command_draws_strip_and_animation_by_it(decoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    strips = []
    path = decoder if decoder == "own" else str(brought(tmp_path))
    for chosen in ([], ["--preview-decoder", path]):
        options = ["--preview-steps", "1,2", "--animation", "a.webp", "--out", "a.png", *chosen]
        assert main(["house", *QUICK, *options]) == 0
        with Image.open("a-steps.png") as strip, Image.open("a.webp") as animation:
            strips.append(np.asarray(strip))
            assert animation.n_frames == 2
    linear, tiny = strips
    assert linear.shape == tiny.shape
    assert not np.array_equal(linear[-128:, :128], tiny[-128:, :128]), "the first step's preview"
    assert np.array_equal(linear[-128:, 132:], tiny[-128:, 132:]), "the finished picture itself"


@pytest.mark.parametrize(
    ("model", "arguments", "said"),
    [
        ("pictogram", ("own",), "came without a preview to draw; give --preview-steps or --anim"),
        ("pictogram", ("missing.pth", "--preview-steps", "1"), "missing.pth"),
        ("pictogram", ("text.txt", "--preview-steps", "1"), "text.txt"),
        ("pictogram", ("{vae}", "--animation", "a.webp"), "holds no tiny decoder such as TAESD's"),
        ("plain", ("own", "--preview-steps", "1"), "give one with --preview-decoder FILE"),
    ],
)
def test_mistakes_are_one_sentence(model, arguments, said, plain, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("no weights")
    vae = find_model("pictogram") / "vae"
    given = [argument.format(vae=vae) for argument in arguments]
    assert main(["house", *QUICK, "--model", model, "--preview-decoder", *given]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("*.png"))
