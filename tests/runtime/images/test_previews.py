import numpy as np
import pytest
from PIL import Image

from engine.backends.settings import BackendSettings
from engine.errors import OutputError, RequestError
from runtime import Pipeline, Request
from runtime.images.previews import (
    GAP,
    Preview,
    check_animation,
    parse_steps,
    probe,
    sheet_size,
    side_by_side,
    write_animation,
)
from tests.support.pictures import drawing, psnr
from tests.support.tolerances import (
    LOSSY_PSNR_DB,
    OWN_PREVIEW_PSNR_DB,
    PREVIEW_PIXELS,
    PROBE_PREVIEW_PSNR_DB,
)

COLOURS = ("red", "lime", "blue", "gray", "yellow")


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.load("pictogram", settings=BackendSettings(threads=1))


@pytest.fixture(scope="module")
def finished(pipeline):
    """Give latents of two pictures and their decodes."""
    prompts = ["a red apple, fluent style", "a sailboat, noto style"]
    request = Request(prompt=prompts, seed=7, num_inference_steps=8, sampler="dpmpp_2m")
    *_, last = pipeline.denoise(pipeline.plan(request))
    return last.latents, pipeline.decode(last.latents)


def linear_decode(latents, factors, bias, scale=8):
    """Decode as a linear autoencoder would; factors (B, C, 3), bias (B, 1, 3)."""
    batch, channels, height, width = latents.shape
    points = latents.reshape(batch, channels, -1).swapaxes(1, 2)
    pixels = (points @ factors + bias).reshape(batch, height, width, 3)
    assert pixels.min() >= 0
    assert pixels.max() <= 255
    large = pixels.round().astype(np.uint8).repeat(scale, 1).repeat(scale, 2)
    return [Image.fromarray(picture) for picture in large]


def small(picture, side=16):
    return picture.resize((side, side), Image.Resampling.BOX)


@pytest.mark.parametrize("channels", [4, 7])
def test_a_linear_decoder_is_found_for_each_picture(channels):
    random = np.random.default_rng(1)
    latents = random.uniform(-1, 1, (3, channels, 12, 20)).astype(np.float32)
    factors = random.uniform(-15, 15, (3, channels, 3))
    bias = np.array([110, 128, 140]).reshape(3, 1, 1) + np.zeros((1, 1, 3))
    pictures = linear_decode(latents, factors, bias)
    preview = Preview.fit(latents, pictures)
    assert preview.factors.dtype == preview.bias.dtype == np.float32
    drawn = preview.draw(latents, scale=1)
    assert [(picture.size, picture.mode) for picture in drawn] == [((20, 12), "RGB")] * 3
    for seen, picture in zip(drawn, pictures, strict=True):
        expected = np.asarray(picture.resize((20, 12), Image.Resampling.BOX), int)
        assert np.abs(np.asarray(seen, int) - expected).max() <= PREVIEW_PIXELS
    assert [picture.size for picture in preview.draw(latents)] == [(160, 96)] * 3


def test_the_finished_picture_tells_how_its_previews_look(finished):
    latents, pictures = finished
    drawn = Preview.fit(latents, pictures).draw(latents, scale=1)
    for seen, picture in zip(drawn, pictures, strict=True):
        assert psnr(seen, small(picture)) >= OWN_PREVIEW_PSNR_DB


def test_a_probe_serves_every_picture_before_it_is_finished(pipeline, finished):
    latents, pictures = finished
    channels = pipeline.model.vae.latent_channels
    preview = Preview.fit(probe(channels), pipeline.decode(probe(channels)))
    drawn = preview.draw(latents, scale=1)
    assert len(drawn) == len(pictures)
    for seen, picture in zip(drawn, pictures, strict=True):
        assert psnr(seen, small(picture)) >= PROBE_PREVIEW_PSNR_DB


@pytest.mark.parametrize("channels", [1, 4, 16])
def test_a_probe_is_balanced(channels):
    latents = probe(channels)
    assert latents.shape == (1, channels, 32, 32)
    assert latents.dtype == np.float32
    assert np.all(latents.mean((2, 3)) == 0)
    points = latents.reshape(channels, -1)
    assert np.linalg.matrix_rank(np.vstack([points, np.ones_like(points[:1])])) == channels + 1
    assert np.array_equal(latents, probe(channels))


def test_latents_that_are_no_numbers_still_give_previews():
    latents = np.full((1, 8, 8, 8), np.nan, np.float32)
    latents[0, :, 0, 0] = np.inf
    preview = Preview.fit(latents, [Image.new("RGB", (64, 64), (10, 20, 30))])
    (picture,) = preview.draw(latents)
    assert picture.getpixel((40, 40)) == (10, 20, 30)


