"""Masks and canvases; the oracle of masks is diffusers' own preparation, bit for bit."""

import math

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from engine.errors import RequestError
from runtime.images.canvas import (
    GRAY,
    MAX_SIDE,
    extend,
    latent_mask,
    masked_pixels,
    paste_back,
)
from runtime.images.files import as_rgb
from tests.support.pictures import drawing
from tests.support.tolerances import FEATHER, GRAY_PIXEL

MODES = ["1", "L", "P", "RGB", "RGBA", "LA", "RGBX", "CMYK", "YCbCr", "HSV", "F"]
SIZES = [(64, 64), (48, 72), (256, 512), (8, 8)]


def noise(height, width, seed=0):
    gray = np.random.default_rng(seed).integers(0, 256, (height, width), np.uint8)
    return Image.fromarray(gray)


def square(height, width, top, left, bottom, right, mode="L"):
    """Draw a mask that is white from (top, left) to (bottom, right), exclusive."""
    mask = Image.new(mode, (width, height))
    mask.paste(Image.new(mode, (right - left, bottom - top), "white"), (left, top))
    return mask


def of_diffusers(mask, height, width, compression=8):
    """Return the mask of pixels and the one of latents that diffusers' inpainting makes."""
    processor = VaeImageProcessor(
        vae_scale_factor=compression,
        do_normalize=False,
        do_binarize=True,
        do_convert_grayscale=True,
    )
    pixels = processor.preprocess(mask, height=height, width=width)
    size = (height // compression, width // compression)
    return pixels, torch.nn.functional.interpolate(pixels, size=size)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("source", [(50, 70), (64, 64), (300, 200)])
def test_a_mask_as_diffusers_makes_it(mode, source):
    mask = noise(*source).convert(mode)
    for height, width in SIZES:
        pixels, latents = of_diffusers(mask, height, width)
        if not latents.any():
            continue
        made = latent_mask(mask, height, width)
        assert made.dtype == np.float32
        assert np.array_equal(made, latents[0].numpy())
        hidden = masked_pixels(Image.new("RGB", (width, height)), mask) == GRAY
        assert np.array_equal(hidden.all(axis=2), pixels[0, 0].numpy().astype(bool))


@pytest.mark.parametrize("compression", [4, 8, 16])
def test_a_mask_at_other_compressions(compression):
    mask = noise(90, 40)
    _, latents = of_diffusers(mask, 96, 64, compression)
    assert np.array_equal(latent_mask(mask, 96, 64, compression), latents[0].numpy())


@pytest.mark.parametrize(("gray", "painted"), [(127, 0), (128, 1)])
def test_gray_goes_to_the_nearer(gray, painted):
    mask = Image.new("L", (64, 64), gray)
    mask.putpixel((0, 0), 255)
    cells = latent_mask(mask, 64, 64)
    assert cells[0, 0, 0] == 1
    assert (cells[0, 1:] == painted).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_is_kept(mode):
    mask = Image.new("RGBA", (64, 32), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 32, 32))
    mask.paste((0, 0, 0, 255), (0, 16, 32, 32))
    cells = latent_mask(mask.convert(mode), 32, 64)
    assert cells.sum() == 4 * 2
    assert cells[0, :2, :4].all()


def test_a_transparent_palette_is_kept():
    mask = Image.new("P", (64, 64), 0)
    mask.putpalette([255, 255, 255, 250, 250, 250])
    mask.paste(1, (0, 0, 32, 64))
    mask.info["transparency"] = 0
    cells = latent_mask(mask, 64, 64)
    assert cells[0, :, :4].all()
    assert not cells[0, :, 4:].any()


def test_sixteen_bits_keep_their_gray():
    gray = np.array([[0, 0x7F00, 0x8000, 0xFFFF]]).repeat(32, axis=0).repeat(8, axis=1)
    for dtype in (np.uint16, np.int32):
        deep = Image.fromarray(gray.astype(dtype))
        assert latent_mask(deep, 32, 32).tolist() == [[[0, 0, 1, 1]] * 4]


