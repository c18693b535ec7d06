"""Noise on the picture to start from: scikit-image's, from the project's own random numbers."""

import json
from functools import partial

import numpy as np
import pytest
from PIL import Image
from skimage.util import img_as_ubyte, random_noise

import runtime.__main__ as command
from engine.backends.settings import BackendSettings
from engine.errors import RequestError
from runtime import Pipeline, Request
from runtime.images.files import read_settings
from runtime.images.image_noise import ImageNoise, noise_seed
from runtime.noise import NOISES, make_noise
from tests.support.pictures import drawing, psnr

SMALL = {"num_inference_steps": 2, "strength": 0.5, "seed": 7}
PHOTO = drawing(32, 48)


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.load("pictogram", settings=BackendSettings(backend="cpu", threads=1))


def noisy(text, pixels, seed=1, kind="cpu"):
    return ImageNoise.read(text).added(pixels, make_noise(kind, seed).normal)


def theirs(text, pixels):
    """Return what scikit-image makes of 8-bit pixels, rounded as it rounds."""
    kind, amount = text.split(":")
    options = {"var": float(amount)} if kind == "gaussian" else {"amount": float(amount)}
    mode = {"gaussian": "gaussian", "salt-pepper": "s&p"}[kind]
    return img_as_ubyte(random_noise(pixels, mode=mode, rng=3, **options))


@pytest.mark.parametrize("generator", list(NOISES))
@pytest.mark.parametrize(
    "text", ["gaussian:0.001", "gaussian:0.1", "gaussian:1", "salt-pepper:0.05", "salt-pepper:0.7"]
)
@pytest.mark.parametrize("level", [0, 40, 128, 255])
def test_the_distribution_is_that_of_scikit_image(text, level, generator):
    """Shares of the 256 values of gray, by their cumulative sums: 270,000 draws of each."""
    pixels = np.full((300, 300, 3), level, np.uint8)
    ours, oracle = noisy(text, pixels, kind=generator), theirs(text, pixels)
    shares = [np.bincount(each.ravel(), minlength=256) / each.size for each in (ours, oracle)]
    apart = np.abs(np.cumsum(shares[0]) - np.cumsum(shares[1])).max()
    assert apart < 0.006  # which Kolmogorov and Smirnov's test of one distribution allows at 1e-4


@pytest.mark.parametrize("text", ["gaussian:0.05", "salt-pepper:0.3"])
def test_every_channel_has_its_own(text):
    pixels = np.full((64, 64, 3), 100, np.uint8)
    changed = noisy(text, pixels) != pixels
    red, green, _ = np.moveaxis(changed, 2, 0)
    assert (red != green).any()


def test_none_of_it_changes_nothing_and_all_of_it_leaves_nothing():
    pixels = np.asarray(PHOTO)
    for text in ("gaussian:0", "salt-pepper:0", "salt-pepper:0.0"):
        np.testing.assert_array_equal(noisy(text, pixels), pixels)
    assert set(np.unique(noisy("salt-pepper:1", pixels))) == {0, 255}


@pytest.mark.parametrize(
    "text",
    [
        *("gaussian", "gaussian:", "gaussian:-0.1", "gaussian:nan", "gaussian:inf", "gaussian:1.1"),
        *("gaussian:1e-3", "gaussian:0.1:2", "gaussian: 0.1", "gaussian:0_1", "Gaussian:0.1"),
        *("gaussian:٠", "salt-pepper:5%", "salt:0.1", "poisson:0.1", "", ":0.1", "0.1"),
        *(0.1, ["gaussian:0.1"], True, b"gaussian:0.1", "gaussian:0." + "0" * 40),
    ],
)
def test_what_is_no_noise_is_refused(text):
    with pytest.raises(RequestError, match="give gaussian:VARIANCE or salt-pepper:SHARE"):
        Request(prompt="a", image=PHOTO, image_noise=text)


