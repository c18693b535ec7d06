"""Many at once: idle connections, floods, keys that come twice, clocks that jump."""

import hashlib
import itertools
import json
import resource
import socket
import threading
import time
from http.client import HTTPConnection

import httpx
import pytest

from serving.keys import Keys
from serving.limits import Limits
from serving.server import FILES, allow_connections
from tests.support.servers import SlowStudio, serving

PICTURES = "/api/v1/pictures"
GENERATIONS = "/v1/images/generations"
IDLE = 1000
JOBS, PICTURES_EACH = 12, 10  # of a flood: jobs that are taken on at a time, and pictures of each


@pytest.fixture
def many_files():
    """Let this process, which is client and server, have a file for each end of a connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * IDLE + 500
    if hard != resource.RLIM_INFINITY and hard < needed:
        pytest.skip("the system allows too few files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def at_once(count, work):
    """Do something in threads, given the number of each."""
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def address(running):
    host, port = running.url.removeprefix("http://").split(":")
    return host, int(port)


def authorized(name):
    return {"authorization": f"Bearer {name}", "content-type": "application/json"}


def flood(running, requests, answers):
    """Ask as fast as one can, and heed nothing; keeps each status and Retry-After."""
    connection = HTTPConnection(*address(running), timeout=20)
    body = json.dumps(
        {"prompt": "flood", "num_inference_steps": 2, "num_images_per_prompt": PICTURES_EACH}
    )
    for _ in range(requests):
        connection.request("POST", PICTURES, body, authorized("flood"))
        answer = connection.getresponse()
        answer.read()
        answers.append((answer.status, answer.headers["retry-after"]))
    connection.close()


def test_the_server_takes_as_many_files_as_it_may():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        allow_connections()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert hard == before[1]
        assert soft == (FILES if hard == resource.RLIM_INFINITY else min(hard, FILES))
        allow_connections()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_nobody_starves_beside_a_flood_and_idle_connections(many_files):
    """Sixty times as many as may wait: who asks now and then is never refused, nor waits for them.

    It waits for what is on board and an equal share of what waits, a part of the flood's pictures.
    """
    hashes = {name: hashlib.sha256(name.encode()).digest() for name in ("flood", "small")}
    limits = Limits(jobs=JOBS, kept_seconds=0.0)
    with serving(SlowStudio(0.002), keys=Keys(hashes=hashes), limits=limits) as running:
        loop, jobs, done = running.loop, running.service.jobs, running.loop._runner.done
        idle = [socket.create_connection(address(running)) for _ in range(IDLE)]
        answers, waited, fullest, marks = [], [], 0, {}
        submit = loop.submit

        def marked(order):
            marks[order.picture_request.fields["prompt"]] = len(done)
            submit(order)

        loop.submit = marked
        threads = [
            threading.Thread(target=flood, args=(running, 60 * JOBS // 4, answers))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        with httpx.Client(base_url=running.url, timeout=20) as client:
            end = time.monotonic() + 20
            while loop.waiting < (JOBS - 2) * PICTURES_EACH and time.monotonic() < end:
                time.sleep(0.001)
            for number in range(8):
                fullest = max(fullest, loop.waiting)
                given = {"prompt": f"small {number}", "num_inference_steps": 2}
                drawn = client.post(GENERATIONS, json=given, headers=authorized("small"))
                assert drawn.status_code == 200, "an equal share is never refused"
                begun = done.index(("texts", given["prompt"]))
                waited.append(done[marks[given["prompt"]] : begun].count(("enter", "flood")))
            for thread in threads:
                thread.join(60)
            for connection in idle:
                connection.close()
            end = time.monotonic() + 20
            while jobs.admission.jobs and time.monotonic() < end:
                time.sleep(0.01)
            client.get(f"{PICTURES}/x", headers=authorized("small"))
    statuses = {status for status, _ in answers}
    assert statuses == {202, 429}
    refused = [int(after) for status, after in answers if status == 429]
    assert len(refused) >= JOBS
    assert all(1 <= after <= 60 for after in refused)
    assert fullest >= (JOBS - 2) * PICTURES_EACH
    assert max(waited) <= loop.board < fullest
    assert (jobs.admission.jobs, jobs.admission.work) == (0, 0.0)
    assert not jobs._jobs
    assert not loop._orders
    assert not jobs.admission._jobs_of


@pytest.fixture(scope="module")
def running():
    hashes = {name: hashlib.sha256(name.encode()).digest() for name in ("anna", "bert")}
    with serving(SlowStudio(0.001), keys=Keys(hashes=hashes)) as started:
        yield started


@pytest.fixture(scope="module")
def http(running):
    with httpx.Client(base_url=running.url, timeout=20) as client:
        yield client


def post(client, caller, key, **body):
    headers = {**authorized(caller), "idempotency-key": key}
    return client.post(PICTURES, json=body, headers=headers)


def test_one_key_at_the_same_time_draws_once(running, http):
    """Twenty at once have one job; another caller's key of that name is another key."""
    answers = {}
    at_once(20, lambda n: answers.update({n: post(http, "anna", "one", prompt="at once")}))
    assert {answer.status_code for answer in answers.values()} == {202}
    (job,) = {answer.json()["id"] for answer in answers.values()}
    other = post(http, "bert", "one", prompt="at once").json()["id"]
    assert other != job
    for caller, each in (("anna", job), ("bert", other)):
        where = f"{PICTURES}/{each}/events"
        assert "event: done" in http.get(where, headers=authorized(caller)).text
    again = post(http, "anna", "one", prompt="at once").json()
    assert (again["id"], again["state"]) == (job, "done")
    assert running.loop._runner.done.count(("texts", "at once")) == 2, "one for each caller"


