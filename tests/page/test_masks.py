"""Pictures to start from and masks: what is sent is what was chosen and painted."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from serving.limits import Limits
from tests.support.browsers import WIDE, card, draw, expect, kept, need_browser, visiting
from tests.support.named_requests import IMAGE
from tests.support.painted_runners import PaintedRunner
from tests.support.servers import load, models, serving

need_browser()

SIZE = 96, 64  # of the picture to start from, in pixels


class RememberingRunner(PaintedRunner):
    """One that keeps the requests it was given."""

    def unfinished_pictures(self, picture_request):
        self.request = picture_request.request()
        return super().unfinished_pictures(picture_request)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    IMAGE.convert("RGB").resize(SIZE).save(path)
    return path


@pytest.fixture
def runner():
    return RememberingRunner()


@pytest.fixture
def url(runner):
    with serving(runner) as started:
        yield started.url


@pytest.fixture
def page(browser, url, photo):
    with visiting(browser, url) as opened:
        choose(opened, photo)
        yield opened


def choose(page, file):
    page.get_by_label("Picture file").set_input_files(file)
    page.get_by_label("Paint what is to change").check()
    page.get_by_label("Brush").fill("8")
    page.locator("#mask").scroll_into_view_if_needed()


def sent(page, runner):
    """Draw, and return the mask that the engine is given, a truth value for each pixel."""
    before = page.locator(".card[data-state=done]").count()
    draw(page, "a cat", num_inference_steps=2)
    expect(page.locator(".card[data-state=done]")).to_have_count(before + 1)
    mask = np.asarray(runner.request.mask.convert("L"))
    assert set(np.unique(mask)) <= {0, 255}
    return mask > 0


def stroke(points, radius=8):
    """Return the pixels whose centres are within a radius of a line through points."""
    across, down = np.meshgrid(np.arange(SIZE[0]) + 0.5, np.arange(SIZE[1]) + 0.5)
    painted = np.zeros(down.shape, bool)
    for (x0, y0), (x1, y1) in zip(points, points[1:] or points, strict=False):
        length = (x1 - x0) ** 2 + (y1 - y0) ** 2
        share = ((across - x0) * (x1 - x0) + (down - y0) * (y1 - y0)) / (length or 1)
        share = np.clip(share, 0, 1)
        near = np.hypot(across - x0 - share * (x1 - x0), down - y0 - share * (y1 - y0))
        painted |= near <= radius
    return painted


def places(page, points):
    """Return where points of the picture are on the screen."""
    box = page.locator("#mask").bounding_box()
    scale = box["width"] / SIZE[0], box["height"] / SIZE[1]
    return [(box["x"] + x * scale[0], box["y"] + y * scale[1]) for x, y in points]


def by_mouse(page, points):
    first, *others = places(page, points)
    page.mouse.move(*first)
    page.mouse.down()
    for place in others:
        page.mouse.move(*place)
    page.mouse.up()


def by_touch(page, points):
    session = page.context.new_cdp_session(page)
    for number, (x, y) in enumerate(places(page, points)):
        kind = "touchMove" if number else "touchStart"
        told = {"type": kind, "touchPoints": [{"x": x, "y": y}]}
        session.send("Input.dispatchTouchEvent", told)
    session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


LINE = [(20.0, 16.0), (60.0, 40.0), (80.0, 20.0)]


def same(found, wanted):
    """Say that masks agree but for pixels on the very edge, where a screen's place is rounded."""
    assert wanted.sum() > 100
    assert (found != wanted).sum() <= 0.02 * wanted.sum()


def test_a_mask_painted_by_mouse(page, runner):
    by_mouse(page, LINE)
    same(sent(page, runner), stroke(LINE))
    assert runner.request.image.size == SIZE


