import io
import os
import stat
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from engine.errors import OutputError, RequestError
from runtime.images.files import FORMATS, check_output, read_image, read_settings, write_image
from tests.support.pictures import drawing, psnr
from tests.support.tolerances import LOSSY_PSNR_DB

SETTINGS = {"prompt": "ein „Apfel“ 🍎", "seed": 2**64 - 1, "guidance_scale": 5.0, "list": [1, None]}


@pytest.fixture
def picture():
    return drawing(48, 64)


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("suffix", [*FORMATS, ".PNG"])
def test_written_and_read(tmp_path, picture, suffix):
    path = tmp_path / f"apple{suffix}"
    write_image(picture, path, SETTINGS)
    again = read_image(path)
    assert (again.size, again.mode) == ((64, 48), "RGB")
    assert psnr(again, picture) >= LOSSY_PSNR_DB
    with Image.open(path) as file:
        assert file.format == FORMATS[suffix.lower()]
    assert listing(tmp_path) == [path.name]


def test_a_png_holds_its_pixels_and_settings(tmp_path, picture):
    path = tmp_path / "apple.png"
    write_image(picture, path, SETTINGS)
    assert np.array_equal(read_image(path), picture)
    assert read_settings(path) == SETTINGS


def test_a_picture_without_settings(tmp_path, picture):
    picture.save(tmp_path / "plain.png")
    assert read_settings(tmp_path / "plain.png") is None
    picture.save(tmp_path / "apple.jpg")
    assert read_settings(tmp_path / "apple.jpg") is None


@pytest.mark.parametrize("text", ["[1, 2]", "7", "null"])
def test_settings_that_are_no_object(tmp_path, picture, text):
    from PIL import PngImagePlugin

    chunk = PngImagePlugin.PngInfo()
    chunk.add_itxt("latentrt", text)
    picture.save(tmp_path / "other.png", pnginfo=chunk)
    assert read_settings(tmp_path / "other.png") is None


def test_settings_that_cannot_be_read(tmp_path, picture):
    from PIL import PngImagePlugin

    with pytest.raises(RequestError, match="cannot be read as a picture"):
        read_settings(tmp_path / "missing.png")
    chunk = PngImagePlugin.PngInfo()
    chunk.add_itxt("latentrt", '{"prompt": ')
    picture.save(tmp_path / "broken.png", pnginfo=chunk)
    with pytest.raises(RequestError, match="cannot be read"):
        read_settings(tmp_path / "broken.png")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("apple", "ends in ''; give a name in .png, .jpg"),
        ("apple.gif", "ends in '.gif'"),
        ("apple.png.exe", "ends in '.exe'"),
        ("missing/apple.png", "the folder .*missing does not exist; make it first"),
        ("folder.png", "is a folder; give the name of a file"),
        ("file/apple.png", "does not exist"),
        ("a" * 300 + ".png", "File name too long"),
        ("zero\0.png", "cannot be written"),
        ("loop.png", "cannot be written|loop"),
    ],
)
def test_no_picture_can_be_written_there(tmp_path, picture, name, said):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "loop.png").symlink_to("loop.png")
    before = listing(tmp_path)
    with pytest.raises(OutputError, match=said):
        check_output(tmp_path / name)
    with pytest.raises(OutputError, match=said):
        write_image(picture, tmp_path / name, {})
    assert listing(tmp_path) == before


def test_a_folder_that_may_not_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may everything
    with pytest.raises(OutputError, match="may not be written to"):
        check_output(tmp_path / "apple.png")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(OutputError, match="may not be written to"):
            check_output(tmp_path / "apple.png")
    finally:
        tmp_path.chmod(stat.S_IRWXU)


@pytest.mark.skipif(os.name != "posix", reason="there are no sticky folders")
def test_a_file_that_its_owner_alone_may_replace(tmp_path, monkeypatch):
    """As in /tmp, where anybody may write, found before a picture is drawn for it."""
    path = tmp_path / "apple.png"
    path.touch()
    tmp_path.chmod(0o1777)
    check_output(path)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(OutputError, match="another user's and may not be replaced"):
        check_output(path)
    check_output(path, replaces=False)
    check_output(tmp_path / "pear.png")
    tmp_path.chmod(0o777)
    check_output(path)


