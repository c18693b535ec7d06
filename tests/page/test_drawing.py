"""The page draws: by mouse and by keys, cancelled, again, over reloads and lost servers."""

import hashlib
import re

import pytest

from serving.keys import Keys
from serving.limits import Limits
from tests.support.browsers import card, draw, expect, kept, need_browser, visiting
from tests.support.painted_runners import PaintedRunner
from tests.support.servers import models, serving

need_browser()

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>&lt;b&gt; ${7*7} </textarea>"


@pytest.fixture
def runner():
    return PaintedRunner()


@pytest.fixture
def running(runner):
    with serving(runner, rows=1) as started:
        yield started


@pytest.fixture
def page(browser, running):
    with visiting(browser, running.url) as opened:
        yield opened


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


def test_place_in_the_queue_and_cancel(page, runner, running):
    runner.goes_on.clear()
    for number in range(6):
        draw(page, f"a cat {number}", num_inference_steps=3)
        expect(card(page, f"a cat {number}")).to_be_visible()
    expect(card(page, "a cat 5").locator(".status")).to_have_text(
        re.compile("^5 ahead in the queue")
    )
    expect(page).to_have_title("(6) Latentrt")
    cancelled = card(page, "a cat 3")
    cancelled.get_by_role("button", name="Cancel").click()
    expect(cancelled).to_have_attribute("data-state", "cancelled")
    expect(card(page, "a cat 5").locator(".status")).to_have_text(re.compile("^4 ahead"))
    first = card(page, "a cat 0")
    first.get_by_role("button", name="Cancel").click()
    expect(first.locator(".status")).to_have_text("Cancelled.")
    runner.goes_on.set()
    expect(page.locator(".card[data-state=done]")).to_have_count(4)
    assert not running.service.jobs.unfinished()
    assert {prompt for stage, prompt in runner.done if stage == "finish"} == {
        f"a cat {number}" for number in (1, 2, 4, 5)
    }


def test_a_reload_picks_a_run_up(page, runner):
    runner.goes_on.clear()
    draw(page, "a cat", num_inference_steps=5, seed=3)
    page.get_by_label("Prompt", exact=True).fill("a half-written")
    expect(card(page, "a cat")).to_have_attribute("data-state", "running")
    page.reload()
    expect(card(page, "a cat")).to_have_attribute("data-state", "running")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a half-written")
    runner.goes_on.set()
    expect(card(page, "a cat")).to_have_attribute("data-state", "done")
    assert [prompt for stage, prompt in runner.done if stage == "finish"] == ["a cat"]
    page.reload()
    expect(card(page, "a cat").locator("img")).to_be_visible()
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Remove all").click()
    expect(page.locator(".card")).to_have_count(0)
    page.reload()
    expect(page.get_by_text("What you draw appears here")).to_be_visible()


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


def test_what_is_refused_is_a_sentence(browser, runner):
    runner.goes_on.clear()
    with serving(runner, limits=Limits(jobs=1)) as started, visiting(browser, started.url) as page:
        draw(page, "", num_inference_steps=2)
        problem = page.get_by_role("alert").filter(has_text=re.compile("."))
        expect(problem).to_contain_text("Write what is to be drawn")
        draw(page, "a cat", width=2048, height=2048, num_inference_steps=150)
        expect(card(page, "a cat")).to_be_visible()
        draw(page, "a dog", width="", height="", num_inference_steps=2)
        expect(problem).to_contain_text(re.compile(r"^1 requests wait .* Try again in \d+ s\."))
        expect(page.get_by_label("Prompt", exact=True)).to_have_value("a dog")
        expect(page.locator(".card")).to_have_count(1)
        card(page, "a cat").get_by_role("button", name="Cancel").click()
        expect(card(page, "a cat")).to_have_attribute("data-state", "cancelled")
        runner.goes_on.set()
        draw(page, "refused")
        failed = card(page, "refused")
        expect(failed.locator(".status")).to_have_text("The prompt is refused.")
        failed.get_by_role("button", name="Try again").click()
        expect(page.locator(".card[data-state=failed]")).to_have_count(2)
        expect(problem).to_have_count(0)


