"""The native API: jobs, their events, cancelling, keys that draw once, and what is counted."""

import base64
import io
import json
import threading
import time

import httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import given, settings
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from schemathesis import checks

from serving.limits import Limits
from tests.support.named_requests import IMAGE, MASK
from tests.support.painted_runners import PaintedRunner
from tests.support.servers import SlowStudio, load, models, serving

BODY = {"prompt": "a cat", "seed": 3, "num_inference_steps": 6}
PICTURES = "/api/v1/pictures"
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]


@pytest.fixture(scope="module")
def running():
    with serving(models()) as started:
        yield started


@pytest.fixture(scope="module")
def http(running):
    with httpx.Client(base_url=running.url, timeout=60) as client:
        yield client


@pytest.fixture
def slow():
    with serving(SlowStudio(0.01)) as started, httpx.Client(base_url=started.url) as client:
        yield started, client


def events(client, job, **headers):
    """Read a job's events to the end, as (name, number, data)."""
    found = []
    with client.stream("GET", f"{PICTURES}/{job}/events", headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        block = {}
        for line in answer.iter_lines():
            if line.startswith(":"):
                continue
            if line:
                name, _, value = line.partition(": ")
                block[name] = value
            elif block:
                found.append((block["event"], int(block["id"]), json.loads(block["data"])))
                block = {}
    return found


def file_of(image):
    file = io.BytesIO()
    image.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize("fields", [{}, {"sampler": "lms", "guidance_rescale": 0.5}])
def test_a_file_says_what_makes_it_again(http, tmp_path, fields):
    """Of every picture of a job: drawn again by the command line, it is the same."""
    from runtime.__main__ import main

    body = {**BODY, "num_images_per_prompt": 2, **fields}
    job = http.post(PICTURES, json=body).json()["id"]
    assert events(http, job)[-1][0] == "done"
    for index in range(2):
        drawn, out = tmp_path / f"{index}.png", tmp_path / f"{index}-again.png"
        drawn.write_bytes(http.get(f"{PICTURES}/{job}/image/{index}").content)
        assert main(["--again", str(drawn), "--threads", "1", "-o", str(out)]) == 0
        np.testing.assert_array_equal(np.asarray(Image.open(out)), np.asarray(Image.open(drawn)))


def test_a_job_is_watched_and_fetched(http):
    answer = http.post(PICTURES, json={**BODY, "num_images_per_prompt": 2, "preview_every": 2})
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"{PICTURES}/{job['id']}"
    told = events(http, job["id"])
    names = [name for name, _, _ in told]
    assert names[0] == "queued"
    assert names[-1] == "done"
    assert names.count("started") == names.count("picture") == 2
    steps = [(data["index"], data["step"]) for name, _, data in told if name == "step"]
    assert sorted(steps) == [(i, step) for i in range(2) for step in range(1, 7)]
    for name, _, data in told:
        if name == "preview":
            jpeg = Image.open(io.BytesIO(base64.b64decode(data["jpeg"])))
            assert (jpeg.format, jpeg.size) == ("JPEG", (128, 128))
    state = http.get(f"{PICTURES}/{job['id']}").json()
    assert state["state"] == "done"
    with load("pictogram") as pipeline:
        wanted = pipeline("a cat", seed=3, num_inference_steps=6, num_images_per_prompt=2)
    for picture, image in zip(state["pictures"], wanted.images, strict=True):
        file = http.get(picture["image"])
        assert file.headers["content-type"] == "image/png"
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(file.content))), image)
        assert picture["settings"]["sampler"] == "ddim"


def test_events_go_on_where_a_client_left_off(http):
    job = http.post(PICTURES, json=BODY).json()["id"]
    told = events(http, job)
    _, number, _ = told[3]
    assert events(http, job, **{"last-event-id": str(number)}) == told[4:]
    assert events(http, job, **{"last-event-id": "nonsense"}) == told


