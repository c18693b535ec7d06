"""Upscaling of latents against torch, whose `interpolate` other programs upscale with."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from engine.errors import RequestError
from runtime.images.upscaling import MODES, upscale_latents, upscale_pixels
from tests.support.pictures import drawing
from tests.support.tolerances import UPSCALED_LATENTS, UPSCALED_LATENTS_FLOAT32

SIZES = [(48, 36), (64, 48), (33, 100), (32, 24), (16, 12), (1, 1)]


def of_torch(latents, size, mode):
    kernel, smooth = mode.removesuffix("-antialiased"), mode.endswith("-antialiased")
    options = {} if kernel.startswith("nearest") else {"align_corners": False, "antialias": smooth}
    return interpolate(latents, size=size, mode=kernel, **options).numpy()


@pytest.mark.parametrize("mode", MODES.values())
@pytest.mark.parametrize("size", SIZES)
def test_upscaled_as_by_torch(mode, size):
    latents = torch.randn(2, 4, 32, 24, generator=torch.Generator().manual_seed(0))
    made = upscale_latents(latents.numpy(), *size, mode)
    assert made.dtype == np.float32
    np.testing.assert_allclose(
        made, of_torch(latents.double(), size, mode), rtol=0, atol=UPSCALED_LATENTS
    )
    np.testing.assert_allclose(
        made, of_torch(latents, size, mode), rtol=0, atol=UPSCALED_LATENTS_FLOAT32
    )


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
def test_nearest_decides_ties_as_torch_does(mode):
    for old in range(1, 40):
        row = torch.arange(old, dtype=torch.float32)[None, None, None]
        for new in range(1, 8 * old):
            made = upscale_latents(row.numpy(), 1, new, mode)
            assert np.array_equal(made, of_torch(row, (1, new), mode)), (old, new)


@pytest.mark.parametrize("mode", MODES)
def test_names_of_automatic1111(mode):
    latents = np.random.default_rng(0).standard_normal((1, 4, 5, 6), np.float32)
    made = upscale_latents(latents, 9, 9, mode.title())
    assert np.array_equal(made, upscale_latents(latents, 9, 9, MODES[mode]))


def test_every_mode_is_another():
    latents = np.random.default_rng(0).standard_normal((1, 4, 6, 6), np.float32)
    made = [upscale_latents(latents, 9, 9, mode).tobytes() for mode in MODES.values()]
    same = MODES["latent"], MODES["latent (antialiased)"]  # differ only where latents shrink
    assert len(set(made)) == len(MODES) - 1
    assert len({upscale_latents(latents, 3, 3, mode).tobytes() for mode in same}) == 2


def test_a_mode_that_is_none():
    with pytest.raises(RequestError, match="not upscaled by 'lanczos'; choose one of bilinear, "):
        upscale_latents(np.zeros((1, 4, 2, 2), np.float32), 4, 4, "lanczos")


def test_upscaled_pixels():
    image = drawing(32, 48)
    larger = upscale_pixels(image, height=64, width=96)
    assert (larger.size, larger.mode) == ((96, 64), "RGB")
    assert np.array_equal(larger, image.resize((96, 64), Image.Resampling.LANCZOS))