def test_a_refused_field_is_led_to(browser, running):
    with visiting(browser, running.url) as page:
        page.get_by_text("More settings").click()
        page.locator("[name='preset']").select_option("fast")
        page.evaluate("document.querySelector('#preset option:checked').value = 'none'")
        page.get_by_text("More settings").click()
        draw(page, "a cat")
        expect(page.get_by_role("alert").filter(has_text="preset")).to_contain_text("Preset is")
        expect(page.get_by_label("Preset")).to_be_focused()
        expect(page.get_by_label("Preset")).to_have_attribute("aria-invalid", "true")
        draw(page, "a cat", height=13)
        expect(page.get_by_label("Height")).to_be_focused()
        assert running.service.metrics.text().decode().count("latentrt_pictures_total 0.0") == 1


def test_a_server_that_is_gone_and_comes_back(page, runner):
    runner.goes_on.clear()
    draw(page, "a cat", num_inference_steps=5)
    expect(card(page, "a cat")).to_have_attribute("data-state", "running")
    page.context.set_offline(True)
    draw(page, "a dog", num_inference_steps=2)
    expect(page.locator("#connection")).to_contain_text("cannot be reached")
    expect(card(page, "a dog").locator(".status")).to_have_text("Waiting for the server.")
    runner.goes_on.set()
    page.context.set_offline(False)
    for prompt in ("a cat", "a dog"):
        expect(card(page, prompt)).to_have_attribute("data-state", "done")
    expect(page.locator("#connection")).to_be_empty()
    assert sorted(prompt for stage, prompt in runner.done if stage == "finish") == [
        "a cat",
        "a dog",
    ]


def test_a_server_that_was_started_anew(browser):
    first, second = PaintedRunner(), PaintedRunner()
    first.goes_on.clear()
    with serving(first) as started:
        port = int(started.url.rpartition(":")[2])
        opened = visiting(browser, started.url)
        page = opened.__enter__()
        draw(page, "a cat", num_inference_steps=2)
        expect(card(page, "a cat")).to_have_attribute("data-state", "running")
        page.context.set_offline(True)
        first.goes_on.set()
    with serving(second, port=port):
        page.context.set_offline(False)
        lost = card(page, "a cat")
        expect(lost).to_have_attribute("data-state", "lost")
        expect(lost.locator(".status")).to_contain_text("no longer has this picture")
        lost.get_by_role("button", name="Try again").click()
        expect(card(page, "a cat")).to_have_attribute("data-state", "done")
        again, before = kept(page)
        assert again["body"]["seed"] == again["seeds"] == before["seeds"]
        assert (before["state"], before["files"]) == ("lost", [None])
        opened.__exit__(None, None, None)
    (asked,) = [prompt for stage, prompt in second.done if stage == "finish"]
    assert asked == "a cat"


def test_a_tab_that_nobody_looks_at_holds_no_connection(page, runner):
    """A browser has six to a server for all of its tabs; such a tab asks now and then instead."""
    watched = []
    page.on("request", lambda request: watched.append(request.url.endswith("/events")))
    page.evaluate(
        """() => {
          Object.defineProperty(document, "hidden", { configurable: true, get: () => true });
          document.dispatchEvent(new Event("visibilitychange"));
        }"""
    )
    draw(page, "a cat", num_inference_steps=2)
    expect(card(page, "a cat")).to_have_attribute("data-state", "done")
    assert not any(watched)
    runner.goes_on.clear()
    draw(page, "a dog", num_inference_steps=2)
    page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    expect(card(page, "a dog")).to_have_attribute("data-state", "running")
    runner.goes_on.set()
    expect(card(page, "a dog")).to_have_attribute("data-state", "done")
    assert any(watched)


def test_keys(browser, runner):
    """The key is asked for, is kept in the tab alone, and only its own pictures are there."""
    keys = Keys(hashes={"anna": hashlib.sha256(b"secret").digest()})
    with serving(runner, keys=keys) as started, visiting(browser, started.url) as page:
        key = page.get_by_label("Key", exact=True)
        expect(key).to_be_focused()
        key.fill("wrong")
        key.press("Enter")
        expect(page.get_by_text("The server does not know that key.")).to_be_visible()
        key.fill("secret")
        key.press("Enter")
        expect(page.get_by_role("dialog")).to_have_count(0)
        draw(page, "a cat", num_inference_steps=2)
        expect(card(page, "a cat")).to_have_attribute("data-state", "done")
        page.reload()
        draw(page, "a dog", num_inference_steps=2)
        expect(card(page, "a dog")).to_have_attribute("data-state", "done")
        assert page.evaluate("JSON.stringify(localStorage)") == "{}"
        assert page.context.cookies() == []
        other = page.context.new_page()
        other.goto(started.url)
        expect(other.get_by_label("Key", exact=True)).to_be_visible()
