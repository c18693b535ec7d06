"""Preprocessors beside OpenCV's own functions: the same bytes, whatever the picture."""

import cv2
import numpy as np
import pytest

from engine.errors import RequestError
from runtime.preprocessors.canny import canny
from runtime.preprocessors.choice import preprocess
from runtime.preprocessors.named import (
    PREPROCESSORS,
    Blur,
    Canny,
    Scribble,
    Tile,
    inpaint_hint,
)

RNG = np.random.default_rng(7)
NOISE = RNG.integers(0, 256, (67, 90, 3), np.uint8)
PICTURES = {
    "noise": NOISE,
    "smooth": cv2.GaussianBlur(NOISE, (0, 0), 2.0),
    "shapes": cv2.resize(NOISE[:5, :5], (120, 70), interpolation=cv2.INTER_NEAREST),
    "slope": np.add.outer(np.arange(50) * 3, np.arange(80) * 2)[..., None].repeat(3, 2).astype("B"),
    "two levels": np.where(NOISE[..., :1] > 200, 255, 0).repeat(3, 2).astype(np.uint8),
    "one row": NOISE[:1],
    "one column": NOISE[:, :1],
    "one pixel": NOISE[:1, :1],
    "black": np.zeros((20, 30, 3), np.uint8),
}
THRESHOLDS = [(100, 200), (20, 40), (0, 0), (50.5, 120.7), (200, 100), (1, 3000)]


@pytest.mark.parametrize("l2_norm", [False, True])
@pytest.mark.parametrize("pixels", PICTURES.values(), ids=PICTURES)
def test_canny_is_opencvs_bit_for_bit(pixels, l2_norm):
    for low, high in THRESHOLDS:
        for given in (pixels, np.ascontiguousarray(pixels[..., 1])):
            expected = cv2.Canny(given, low, high, L2gradient=l2_norm)
            assert np.array_equal(canny(given, low, high, l2_norm=l2_norm), expected), (low, high)


def test_a_line_that_winds_is_joined_to_its_strong_end():
    """A spiral of one weak line, strong at its inner end: joined in few passes."""
    pixels = np.full((401, 401), 100, np.uint8)
    points = [(200, 200)]
    for turn in range(1, 48):
        across, down = points[-1]
        step = 8 * ((turn + 1) // 2)
        moves = [(step, 0), (0, step), (-step, 0), (0, -step)]
        points.append((across + moves[turn % 4][0], down + moves[turn % 4][1]))
    cv2.polylines(pixels, [np.array(points)], isClosed=False, color=120, thickness=2)
    cv2.polylines(pixels, [np.array(points[:3])], isClosed=False, color=255, thickness=2)
    expected = cv2.Canny(pixels, 30, 300)
    assert np.array_equal(canny(pixels, 30, 300), expected)
    assert (expected > 0).sum() > 3 * (cv2.Canny(pixels, 299, 300) > 0).sum(), "mostly weak"


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1, 2.3, 9, 30])
@pytest.mark.parametrize("pixels", PICTURES.values(), ids=PICTURES)
def test_blur_is_opencvs(pixels, sigma):
    expected = cv2.GaussianBlur(pixels, (0, 0), sigma)
    difference = Blur(sigma=sigma)(pixels).astype(int) - expected
    assert np.abs(difference).max() <= 1


def test_a_sketch_is_that_of_two_blurs_of_opencv():
    pixels = cv2.resize(NOISE[:12, :12], (60, 50))
    fine, coarse = (cv2.GaussianBlur(pixels.astype("f"), (0, 0), sigma) for sigma in (0.5, 5.0))
    difference = (255 - np.min(coarse - fine, axis=2)).clip(0, 255).astype(np.uint8)
    expected = 2 * (255 - difference.astype(int)) > 32
    made = Scribble()(pixels)
    assert (made[..., 0] == 255 * expected).mean() > 0.999
    assert 0.01 < expected.mean() < 0.5
    assert Scribble(threshold=255)(pixels).mean() < Scribble(threshold=8)(pixels).mean()


def test_gray_is_opencvs_within_one():
    expected = cv2.cvtColor(NOISE, cv2.COLOR_RGB2GRAY)
    made = preprocess("gray", NOISE)
    assert np.abs(made.astype(int) - expected[..., None]).max() <= 1


def test_a_tile_keeps_the_mean_of_what_it_takes_together():
    assert np.array_equal(Tile()(NOISE), NOISE)
    pixels = NOISE[:64, :64]
    made = Tile(factor=8)(pixels)
    assert made.shape == pixels.shape
    means = pixels.reshape(8, 8, 8, 8, 3).mean((1, 3))
    assert np.abs(cv2.resize(made, (8, 8), interpolation=cv2.INTER_AREA) - means).max() < 12
    assert made.astype("f").std() < 0.5 * pixels.astype("f").std()
    assert Tile(factor=8000)(NOISE).shape == NOISE.shape


def test_the_hint_of_inpainting_is_minus_one_under_the_mask():
    mask = np.zeros(NOISE.shape[:2], np.uint8)
    mask[10:20, 5:9], mask[0] = 255, 127
    hint = inpaint_hint(NOISE, mask)
    assert hint.dtype == np.float32
    assert (hint[10:20, 5:9] == -1).all()
    hint[10:20, 5:9] = NOISE[10:20, 5:9] / np.float32(255)
    assert np.array_equal(hint, NOISE / np.float32(255))


@pytest.mark.parametrize("name", PREPROCESSORS)
def test_every_preprocessor_makes_bytes_as_large_as_the_picture(name):
    for pixels in PICTURES.values():
        before = pixels.copy()
        made = preprocess(name, pixels)
        assert (made.dtype, made.shape) == (np.uint8, pixels.shape)
        assert np.array_equal(pixels, before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: preprocess("depth", NOISE),
            "no preprocessor 'depth'; choose one of canny",
        ),
        (lambda: Canny(low=-1), "low is -1; give a number from 0"),
        (lambda: Canny(high=float("nan")), "high is nan; give a number"),
        (lambda: Scribble(threshold=0.5), "threshold is 0.5; give a whole number from 0 to 255"),
        (lambda: Tile(factor=0), "factor is 0; give a number from 1"),
        (lambda: Blur(sigma=1e9), "sigma is 1000000000.0; give a number from 0.1 to 100"),
        (lambda: preprocess("gray", NOISE[..., :1]), r"uint8 \(67, 90, 1\); give uint8"),
        (lambda: preprocess("canny", NOISE.astype("f")), "came as float32"),
        (lambda: preprocess("blur", NOISE[:0]), "a picture came as"),
        (lambda: inpaint_hint(NOISE, NOISE[..., 0].T), r"the mask came as uint8 \(90, 67\)"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(RequestError, match=message):
        make()