def test_a_mask_painted_by_finger(browser, url, runner, photo):
    """On a phone, where the page would scroll under a finger elsewhere."""
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with visiting(browser, url, **phone) as page:
        choose(page, photo)
        before = page.evaluate("window.scrollY")
        by_touch(page, LINE)
        assert page.evaluate("window.scrollY") == before
        same(sent(page, runner), stroke(LINE))


def test_keys_paint_exactly(page, runner):
    page.locator("#mask").focus()
    page.keyboard.press("Space")
    for _ in range(3):
        page.keyboard.press("Shift+ArrowRight")
    wanted = stroke([(48, 32), (60, 32)])
    np.testing.assert_array_equal(sent(page, runner), wanted)


def test_erase_undo_invert_and_clear(page, runner):
    dot = [(48, 32)]
    page.locator("#mask").focus()
    page.keyboard.press("Space")
    button = {
        name: page.get_by_role("button", name=name, exact=True)
        for name in ("Erase", "Undo", "Invert", "Clear")
    }
    button["Invert"].click()
    np.testing.assert_array_equal(sent(page, runner), ~stroke(dot))
    button["Undo"].click()
    np.testing.assert_array_equal(sent(page, runner), stroke(dot))
    button["Erase"].click()
    expect(button["Erase"]).to_have_attribute("aria-pressed", "true")
    page.get_by_label("Brush").fill("4")
    page.locator("#mask").focus()
    page.keyboard.press("Space")
    np.testing.assert_array_equal(sent(page, runner), stroke(dot) & ~stroke(dot, 4))
    button["Clear"].click()
    draw(page, "a cat")
    alert = page.get_by_role("alert").filter(has_text="Nothing is painted")
    expect(alert).to_be_visible()
    button["Undo"].click()
    np.testing.assert_array_equal(sent(page, runner), stroke(dot) & ~stroke(dot, 4))


def test_a_mask_comes_back_with_its_settings(page, runner):
    """From a card, after a reload, to be painted on."""
    by_mouse(page, LINE)
    first = sent(page, runner)
    page.reload()
    card(page, "a cat").get_by_role("button", name="Reuse settings").click()
    expect(page.get_by_label("Paint what is to change")).to_be_checked()
    np.testing.assert_array_equal(sent(page, runner), first)
    again, before = kept(page)
    assert again["mask"] == before["mask"]


def test_pictures_are_sent_as_they_are_or_shrunk_to_what_is_taken(browser, url, runner, tmp_path):
    """A file that fits goes byte for byte; a large one, or of another kind, is redrawn."""
    image = IMAGE.convert("RGB")
    image.resize((3000, 1500)).save(tmp_path / "large.png")
    image.resize((40, 24)).save(tmp_path / "small.bmp")
    turned = Image.Exif()
    turned[0x0112] = 6  # a phone that was held upright
    image.resize((80, 48)).save(tmp_path / "phone.jpg", exif=turned)
    (tmp_path / "text.png").write_bytes(b"no picture")
    sizes = {"large.png": (2048, 1024), "small.bmp": (40, 24), "phone.jpg": (48, 80)}
    with visiting(browser, url) as page:
        for name, size in sizes.items():
            page.get_by_label("Picture file").set_input_files(tmp_path / name)
            expect(page.locator("#source-size")).to_have_text(f"{size[0]} × {size[1]} pixels")
            draw(page, name, num_inference_steps=1)
            expect(card(page, name)).to_have_attribute("data-state", "done")
            assert runner.request.image.size == size
        page.get_by_label("Longest side").fill("40")
        page.get_by_label("Longest side").blur()
        expect(page.locator("#source-size")).to_have_text("24 × 40 pixels")
        page.get_by_label("Picture file").set_input_files(tmp_path / "text.png")
        expect(page.get_by_role("alert").filter(has_text="no picture")).to_be_visible()


