"""The page's files without a browser: small, whole, let nothing else in, and are no secret."""

import hashlib
import re

import httpx
import pytest

from serving.http.page import FOLDER, TYPES
from serving.keys import Keys
from tests.support.servers import SlowStudio, serving

FIRST_PAINT = 100_000  # bytes, of all that the page loads; docs/serving.md says 76,000
KEYS = Keys(hashes={"anna": hashlib.sha256(b"secret").digest()})


@pytest.fixture(scope="module")
def http():
    with (
        serving(SlowStudio(0), keys=KEYS) as started,
        httpx.Client(base_url=started.url) as client,
    ):
        yield client


def names():
    return sorted(path.name for path in FOLDER.iterdir())


def test_the_page_needs_no_key_and_what_it_asks_does(http):
    assert http.get("/").text == (FOLDER / "index.html").read_text(encoding="utf-8")
    for name in names():
        answer = http.get(f"/page/{name}")
        assert answer.content == (FOLDER / name).read_bytes()
        assert answer.headers["content-type"] == TYPES[f".{name.rpartition('.')[2]}"]
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert http.get("/api/v1/capabilities").status_code == 401


@pytest.mark.parametrize(
    "path", ["/page/", "/page/none.js", "/page/..%2fjobs.py", "/page/%2e%2e/jobs.py", "/page/x\0"]
)
def test_nothing_else_is_there(http, path):
    assert http.get(path.replace("\0", "%00")).status_code in (401, 404)


def test_the_first_paint_is_small_and_comes_at_once(http):
    page = http.get("/").text
    loaded = {"/", *re.findall(r'(?:src|href)="(/page/[^"]+)"', page)}
    assert loaded == {"/", *(f"/page/{name}" for name in names() if name != "index.html")}
    assert sum(len(http.get(path).content) for path in loaded) < FIRST_PAINT


def test_modules_import_what_is_there(http):
    for path in FOLDER.glob("*.js"):
        code = path.read_text(encoding="utf-8")
        for name, imported in re.findall(r'import \{ ([^}]+) \} from "\./([^"]+)";', code):
            exported = re.findall(
                r"^export (?:async )?(?:class|function\*?|const) (\w+)",
                (FOLDER / imported).read_text(encoding="utf-8"),
                re.MULTILINE,
            )
            assert set(name.split(", ")) <= set(exported), (path.name, imported)


def test_the_policy_lets_nothing_in(http):
    for path in ("/", "/page/app.js"):
        policy = http.get(path).headers["content-security-policy"]
        rules = dict(each.split(" ", 1) for each in policy.split("; "))
        for name in ("default-src", "base-uri", "form-action", "frame-ancestors", "trusted-types"):
            assert rules[name] == "'none'"
        for name in ("script-src", "style-src", "connect-src"):
            assert rules[name] == "'self'"
        assert rules["require-trusted-types-for"] == "'script'"
        assert not re.search(r"unsafe|\*|https?:", policy)
    page = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|<script>|\son\w+=|\sstyle=|(?:src|href)=\"(?!/|#)", page)


def test_texts_of_people_never_become_markup():
    for path in FOLDER.glob("*.js"):
        code = path.read_text(encoding="utf-8")
        found = re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|srcdoc", code)
        assert not found, (path.name, found)


def test_a_browser_that_has_a_file_is_told_so(http):
    first = http.get("/page/app.js")
    again = http.get("/page/app.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["cache-control"] == "no-cache"
    assert http.get("/page/app.js", headers={"if-none-match": '"other"'}).status_code == 200


def test_a_script_is_not_answered_with_a_window_for_passwords(http):
    """Browsers open one for Basic, over the page that asks for the key itself."""
    challenges = {
        kind: http.get("/api/v1/capabilities", headers=headers).headers["www-authenticate"]
        for kind, headers in (("script", {"sec-fetch-dest": "empty"}), ("client", {}))
    }
    assert challenges["script"] == 'Bearer realm="latentrt"'
    assert "Basic" in challenges["client"]
