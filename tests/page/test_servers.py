"""The page and its server: queues, reloads, refusals, servers that go and come, and keys."""

import hashlib
import re

from serving.keys import Keys
from serving.limits import Limits
from tests.support.browsers import card, draw, expect, kept, need_browser, visiting
from tests.support.painted_runners import PaintedRunner
from tests.support.servers import serving

need_browser()


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
