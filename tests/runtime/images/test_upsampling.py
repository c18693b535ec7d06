"""A diffusion upsampler's pictures, against diffusers' upscale pipeline, and what it takes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionUpscalePipeline
from PIL import Image

import runtime.__main__ as draw
from engine.configs.upsampler import (
    LOW_RES_SCHEDULER,
    RESIDUAL_SCALE,
    SCHEDULER,
    UpsamplerConfig,
)
from engine.errors import RequestError
from latentrt.__main__ import main
from runtime.images import upsampling
from runtime.images.files import read_settings
from runtime.images.upsampling import Sampling
from runtime.images.upscaler import Upscaler
from tests.support.tolerances import UPSAMPLED_LATENTS
from tests.support.unet2d import unet2d
from tests.support.upscaler_files import UPSAMPLER, write_upsampler, write_upscaler

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
SMALL = ("--height", "32", "--width", "32", "--steps", "1", "--threads", "1", "--backend", "cpu")
DEEP = UpsamplerConfig(block_out_channels=(8, 16, 24), upscale=2)


def picture(width, height, seed=0):
    shape = (height, width, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def load(folder, config=UPSAMPLER, **sampling):
    path = write_upsampler(folder / "up.safetensors", config, scale=0.15)
    return Upscaler.load(path, sampling=Sampling(**sampling))


class TextlessUNet(torch.nn.Module):
    """A UNet2DModel in the place of one that attends to a text."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, unet):
        super().__init__()
        self.unet, self.config = unet, unet.config

    def forward(self, sample, timestep, class_labels, return_dict, **text):
        return self.unet(sample, timestep, class_labels, return_dict=return_dict)


def diffusers_latents(path, config, low, sampling):
    """Draw with diffusers' own pipeline of the second stage, its text left out."""
    vae = AutoencoderKL(latent_channels=config.out_channels, norm_num_groups=1)
    pipeline = StableDiffusionUpscalePipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=TextlessUNet(unet2d(path, config)),
        low_res_scheduler=DDPMScheduler.from_config(dict(LOW_RES_SCHEDULER)),
        scheduler=DDIMScheduler.from_config(dict(SCHEDULER)),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        image=torch.from_numpy(low[None]),
        prompt_embeds=torch.zeros(1, 1, 4),
        guidance_scale=1,
        num_inference_steps=sampling.num_inference_steps,
        noise_level=sampling.noise_level,
        generator=torch.Generator().manual_seed(sampling.seed),
        output_type="latent",
        return_dict=False,
    )[0].numpy()[0]


@pytest.mark.parametrize(
    ("config", "steps", "noise_level", "seed"),
    [
        (UPSAMPLER, 1, 0, 0),
        (UPSAMPLER, 4, 20, 7),
        (UPSAMPLER, 7, 100, 2**32 + 1),
        (UpsamplerConfig(block_out_channels=(8, 16), upscale=4), 4, 3, 1),
        (DEEP, 10, 50, 3),
    ],
)
def test_it_draws_what_diffusers_pipeline_draws(config, steps, noise_level, seed, tmp_path):
    """The order of the noise, the low picture's noise and its level, and every step."""
    sampling = Sampling(num_inference_steps=steps, noise_level=noise_level, seed=seed)
    path = write_upsampler(tmp_path / "up.safetensors", config, scale=0.15)
    given = picture(24, 16)
    cells = upsampling.enlarged_cells(np.asarray(given), config.scale)
    x = diffusers_latents(path, config, cells, sampling)
    low = upsampling.noised(cells, noise_level, upsampling.TorchNoise(seed))
    expected = torch.nn.functional.pixel_shuffle(
        torch.from_numpy(low + x / np.float32(RESIDUAL_SCALE)), config.scale
    )
    found = np.asarray(Upscaler.load(path, sampling=sampling)(given), np.float32).transpose(2, 0, 1)
    limit = expected.numpy().clip(-1, 1) * 127.5 + 127.5
    assert abs(found - limit).max() <= 0.5 + 127.5 * UPSAMPLED_LATENTS


def test_cells_are_those_of_torch_and_come_back():
    pixels = np.asarray(picture(6, 4))
    for scale in (1, 2, 3, 4):
        larger = Image.fromarray(pixels).resize((6 * scale, 4 * scale), Image.Resampling.LANCZOS)
        floats = torch.from_numpy(np.array(larger)).permute(2, 0, 1).float() / 127.5 - 1
        cells = upsampling.enlarged_cells(pixels, scale)
        expected = torch.nn.functional.pixel_unshuffle(floats, scale).numpy()
        np.testing.assert_allclose(cells, expected, atol=1e-6)
        np.testing.assert_array_equal(upsampling.from_cells(cells, scale), np.asarray(larger))


class Pointwise:
    """An engine that sees no neighbours, so that a picture in tiles must be the whole one."""

    def __init__(self):
        self.shapes = []

    def run(self, inputs):
        x, low = np.split(inputs["sample"], 2, axis=1)
        self.shapes.append(x.shape)
        return {"out": np.tanh(x + 2 * low + inputs["times"][0] / 1000)}


