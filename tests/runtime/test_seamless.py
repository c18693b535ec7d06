"""Seamless pictures: as torch's circular padding makes them, and their edges join."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.backends.settings import BackendSettings
from engine.engines import Engines
from engine.errors import RequestError
from engine.graphs.variants import Variant
from engine.model import Model, find_model
from runtime import Control, Hires, Pipeline, Request
from runtime.__main__ import main
from runtime.images import tiles
from runtime.images.files import read_settings
from tests.support.pictures import drawing, psnr
from tests.support.small_models import SMALL, trace_graphs
from tests.support.tolerances import LATENTS_ATOL, SMALL_PICTURE_PSNR_DB

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SETTINGS = BackendSettings(threads=1, backend="cpu")
FIELDS = {"num_inference_steps": 3, "guidance_scale": 5.0, "height": 64, "width": 64}
PROMPT, SEED = "moss on stones", 5
AXES = {"x": (3,), "y": (2,), "both": (2, 3)}


@pytest.fixture(scope="module")
def small():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = SMALL["sd1"].write_file(folder)
        trace_graphs(Model.open(file), folder)
        yield SMALL["sd1"], Pipeline.load(file, graphs=folder, settings=SETTINGS)


@pytest.fixture(scope="module")
def pictogram():
    return Pipeline.load(settings=SETTINGS, precision="float32")


def circular(module, along):
    """Have torch pad a module's convolutions with the other side along an axis, or both."""
    for conv in (m for m in module.modules() if isinstance(m, nn.Conv2d)):
        down, across = conv.padding

        def forward(x, weight, bias, conv=conv, down=down, across=across):
            sides = ((across,) * 2, (down,) * 2)
            for axis, pad in ((3, (*sides[0], 0, 0)), (2, (0, 0, *sides[1]))):
                x = F.pad(x, pad, mode="circular" if axis in AXES[along] else "constant")
            return F.conv2d(x, weight, bias, conv.stride, 0, conv.dilation, conv.groups)

        conv._conv_forward = forward


def straight(module):
    for conv in (m for m in module.modules() if isinstance(m, nn.Conv2d)):
        conv.__dict__.pop("_conv_forward", None)


def draw(pipeline, **fields):
    return pipeline(PROMPT, **{"seed": SEED, "sampler": "ddim", **FIELDS, **fields}).images[0]


def rolled(array, axes, by):
    return np.roll(array, [by] * len(axes), axis=axes)


@pytest.mark.parametrize("along", AXES)
def test_pictures_are_those_of_circular_padding(small, along):
    model, pipeline = small
    reference = model.reference
    parts = reference.unet, reference.vae.decoder, reference.vae.post_quant_conv
    for part in parts:
        circular(part, along)
    try:
        reference.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(SEED)
        theirs = reference(PROMPT, generator=generator, **FIELDS).images[0]
    finally:
        for part in parts:
            straight(part)
    assert psnr(draw(pipeline, seamless=along), theirs) >= SMALL_PICTURE_PSNR_DB
    for other in {None, *AXES} - {along}:
        assert psnr(draw(pipeline, seamless=other), theirs) < SMALL_PICTURE_PSNR_DB / 2


@pytest.mark.parametrize("backend", ["cpu", "openvino"])
@pytest.mark.parametrize("along", AXES)
def test_what_is_rolled_becomes_what_is_rolled(backend, along):
    pytest.importorskip("openvino")
    settings = BackendSettings(threads=1, backend=backend)
    model = Model.open(find_model("pictogram"))
    engines = Engines.choose(model, settings=settings, precision="float32")
    variant, axes = Variant(seamless=along), AXES[along]
    latents = np.random.default_rng(0).normal(size=(1, 8, 16, 24)).astype(np.float32)
    moved, silence = rolled(latents, axes, 8), np.zeros_like(latents)

    def decoded(z, variant=variant):
        return engines.engine("vae_decoder", variant).run({"latents": z})["pixels"].astype(int)

    def encoded(pixels):
        inputs = {"pixels": pixels.astype(np.uint8), "noise": silence}
        return engines.engine("vae_encoder", variant).run(inputs)["latents"]

    pixels = decoded(latents)
    wanted = rolled(pixels, [axis - 1 for axis in axes], 8 * model.vae.compression)
    assert np.abs(decoded(moved) - wanted).max() <= 1
    assert np.abs(decoded(moved, None) - wanted).max() > 20
    assert np.abs(encoded(wanted) - rolled(encoded(pixels), axes, 8)).max() < LATENTS_ATOL


def test_a_step_of_what_is_rolled_is_rolled(pictogram):
    plan = pictogram.plan(Request(prompt=PROMPT, seed=SEED, num_inference_steps=2, seamless="both"))
    state, inputs = pictogram.start(plan), plan.steps()[0]
    after = pictogram.step(state, inputs).latents
    state.registers[:] = np.roll(state.registers, (8, 8), axis=(3, 4))
    moved = pictogram.step(state, inputs).latents
    assert np.abs(moved - rolled(after, (2, 3), 8)).max() < LATENTS_ATOL