def test_every_mode_is_what_the_pipeline_draws(http):
    """A mask, a second run, guidance that ends, deep features: all by their names."""
    picture_requests = {
        "mask": {"image": IMAGE, "mask": MASK, "strength": 0.9, "sampler": "dpm2"},
        "noise": {"image": IMAGE, "strength": 0.5, "image_noise": "gaussian:0.05"},
        "hires": {"hires": {"scale": 1.25}, "sampler": "lms"},
        "curve": {"guidance_scale": [7.0, 3.0], "guidance_interval": [0.0, 0.5]},
        "deep": {"cache_interval": 2, "negative_prompt": "blue", "noise": "cuda"},
        "AND": {"prompt": "a cat AND a hat :0.6", "clip_skip": 2},
    }
    jobs = {}
    for name, picture_request in picture_requests.items():
        sent = {
            k: file_of(v) if isinstance(v, Image.Image) else v for k, v in picture_request.items()
        }
        answer = http.post(PICTURES, json={**BODY, **sent})
        assert answer.status_code == 202, answer.text
        jobs[name] = answer.json()["id"]
    from runtime import Hires

    with load("pictogram") as pipeline:
        for name, job in jobs.items():
            assert events(http, job)[-1][0] == "done", name
            given = {**BODY, **picture_requests[name]}
            if "hires" in given:
                given["hires"] = Hires(**given["hires"])
            (image,) = pipeline(given.pop("prompt"), **given).images
            drawn = Image.open(io.BytesIO(http.get(f"{PICTURES}/{job}/image/0").content))
            np.testing.assert_array_equal(np.asarray(drawn), np.asarray(image), name)


def test_what_a_model_refuses_fails_the_job_in_the_runtimes_words(http):
    job = http.post(PICTURES, json={**BODY, "height": 130}).json()["id"]
    name, _, data = events(http, job)[-1]
    assert (name, data["code"]) == ("failed", "invalid_request")
    assert data["message"].startswith("height is 130; it must be a multiple of 8")


@pytest.mark.parametrize(
    ("idle", "lacking"),
    [
        ({"strength": 0.5}, "image"),
        ({"mask_blur": 2.0}, "image"),
        ({"image": IMAGE, "mask_blur": 2.0}, "mask"),
        ({"image": IMAGE, "paste_back": False}, "mask"),
        ({"image": IMAGE, "inpaint_area": "masked"}, "mask"),
        ({"mask_padding": 8, "image": IMAGE, "mask": MASK}, 'inpaint_area="masked"'),
        ({"variation_seed": 3}, "variation_strength"),
        ({"quality": 50}, "format jpeg or webp"),
    ],
    ids=lambda given: given if isinstance(given, str) else ",".join(given),
)
def test_a_field_that_cannot_act_is_refused(http, idle, lacking):
    sent = {k: file_of(v) if isinstance(v, Image.Image) else v for k, v in idle.items()}
    answer = http.post(PICTURES, json={**BODY, **sent})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    (name,) = idle.keys() - {"image", "mask"}
    assert error["param"] == name
    assert error["message"].startswith(f"{name} came without {lacking}; ")


def test_a_misspelt_name_gets_the_near_one_first(http):
    for field, near in (("sampler", "euler"), ("preset", "fast"), ("format", "webp")):
        message = http.post(PICTURES, json={**BODY, field: near[:-1]}).json()["error"]["message"]
        assert message.startswith(f"{field} is {near[:-1]!r}; did you mean {near!r}? There are ")
    answer = http.post(PICTURES, json={**BODY, "model": "pictogrm"})
    assert "did you mean 'pictogram'? /v1/models" in answer.json()["error"]["message"]


def test_texts_that_take_the_encoder_long_are_refused(http):
    for prompt in ("word " * 6000, "[a|b|c|d|e|f|g|h] " * 3 + "x " * 3000):
        job = http.post(PICTURES, json={**BODY, "prompt": prompt}).json()["id"]
        name, _, data = events(http, job)[-1]
        assert (name, data["code"]) == ("failed", "invalid_request")
        assert "up to 64" in data["message"]


