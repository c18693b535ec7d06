"""Chromium under playwright, and axe-core.

LATENTRT_CHROMIUM names the program, and LATENTRT_AXE the file axe.min.js of the npm package
axe-core; `.ci/run` installs both.
"""

import base64
import os
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

CHROMIUM, AXE = "LATENTRT_CHROMIUM", "LATENTRT_AXE"
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 320, "height": 640}
NO_FAULT = ("Failed to load resource", "net::")  # an answer that was refused, or no server

KEPT = """async () => {
  const encoded = async (blob) => {
    if (!blob) return null;
    const bytes = new Uint8Array(await blob.arrayBuffer());
    return btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
  };
  const { Store } = await import("/page/store.js");
  const records = (await (await Store.open()).all()).reverse();
  return Promise.all(records.map(async ({ body, state, mask, pictures }) => ({
    body, state, mask: await encoded(mask), seeds: pictures.map(({ seed }) => seed),
    files: await Promise.all(pictures.map(({ file }) => encoded(file))),
  })));
}"""

expect.set_options(timeout=20_000)


def need_browser():
    """Skip a file of tests where there is no browser."""
    if not Path(os.environ.get(CHROMIUM, "")).is_file():
        pytest.skip(f"needs {CHROMIUM} to name a Chromium", allow_module_level=True)


@contextmanager
def chromium():
    """Run the browser, without a window."""
    with sync_playwright() as playwright:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(
            executable_path=os.environ[CHROMIUM], args=options, timeout=60_000
        )
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def visiting(browser, url, **context):
    """Open the page of a server, as someone new; nothing may go wrong in it until the end.

    A violation of the page's policy is told in the browser's console, too.
    """
    context = browser.new_context(**{"viewport": WIDE, "reduced_motion": "reduce", **context})
    context.set_default_timeout(20_000)
    told = []

    def hear(message):
        if message.type in ("error", "warning") and not message.text.startswith(NO_FAULT):
            told.append(message.text)

    page = context.new_page()
    page.on("console", hear)
    page.on("pageerror", lambda error: told.append(str(error)))
    try:
        page.goto(url)
        yield page
        assert not told, told
    finally:
        context.close()


def violations(page):
    """Return what axe-core finds wrong: the rule, and where."""
    page.evaluate(Path(os.environ[AXE]).read_text(encoding="utf-8"))
    found = page.evaluate("async () => (await axe.run(document)).violations")
    return [(each["id"], node["target"]) for each in found for node in each["nodes"]]


def draw(page, prompt, **fields):
    """Fill the form and send it."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    for name, value in fields.items():
        page.locator(f"[name='{name}']").fill(str(value))
    page.get_by_role("button", name="Draw", exact=True).click()


def card(page, prompt):
    """Return the newest card of a prompt."""
    return page.locator(".card", has=page.get_by_role("heading", name=prompt, exact=True)).first


def kept(page):
    """Return what the browser keeps, the newest first: requests, states, seeds, files and masks."""
    records = page.evaluate(KEPT)
    for record in records:
        record["files"] = [file and base64.b64decode(file) for file in record["files"]]
        record["mask"] = record["mask"] and base64.b64decode(record["mask"])
    return records