def test_the_edges_of_a_picture_join(pictogram):
    pixels = np.asarray(draw(pictogram, seamless="x", num_inference_steps=8), int)
    inside = np.abs(np.diff(pixels, axis=1)).mean((0, 2))
    assert np.abs(pixels[:, 0] - pixels[:, -1]).mean() <= inside.max()


class Averaging:
    """An autoencoder that takes the mean of seven places in a row, and zeros beyond an edge."""

    def __call__(self, part, variant=None):
        assert variant is None, "tiles have edges of their own, which do not join"
        return type("Engine", (), {"run": staticmethod(getattr(self, part))})

    @staticmethod
    def averaged(places):
        wider = np.pad(places, ((0, 0), (0, 0), (0, 0), (3, 3)))
        return np.lib.stride_tricks.sliding_window_view(wider, 7, axis=3).mean(-1)

    def vae_decoder(self, given):
        pixels = self.averaged(given["latents"]).transpose(0, 2, 3, 1)
        return {"pixels": pixels.repeat(3, 3).repeat(2, 1).repeat(2, 2).round().astype(np.uint8)}

    def vae_encoder(self, given):
        pixels = given["pixels"][:, ::2, ::2, :1].transpose(0, 3, 1, 2)
        return {"latents": self.averaged(pixels.astype(np.float32))}


def test_tiles_of_large_pictures_reach_to_the_other_side():
    engine, flat = Averaging(), np.full((1, 1, 40, 480), 100, np.float32)
    pixels = tiles.decode_seamless(engine, flat, 2, "x")
    assert pixels.shape == (1, 80, 960, 3)
    ends = pixels[0, 0, :, 0].astype(int)
    assert abs(ends[0] - ends[-1]) <= 1, "tiles differ, and their ends join all the same"
    assert abs(ends[-4:] - ends[-1]).max() <= 4
    cut = tiles.decode(engine("vae_decoder").run, flat, 2)[0, 0, :, 0].astype(int)
    assert abs(cut[-9] - cut[-1]) > 20, "which a decoder alone makes dark"
    noise, flat = np.zeros_like(flat), np.full((1, 80, 960, 3), 100, np.uint8)
    latents = tiles.encode_seamless(engine, flat, noise, 2, "both")
    assert latents.shape == noise.shape
    ends = latents[0, 0, 0]
    assert abs(ends[0] - ends[-1]) <= 1
    cut = tiles.encode(engine("vae_encoder").run, flat, noise, 2)[0, 0, 0]
    assert abs(cut[-9] - cut[-1]) > 20


def test_rows_share_a_call_with_their_like(pictogram):
    along = (None, "x", "x", "both", None)
    requests = [
        Request(prompt=PROMPT, seed=i, seamless=axes, sampler="ddim", **FIELDS)
        for i, axes in enumerate(along)
    ]
    together = {drawn.request: drawn.image for drawn in pictogram.draw(requests, batch_size=5)}
    for i, axes in enumerate(along):
        assert np.array_equal(together[i], draw(pictogram, seed=i, seamless=axes))


def test_other_modes(pictogram):
    image = drawing(64, 64)
    plain = draw(pictogram, image=image, strength=0.5)
    joined = draw(pictogram, image=image, strength=0.5, seamless="both")
    assert psnr(plain, joined) < 60
    assert draw(pictogram, seamless="both", hires=Hires(scale=1.5, strength=0.5)).size == (96, 96)
    assert draw(pictogram, seamless="both", cache_interval=2).size == (64, 64)


def test_what_cannot_be_is_one_sentence(pictogram):
    with pytest.raises(RequestError, match="seamless is 'z'; choose one of x, y, both"):
        Request(prompt=PROMPT, seamless="z")
    control = Control(net="a", image=drawing(64, 64))
    pipeline = Pipeline.load(settings=SETTINGS)
    pipeline._steering = type("Any", (), {"completed": lambda _, request: request})()
    with pytest.raises(RequestError, match="seamless and controls came together"):
        pipeline.plan(Request(prompt=PROMPT, seamless="x", controls=[control]))
    plan = pictogram.plan
    pictogram.engines.settings = BackendSettings(backend="tensorrt")
    try:
        with pytest.raises(RequestError, match="tensorrt draws with plain graphs alone"):
            plan(Request(prompt=PROMPT, seamless="x"))
    finally:
        pictogram.engines.settings = SETTINGS


def test_the_command_line_and_the_same_picture_again(tmp_path):
    out = [str(tmp_path / name) for name in ("one.png", "again.png", "plain.png")]
    shared = ["--backend", "cpu", "--threads", "1"]
    asked = [PROMPT, "--steps", "2", "--height", "64", "--width", "64", "--seed", "1"]
    assert main([*asked, *shared, "--seamless", "both", "--out", out[0]]) == 0
    assert read_settings(Path(out[0]))["seamless"] == "both"
    assert main(["--again", out[0], *shared, "--out", out[1]]) == 0
    assert Path(out[0]).read_bytes() == Path(out[1]).read_bytes()
    assert main([*asked, *shared, "--out", out[2]]) == 0
    assert Path(out[0]).read_bytes() != Path(out[2]).read_bytes()