def test_one_key_for_several_requests_at_the_same_time(http):
    """One of them is drawn; which it is, those that come again are told of."""
    answers = {}
    at_once(9, lambda n: answers.update({n: post(http, "anna", "two", prompt=f"of {n % 3}")}))
    accepted = [n % 3 for n, answer in answers.items() if answer.status_code == 202]
    assert len(set(accepted)) == 1
    assert len(accepted) == 3
    refused = [answer for answer in answers.values() if answer.status_code != 202]
    assert {answer.status_code for answer in refused} == {409}
    assert {answer.json()["error"]["code"] for answer in refused} == {"idempotency_key_reused"}


def test_a_key_of_what_was_refused_or_cancelled(running, http):
    """A refusal is not remembered, so it may be asked again; what was cancelled stays so."""
    running.service.jobs.draining = True
    assert post(http, "anna", "three", prompt="p").status_code == 503
    running.service.jobs.draining = False
    job = post(http, "anna", "three", prompt="p", num_inference_steps=150).json()["id"]
    where, headers = f"{PICTURES}/{job}", authorized("anna")
    assert http.delete(where, headers=headers).json()["state"] == "cancelled"
    again = post(http, "anna", "three", prompt="p", num_inference_steps=150).json()
    assert (again["id"], again["state"]) == (job, "cancelled")
    assert post(http, "anna", "k" * 201, prompt="p").status_code == 400


@pytest.mark.parametrize("deadline", ["NaN", "Infinity", "1e400", "-1e400", "0", "-0.0", '"soon"'])
def test_deadlines_that_are_none(running, http, deadline):
    content = b'{"prompt": "never", "deadline_s": %s}' % deadline.encode()
    answer = http.post(PICTURES, content=content, headers=authorized("anna"))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "deadline_s")
    assert ("texts", "never") not in running.loop._runner.done


def test_a_clock_that_jumps_changes_nothing(running, http, monkeypatch):
    """Years forwards and back at every look: nothing is late, forgotten or counted by it."""
    now, jumps = time.time(), itertools.cycle((0.0, 1e8, -1e8, 3e8))
    monkeypatch.setattr(time, "time", lambda: now + next(jumps))
    headers = authorized("anna")
    given = {"prompt": "jumps", "num_inference_steps": 30, "deadline_s": 30, "preview_every": 3}
    job = http.post(PICTURES, json=given, headers=headers).json()["id"]
    names = [
        line.removeprefix("event: ")
        for line in http.get(f"{PICTURES}/{job}/events", headers=headers).text.splitlines()
        if line.startswith("event: ")
    ]
    assert names[-1] == "done"
    assert names.count("step") == 30
    assert http.get(f"{PICTURES}/{job}/image/0", headers=headers).status_code == 200
    assert http.post(GENERATIONS, json={"prompt": "p"}, headers=headers).status_code == 200
    admission = running.service.jobs.admission
    assert 1e-3 < admission.rate < 1e5
    assert (admission.jobs, admission.work) == (0, 0.0)
    for family in running.service.metrics.registry.collect():
        for sample in family.samples:
            if sample.name.endswith("_seconds_sum"):
                assert 0 <= sample.value < 600, sample
