"""The watermark: what it withstands, measured on drawn pictures, and what it costs them."""

import io

import numpy as np
import pytest
from PIL import Image

from engine.backends.settings import BackendSettings
from engine.errors import RequestError
from runtime import Pipeline
from runtime.images.watermark import (
    embed_watermark,
    read_bits,
    read_watermark,
    watermark_bits,
)
from tests.support.pictures import drawing, psnr
from tests.support.tolerances import WATERMARK_BIT_ERROR, WATERMARK_PSNR_DB

TEXT = "SDV2"
PROMPTS = ["a red apple, fluent style", "a cat face, noto style", "a sailboat, twemoji style"]


@pytest.fixture(scope="module")
def images():
    pipeline = Pipeline.load(settings=BackendSettings(threads=1))
    small = pipeline(PROMPTS, seed=1, num_inference_steps=10).images
    return [*small, *pipeline(PROMPTS[0], seed=1, num_inference_steps=4, height=256).images]


def jpeg(image, quality=75):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def halved(image):
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)


def cropped(image):
    """Cut a tenth of each side off, at no multiple of a block."""
    edge = round(0.05 * image.width)
    return image.crop((edge + 1, edge, image.width - edge, image.height - edge - 1))


def bit_error(image, size):
    """Return the share of bits that are read wrong at the picture's own size."""
    restored = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    return np.mean(read_bits(restored) != watermark_bits(TEXT))


def test_it_is_read_and_hardly_seen(images):
    for image in images:
        marked = embed_watermark(image, TEXT)
        assert marked.size == image.size
        assert psnr(image, marked) >= WATERMARK_PSNR_DB
        assert read_watermark(marked) == TEXT
        assert read_watermark(image) is None


@pytest.mark.parametrize("change", [jpeg, halved], ids=lambda f: f.__name__)
def test_bits_withstand(images, change):
    for image in images:
        marked = embed_watermark(image, TEXT)
        assert bit_error(change(marked), image.size) <= WATERMARK_BIT_ERROR


@pytest.mark.parametrize("change", [jpeg, halved, cropped], ids=lambda f: f.__name__)
def test_it_is_found_after(images, change):
    for image in images:
        assert read_watermark(change(embed_watermark(image, TEXT))) == TEXT


@pytest.mark.parametrize("text", ["A", "ab", "x y", "~!?#"])
def test_any_text(text):
    assert read_watermark(embed_watermark(drawing(100, 90), text)) == text


@pytest.mark.parametrize("colour", ["white", "black", (200, 40, 30), (3, 250, 128)])
def test_on_one_colour(colour):
    marked = embed_watermark(Image.new("RGB", (128, 128), colour), TEXT)
    assert read_watermark(jpeg(marked)) == TEXT


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_any_mode(mode):
    assert read_watermark(embed_watermark(drawing(64, 64).convert(mode), TEXT)) == TEXT


def test_what_is_beyond_whole_blocks_stays():
    image = drawing(77, 131)
    marked = np.asarray(embed_watermark(image, TEXT))
    np.testing.assert_array_equal(marked[72:], np.asarray(image)[72:])
    np.testing.assert_array_equal(marked[:, 128:], np.asarray(image)[:, 128:])


def test_nothing_is_found_where_nothing_is():
    random = np.random.default_rng(0)
    for size in ((64, 64), (100, 37), (8, 8), (1, 1)):
        pixels = random.integers(0, 256, (*size, 3), np.uint8)
        assert read_watermark(Image.fromarray(pixels)) is None


@pytest.mark.parametrize("text", ["", "12345", "ä", "a\n", "\0"])
def test_no_such_text(text):
    with pytest.raises(RequestError, match="1 to 4 printable ASCII characters"):
        embed_watermark(drawing(64, 64), text)


def test_a_picture_that_is_too_small():
    with pytest.raises(
        RequestError, match="needs 64 blocks of 8 x 8 pixels, and a picture of 64 x 63"
    ):
        embed_watermark(drawing(63, 64), TEXT)
