import math

import numpy as np
import pytest

from benchmarks.distances import WINDOW, relative_error, ssim
from runtime.images.files import psnr
from tests.support import pictures
from tests.support.tolerances import SSIM


def noisy(image, deviation):
    noise = np.random.default_rng(0).normal(0, deviation, image.shape)
    return (image + noise).clip(0, 255).astype(np.uint8)


@pytest.fixture
def drawn():
    return np.asarray(pictures.drawing(24, 40))


def direct_ssim(a, b):
    """The published formula, window by window."""
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for channel in range(a.shape[2]):
        for top in range(a.shape[0] - WINDOW + 1):
            for left in range(a.shape[1] - WINDOW + 1):
                place = (slice(top, top + WINDOW), slice(left, left + WINDOW), channel)
                x, y = a[place].astype(float).ravel(), b[place].astype(float).ravel()
                (xx, xy), (_, yy) = np.cov(x, y)
                mx, my = x.mean(), y.mean()
                above = (2 * mx * my + c1) * (2 * xy + c2)
                values.append(above / ((mx**2 + my**2 + c1) * (xx + yy + c2)))
    return np.mean(values)


@pytest.mark.parametrize("deviation", [2, 20, 100])
def test_ssim_is_the_published_formula(drawn, deviation):
    other = noisy(drawn, deviation)
    assert ssim(drawn, other) == pytest.approx(direct_ssim(drawn, other), abs=SSIM)
    assert ssim(drawn, other) < 0.995


def test_equal_pictures(drawn):
    assert ssim(drawn, drawn) == pytest.approx(1, abs=SSIM)
    assert psnr(drawn, drawn) == math.inf


def test_psnr_of_bytes_that_differ_by_one(drawn):
    other = np.where(drawn > 0, drawn - 1, 1).astype(np.uint8)
    assert psnr(drawn, other) == pytest.approx(20 * math.log10(255))


def test_relative_errors():
    expected = np.array([3, 4], np.float32)
    assert relative_error(np.array([3, 4.5], np.float32), expected) == pytest.approx(0.1)
    assert relative_error(expected[None], expected) == math.inf