def test_it_is_refused_where_it_cannot_act():
    mask = Image.new("L", PHOTO.size, 255)
    with pytest.raises(RequestError, match="image_noise came without image"):
        Request(prompt="a", image_noise="gaussian:0.1")
    for options in ({"mask": mask}, {"mask": mask, "strength": 1}, {"extend": (0, 0, 8, 0)}):
        with pytest.raises(RequestError, match="give a strength below 1"):
            Request(prompt="a", image=PHOTO, image_noise="gaussian:0.1", **options)
    Request(prompt="a", image=PHOTO, image_noise="gaussian:0.1", mask=mask, strength=0.9)


def test_each_picture_starts_from_noise_of_its_own_seed(pipeline):
    """What runs is what runs on a picture that somebody else made noisy, with the same seed."""
    draw = partial(pipeline, "a", **{**SMALL, "num_images_per_prompt": 2})
    together = draw(image=PHOTO, image_noise="salt-pepper:0.2").images
    for seed, image in zip((7, 8), together, strict=True):
        start = noisy("salt-pepper:0.2", np.asarray(PHOTO), noise_seed(seed))
        alone = pipeline("a", image=Image.fromarray(start), **{**SMALL, "seed": seed}).images[0]
        np.testing.assert_array_equal(np.asarray(image), np.asarray(alone))
    clean = draw(image=PHOTO).images
    assert psnr(clean[0], together[0]) < 35
    none = draw(image=PHOTO, image_noise="gaussian:0").images
    np.testing.assert_array_equal(np.asarray(none[1]), np.asarray(clean[1]))


def test_it_is_laid_over_what_is_drawn_from(pipeline):
    """A picture that is resized gets it at its new size; one with odd sides keeps these."""
    odd, noise = drawing(30, 45), "gaussian:0.01"
    sides = {"height": 64, "width": 96}
    start = noisy(noise, np.asarray(odd.resize((96, 64), Image.Resampling.LANCZOS)), noise_seed(7))
    ours = pipeline("a", image=odd, image_noise=noise, **sides, **SMALL).images[0]
    expected = pipeline("a", image=Image.fromarray(start), **SMALL).images[0]
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected))
    assert pipeline("a", image=odd, image_noise=noise, **SMALL).images[0].size == odd.size


def test_what_a_mask_keeps_gets_none(pipeline):
    mask = Image.new("L", PHOTO.size)
    mask.paste(255, (0, 0, 24, 32))
    options = {**SMALL, "mask": mask, "mask_blur": 0.0}
    noise = "salt-pepper:0.5"
    plain, noised = (
        np.asarray(pipeline("a", image=PHOTO, paste_back=False, **options, **more).images[0])
        for more in ({}, {"image_noise": noise})
    )
    assert psnr(plain[:, :16], noised[:, :16]) < psnr(plain[:, 40:], noised[:, 40:]) - 6
    kept = pipeline("a", image=PHOTO, image_noise=noise, **options).images[0]
    np.testing.assert_array_equal(np.asarray(kept)[:, 24:], np.asarray(PHOTO)[:, 24:])


def test_a_file_keeps_it_and_again_draws_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    PHOTO.save("start.png")
    asked = ["a", "--image", "start.png", "--strength", "0.5", "--steps", "2", "--seed", "3"]
    small = ["--threads", "1", "--backend", "cpu"]
    assert command.main([*asked, *small, "--image-noise", "salt-pepper:0.1", "--out", "a.png"]) == 0
    assert read_settings("a.png")["image_noise"] == "salt-pepper:0.1"
    assert command.main(["--again", "a.png", *small, "--out", "b.png"]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    capsys.readouterr()
    assert command.main(["a", "--image-noise", "gaussian:0.1"]) == 2
    assert "--image-noise came without --image" in capsys.readouterr().err
    assert command.main([*asked, "--image-noise", "pink:0.1"]) == 2
    assert "--image-noise is 'pink:0.1'" in capsys.readouterr().err


def test_a_picture_from_a_text_does_not_speak_of_it(pipeline):
    settings = pipeline("a", num_inference_steps=1, seed=1, height=32, width=32).settings[0]
    assert "image_noise" not in json.dumps(settings)