def test_a_file_that_is_too_large_to_be_sent(browser, runner, tmp_path):
    """The server would break off, which looks as if it were gone, and so on without an end."""
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    limits = Limits(body_bytes=200_000)
    with serving(runner, limits=limits) as started, visiting(browser, started.url) as page:
        page.get_by_label("Picture file").set_input_files(tmp_path / "noise.png")
        expect(page.locator("#source-size")).to_have_text("256 × 256 pixels")
        draw(page, "a cat")
        expect(page.get_by_role("alert").filter(has_text="too large to be sent")).to_be_visible()
        page.get_by_label("Longest side").fill("64")
        page.get_by_role("button", name="Draw", exact=True).click()  # while it is made smaller
        expect(card(page, "a cat")).to_have_attribute("data-state", "done")
        assert runner.request.image.size == (64, 64)


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_a_picture_is_dropped_or_pasted_and_a_text_is_not_in_its_way(browser, url, photo, way):
    with visiting(browser, url) as page:
        expect(page.get_by_role("button", name="Draw", exact=True)).to_be_enabled()
        taken = page.evaluate(
            """([way, file]) => {
              const bytes = Uint8Array.from(atob(file), (character) => character.charCodeAt(0));
              const tell = (data) => {
                const told = { bubbles: true, cancelable: true };
                const event = way === "drop"
                  ? new DragEvent("drop", { ...told, dataTransfer: data })
                  : new ClipboardEvent("paste", { ...told, clipboardData: data });
                return !document.getElementById("prompt").dispatchEvent(event);
              };
              const text = new DataTransfer();
              text.setData("text/plain", "a cat");
              const picture = new DataTransfer();
              picture.items.add(new File([bytes], "photo.png", { type: "image/png" }));
              return [tell(text), tell(picture)];
            }""",
            [way, base64.b64encode(photo.read_bytes()).decode()],
        )
        assert taken == [False, True]
        expect(page.locator("#source-size")).to_have_text(f"{SIZE[0]} × {SIZE[1]} pixels")
        expect(page.get_by_label("Prompt", exact=True)).to_have_value("")


def test_an_edit_is_the_pipelines_picture_and_starts_the_next(browser, photo, tmp_path):
    """With the real model: painted, drawn again bit for bit, and started from."""
    with serving(models()) as started, visiting(browser, started.url, viewport=WIDE) as page:
        page.get_by_label("Picture file").set_input_files(photo)
        page.get_by_label("Strength", exact=True).fill("0.7")
        page.get_by_label("Paint what is to change").check()
        page.locator("#mask").focus()
        page.keyboard.press("Space")
        draw(page, "a red apple", num_inference_steps=3, seed=4)
        expect(page.locator(".card[data-state=done]")).to_have_count(1)
        page.get_by_role("button", name="Again: a red apple").click()
        expect(page.locator(".card[data-state=done]")).to_have_count(2)
        again, first = kept(page)
        assert again["files"] == first["files"]
        page.get_by_role("button", name="Picture: a red apple").first.click()
        page.get_by_role("button", name="Start from this").click()
        expect(page.get_by_label("Strength", exact=True)).to_be_focused()
        expect(page.get_by_label("Paint what is to change")).not_to_be_checked()
        draw(page, "a green apple", num_inference_steps=3, seed=5)
        expect(card(page, "a green apple")).to_have_attribute("data-state", "done")
        next_file = kept(page)[0]["files"][0]
    edited = Image.open(io.BytesIO(first["files"][0]))
    options = {"num_inference_steps": 3, "strength": 0.7}
    with load("pictogram") as pipeline, Image.open(photo) as image:
        mask = Image.open(io.BytesIO(first["mask"]))
        wanted = pipeline("a red apple", seed=4, image=image, mask=mask, **options)
        started_from = pipeline("a green apple", seed=5, image=edited, **options)
    np.testing.assert_array_equal(np.asarray(edited), np.asarray(wanted.images[0]))
    found = np.asarray(Image.open(io.BytesIO(next_file)))
    np.testing.assert_array_equal(found, np.asarray(started_from.images[0]))
