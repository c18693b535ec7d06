"""Whoever leaves, comes too late or stops reading: in every state, and over HTTP.

What a server must survive, and where it is tested:

| URLs, names, hosts, pictures, bodies, sizes, keys, texts of errors, headers | test_security |
| cancelling, leaving, deadlines in every state; clients that stop reading | here, test_loop |
| SIGTERM once and twice; a full disk | test_command |
| an engine that dies: in every state, while it starts, of one request | test_supervisor |
| want of memory, one row that fails, starving | test_loop, test_floods |
| NaN, damaged models and adapters, a start without the first model | test_faulty_models |
| files replaced, deleted or written over while they are served | test_model_files |
| idle connections, floods, clocks that jump, keys that come twice | test_floods |
"""

import json
import socket
import threading
import time
from contextlib import suppress

import httpx
import pytest

from serving.http.connections import ImpatientProtocol
from serving.unfinished_picture import FinishedPicture
from tests.support.servers import SlowStudio, serving

PICTURES = "/api/v1/pictures"
GENERATIONS = "/v1/images/generations"
STEPS = 6
STATES = ("queued", "texts", "enter", "step", "finish")
WAYS = ("cancelled", "deadline", "answer left", "stream left")
LARGE = 2 << 20  # bytes of a picture, more than the system takes of an answer


class Gate:
    """A place in a stage at which a picture waits until it is let through."""

    def __init__(self):
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self):
        self.reached.set()
        assert self.opened.wait(20)


def wait_until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.002)
    assert true()


@pytest.fixture(scope="module")
def running():
    """One row in a step and two pictures on board, so that others are in the queue."""
    with serving(SlowStudio(0), rows=1) as started:
        yield started


@pytest.fixture(scope="module")
def http(running):
    with httpx.Client(base_url=running.url, timeout=20) as client:
        yield client


def gate_at(running, state, prompt):
    """Return where pictures of a prompt wait; for "queued", where those before it do."""
    gate, at = Gate(), (state, prompt) if state != "queued" else ("step", "before")
    running.loop._runner.hooks[at] = gate
    return gate


def leave(running, http, prompt, way):
    """Begin a picture; return what makes it nobody's any more."""
    body = {"prompt": prompt, "num_inference_steps": STEPS}
    if way in ("cancelled", "deadline"):
        late = {"deadline_s": 0.5} if way == "deadline" else {}
        job = http.post(PICTURES, json={**body, **late}).json()["id"]
        where = f"{PICTURES}/{job}"

        def go():
            if way == "cancelled":
                assert [http.delete(where).json()["state"] for _ in range(2)] == ["cancelled"] * 2
                return
            wait_until(lambda: http.get(where).json()["state"] == "failed")
            assert http.get(where).json()["error"]["code"] == "deadline_exceeded"

        return go
    data = json.dumps({**body, "stream": way == "stream left"}).encode()
    head = f"POST {GENERATIONS} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    connection = connect(running)
    connection.sendall(head.encode() + b"content-length: %d\r\n\r\n" % len(data) + data)
    return connection.close


def connect(running, **options):
    host, port = running.url.removeprefix("http://").split(":")
    connection = socket.socket()
    for name, value in options.items():
        connection.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    connection.settimeout(20)
    connection.connect((host, int(port)))
    return connection


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("state", STATES)
def test_in_every_state_the_row_is_free_at_once(running, http, state, way):
    """No step is made of what nobody waits for, nothing is kept of it, and others are drawn."""
    jobs, loop, runner = running.service.jobs, running.loop, running.loop._runner
    prompt = f"{state}, {way}"
    gate = gate_at(running, state, prompt)
    before = 0
    if state == "queued":
        before = 2
        for _ in range(before):
            http.post(PICTURES, json={"prompt": "before", "num_inference_steps": STEPS})
        assert gate.reached.wait(20)
    go = leave(running, http, prompt, way)
    if state == "queued":
        wait_until(lambda: (jobs.admission.jobs, loop.waiting) == (before + 1, 1))
    else:
        assert gate.reached.wait(20)
    go()
    wait_until(lambda: jobs.admission.jobs == before)
    made = runner.done.count(("step", prompt))
    gate.opened.set()
    wait_until(lambda: (loop.on_board, loop.waiting) == (0, 0))
    assert runner.done.count(("step", prompt)) == made <= STEPS
    assert (state == "queued") == (("texts", prompt) not in runner.done)
    assert ("finish", prompt) not in runner.done or state == "finish"
    assert not loop._orders
    assert not loop._previews
    wait_until(lambda: jobs.admission.work == 0)
    other = http.post(GENERATIONS, json={"prompt": "other", "num_inference_steps": STEPS})
    assert other.status_code == 200


