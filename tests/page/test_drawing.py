"""The page draws: what the form says is asked for, shown, kept, and drawn again."""

import re

import pytest

from serving.limits import Limits
from tests.support.browsers import card, draw, expect, kept, need_browser, visiting
from tests.support.servers import models, serving

need_browser()

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>&lt;b&gt; ${7*7} </textarea>"


@pytest.fixture(scope="module")
def real():
    with serving(models()) as started:
        yield started


def test_a_picture_is_drawn_before_ones_eyes(page, runner):
    runner.goes_on.clear()
    draw(page, "a cat", num_inference_steps=30)
    drawing = card(page, "a cat")
    expect(drawing).to_have_attribute("data-state", "running")
    expect(page).to_have_title("(1) Latentrt")
    runner.seconds = 0.02
    runner.goes_on.set()
    expect(drawing.get_by_alt_text("Preview")).to_be_visible()
    expect(drawing.get_by_role("progressbar", name="Steps")).to_be_visible()
    expect(drawing).to_have_attribute("data-state", "done")
    expect(page.get_by_role("status").filter(has_text="finished")).to_have_count(1)
    expect(page).to_have_title("Latentrt")
    seed = kept(page)[0]["body"].get("seed")
    assert seed is None, "what the form left open stays open"
    expect(drawing.locator(".status")).to_have_text(re.compile(r"64 × 64 · 30 steps · seed \d+"))


def test_the_form_has_what_the_server_says(page):
    names = page.locator("#model option").all_text_contents()
    assert names == ["pictogram", "other"]
    assert "dpmpp_2m" in page.locator("#sampler option").all_text_contents()
    assert "karras" in page.locator("#schedule option").all_text_contents()
    assert page.locator("#preset option").count() == 5
    limits = Limits()
    for name, most in (
        ("num_inference_steps", limits.steps),
        ("num_images_per_prompt", limits.pictures),
        ("width", limits.side),
    ):
        assert page.locator(f"#{name}").get_attribute("max") == str(most)


def test_every_setting_is_what_is_asked_for(page, runner):
    """It goes to the server by its own name, and comes back into the form from a card."""
    page.get_by_text("More settings").click()
    texts = {"width": 72, "height": 80, "guidance_scale": 3.5, "seed": 5, "eta": 0.5}
    chosen = {"model": "other", "sampler": "euler_a", "schedule": "karras", "clip_skip": "2"}
    for name, value in chosen.items():
        page.locator(f"[name='{name}']").select_option(value)
    page.get_by_label("Add an adapter").select_option("ink")
    page.get_by_label("ink", exact=True).fill("0.75")
    page.locator("[name='hires.scale']").fill("1.5")
    page.get_by_label("Draw every step alone").check()
    draw(page, "a hat", negative_prompt="grey", num_inference_steps=4, **texts)
    expect(card(page, "a hat")).to_have_attribute("data-state", "done")
    body = kept(page)[0]["body"]
    wanted = {**texts, **chosen, "clip_skip": 2, "negative_prompt": "grey", "exact": True}
    wanted |= {"loras": {"ink": 0.75}, "hires": {"scale": 1.5}, "num_images_per_prompt": 1}
    wanted |= {"prompt": "a hat", "num_inference_steps": 4, "format": "png", "preview_every": 2}
    assert body == wanted
    page.get_by_role("button", name="Reset").click()
    expect(page.locator("#width")).to_have_value("")
    page.get_by_role("button", name="Reuse settings").click()
    for name, value in {**texts, **chosen}.items():
        expect(page.locator(f"[name='{name}']")).to_have_value(str(value))
    expect(page.get_by_label("ink", exact=True)).to_have_value("0.75")
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()


def test_what_people_write_is_text(page, running):
    for prompt in (HOSTILE, "refused"):
        draw(page, prompt, negative_prompt=HOSTILE)
    shown = card(page, HOSTILE)
    expect(shown).to_have_attribute("data-state", "done")
    expect(card(page, "refused")).to_have_attribute("data-state", "failed")
    shown.get_by_role("button", name="Picture: <img").click()
    expect(page.get_by_role("dialog")).to_contain_text(HOSTILE)
    page.reload()
    expect(card(page, HOSTILE)).to_be_visible()
    assert page.locator("script").count() == 1
    assert page.locator("img[src=x]").count() == 0


def test_again_is_the_same_picture_bit_for_bit(browser, real):
    """All of a request, one of them, after a reload, and with what the seed chooses."""
    with visiting(browser, real.url) as page:
        draw(page, "a {red|blue|green} hat", num_inference_steps=3, num_images_per_prompt=3)
        expect(page.locator(".card[data-state=done]")).to_have_count(1)
        page.reload()
        page.get_by_role("button", name="Again: a {red").click()
        expect(page.locator(".card[data-state=done]")).to_have_count(2)
        page.get_by_role("button", name="Picture 3: ").first.click()
        dialog = page.get_by_role("dialog")
        dialog.get_by_role("button", name="Previous").click()
        dialog.get_by_role("button", name="Again").click()
        expect(page.locator(".card[data-state=done]")).to_have_count(3)
        single, again, first = kept(page)
    assert len(set(first["files"])) == 3
    assert again["files"] == first["files"]
    assert single["files"] == first["files"][1:2]
    assert all(file.startswith(b"\x89PNG") for file in first["files"])


def test_the_oldest_go_where_there_are_too_many(page):
    """Never what is unfinished; a full gallery is shown whole."""
    page.evaluate(
        """async () => {
          const { Store } = await import("/page/store.js");
          const store = await Store.open();
          for (let number = 0; number < 200; number += 1) {
            const state = number ? "cancelled" : "unsent";
            const body = { prompt: `old ${number}`, num_inference_steps: 1 };
            const pictures = [{ step: 0, total: 0, file: null }];
            const record = { key: `key-${number}`, created: number, body, state, pictures };
            await store.put({ ...record, image: null, mask: null, job: null, error: null });
          }
        }"""
    )
    page.reload()
    expect(page.locator(".card")).to_have_count(200)
    expect(card(page, "old 0")).to_have_attribute("data-state", "done")
    draw(page, "new", num_inference_steps=1)
    expect(card(page, "new")).to_have_attribute("data-state", "done")
    expect(page.locator(".card")).to_have_count(200)
    prompts = [record["body"]["prompt"] for record in kept(page)]
    assert prompts == ["new", *(f"old {number}" for number in range(199, 0, -1))]
    card(page, "old 7").get_by_role("button", name="Try again").click()
    expect(card(page, "old 7")).to_have_attribute("data-state", "done")


def test_a_downloaded_picture_is_the_servers_file(page):
    draw(page, "A café, <fluent> style!", num_inference_steps=2, seed=9)
    page.get_by_role("button", name="Picture: A café").click()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == "a-cafe-fluent-style-9.png"
    assert download.value.path().read_bytes() == kept(page)[0]["files"][0]
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