def test_steps_are_read_in_order():
    assert parse_steps("1,5,10,15,20", 20) == (1, 5, 10, 15, 20)
    assert parse_steps(" 20, 3 ,1", 20) == (1, 3, 20)
    assert parse_steps("007", 8) == (7,)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("0,1", "'0'"),
        ("1,21", "'21'"),
        ("1,-2", "'-2'"),
        ("1,x", "'x'"),
        ("1,2.0", "'2.0'"),
        ("1;2", "'1;2'"),
        ("", "''"),
        ("1,,2", "''"),
        ("3,5,3", "'3'"),
        ("5,05", "'05'"),
        ("١", "'١'"),
        ("9" * 5000, "999'"),
    ],
)
def test_steps_that_are_refused(text, wrong):
    with pytest.raises(RequestError, match="whole numbers from 1 to 20") as caught:
        parse_steps(text, 20)
    assert f"hold {wrong}" in str(caught.value) or len(text) > 1000


def test_pictures_beside_each_other():
    rows = [[Image.new("RGB", (30, 20), c) for c in COLOURS[i : i + 3]] for i in (0, 2)]
    sheet = np.asarray(side_by_side(rows))
    assert sheet.shape == (2 * 20 + GAP, 3 * 30 + 2 * GAP, 3)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            top, left = i * (20 + GAP), j * (30 + GAP)
            assert np.array_equal(sheet[top : top + 20, left : left + 30], picture)
    assert np.all(sheet[20 : 20 + GAP] == 255)
    assert np.all(sheet[:, 30 : 30 + GAP] == 255)


@pytest.mark.parametrize("freetype", [True, False])
def test_captions_stand_above_the_columns(monkeypatch, freetype):
    monkeypatch.setattr("runtime.images.previews.features.check", lambda _: freetype)
    row = [Image.new("RGB", (128, 128), colour) for colour in COLOURS[:2]]
    sheet = np.asarray(side_by_side([row], ["step 1", ""]))
    top = sheet.shape[0] - 128
    assert np.array_equal(sheet[top:, :128], row[0])
    dark = np.argwhere(sheet[:top].min(axis=2) < 128)
    assert len(dark) > 20  # pixels of ink
    assert abs(dark[:, 1].mean() - 64) < 8
    assert dark[:, 0].min() > 0
    assert dark[:, 0].max() < top - 1


@pytest.mark.parametrize("sides", [(128, 96), (16, 16), (800, 64)])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 3)])
def test_the_size_of_a_sheet_is_known_before_it_is_drawn(sides, rows, columns):
    cells = [[Image.new("RGB", sides)] * columns] * rows
    for texts in ((), (["a"] * columns,), (["a"] * columns, ["some label", ""][:rows])):
        assert sheet_size(rows, columns, sides, *texts) == side_by_side(cells, *texts).size


def frames(count, side=64):
    """Give pictures that differ everywhere."""
    start = np.asarray(drawing(side, side))
    return [Image.fromarray(np.roll(start, 7 * i, axis=1)) for i in range(count)]


def test_an_animation_is_read_back(tmp_path):
    path, drawn = tmp_path / "apple.webp", frames(5)
    write_animation(path, drawn, frame_ms=80, hold_ms=1500)
    with Image.open(path) as file:
        assert (file.n_frames, file.info["loop"], file.size) == (5, 0, (64, 64))
        durations = []
        for i, frame in enumerate(drawn):
            file.seek(i)
            assert psnr(file.convert("RGB"), frame) >= LOSSY_PSNR_DB
            durations.append(file.info["duration"])
    assert durations == [80, 80, 80, 80, 1500]
    assert [entry.name for entry in tmp_path.iterdir()] == ["apple.webp"]


def test_an_animation_of_one_frame(tmp_path):
    write_animation(tmp_path / "one.webp", frames(1))
    with Image.open(tmp_path / "one.webp") as file:
        assert file.n_frames == 1


def test_an_old_animation_stays_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "apple.webp"
    write_animation(path, frames(3))
    before = path.read_bytes()

    def half(self, file, **_):
        file.write(b"RIFF half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OutputError, match="No space left on device"):
        write_animation(path, frames(2))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["apple.webp"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("apple.png", "the animation .*apple.png ends in '.png'; give a name in .webp"),
        ("apple", "ends in ''"),
        ("missing/apple.webp", "does not exist"),
    ],
)
def test_no_animation_can_be_written_there(tmp_path, name, said):
    with pytest.raises(OutputError, match=said):
        check_animation(tmp_path / name)
    with pytest.raises(OutputError, match=said):
        write_animation(tmp_path / name, frames(2))
    assert list(tmp_path.iterdir()) == []
