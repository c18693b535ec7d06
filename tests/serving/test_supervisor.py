"""The engine as a process that dies: nothing is lost, nothing is drawn wrong, culprits fail."""

import base64
import os
import random
import signal
import threading
import time
from collections import defaultdict

import httpx
import pytest

from serving.child import EngineSettings
from serving.http.access import AccessRules
from serving.http.app import make_service
from serving.limits import Limits
from serving.order import Order
from serving.picture_request import PictureRequest
from serving.supervisor import ProcessEngine, Unfinished
from tests.support.dying import COMMAND, STAGES
from tests.support.servers import CATALOG, listening, load

SETTINGS = EngineSettings(models={"pictogram": "pictogram"}, backend="cpu", threads=1)


def order(job, *, preview_every=0, model="pictogram", **picture_requests):
    fields = {"prompt": job, "num_inference_steps": 6, "seed": 7, **picture_requests}
    request = PictureRequest(fields=fields, model=model, preview_every=preview_every)
    return Order(job=job, picture_request=request.checked(Limits()))


class Watched:
    """An engine in a process, and what it told: finished files by picture, failures by job."""

    def __init__(self, settings=SETTINGS, **options):
        self.files, self.failed, self.counts = {}, {}, defaultdict(int)
        self.changed = threading.Condition()
        self.engine = ProcessEngine(settings, pause=0.01, **options)
        self.deaths = 0
        self.engine.on_death(self.died)

    def died(self):
        self.deaths += 1

    def tell(self, event):
        with self.changed:
            self.counts[event.kind] += 1
            if event.kind == "finished":
                assert (event.job, event.index) not in self.files, "told once"
                self.files[event.job, event.index] = event.blob
            elif event.kind == "failed":
                self.failed[event.job] = event.data["code"]
            self.changed.notify_all()

    def wait(self, what, seconds=60):
        with self.changed:
            assert self.changed.wait_for(what, seconds), (self.files.keys(), self.failed)

    def wait_ready(self):
        end = time.monotonic() + 60
        while not self.engine.is_ready and time.monotonic() < end:
            time.sleep(0.005)
        assert self.engine.is_ready

    def kill(self, within):
        """Kill the engine some time after it is ready, and wait until that is noticed."""
        self.wait_ready()
        time.sleep(random.random() * within)
        before = self.deaths
        os.kill(self.engine.pid, signal.SIGKILL)
        end = time.monotonic() + 10
        while self.deaths == before and time.monotonic() < end:
            time.sleep(0.001)
        assert self.deaths == before + 1

    def __enter__(self):
        self.engine.start(self.tell)
        self.wait_ready()
        return self

    def __exit__(self, *_):
        self.engine.stop()
        assert self.engine._process.poll() is not None


@pytest.fixture
def fake():
    with Watched(command=COMMAND) as watched:
        yield watched


def alone(prompt, index=0, steps=6):
    made = {"prompt": prompt, "seed": 7 + index}
    return b"\x89PNG\r\n\x1a\n" + repr((made, steps)).encode()


def test_a_killed_engine_loses_nothing(fake):
    """Killed ten times under load, a finished picture apart: every file is what it must be."""
    random.seed(3)
    for number in range(40):
        fake.engine.submit(order(f"{number}", num_images_per_prompt=1 + number % 2))
    for _ in range(10):
        done = len(fake.files)
        fake.wait(lambda least=done: len(fake.files) > least)
        fake.kill(within=0.02)
    fake.wait(lambda: len(fake.files) == 60)
    assert fake.deaths == 10
    assert fake.failed == {}
    assert fake.files == {
        (f"{n}", i): alone(f"{n}", i) for n in range(40) for i in range(1 + n % 2)
    }
    assert fake.engine._unfinished.orders == {}
    assert not fake.engine._unfinished.deaths


@pytest.mark.parametrize("prompt", ["poison", "bad text"])
def test_only_the_culprit_fails(fake, prompt):
    """Four rows die with it twice, are drawn one by one, and only it dies alone twice."""
    for job in ("a", "b"):
        fake.engine.submit(order(job, num_inference_steps=100))
    fake.engine.submit(order("culprit", prompt=prompt))
    for job in ("c", "d"):
        fake.engine.submit(order(job, num_inference_steps=100))
    fake.wait(lambda: len(fake.files) == 4 and fake.failed)
    assert fake.failed == {"culprit": "engine_failed"}
    assert {job for job, _ in fake.files} == {"a", "b", "c", "d"}
    assert 3 <= fake.deaths <= 4
    assert all(data == alone(job, steps=100) for (job, _), data in fake.files.items())


def test_whatever_it_dies_in_everything_is_drawn_again(fake, tmp_path):
    """Beside one of its batch, others that wait, and one of which a picture is finished."""
    wanted = {}
    for deaths, stage in enumerate(STAGES, start=1):
        prompt = f"{stage} once {tmp_path / stage}"
        fake.wait_ready()
        fake.engine.submit(order(f"{stage} three", num_images_per_prompt=3))
        fake.wait(lambda stage=stage: (f"{stage} three", 0) in fake.files)
        for number in range(20):
            fake.engine.submit(order(f"{stage} {number}", num_inference_steps=9))
        fake.engine.submit(order(stage, prompt=prompt, preview_every=2))
        wanted |= {(f"{stage} three", index): alone(f"{stage} three", index) for index in range(3)}
        wanted |= {(f"{stage} {n}", 0): alone(f"{stage} {n}", steps=9) for n in range(20)}
        wanted[stage, 0] = alone(prompt)
        fake.wait(lambda names=frozenset(wanted): fake.files.keys() == names)
        assert (fake.deaths, fake.failed) == (deaths, {}), stage
    assert fake.files == wanted


