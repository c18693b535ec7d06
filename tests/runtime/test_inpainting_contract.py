"""What a picture to start from may count on: its size, its pixels, its transparency, its EXIF."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

import runtime.__main__ as command
from engine.backends.settings import BackendSettings
from engine.errors import RequestError
from runtime import Hires, Pipeline, Request
from runtime.images.canvas import paste_back
from runtime.images.frame import Frame
from tests.support.pictures import drawing

DRAWN = {"num_inference_steps": 1, "seed": 1}


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.load(settings=BackendSettings(backend="cpu", threads=1))


def textured(width, height):
    """Return a fine texture, as photos have: every resampling changes it."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(
        np.stack([(x * 37 + y * 11) % 256, (x * y) % 256, x ^ y], -1).astype(np.uint8)
    )


def boxed(width, height, box):
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    return mask


def distances(width, height, box):
    """Return how far each pixel is from a box of pixels."""
    y, x = np.mgrid[0:height, 0:width]
    left, top, right, bottom = box
    across = np.maximum(left - x, x - right).clip(0)
    return np.hypot(across, np.maximum(top - y, y - bottom).clip(0))


def changed(before, after):
    return (np.asarray(before) != np.asarray(after)).any(-1)


@pytest.mark.parametrize("blur", [0, 0.3, 0.5, 0.7, 0.9, 1, 1.3, 1.7, 4, 9])
@pytest.mark.parametrize("box", [(20, 20, 40, 30), (30, 30, 30, 30), (0, 0, 5, 63)])
def test_no_pixel_changes_beyond_three_times_the_blur(box, blur):
    mask = boxed(64, 64, box)
    new = paste_back(Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64), "white"), mask, blur)
    away = distances(64, 64, box)
    pixels = np.asarray(new)[..., 0]
    assert (pixels[away > 3 * blur] == 255).all()
    assert (pixels[away == 0] == 0).all()


@pytest.mark.parametrize("size", [(301, 203), (300, 201), (41, 27)])
@pytest.mark.parametrize("blur", [0.0, 4.0])
@pytest.mark.parametrize("area", ["whole", "masked"])
def test_inpainting_keeps_size_and_pixels(pipeline, size, blur, area):
    photo = textured(*size)
    width, height = size
    box = width // 3, height // 4, width // 2 + 2, height // 2 + 2
    mask = boxed(*size, box)
    result = pipeline(
        "a hat", image=photo, mask=mask, mask_blur=blur, inpaint_area=area, **DRAWN
    ).images[0]
    assert result.size == size
    assert not changed(photo, result)[distances(*size, box) > 3 * blur].any(), "not a byte"
    assert changed(photo, result)[np.asarray(mask) > 0].mean() > 0.9


def test_the_whole_picture_may_be_masked(pipeline):
    photo = textured(51, 35)
    for area in ("whole", "masked"):
        white = Image.new("L", photo.size, 255)
        result = pipeline("a hat", image=photo, mask=white, inpaint_area=area, **DRAWN).images[0]
        assert result.size == photo.size


def test_a_mask_in_a_corner_is_enlarged(pipeline):
    """A small masked part is drawn in the model's own size, and what is shown is that part."""
    photo, mask = textured(200, 90), boxed(200, 90, (180, 2, 195, 12))
    plan = pipeline.plan(
        Request(prompt="a", image=photo, mask=mask, inpaint_area="masked", mask_padding=8, **DRAWN)
    )
    assert (plan.height, plan.width) == (128, 128)
    assert plan.frame.box == (172, 0, 200, 28)
    assert np.isclose(np.asarray(plan.mask).mean(), 255 * 16 * 11 / 28**2, rtol=0.1)
    whole = pipeline.finish(plan, [Image.new("RGB", (128, 128), "red")])[0]
    assert whole.size == photo.size
    assert (np.asarray(whole)[2:13, 180:196] == (255, 0, 0)).all()


@pytest.mark.parametrize("size", [(101, 43), (24, 20), (65, 129)])
def test_image_to_image_keeps_size_and_aspect(pipeline, size):
    photo = drawing(size[1], size[0])
    plan = pipeline.plan(Request(prompt="a", image=photo, strength=1.0, **DRAWN))
    assert plan.image.crop((0, 0, *size)).tobytes() == photo.tobytes(), "nothing is resampled"
    (result,) = pipeline("a", image=photo, strength=1.0, **DRAWN).images
    assert result.size == size


def test_sides_that_are_given_resize(pipeline):
    def size(**sides):
        photo = drawing(100, 200)
        return pipeline("a", image=photo, strength=1.0, **sides, **DRAWN).images[0].size

    assert size(height=64, width=64) == (64, 64)
    assert size(height=64) == (128, 64), "the aspect stays"
    assert size(width=64) == (64, 32)
    assert size(hires=Hires(scale=1.25, strength=1.0)) == (248, 123)


def test_outpainting_grows_by_what_is_asked(pipeline):
    photo = textured(61, 43)
    result = pipeline("a", image=photo, extend=(5, 0, 10, 3), mask_blur=0, **DRAWN).images[0]
    assert result.size == (76, 46)
    kept = result.crop((13, 0, 58, 35))
    assert kept.tobytes() == photo.crop((8, 0, 53, 35)).tobytes()


