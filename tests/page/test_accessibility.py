"""Everybody can use the page: axe-core finds nothing, keys suffice, and nothing overflows."""

import re

import pytest

from tests.support.browsers import (
    NARROW,
    WIDE,
    card,
    draw,
    expect,
    kept,
    need_browser,
    violations,
    visiting,
)
from tests.support.named_requests import IMAGE

need_browser()

LONG = "a-very-long-word-without-any-space-" * 8
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    IMAGE.convert("RGB").save(path)
    return path


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_and_nothing_overflows(browser, running, runner, photo, scheme, size):
    """Empty, filled in, drawing, waiting, failed, cancelled, full, one picture, no server."""

    def check(page, state):
        assert violations(page) == [], state
        assert page.evaluate(OVERFLOW) <= 0, state

    with visiting(browser, running.url, color_scheme=scheme, viewport=size) as page:
        expect(page.get_by_role("button", name="Draw", exact=True)).to_be_enabled()
        check(page, "empty")
        page.get_by_text("More settings").click()
        page.get_by_label("Add an adapter").select_option("ink")
        page.get_by_label("Picture file").set_input_files(photo)
        page.get_by_label("Paint what is to change").check()
        check(page, "filled in")
        page.get_by_role("button", name="Remove picture").click()
        runner.goes_on.clear()
        for prompt in ("a cat", LONG):
            draw(page, prompt, num_inference_steps=4)
            expect(card(page, prompt)).to_be_visible()
        expect(card(page, "a cat")).to_have_attribute("data-state", "running")
        check(page, "drawing")
        card(page, "a cat").get_by_role("button", name="Cancel").click()
        expect(card(page, "a cat")).to_have_attribute("data-state", "cancelled")
        runner.goes_on.set()
        draw(page, "refused")
        draw(page, "four", num_images_per_prompt=4)
        draw(page, "", num_images_per_prompt=1)
        expect(page.get_by_role("alert").filter(has_text="Write what")).to_be_visible()
        expect(page.locator(".card[data-state=failed]")).to_have_count(1)
        expect(page.locator(".card[data-state=done]")).to_have_count(2)
        check(page, "full")
        page.get_by_role("button", name="Picture 2: four").click()
        check(page, "one picture")
        page.keyboard.press("Escape")
        page.context.set_offline(True)
        draw(page, "a dog")
        expect(page.locator("#connection")).not_to_be_empty()
        check(page, "no server")


def test_the_page_is_used_by_keys_alone(page, photo):
    """From the first Tab to a picture drawn over a painted mask, again, and removed."""
    keys = page.keyboard

    def focused():
        return page.evaluate(
            "document.activeElement.getAttribute('aria-label') "
            "|| document.activeElement.labels?.[0]?.textContent "
            "|| document.activeElement.textContent"
        ).strip()

    def walk_to(name, back=False):
        for _ in range(60):
            keys.press("Shift+Tab" if back else "Tab")
            if re.fullmatch(name, focused()):
                return
        raise AssertionError(f"no way to {name}")

    expect(page.get_by_role("button", name="Draw", exact=True)).to_be_enabled()
    walk_to("Skip to the pictures")
    walk_to("Prompt")
    keys.type("a cat")
    walk_to("Steps")
    keys.type("3")
    walk_to("More settings")
    keys.press("Enter")
    walk_to("Sampler")
    keys.type("eul")
    expect(page.locator("#sampler")).to_have_value("euler")
    walk_to("Picture file")
    page.locator(":focus").set_input_files(photo)  # the window that opens is the system's own
    expect(page.get_by_text(f"{IMAGE.width} × {IMAGE.height} pixels")).to_be_visible()
    walk_to("Paint what is to change")
    keys.press("Space")
    walk_to("Mask")
    keys.press("ArrowLeft")
    keys.press("Space")
    keys.press("Shift+ArrowDown")
    expect(page.get_by_role("status").filter(has_text="from the left")).to_have_count(1)
    walk_to("Erase")
    walk_to("Draw")
    keys.press("Enter")
    expect(card(page, "a cat")).to_have_attribute("data-state", "done")
    assert kept(page)[0]["mask"].startswith(b"\x89PNG")
    assert kept(page)[0]["body"]["sampler"] == "euler"
    walk_to("Picture: a cat|")  # the button of a picture has its text as its alternative
    expect(page.locator(".picture button:focus")).to_have_count(1)
    keys.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    walk_to("Again")
    keys.press("Enter")
    expect(page.locator(".card[data-state=done]")).to_have_count(2)
    assert kept(page)[0]["mask"] == kept(page)[1]["mask"]
    walk_to("Prompt", back=True)
    keys.press("Control+Enter")
    expect(page.locator(".card[data-state=done]")).to_have_count(3)
    for left in (2, 1, 0):
        walk_to("Remove: a cat")
        keys.press("Enter")
        expect(page.locator(".card")).to_have_count(left)
        assert page.evaluate("document.activeElement !== document.body")