def test_deaths_while_it_starts_are_nobodys(tmp_path):
    """Before it is ever ready, and when it is started again with pictures owed."""
    deaths = tmp_path / "deaths"
    deaths.write_text("1")
    with Watched(command=(*COMMAND, str(deaths))) as watched:
        assert watched.deaths == 1
        for job in ("a", "b"):
            watched.engine.submit(order(job, num_inference_steps=100))
        watched.wait(lambda: watched.counts["turn"] > 5)
        deaths.write_text("2")
        os.kill(watched.engine.pid, signal.SIGKILL)
        watched.engine.submit(order("while it is dead"))
        watched.wait(lambda: len(watched.files) == 3)
        assert (watched.deaths, watched.failed) == (4, {})
        assert watched.files["a", 0] == alone("a", steps=100)


def test_alone_from_the_beginning_two_deaths_are_enough(fake):
    fake.engine.submit(order("culprit", prompt="poison"))
    fake.wait(lambda: fake.failed)
    assert fake.deaths == 2
    fake.wait_ready()
    fake.engine.submit(order("next"))
    fake.wait(lambda: fake.files)


def test_cancelled_while_the_engine_is_dead(fake):
    fake.engine.submit(order("long", num_inference_steps=150))
    fake.engine.submit(order("short"))
    os.kill(fake.engine.pid, signal.SIGKILL)
    fake.engine.cancel("long")
    fake.wait(lambda: fake.files)
    assert set(fake.files) == {("short", 0)}
    assert fake.engine._unfinished.orders == {}


def test_over_http_only_the_culprit_is_told():
    """Its client gets 500 and is told not to ask again; the others get what they get alone."""
    engine = ProcessEngine(SETTINGS, command=COMMAND, pause=0.01)
    rules = AccessRules.of("127.0.0.1", [], [], None)
    answers = {}

    def ask(prompt):
        body = {"prompt": prompt, "num_inference_steps": 90, "seed": 7}
        answers[prompt] = client.post("/v1/images/generations", json=body)

    service = make_service(engine, CATALOG, rules)
    with listening(service) as url, httpx.Client(base_url=url, timeout=60) as client:
        while client.get("/ready").status_code != 200:
            time.sleep(0.01)
        threads = [threading.Thread(target=ask, args=(name,)) for name in ("a", "poison", "b")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert client.get("/health").status_code == 200
    culprit = answers.pop("poison")
    assert (culprit.status_code, culprit.json()["error"]["code"]) == (500, "engine_failed")
    assert culprit.headers["x-should-retry"] == "false"
    for prompt, answer in answers.items():
        (told,) = answer.json()["data"]
        assert base64.b64decode(told["b64_json"]) == alone(prompt, steps=90)


def test_a_refused_wish_fails_with_its_sentence(fake):
    fake.engine.submit(order("refused"))
    fake.wait(lambda: fake.failed)
    assert fake.failed == {"refused": "invalid_request"}
    assert fake.deaths == 0


def test_an_engine_that_cannot_start_says_so(tmp_path, capfd):
    (tmp_path / "model").mkdir()
    settings = EngineSettings(models={"none": str(tmp_path / "model")})
    watched = Watched(settings)
    watched.engine.start(watched.tell)
    end = time.monotonic() + 60
    while not watched.engine.has_failed and time.monotonic() < end:
        time.sleep(0.01)
    assert watched.engine.has_failed
    assert not watched.engine.is_ready
    watched.engine.stop()
    assert "error: " in capfd.readouterr().err


def test_who_is_owed_what():
    unfinished = Unfinished()
    unfinished.add(order("a", num_images_per_prompt=2))
    unfinished.aboard |= {("a", 0), ("a", 1)}
    assert unfinished.died() == []
    unfinished.aboard |= {("a", 0)}
    assert unfinished.died() == []
    assert unfinished.suspect == ("a", 0)
    unfinished.done("a", 0)
    assert unfinished.suspect is None
    assert list(unfinished.rest("a").indices) == [1]
    unfinished.done("a", 1)
    assert unfinished.orders == {}


def kill_under_load(kills, pictures):
    """Kill the engine at random moments, at least a finished picture apart; compare every file."""
    random.seed(5)
    samplers = ("ddim", "euler_a", "lms", "dpmpp_2m", "unipc", "ddpm")
    picture_requests = {
        f"{n}": {"seed": n, "sampler": samplers[n % 6], "num_inference_steps": 4 + n % 7}
        for n in range(pictures)
    }
    with Watched() as watched:
        for job, picture_request in picture_requests.items():
            watched.engine.submit(order(job, **picture_request))
        for _ in range(kills):
            done = len(watched.files)
            watched.wait(lambda least=done: len(watched.files) > least)
            watched.kill(within=0.3)
        watched.wait(lambda: len(watched.files) == pictures, 300)
        assert watched.failed == {}
        assert watched.deaths == kills
    import io

    import numpy as np
    from PIL import Image

    with load("pictogram") as pipeline:
        for (job, _), data in watched.files.items():
            (image,) = pipeline(job, **picture_requests[job]).images
            drawn = np.asarray(Image.open(io.BytesIO(data)))
            np.testing.assert_array_equal(drawn, np.asarray(image), job)


def test_the_model_that_ships_is_redrawn_bit_for_bit():
    kill_under_load(kills=2, pictures=9)


@pytest.mark.slow
def test_fifty_kills_lose_no_picture():
    kill_under_load(kills=50, pictures=500)
