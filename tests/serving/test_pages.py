"""The examples of docs/serving.md run as they are written, against a server that is elsewhere."""

import base64
import hashlib
import io
import re
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from runtime.images.files import read_settings
from serving.configuration import parse_options
from serving.http.bodies import Picture
from serving.http.docs_page import docs_page
from serving.options import make_parser
from tests.support.pictures import drawing
from tests.support.servers import load, models, serving

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
WHERE = "http://127.0.0.1:7860"


@pytest.fixture(scope="module")
def url():
    with serving(models()) as running:
        yield running.url


def example(library, where=WHERE):
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if library in c)
    assert code.count(where) == 1
    return code


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # an example opens a client and ends
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_example_of_openais_api(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(example("openai").replace(WHERE, url), {})
    with load("pictogram") as pipeline:
        wanted = pipeline(
            "a red apple, fluent style",
            seed=7,
            sampler="euler_a",
            num_inference_steps=20,
            num_images_per_prompt=2,
        )
    for number, image in enumerate(wanted.images):
        drawn = Image.open(tmp_path / f"apple-{number}.png")
        np.testing.assert_array_equal(np.asarray(drawn), np.asarray(image))
    assert read_settings(tmp_path / "apple-1.png")["seed"] == 8


def test_the_example_of_the_native_api(url, capsys):
    names = {}
    exec(example("idempotency-key").replace(WHERE, url), names)
    assert names["file"].startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "'jpeg'" in shown
    assert "'step'" in shown


def test_the_example_of_enlarging(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture, names = drawing(40, 28).convert("RGB"), {}
    picture.save("apple-0.png")
    exec(example("/api/v1/upscales").replace(WHERE, url), names)
    with Image.open(io.BytesIO(names["large"])) as large:
        expected = picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(np.asarray(large), np.asarray(expected))


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # an example opens a client and ends
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_example_of_automatic1111s_api(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    host, port = url.removeprefix("http://").split(":")
    code = example("webuiapi", 'host="127.0.0.1", port=7860')
    exec(code.replace('host="127.0.0.1", port=7860', f'host="{host}", port={port}'), {})
    assert read_settings(tmp_path / "apple-7.png")["seed"] == 7
    with Image.open(tmp_path / "apple-8.png") as picture:
        assert picture.size == (128, 128)


def test_the_page_names_the_limits_as_they_are():
    from serving.bucket_scheduler import MAX_TURNS_WAITED
    from serving.limits import Limits

    limits = Limits()
    for told in (
        f"within {limits.pictures} pictures, {limits.steps} steps, sides of {limits.side}",
        f"{limits.prompt_characters:,} characters, {limits.chunks}",
        f"{limits.parts} parts, {limits.loras} adapters",
        f"(`--max-queue` unfinished requests ({limits.jobs})"[1:],
        f"work ({limits.queue_seconds:.0f})",
        f"waits more than {MAX_TURNS_WAITED} steps",
        f"bodies within {limits.body_bytes >> 20} MiB and {limits.body_seconds:.0f} s",
        f"{limits.upload_pixels // 10**6} megapixels",
        f"({limits.kept_bytes >> 20} MiB, ten minutes)",
    ):
        assert told in " ".join(PAGE.split()), told


def test_the_page_of_the_api_is_whole_and_loads_nothing(url):
    """It needs no other address and no script, and no stranger's page can hold it."""
    page = httpx.get(f"{url}/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert not re.findall(r"<(?:script|iframe|img|link|form|object|base)|\bon\w+=|//", page.text)
    (style,) = re.findall("<style>(.*?)</style>", page.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = dict(
        each.split(" ", 1) for each in page.headers["content-security-policy"].split("; ")
    )
    assert policy["style-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    document = httpx.get(f"{url}/openapi.json").json()
    for path, methods in document["paths"].items():
        for method in methods:
            assert f"<code>{method.upper()} {path}</code>" in page.text
    for field in Picture.model_fields:
        assert f"<td><code>{field}</code></td>" in page.text, field
    assert "<td><code>hires</code></td><td><code>object: scale (number)" in page.text
    for gone in ("/redoc", "/docs/oauth2-redirect"):
        assert httpx.get(f"{url}{gone}").status_code == 404


def test_what_a_document_says_is_text_in_its_page():
    said = "<script>alert(1)</script>"
    operation = {
        "description": said,
        "tags": [said],
        "parameters": [
            {"name": said, "in": "query", "schema": {"type": "string", "default": said}}
        ],
        "responses": {"200": {"description": said}},
    }
    document = {"info": {"title": said, "version": "1"}, "paths": {f"/{said}": {"get": operation}}}
    assert "<script" not in docs_page(document).body.decode()


def test_the_settings_of_the_page_are_options(tmp_path):
    (settings,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "server.toml").write_text(settings)
    read = parse_options(make_parser("serve"), ["--config", str(tmp_path / "server.toml")], {})
    assert (read.port, read.rows, len(read.models)) == (8080, "capacity", 2)