def test_a_link_is_followed(tmp_path, picture):
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.png"
    link.symlink_to(tmp_path / "real" / "apple.png")
    write_image(picture, link, {})
    assert link.is_symlink()
    assert read_image(tmp_path / "real" / "apple.png").size == (64, 48)


def test_the_old_picture_stays_when_saving_fails(tmp_path, picture, monkeypatch):
    path = tmp_path / "apple.png"
    write_image(picture, path, {"seed": 1})
    before = path.read_bytes()

    def half(self, file, **_):
        file.write(b"\x89PNG half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OutputError, match="No space left on device"):
        write_image(picture, path, {"seed": 2})
    assert path.read_bytes() == before
    assert listing(tmp_path) == ["apple.png"]
    with pytest.raises(OutputError, match="No space left"):
        write_image(picture, tmp_path / "new.png", {})
    assert listing(tmp_path) == ["apple.png"]


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_damaged_images(tmp_path, picture, suffix):
    file = io.BytesIO()
    noisy = np.asarray(picture) ^ np.random.default_rng(0).integers(0, 99, (48, 64, 3), np.uint8)
    Image.fromarray(noisy).save(file, FORMATS[f".{suffix}"])
    whole, path = file.getvalue(), tmp_path / f"cut.{suffix}"
    for length in (0, 3, 8, 20, 40, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(RequestError, match=r"the image .*cut.* cannot be read"):
            read_image(path)
    random = np.random.default_rng(1)
    for _ in range(60):
        damaged = bytearray(whole)
        for place in random.integers(0, len(whole), 5):
            damaged[place] ^= int(random.integers(1, 256))
        path.write_bytes(damaged)
        with suppress(RequestError):  # a damaged picture may still be one; nothing else is raised
            assert read_image(path).mode == "RGB"


def test_images_that_are_none(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    for path, said in (
        (tmp_path, "Is a directory"),
        (tmp_path / "missing.png", r"missing.png cannot be read \(No such file or directory\)"),
        (tmp_path / "text.png", "cannot identify image file"),
        (tmp_path / ("a" * 300), "File name too long"),
    ):
        with pytest.raises(RequestError, match=said):
            read_image(path)


def test_an_image_that_would_fill_the_memory(tmp_path, picture, monkeypatch):
    picture.save(tmp_path / "large.png")
    for limit in (2000, 1000):  # more than the limit warns, more than twice is an error
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(RequestError, match="decompression bomb"):
            read_image(tmp_path / "large.png")


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_becomes_white(tmp_path, mode):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    image.convert(mode).save(tmp_path / "clear.png")
    read = read_image(tmp_path / "clear.png")
    assert [read.getpixel((0, 0)), read.getpixel((1, 0))] == [(255,) * 3, (0,) * 3]


def test_a_transparent_palette_becomes_white(tmp_path):
    image = Image.new("P", (2, 1), 0)
    image.putpalette([0, 0, 0, 200, 0, 0])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "palette.png", transparency=0)
    read = read_image(tmp_path / "palette.png")
    assert [read.getpixel((0, 0)), read.getpixel((1, 0))] == [(255,) * 3, (200, 0, 0)]


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(tmp_path, picture, mode):
    path = tmp_path / ("a.png" if mode in "1L" else "a.jpg")
    picture.convert(mode).save(path)
    assert read_image(path).mode == "RGB"


def test_sixteen_bits_keep_their_grey(tmp_path):
    grey = np.array([[0, 0x4000, 0x8000, 0xFFFF]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    read = np.asarray(read_image(tmp_path / "deep.png"))[0, :, 0]
    np.testing.assert_allclose(read, [0, 64, 128, 255], atol=1)


def test_a_photograph_is_turned_as_its_camera_says(tmp_path):
    image = Image.new("RGB", (2, 1), "white")
    image.putpixel((0, 0), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees, clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    turned = read_image(tmp_path / "turned.png")
    assert turned.size == (1, 2)
    assert turned.getpixel((0, 0)) == (0, 0, 0)