def erased(photo, box):
    """Return a picture with a transparent hole, whose colours are still there."""
    alpha = Image.new("L", photo.size, 255)
    ImageDraw.Draw(alpha).rectangle(box, fill=0)
    holed = photo.copy()
    holed.putalpha(alpha)
    return holed


def test_transparency_as_mask_in_app_and_command(pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo, box = textured(70, 50), (20, 10, 50, 40)
    erased(photo, box).save("erased.png")
    mask = boxed(70, 50, box)
    expected = pipeline("a hat", image=photo, mask=mask, **DRAWN).images[0]
    holed = Image.open("erased.png")
    assert pipeline("a hat", image=holed, mask="alpha", **DRAWN).images[0] == expected
    flags = ["--steps", "1", "--seed", "1", "--threads", "1", "--backend", "cpu"]
    flags += ["--image", "erased.png"]
    assert command.main(["a hat", *flags, "--mask", "alpha", "--out", "a.png"]) == 0
    np.testing.assert_array_equal(Image.open("a.png"), expected)
    assert command.main(["--again", "a.png", "--threads", "1", "--out", "b.png"]) == 0
    np.testing.assert_array_equal(Image.open("a.png"), Image.open("b.png"))
    photo.save("photo.png")
    assert command.main(["a", *flags[:-1], "photo.png", "--mask", "alpha"]) == 2


def test_a_picture_without_transparency_is_no_mask(pipeline):
    for photo in (drawing(32, 32), erased(drawing(32, 32), (90, 90, 99, 99))):
        with pytest.raises(RequestError, match="nothing of the image is transparent"):
            pipeline("a", image=photo, mask="alpha")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16", "1"])
def test_a_mask_file_means_what_the_mask_means(pipeline, tmp_path, monkeypatch, mode):
    """White on a transparent layer, as painting programs save it, and masks of other modes."""
    monkeypatch.chdir(tmp_path)
    drawing(48, 64).save("photo.png")
    mask = Image.new("RGBA", (64, 48), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (30, 10, 50, 30))
    if mode == "I;16":
        mask = Image.fromarray(np.asarray(boxed(64, 48, (30, 10, 49, 29))).astype(np.uint16) * 257)
    elif mode == "1":
        mask = boxed(64, 48, (30, 10, 49, 29)).convert("1")
    else:
        mask = mask.convert(mode)
    mask.save("mask.png")
    flags = ["--steps", "1", "--seed", "1", "--threads", "1", "--mask-blur", "0"]
    flags += ["--image", "photo.png", "--mask", "mask.png", "--out", "a.png"]
    assert command.main(["a hat", *flags]) == 0
    with Image.open("a.png") as made, Image.open("mask.png") as file:
        by_app = pipeline("a hat", image=drawing(48, 64), mask=file, mask_blur=0, **DRAWN)
        np.testing.assert_array_equal(made, by_app.images[0])
        kept = ~changed(made, drawing(48, 64))
    assert kept[:10].all()
    assert 0.8 < kept.mean() < 0.9, "all but the 20 by 20 pixels"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_phones_photo_stands_upright(pipeline, tmp_path, monkeypatch, orientation):
    monkeypatch.chdir(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = orientation
    drawing(40, 72).save("phone.png", exif=exif)
    boxed(72, 40, (0, 0, 20, 10)).save("mask.png", exif=exif)
    shown = (72, 40) if orientation < 5 else (40, 72)
    with Image.open("phone.png") as photo, Image.open("mask.png") as mask:
        result = pipeline("a", image=photo, mask=mask, mask_blur=0, **DRAWN).images[0]
    assert result.size == shown
    flags = ["--steps", "1", "--seed", "1", "--threads", "1", "--mask-blur", "0"]
    flags += ["--image", "phone.png", "--mask", "mask.png", "--out", "a.png"]
    assert command.main(["a", *flags]) == 0
    np.testing.assert_array_equal(Image.open("a.png"), result)


def test_broken_exif_turns_nothing(pipeline):
    photo = drawing(40, 72)
    photo.info["exif"] = b"Exif\0\0MM\0*\xff\xff\xff\xff"
    assert pipeline("a", image=photo, strength=1.0, **DRAWN).images[0].size == (72, 40)


def test_a_frame_and_the_way_back():
    photo, mask = textured(50, 20), boxed(50, 20, (30, 5, 35, 9))
    for frame in (
        Frame.padded(photo, mask, 8),
        Frame.masked(photo, mask, 64, 64, 3),
        Frame.masked(photo, mask, 32, 96, 50),
    ):
        drawn = frame.drawn_image()
        assert drawn.size == (frame.width, frame.height) == frame.drawn_mask().size
        assert frame.drawn_mask().getextrema() == (0, 255)
        assert frame.restore(drawn, 0.0).size == photo.size
        assert not changed(photo, frame.restore(drawn, 0.0))[np.asarray(mask) == 0].any()