def test_why_they_went_is_counted(running):
    """After the test before: each way has a number of its own."""
    text = running.service.metrics.text().decode()
    for why in ("asked", "deadline", "left"):
        assert f'latentrt_cancelled_total{{why="{why}"}}' in text


def test_a_deadline_passes_while_the_server_drains(running, http):
    """Going down, it waits neither for what is too late nor longer than for what is not."""
    jobs, gate = running.service.jobs, gate_at(running, "step", "slow")
    late = {"prompt": "slow", "num_inference_steps": STEPS, "deadline_s": 0.3}
    job = http.post(PICTURES, json=late).json()["id"]
    assert gate.reached.wait(20)
    jobs.draining = True
    try:
        wait_until(lambda: not jobs.unfinished())
        answer = http.get(f"{PICTURES}/{job}").json()
        assert answer["error"]["code"] == "deadline_exceeded"
        assert http.post(PICTURES, json={"prompt": "p", "deadline_s": 9}).status_code == 503
    finally:
        jobs.draining = False
        gate.opened.set()


class LargeStudio(SlowStudio):
    """One whose files and previews are large."""

    def unfinished_pictures(self, picture_request):
        pictures = super().unfinished_pictures(picture_request)
        for picture in pictures:
            finish = picture.finish
            picture.finish = lambda finish=finish: FinishedPicture(
                data=finish().data.ljust(LARGE), settings={}
            )
            picture.preview = lambda: lambda: bytes(LARGE)
        return pictures


@pytest.fixture
def large(monkeypatch):
    """A server of large answers that gives a client up soon; its connections."""
    monkeypatch.setattr(ImpatientProtocol, "stalled_seconds", 0.4)
    connections, made = [], ImpatientProtocol.connection_made

    def noted(self, transport):
        connections.append(self)
        made(self, transport)

    monkeypatch.setattr(ImpatientProtocol, "connection_made", noted)
    with serving(LargeStudio(0.001)) as running:
        yield running, connections


def request_of(kind, http):
    """Return a request whose answer is large, as bytes."""
    if kind == "events":
        body = {"prompt": "p", "num_inference_steps": 150, "preview_every": 1}
        job = http.post(PICTURES, json=body).json()["id"]
        return f"GET {PICTURES}/{job}/events HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode()
    data = json.dumps({"prompt": "p", "stream": kind == "stream", "partial_images": 3}).encode()
    head = f"POST {GENERATIONS} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n" % len(data) + data


@pytest.mark.parametrize("kind", ["answer", "stream", "events"])
def test_whoever_stops_reading_is_given_up(large, kind):
    """It holds no step, no more than one message of memory, and after a while nothing at all."""
    running, connections = large
    jobs = running.service.jobs
    with httpx.Client(base_url=running.url, timeout=20) as http:
        request = request_of(kind, http)
        known = len(connections)
        stalled = connect(running, SO_RCVBUF=4096)
        stalled.sendall(request)
        wait_until(lambda: len(connections) > known and connections[known]._stalled is not None)
        held = connections[known].transport.get_write_buffer_size()
        assert held <= 2 * LARGE, "one message in base64"
        other = http.post(GENERATIONS, json={"prompt": "other", "num_inference_steps": STEPS})
        assert other.status_code == 200
        wait_until(lambda: connections[known].transport.is_closing())
        wait_until(lambda: not jobs.unfinished())
        if kind != "events":
            wait_until(lambda: not jobs._jobs)  # what it asked for is kept for nobody
        assert sum(len(event.blob) for job in jobs._jobs.values() for event in job.events) <= LARGE
        got = 0
        with suppress(ConnectionResetError):
            while part := stalled.recv(1 << 20):
                got += len(part)
        assert got < held
        stalled.close()


def test_whoever_reads_slowly_gets_everything(large):
    """Some is taken every now and then, over several times of what a stalled client is given."""
    running, _ = large
    with httpx.Client(base_url=running.url, timeout=20) as http:
        slow = connect(running, SO_RCVBUF=65536)
        slow.sendall(
            request_of("answer", http).replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
        )
        got, began = b"", time.monotonic()
        while part := slow.recv(1 << 18):
            got += part
            time.sleep(0.03)
        assert time.monotonic() - began > 0.8
        head, _, body = got.partition(b"\r\n\r\n")
        assert f"content-length: {len(body)}".encode() in head.lower()
        assert len(json.loads(body)["data"][0]["b64_json"]) > LARGE
        slow.close()