def test_eight_bits_in_a_wider_mode_stay_eight_bits():
    gray = Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8).repeat(32, 0).repeat(8, 1))
    assert latent_mask(gray.convert("I"), 32, 32).tolist() == [[[0, 0, 1, 1]] * 4]
    assert np.array_equal(as_rgb(gray.convert("I")), gray.convert("RGB"))


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (Image.new("L", (64, 64)), "the mask is black everywhere"),
        (Image.new("L", (64, 64), 127), "the mask is black everywhere"),
        (Image.new("RGBA", (9, 9)), "the mask is black everywhere"),
        (square(64, 64, 1, 1, 8, 64), r"no white area of 8 x 8 pixels.*\(64 x 64\); make"),
    ],
    ids=["black", "gray", "transparent", "between the cells"],
)
def test_nothing_to_paint(mask, said):
    with pytest.raises(RequestError, match=said):
        latent_mask(mask, 64, 64)


def test_colours_that_have_no_gray():
    with pytest.raises(RequestError, match=r"mask cannot be read as gray .*mode L or RGB"):
        latent_mask(Image.new("LAB", (8, 8)), 64, 64)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_hidden_pixels_are_those_of_diffusers(mode):
    image, mask = drawing(64, 48).convert(mode), noise(30, 30)
    pixels, _ = of_diffusers(mask, 64, 48)
    normal = VaeImageProcessor().preprocess(image.convert("RGB"), height=64, width=48)
    theirs = (normal * (pixels < 0.5))[0].permute(1, 2, 0).numpy()
    ours = masked_pixels(image, mask)
    assert ours.dtype == np.uint8
    np.testing.assert_allclose(ours / 127.5 - 1, theirs, atol=GRAY_PIXEL)
    assert (ours[pixels[0, 0].numpy() == 1] == GRAY).all()


def test_pasting_back_keeps_either_picture():
    white, black = Image.new("RGB", (96, 96), "white"), Image.new("RGB", (96, 96))
    for place in ((32, 32, 64, 64), (48, 48, 49, 49), (0, 40, 96, 43)):
        mask = square(96, 96, *place)
        share = np.asarray(paste_back(white, black, mask))[..., 0]
        inside = np.asarray(mask) > 0
        assert (share[inside] == 255).all(), "the original does not show inside"
        rows, columns = np.nonzero(inside)
        far = np.ones((96, 96), bool)
        down = slice(max(rows.min() - 13, 0), rows.max() + 14)
        far[down, max(columns.min() - 13, 0) : columns.max() + 14] = False
        assert (share[far] == 0).all(), "the new picture does not show far outside"
    edge = np.asarray(paste_back(white, black, square(96, 96, 0, 0, 96, 48)))[50, :, 0]
    assert (np.diff(edge[40:80].astype(int)) <= 0).all()
    share = math.erfc(4.5 / 4 / math.sqrt(2))  # twice a normal's tail, 4.5 pixels from the edge
    assert abs(edge[52] / 255 - share) < FEATHER


def test_pasting_back_bit_for_bit():
    picture, original = drawing(64, 64), noise(64, 64).convert("RGB")
    mask = square(32, 32, 0, 0, 32, 16)
    sharp = np.asarray(paste_back(picture, original, mask, blur=0))
    assert np.array_equal(sharp[:, :32], np.asarray(picture)[:, :32])
    assert np.array_equal(sharp[:, 32:], np.asarray(original)[:, 32:])
    soft = np.asarray(paste_back(picture, original, mask, blur=2))
    assert np.array_equal(soft[:, :32], np.asarray(picture)[:, :32])
    assert np.array_equal(soft[:, 40:], np.asarray(original)[:, 40:])
    assert not np.array_equal(soft, sharp)


