"""What a server must survive: strangers' pages, bombs, hostile bodies, keys, and what is logged."""

import base64
import hashlib
import hmac
import io
import json
import logging
import re
import socket
import struct
import time
import zlib

import httpx
import pytest
from PIL import Image

from engine.errors import RequestError
from serving.addresses import is_loopback
from serving.http.access import AccessRules
from serving.http.connections import ImpatientProtocol
from serving.http.forms import FormParser
from serving.keys import Keys
from serving.limits import Limits
from tests.support.servers import SlowStudio, serving

PICTURES = "/api/v1/pictures"
GENERATIONS = "/v1/images/generations"
SECRET = "a-very-secret-key"
PROMPT = "a prompt that nobody else may read"


@pytest.fixture(scope="module")
def running():
    limits = Limits(body_bytes=2**20, body_seconds=0.5, fields=16)
    with serving(SlowStudio(0), limits=limits) as started:
        yield started


@pytest.fixture(scope="module")
def http(running):
    with httpx.Client(base_url=running.url, timeout=20) as client:
        yield client


def error(answer, status):
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    told = answer.json()["error"]
    assert set(told) == {"message", "type", "param", "code"}
    assert not re.search(r"0x[0-9a-f]{4}|/usr|/tmp|PIL|Traceback|site-packages", told["message"])
    return told


def file_of(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def encoded(data):
    return base64.b64encode(data).decode()


def small(mode="RGB"):
    return Image.new(mode, (16, 16))


# 1: nothing is fetched


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/secret.png",
        "https://example.com/a.png",
        "file:///etc/passwd",
        "ftp://example.com/a.png",
        "//example.com/a.png",
        "data:text/html;base64,AAAA",
        "data:image/png,AAAA",
        "/etc/passwd",
        "../../etc/passwd",
    ],
)
def test_no_url_and_no_path_is_opened(http, url, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    assert error(http.post(PICTURES, json={"prompt": "p", "image": url}), 400)["param"] == "image"
    form = {"image": (None, url), "prompt": (None, "p")}
    assert error(http.post("/v1/images/edits", files=form), 400)["param"] == "image"


# 2: names


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a\0b", "x" * 10_000, "pictogram/", "", ".", "..\\x"]
)
def test_names_are_those_of_the_operator(http, name):
    error(http.post(PICTURES, json={"prompt": "p", "model": name}), 404)
    error(http.post(PICTURES, json={"prompt": "p", "loras": {name: 1.0}}), 404)
    path = httpx.URL(PICTURES + "/").join("x") if "\0" in name else f"{PICTURES}/{name[:500]}x"
    assert http.get(path).status_code == 404