def test_cancel(slow):
    running, client = slow
    job = client.post(PICTURES, json={**BODY, "num_inference_steps": 150}).json()["id"]
    while client.get(f"{PICTURES}/{job}").json()["pictures"][0]["step"] < 2:
        time.sleep(0.01)
    assert client.delete(f"{PICTURES}/{job}").json()["state"] == "cancelled"
    before = client.get(f"{PICTURES}/{job}").json()["pictures"][0]["step"]
    time.sleep(0.1)
    assert running.loop.on_board == 0
    assert client.get(f"{PICTURES}/{job}").json()["pictures"][0]["step"] - before <= 2
    assert client.delete(f"{PICTURES}/{job}").json()["state"] == "cancelled", "twice"
    assert events(client, job)[-1][0] == "cancelled"
    assert client.get(f"{PICTURES}/{job}/image/0").status_code == 404


def test_those_that_wait_are_told_their_place():
    """It counts down as others end or leave, whoever polls or watches; only the newest is kept."""
    runner = PaintedRunner()
    runner.goes_on.clear()
    with serving(runner, rows=1) as running, httpx.Client(base_url=running.url) as client:
        jobs = [client.post(PICTURES, json=BODY).json() for _ in range(5)]
        assert [job["position"] for job in jobs] == [0, 1, 2, 3, 4]

        last = f"{PICTURES}/{jobs[4]['id']}"
        for left, place in ((3, 3), (2, 2)):
            client.delete(f"{PICTURES}/{jobs[left]['id']}")
            assert client.get(last).json()["position"] == place
        runner.goes_on.set()
        told = [data for name, _, data in events(client, jobs[4]["id"]) if name == "queued"]
        assert [data["position"] for data in told] in ([2], [2, 1], [2, 1, 0], [1], [0], [1, 0])
        assert all(data["eta_s"] >= 0 for data in told)
        assert "position" not in client.get(last).json()