@pytest.mark.parametrize("size", [(150, 70), (64, 64), (65, 33), (40, 300)])
def test_tiles_fade_into_each_other(size, tmp_path):
    upscaler, told = load(tmp_path, DEEP), []
    whole, tiled = Pointwise(), Pointwise()
    expected = replace(upscaler, engine=whole)(picture(*size))
    cut = replace(upscaler, engine=tiled, tile=64)
    found = cut(picture(*size), on_tile=lambda done, total: told.append((done, total)))
    assert abs(np.asarray(found, int) - np.asarray(expected, int)).max() <= 1
    assert len(whole.shapes) == 4
    assert {max(shape[2:]) for shape in tiled.shapes} <= {64}
    assert told == [(i + 1, len(tiled.shapes)) for i in range(len(tiled.shapes))]


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 2), (33, 5)])
@pytest.mark.parametrize("factor", [None, 1.5, 4])
def test_any_size_and_factor(size, factor, tmp_path):
    upscaler = load(tmp_path, DEEP)
    engine = Pointwise()
    larger = replace(upscaler, engine=engine)(picture(*size), factor)
    assert larger.size == tuple(round(side * (factor or 2)) for side in size)
    assert len(engine.shapes) == (8 if factor == 4 else 4)
    assert all(side % 4 == 0 for shape in engine.shapes for side in shape[2:])


def test_the_same_seed_is_the_same_picture_and_another_is_not(tmp_path):
    upscaler = load(tmp_path)
    first, again = (np.asarray(upscaler(picture(12, 8))) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    for other in ({"seed": 1}, {"noise_level": 30}, {"num_inference_steps": 2}):
        changed = replace(upscaler, sampling=Sampling(**other))(picture(12, 8))
        assert (np.asarray(changed) != first).any(), other


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps is 0; give a whole number from 1"),
        ({"num_inference_steps": 1001}, "from 1 to 1000"),
        ({"noise_level": 101}, "noise_level is 101; give a whole number from 0"),
        ({"noise_level": 0.5}, "give a whole number from 0 to 100"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_what_no_upsampler_could_do(fields, said):
    with pytest.raises(RequestError, match=said):
        Sampling(**fields)


def test_a_drawn_picture_is_the_enlarged_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_upsampler(tmp_path / "up.safetensors", scale=0.15)
    drawn = ["a red apple", *SMALL, "--seed", "7"]
    assert draw.main([*drawn, "-o", "small.png"]) == 0
    assert draw.main([*drawn, "-o", "large.png", "--upsample", "up.safetensors"]) == 0
    expected = Upscaler.load("up.safetensors")(Image.open("small.png"))
    np.testing.assert_array_equal(np.asarray(expected), np.asarray(Image.open("large.png")))
    assert read_settings("large.png")["upscale"] == "up.safetensors"


def test_how_it_was_enlarged_is_kept_for_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_upsampler(tmp_path / "up.safetensors", scale=0.15)
    drawn = ["a red apple", *SMALL, "--seed", "7"]
    how = ["--upsample-steps", "2", "--upsample-noise", "30", "--upsample-seed", "5"]
    assert draw.main([*drawn, "-o", "small.png"]) == 0
    assert draw.main([*drawn, "-o", "large.png", "--upsample", "up.safetensors:3", *how]) == 0
    sampling = Sampling(num_inference_steps=2, noise_level=30, seed=5)
    expected = Upscaler.load("up.safetensors", sampling=sampling)(Image.open("small.png"), 3)
    np.testing.assert_array_equal(np.asarray(expected), np.asarray(Image.open("large.png")))
    assert draw.main(["--again", "large.png", "-o", "again.png", "--threads", "1"]) == 0
    np.testing.assert_array_equal(np.asarray(expected), np.asarray(Image.open("again.png")))
    asked = ["upscale", "small.png", "--upscaler", "up.safetensors:3", "-o", "later.png"]
    given = ["--steps", "2", "--noise-level", "30", "--seed", "5", "--threads", "1"]
    assert main([*asked, *given]) == 0
    assert draw.main(["--again", "later.png", "-o", "last.png", "--threads", "1"]) == 0
    np.testing.assert_array_equal(np.asarray(expected), np.asarray(Image.open("last.png")))
    capsys.readouterr()
    assert draw.main([*drawn, *how]) == 2
    assert "--upsample-steps came without --upsample" in capsys.readouterr().err
    assert main(["grid", *drawn, "--x", "steps=1,2", *how]) == 2
    assert "--upsample-steps is for `latentrt draw`" in capsys.readouterr().err


def test_any_picture_by_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture(20, 12).save("photo.png")
    write_upsampler(tmp_path / "up.safetensors", scale=0.15)
    write_upscaler(tmp_path / "once.safetensors")
    asked = ["upscale", "photo.png", "--threads", "1", "-o", "large.png", "--upscaler"]
    given = ["--steps", "2", "--noise-level", "9", "--seed", "5"]
    assert main([*asked, "up.safetensors", *given]) == 0
    sampling = Sampling(num_inference_steps=2, noise_level=9, seed=5)
    expected = Upscaler.load("up.safetensors", sampling=sampling)(Image.open("photo.png"))
    np.testing.assert_array_equal(np.asarray(expected), np.asarray(Image.open("large.png")))
    capsys.readouterr()
    assert main([*asked, "once.safetensors", "--steps", "2"]) == 2
    said = capsys.readouterr().err
    assert "once.safetensors enlarges in one pass (compact ESRGAN (SRVGG)) and takes no" in said
    assert main([*asked, "up.safetensors", "--noise-level", "101"]) == 2
    assert "give a whole number from 0 to 100" in capsys.readouterr().err