# 3 and 4: hosts, origins, types


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 202),
        ({"host": "evil.example"}, 403),
        ({"host": "evil.example:7860"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": ""}, 403),
        ({"host": "localhost:1"}, 202),
        ({"host": "[::1]:7860"}, 202),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:1"}, 403),
        ({"origin": "http://[bad"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-origin"}, 202),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "multipart/form-data; boundary=x"}, 415),
        ({"content-type": ""}, 415),
    ],
)
def test_pages_of_strangers_cannot_draw(http, headers, status):
    given = {"content-type": "application/json", **headers}
    answer = http.post(PICTURES, content=b'{"prompt": "p"}', headers=given)
    assert answer.status_code == status
    assert not any("access-control" in name for name in answer.headers)


def test_the_pages_own_origin_and_a_link_to_it_pass(running, http):
    same = http.post(PICTURES, json={"prompt": "p"}, headers={"origin": running.url})
    assert same.status_code == 202
    linked = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert http.get("/docs", headers=linked).status_code == 200
    assert http.delete(f"{PICTURES}/x", headers={"sec-fetch-site": "cross-site"}).status_code == 403


def test_an_origin_that_the_operator_allows():
    with (
        serving(SlowStudio(0), origins=["https://app.example"], names=["pictures.lan"]) as running,
        httpx.Client(base_url=running.url) as client,
    ):
        allowed = {"origin": "https://app.example", "host": "pictures.lan"}
        answer = client.post(PICTURES, json={"prompt": "p"}, headers=allowed)
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        assert "access-control-allow-credentials" not in answer.headers
        assert client.options(PICTURES, headers=allowed).status_code == 204
        other = {"origin": "https://other.example"}
        refused = client.post(PICTURES, json={"prompt": "p"}, headers=other)
        assert refused.status_code == 403
        assert "access-control-allow-origin" not in refused.headers


def test_which_addresses_are_this_machines_alone():
    assert all(map(is_loopback, ("127.0.0.1", "127.8.0.1", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.2", "example.com", "")))
    assert AccessRules.of("0.0.0.0", [], [], None).hosts is None


# 5: pictures


def header_only(width, height):
    """A PNG that says it is very large and holds nothing."""
    ihdr = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", ihdr), (b"IDAT", zlib.compress(b""))):
        file += struct.pack(">I", len(data)) + name + data
        file += struct.pack(">I", zlib.crc32(name + data))
    return file


def moving(kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    return file_of(frames[0], kind, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (header_only(40_000, 25_000), 413),
        (header_only(2**31 - 1, 2**31 - 1), 413),
        (header_only(5000, 5000), 413),
        (header_only(16, 16), 202),  # found broken where it is decoded
        (moving("WEBP"), 400),
        (moving("PNG"), 400),
        (moving("GIF"), 400),
        (file_of(small(), "GIF"), 400),
        (file_of(small(), "TIFF"), 400),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 400),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", 400),
        (b"", 400),
        (b"\x89PNG", 400),
    ],
)
def test_bombs_and_what_is_no_picture(http, data, status):
    began = time.monotonic()
    answer = http.post(PICTURES, json={"prompt": "p", "image": encoded(data)})
    if status == 202:
        assert answer.status_code == 202
    else:
        assert error(answer, status)["param"] == "image"
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("name", ["image", "mask"])
@pytest.mark.parametrize(
    ("data", "status"),
    [(header_only(40_000, 25_000), 413), (moving("WEBP"), 400), (b"http://127.0.0.1:1/a.png", 400)],
)
def test_a_form_is_looked_at_as_json_is(http, name, data, status):
    """Both of its pictures; what is a file of text is opened by nobody."""
    good = ("a.png", file_of(small()), "image/png")
    files = {"image": good, "mask": good, name: ("../../a.png", data, "image/png")}
    told = error(http.post("/v1/images/edits", files=files, data={"prompt": "p"}), status)
    assert told["param"] == name
    body = {"prompt": "p", "image": encoded(file_of(small())), name: "https://example.com/a.png"}
    assert error(http.post(PICTURES, json=body), 400)["code"] == "url_not_fetched"


def test_pictures_of_every_mode_are_decoded_where_the_engine_lives():
    from serving.errors import BadRequestError
    from serving.uploads import decode, size_of

    turned = small().resize((8, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode("image", file_of(turned, "JPEG", exif=exif)).size == (16, 8)
    palette = Image.new("P", (8, 8))
    palette.info["transparency"] = 0
    for image, kind in (
        (small("CMYK"), "JPEG"),
        (Image.new("I;16", (8, 8)), "PNG"),
        (palette, "PNG"),
        (small("LA"), "PNG"),
        (small("1"), "PNG"),
    ):
        data = file_of(image, kind)
        assert size_of("image", data, 10**6) == image.size
        from runtime.images.files import as_rgb

        assert as_rgb(decode("image", data)).mode == "RGB"
    whole = file_of(Image.effect_noise((64, 64), 50))
    for cut in range(0, len(whole) - 12, 97):
        with pytest.raises(BadRequestError):
            decode("image", whole[:cut])


# 6: bodies


def raw(running, data, wait=3.0):
    """Send bytes as they are; return the status line of the answer, if one comes."""
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait) as connection:
        connection.sendall(data)
        found = b""
        while b"\r\n" not in found:
            part = connection.recv(4096)
            if not part:
                break
            found += part
        return found.split(b"\r\n")[0].decode()


HEAD = b"POST /api/v1/pictures HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"


def test_too_much_is_refused_by_its_length_and_while_it_comes(running, http):
    assert "413" in raw(running, HEAD + b"content-length: 999999999999\r\n\r\n")
    assert "413" in raw(running, HEAD + b"content-length: 2000000\r\n\r\n")
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    assert "413" in raw(running, HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunk * 20)
    assert http.get("/health").status_code == 200


def test_a_slow_body_is_not_waited_for(running):
    began = time.monotonic()
    assert "400" in raw(running, HEAD + b"content-length: 100\r\n\r\n{", wait=5)
    assert time.monotonic() - began < 4


@pytest.mark.parametrize("begun", [b"", b"POST /api", HEAD, "after another"])
def test_headers_that_do_not_end_are_not_waited_for(running, monkeypatch, begun):
    """Nothing, half a line, a head without its end, and the same on a connection that was used."""
    monkeypatch.setattr(ImpatientProtocol, "header_seconds", 0.3)
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        if begun == "after another":
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
            assert b"200 OK" in connection.recv(4096)
            begun = HEAD
        connection.sendall(begun)
        began = time.monotonic()
        while connection.recv(4096):
            pass
        assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"prompt": "p", "seed": ' + b"9" * 10_000 + b"}",
        b'{"prompt": "p", "guidance_scale": 1e400}',
        b'{"prompt": "p", "guidance_scale": NaN}',
        b'{"prompt": "p", "eta": -Infinity}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": 1}',
        b'{"prompt": null}',
        b'"text"',
        b"null",
        b"",
        b"\xff\xfe",
        b'{"prompt": "p", "unknown": 1}',
        b'{"prompt": "p", "seed": [1, 2, 3]}',
        b'{"prompt": "p", "extend": [1, 2]}',
        b'{"prompt": "p", "hires": {"scale": 1e9}}',
        b'{"prompt": "p", "mask": "AAAA"}',
        b'{"prompt": "p", "num_images_per_prompt": 0}',
    ],
)
@pytest.mark.parametrize("path", [PICTURES, GENERATIONS])
def test_hostile_json(http, body, path):
    answer = http.post(path, content=body, headers={"content-type": "application/json"})
    if path == GENERATIONS and answer.status_code == 200:
        assert set(json.loads(body)) & {"unknown", "mask", "num_images_per_prompt"}
        return  # what OpenAI's clients may send beside
    error(answer, 400)


def test_forms_of_too_many_parts(http):
    image = ("a.png", file_of(small()), "image/png")
    many = [("image", image)] * 17
    error(http.post("/v1/images/edits", files=many), 400)
    fields = {f"f{i}": "x" for i in range(1000)}
    error(http.post("/v1/images/edits", data=fields, files={"image": image}), 400)
    error(http.post("/v1/images/edits", files={"prompt": (None, "p")}), 400)
    broken = {"content-type": "multipart/form-data; boundary=x"}
    error(http.post("/v1/images/edits", content=b"--y\r\n", headers=broken), 400)
    error(
        http.post("/v1/images/edits", content=b"", headers={"content-type": "multipart/form-data"}),
        400,
    )


def test_a_million_fields_are_not_counted_to_the_end(monkeypatch):
    """Within the bytes of a body: it is refused at the first field too many."""
    begun, begin = [], FormParser.on_part_begin
    monkeypatch.setattr(FormParser, "on_part_begin", lambda self: (begun.append(1), begin(self)))
    part = b'--x\r\ncontent-disposition: form-data; name="a"\r\n\r\n\r\n'
    body = part * (10**6 * 32 // len(part)) + b"--x--\r\n"
    with serving(SlowStudio(0)) as running, httpx.Client(base_url=running.url) as client:
        headers = {"content-type": "multipart/form-data; boundary=x"}
        error(client.post("/v1/images/edits", content=body, headers=headers), 400)
    assert len(begun) == Limits().fields + 1


# 7: products


@pytest.mark.parametrize(
    "picture_request",
    [
        {"height": 2048, "width": 2056},
        {"height": 2049},
        {"num_inference_steps": 151},
        {"num_images_per_prompt": 11},
        {"num_inference_steps": 150, "height": 2048, "width": 2048, "num_images_per_prompt": 10},
        {"height": 1536, "width": 1536, "hires": {"scale": 2.0}},
        {"hires": {"scale": 2.0, "num_inference_steps": 1000}},
        {"prompt": "p" * 32_001},
        {"negative_prompt": "p" * 32_001},
        {"prompt": "a AND " * 300 + "a"},
        {"loras": {"ink": 1e9}},
        {"format": "webp", "quality": 0},
        {"preview_every": -1},
        {"priority": 10**6},
    ],
)
def test_products_of_what_is_allowed(http, picture_request):
    answer = http.post(PICTURES, json={"prompt": "p", **picture_request})
    assert answer.status_code in (400, 413), answer.text
    error(answer, answer.status_code)


# 8 and 9: keys, logs, what errors say


def test_keys_are_needed_and_never_seen(tmp_path, caplog):
    path = tmp_path / "keys"
    path.write_text(f"# people\nanna:{hashlib.sha256(SECRET.encode()).hexdigest()}\n")
    keys = Keys.read(path)
    assert SECRET not in repr(keys)
    caplog.set_level(logging.DEBUG)
    with (
        serving(SlowStudio(0), keys=keys) as running,
        httpx.Client(base_url=running.url) as client,
    ):
        body = {"prompt": PROMPT, "negative_prompt": PROMPT}
        basic = base64.b64encode(f"me:{SECRET}".encode()).decode()
        for given, status in (
            (None, 401),
            ("Bearer wrong", 401),
            (f"Bearer {SECRET}x", 401),
            ("Bearer", 401),
            ("Basic !!!", 401),
            (f"Digest {SECRET}", 401),
            (f"Bearer {SECRET}", 202),
            (f"Basic {basic}", 202),
        ):
            headers = {} if given is None else {"authorization": given}
            assert client.post(PICTURES, json=body, headers=headers).status_code == status
        assert client.get("/metrics").status_code == 401
        assert client.get("/health").status_code == 200
        right = {"authorization": f"Bearer {SECRET}"}
        error(client.post(PICTURES, json={**body, "sampler": PROMPT}, headers=right), 400)
        running.loop._runner.fail["step", PROMPT] = RuntimeError("a library's own words")
        answer = client.post(GENERATIONS, json=body, headers=right)
        told = error(answer, 500)
        assert answer.headers["x-should-retry"] == "false"
        assert "library" not in told["message"]
        metrics = client.get("/metrics", headers=right).text
    logged = caplog.text
    assert "a library's own words" in logged, "the operator is told"
    for secret in (SECRET, PROMPT):
        assert secret not in logged
        assert secret not in metrics


@pytest.mark.parametrize("given", ["first", "last", "wrong", "", "f" * 10_000])
def test_every_key_is_compared_whole_whichever_is_right(given, monkeypatch):
    """Hashes, all of one length, by what takes as long for any two of them."""
    names = ("first", "second", "third", "last")
    keys = Keys(hashes={name: hashlib.sha256(name.encode()).digest() for name in names})
    compared, compare = [], hmac.compare_digest

    def noted(one, other):
        compared.append((one, other))
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", noted)
    assert keys.name(f"Bearer {given}") == (given if given in names else None)
    digest = hashlib.sha256(given.encode()).digest()
    assert [set(pair) for pair in compared] == [{kept, digest} for kept in keys.hashes.values()]


@pytest.mark.parametrize("key", ["schl\u00fcssel", "cl\u00e0", "\u9375", "a b", "a:b"])
def test_keys_of_any_letters(key):
    """As the header's own bytes, which are those that were hashed."""
    keys = Keys(hashes={"anna": hashlib.sha256(key.encode()).digest()})
    basic = base64.b64encode(f"me:{key}".encode())
    with serving(SlowStudio(0), keys=keys) as running:
        for given, status in (
            (b"Bearer " + key.encode(), 200),
            (b"bearer  " + key.encode(), 200),
            (b"Basic " + basic, 200),
            (b"Bearer " + key.encode()[1:], 401),
            (b"Basic " + base64.b64encode(f"{key}:me".encode()), 401),
        ):
            headers = {b"authorization": given}
            assert httpx.get(f"{running.url}/v1/models", headers=headers).status_code == status


@pytest.mark.parametrize("place", ["within a route", "before the routes", "where a stream begins"])
def test_what_nobody_expected_is_answered_in_one_way(place, monkeypatch, caplog):
    """Wherever it comes from, a stranger learns nothing, and the log has it all."""

    def fail(*_, **__):
        raise LookupError("a library's own words about /usr/lib")

    with (
        serving(SlowStudio(0)) as running,
        httpx.Client(base_url=running.url) as client,
    ):
        if place == "before the routes":
            monkeypatch.setattr("serving.http.body._check_type", fail)
        elif place == "within a route":
            monkeypatch.setattr(running.service.jobs, "submit", fail)
        else:
            monkeypatch.setattr("serving.http.native._watched", fail)
        path, answer = PICTURES, None
        if place == "where a stream begins":
            job = client.post(PICTURES, json={"prompt": "p"}).json()["id"]
            answer = client.get(f"{PICTURES}/{job}/events")
        answer = answer or client.post(path, json={"prompt": "p"})
        assert error(answer, 500)["code"] == "internal_error"
        assert answer.headers["x-should-retry"] == "false"
        assert answer.headers["x-request-id"] in caplog.text
        assert "a library's own words" in caplog.text
        monkeypatch.undo()
        assert client.post(PICTURES, json={"prompt": "p"}).status_code == 202, "and it goes on"


def test_a_callers_jobs_are_the_callers_own():
    hashes = {name: hashlib.sha256(name.encode()).digest() for name in ("anna", "bert")}
    with (
        serving(SlowStudio(0), keys=Keys(hashes=hashes)) as running,
        httpx.Client(base_url=running.url) as client,
    ):
        anna, bert = ({"authorization": f"Bearer {name}"} for name in hashes)
        job = client.post(PICTURES, json={"prompt": "p"}, headers=anna).json()["id"]
        for path in ("", "/events", "/image/0"):
            assert client.get(f"{PICTURES}/{job}{path}", headers=bert).status_code == 404
        assert client.delete(f"{PICTURES}/{job}", headers=bert).status_code == 404
        assert client.get(f"{PICTURES}/{job}", headers=anna).status_code == 200


@pytest.mark.parametrize(
    "text", ["", "# nothing", "anna", "anna:abc", "anna:" + "G" * 64, "a b:" + "0" * 64]
)
def test_key_files_that_hold_no_keys(tmp_path, text):
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(RequestError):
        Keys.read(path)
    with pytest.raises(RequestError, match="cannot be read"):
        Keys.read(tmp_path / "none")


# 10: headers and settings


def test_nothing_of_a_prompt_gets_into_a_header(http):
    prompt = "p\r\nset-cookie: a=b\r\n\r\n<script>"
    answer = http.post(PICTURES, json={"prompt": prompt})
    assert answer.status_code == 202
    assert "set-cookie" not in answer.headers
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"


def test_a_flood_of_idle_connections_leaves_room(running, http):
    host, port = running.url.removeprefix("http://").split(":")
    idle = [socket.create_connection((host, int(port))) for _ in range(300)]
    try:
        began = time.monotonic()
        assert http.post(GENERATIONS, json={"prompt": "p"}).status_code == 200
        assert time.monotonic() - began < 5
    finally:
        for connection in idle:
            connection.close()