def test_the_same_key_draws_once(slow):
    running, client = slow
    headers = {"idempotency-key": "order-7"}
    body = {"prompt": "a cat"}  # without a seed: the first one's is kept
    first = client.post(PICTURES, json=body, headers=headers).json()
    again = client.post(PICTURES, json=body, headers=headers).json()
    assert again["id"] == first["id"]
    other = client.post(PICTURES, json={"prompt": "a dog"}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reused")
    assert events(client, first["id"])[-1][0] == "done"
    assert running.loop._runner.done.count(("texts", "a cat")) == 1


def test_deadlines(slow):
    _, client = slow
    late = client.post(PICTURES, json={**BODY, "deadline_s": -1})
    assert (late.status_code, late.json()["error"]["code"]) == (400, "deadline_exceeded")
    job = client.post(
        PICTURES, json={**BODY, "num_inference_steps": 100, "deadline_s": 0.2}
    ).json()["id"]
    name, _, data = events(client, job)[-1]
    assert (name, data["code"]) == ("failed", "deadline_exceeded")
    hopeless = client.post(PICTURES, json={**BODY, "num_inference_steps": 150, "deadline_s": 0.01})
    assert hopeless.status_code == 400, "by the rate that was measured it cannot be in time"


def test_a_slow_reader_holds_nothing_up_and_gets_the_end(slow):
    """Nobody reads for the whole job: events are bounded, and the last is there."""
    running, client = slow
    body = {**BODY, "num_inference_steps": 150, "preview_every": 1}
    job = client.post(PICTURES, json=body).json()["id"]
    while client.get(f"{PICTURES}/{job}").json()["state"] != "done":
        time.sleep(0.05)
    kept = running.service.jobs._jobs[job].events
    assert len(kept) <= 64
    assert sum(told.name == "preview" for told in kept) <= 1
    assert events(client, job)[-1][0] == "done"


def test_an_end_waits_for_what_was_just_finished_to_be_fetched(slow, monkeypatch):
    running, client = slow
    jobs = running.service.jobs
    assert not jobs.awaits_fetching
    body = {"prompt": "p", "num_inference_steps": 1, "num_images_per_prompt": 2}
    job = client.post(PICTURES, json=body).json()["id"]
    assert events(client, job)[-1][0] == "done"
    for index in range(2):
        assert jobs.awaits_fetching
        client.get(f"{PICTURES}/{job}/image/{index}")
    assert not jobs.awaits_fetching
    job = client.post(PICTURES, json=body).json()["id"]
    assert events(client, job)[-1][0] == "done"
    assert jobs.awaits_fetching
    monkeypatch.setattr("serving.jobs.FETCH_SECONDS", 0.0)
    assert not jobs.awaits_fetching, "nor for ever"


def test_finished_pictures_are_kept_within_bounds():
    limits = Limits(kept_bytes=400)
    with (
        serving(SlowStudio(0), limits=limits) as running,
        httpx.Client(base_url=running.url) as client,
    ):
        for number in range(20):
            job = client.post(PICTURES, json={"prompt": f"{number}"}).json()["id"]
            assert events(client, job)[-1][0] == "done"
        kept = running.service.jobs._jobs.values()
        assert 0 < sum(job.kept_bytes for job in kept) <= 400
        assert client.get(f"{PICTURES}/{'0' * 32}").status_code == 404


def test_the_numbers_are_prometheus(http, running):
    before = dict(numbers(http))
    job = http.post(PICTURES, json=BODY).json()["id"]
    events(http, job)
    after = dict(numbers(http))
    for name, value in before.items():
        if name[0].endswith(("_total", "_count", "_bucket")):
            assert after[name] >= value, name
    assert after["latentrt_pictures_total", ()] == before["latentrt_pictures_total", ()] + 1
    assert after["latentrt_rows", ()] <= after["latentrt_rows_capacity", ()] == 8
    assert after["latentrt_waiting", ()] == 0
    assert after["latentrt_engine_memory_bytes", ()] > 10**7
    text = http.get("/metrics").text
    assert "a cat" not in text
    assert job not in text


def numbers(client):
    answer = client.get("/metrics")
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            yield (sample.name, tuple(sorted(sample.labels.items()))), sample.value


def test_ready_and_capabilities(http, running):
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ready"}
    told = http.get("/api/v1/capabilities").json()
    assert told["models"] == ["pictogram", "other"]
    assert "euler_a" in told["samplers"]
    assert told["upscalers"][0] == "lanczos"
    limits = Limits()
    assert told["limits"] == {name: getattr(limits, name) for name in told["limits"]}
    assert {"prompt_characters", "loras", "side"} <= told["limits"].keys()
    running.service.jobs.draining = True
    try:
        assert http.get("/ready").status_code == 503
        refused = http.post(PICTURES, json=BODY)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    finally:
        running.service.jobs.draining = False


def test_three_hundred_requests_leave_nothing_behind():
    with serving(SlowStudio(0), limits=Limits(kept_seconds=0.0)) as running:
        with httpx.Client(base_url=running.url) as client:
            threads = [
                threading.Thread(
                    target=lambda: [
                        client.post(PICTURES, json={**BODY, "prompt": "p"}) for _ in range(30)
                    ]
                )
                for _ in range(10)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            end = time.monotonic() + 20
            while running.service.jobs.admission.jobs and time.monotonic() < end:
                time.sleep(0.05)
            client.get(f"{PICTURES}/x")
        assert running.service.jobs._jobs == {}
        assert running.service.jobs.admission.work == 0
        assert not running.loop._orders


@pytest.fixture(scope="module")
def document():
    with serving(SlowStudio(0), limits=Limits(jobs=10**6)) as started:
        yield schemathesis.openapi.from_url(f"{started.url}/openapi.json")


def test_the_document_says_what_is_answered(document):
    """No status, type or body that the document does not list, and no error of the server's."""
    operations = [found.ok() for found in document.get_all_operations()]
    assert len(operations) == 53
    for operation in operations:

        @settings(max_examples=20, deadline=None, derandomize=True, database=None)
        @given(case=operation.as_strategy())
        def check(case):
            case.validate_response(case.call(timeout=20), checks=CHECKS)

        check()