def test_pasting_back_an_original_of_another_size():
    original = Image.new("RGBA", (20, 10), "red")
    pasted = paste_back(drawing(64, 64), original, square(8, 8, 0, 0, 8, 4))
    assert (pasted.size, pasted.mode) == ((64, 64), "RGB")
    assert pasted.getpixel((63, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("margins", "size", "place"),
    [
        ({"left": 64}, (128, 64), (64, 0)),
        ({"right": 60}, (124, 64), (0, 0)),
        ({"left": 60}, (124, 64), (60, 0)),
        ({"top": 1, "bottom": 1}, (64, 66), (0, 1)),
        ({"left": 3, "top": 5, "right": 40, "bottom": 0}, (107, 69), (3, 5)),
    ],
)
def test_a_canvas(margins, size, place):
    image = drawing(64, 64)
    canvas, mask = extend(image, **margins)
    assert (canvas.size, canvas.mode) == (size, "RGB")
    assert (mask.size, mask.mode) == (size, "L")
    box = (*place, place[0] + 64, place[1] + 64)
    assert np.array_equal(canvas.crop(box), image), "the picture itself stays bit for bit"
    kept = np.asarray(mask) == 0
    assert set(np.unique(mask)) == {0, 255}
    outside = kept.copy()
    outside[box[1] : box[3], box[0] : box[2]] = False
    assert not outside.any(), "all new area is painted"
    seams = kept[box[1] : box[3], box[0] : box[2]]
    grown = (place[1] > 0, size[1] > box[3], place[0] > 0, size[0] > box[2])
    for edge, wide in zip((seams[:8], seams[-8:], seams[:, :8], seams[:, -8:]), grown, strict=True):
        assert edge.any() != wide, "painted along a seam, kept along the other sides"
    assert latent_mask(mask, size[1], size[0]).any()


def test_new_area_continues_the_edge():
    image = Image.new("RGB", (64, 64), "blue")
    image.paste((255, 0, 0), (32, 0, 64, 64))
    canvas = np.asarray(extend(image, left=64, right=64)[0]).astype(int)
    assert np.abs(canvas[:, :32] - (0, 0, 255)).max() <= 8
    assert np.abs(canvas[:, -32:] - (255, 0, 0)).max() <= 8


def test_new_area_is_the_smoother_the_farther():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[::2] = 255
    canvas = np.asarray(extend(Image.fromarray(stripes), right=128)[0]).astype(float)
    contrast = canvas[..., 0].std(axis=0)
    assert contrast[64] == contrast[0]
    assert contrast[70] < contrast[0] / 4
    assert contrast[100:].max() < 2
    assert abs(canvas[:, 100:].mean() - 127.5) < 2, "brightness stays"


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_a_mask_lies_where_the_picture_lies(mode):
    """What is transparent stays."""
    mask = Image.new(mode, (40, 24))
    mask.paste("white", (30, 0, 40, 24))
    if mode == "RGBA":
        mask.paste((255, 255, 255, 0), (12, 0, 20, 24))
    canvas, new = extend(noise(24, 40), left=5, mask=mask)
    assert canvas.size == new.size == (45, 24)
    painted = np.asarray(new)[12] == 255
    assert painted.tolist() == [True] * 13 + [False] * 22 + [True] * 10


def test_the_smallest_and_the_most_narrow_pictures():
    for image in (Image.new("RGB", (1, 1), "red"), noise(16, 1), noise(1, 1)):
        canvas, mask = extend(image, right=7, bottom=8)
        assert canvas.size == (image.width + 7, image.height + 8)
        assert mask.getpixel((7, 7)) == 255


@pytest.mark.parametrize(
    ("margins", "said"),
    [
        ({"left": -1}, "extend's left is -1; give a whole number from 0"),
        ({"top": 1.5}, "top is 1.5"),
        ({"right": "8"}, "right is '8'"),
        ({"bottom": True}, "bottom is True"),
        ({}, "grows on no side; add pixels left, top, right or bottom"),
        ({"left": 0, "bottom": 0}, "grows on no side"),
        ({"right": MAX_SIDE}, f"8256 x 64 pixels; each side may have {MAX_SIDE}, add fewer"),
        ({"top": 10**30}, f"from 0 to {MAX_SIDE}"),
    ],
)
def test_canvases_that_are_none(margins, said):
    with pytest.raises(RequestError, match=said):
        extend(drawing(64, 64), **margins)
