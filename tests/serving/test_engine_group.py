"""Several engines behind one server: who draws what, and what a death of one leaves alone."""

import os
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from engine.errors import RequestError
from runtime.images.files import read_image
from serving.engine_group import EngineGroup, make_engine
from serving.engine_settings import EngineSettings
from serving.events import Event
from serving.limits import Limits
from serving.options import make_parser, read_cards
from serving.order import Order
from serving.picture_request import PictureRequest
from serving.supervisor import ProcessEngine
from tests.support.dying import COMMAND
from tests.support.servers import load

SETTINGS = EngineSettings(models={"pictogram": "pictogram"}, backend="cpu", threads=1)
PNG = b"\x89PNG\r\n\x1a\n"


def order(job, model="pictogram", **fields):
    fields = {"prompt": job, "seed": 7, "num_inference_steps": 6, **fields}
    return Order(
        job=job, picture_request=PictureRequest(fields=fields, model=model).checked(Limits())
    )


class Recorder:
    """What engines would be given; stands for one whose process nobody starts."""

    def __init__(self):
        self.orders, self.cancelled, self.is_ready = [], [], True
        self.tell = None

    def start(self, tell):
        self.tell = tell

    def submit(self, given):
        self.orders.append((given.job, list(given.indices)))

    def cancel(self, job):
        self.cancelled.append(job)


@pytest.fixture
def recorded():
    engines, told = [Recorder(), Recorder()], []
    group = EngineGroup(engines)
    group.start(told.append)
    return group, engines, told


def finish(engine, job, index=0):
    engine.tell(Event(kind="finished", job=job, index=index))


def test_the_least_loaded_draws(recorded):
    group, (first, second), told = recorded
    group.submit(order("long", num_inference_steps=100))
    for job in ("a", "b", "c"):
        group.submit(order(job))
    assert first.orders == [("long", [0])]
    assert second.orders == [("a", [0]), ("b", [0]), ("c", [0])]
    finish(first, "long")
    group.submit(order("d"))
    assert first.orders[-1] == ("d", [0])
    assert [event.job for event in told] == ["long"]


def test_pictures_of_one_request_are_shared_out(recorded):
    group, (first, second), _ = recorded
    group.submit(order("four", num_images_per_prompt=4))
    assert first.orders == [("four", [0, 2])]
    assert second.orders == [("four", [1, 3])]
    finish(first, "four", 0)
    finish(first, "four", 2)
    group.cancel("four")
    assert (first.cancelled, second.cancelled) == ([], ["four"])
    group.submit(order("next", num_images_per_prompt=2))
    assert first.orders[-1] == ("next", [0])
    assert second.orders[-1] == ("next", [1])


def test_of_two_idle_engines_the_one_that_has_the_model(recorded):
    group, (first, second), _ = recorded
    group.submit(order("a"))
    group.submit(order("b", model="other"))
    finish(first, "a")
    finish(second, "b")
    group.submit(order("c", model="other"))
    assert second.orders[-1] == ("c", [0])


def test_one_that_is_not_ready_gets_nothing(recorded):
    group, (first, second), _ = recorded
    first.is_ready = False
    group.submit(order("a", num_images_per_prompt=3))
    assert (first.orders, second.orders) == ([], [("a", [0, 1, 2])])
    assert group.is_ready
    second.is_ready = False
    assert not group.is_ready


def test_a_failed_job_is_work_no_longer(recorded):
    group, (first, _), _ = recorded
    group.submit(order("bad", num_inference_steps=100))
    group.submit(order("a"))
    first.tell(Event(kind="failed", job="bad", data={"code": "x", "message": "y"}))
    group.submit(order("b"))
    assert first.orders[-1] == ("b", [0])


def test_a_turn_is_a_share_of_what_all_do(recorded):
    _, (first, second), told = recorded
    turn = Event(kind="turn", data={"elapsed": 3.0, "seconds": 1.0, "limit": 8, "rows": []})
    first.tell(turn)
    second.is_ready = False
    first.tell(turn)
    assert [event.data["elapsed"] for event in told] == [1.5, 3.0]
    assert [event.data["seconds"] for event in told] == [1.0, 1.0]


class Watched:
    """Two engines in processes, and the files that they made."""

    def __init__(self, **options):
        engines = [ProcessEngine(SETTINGS, pause=0.01, **options) for _ in range(2)]
        self.group, self.files, self.deaths = EngineGroup(engines), {}, 0
        self.changed = threading.Condition()
        self.group.on_death(self.died)

    def died(self):
        self.deaths += 1

    def tell(self, event):
        with self.changed:
            if event.kind == "finished":
                assert (event.job, event.index) not in self.files, "told once"
                self.files[event.job, event.index] = event.blob
            self.changed.notify_all()

    def wait(self, what, seconds=60):
        with self.changed:
            assert self.changed.wait_for(what, seconds), self.files.keys()

    def wait_ready(self):
        end = time.monotonic() + 60
        while not all(engine.is_ready for engine in self.group.engines):
            assert time.monotonic() < end
            time.sleep(0.005)

    def __enter__(self):
        self.group.start(self.tell)
        self.wait_ready()
        return self

    def __exit__(self, *_):
        self.group.stop()
        assert all(engine._process.poll() is not None for engine in self.group.engines)


def test_the_death_of_one_does_not_stop_the_other():
    with Watched(command=COMMAND) as watched:
        first, second = watched.group.engines
        watched.group.submit(order("own", num_images_per_prompt=2, num_inference_steps=150))
        for engine in (first, second):
            assert list(engine._unfinished.orders) == ["own"]
        before = second.pid
        os.kill(first.pid, signal.SIGKILL)
        while first.is_ready:
            time.sleep(0.001)
        assert watched.group.is_ready
        watched.group.submit(order("meanwhile"))
        assert "meanwhile" in second._unfinished.orders
        watched.wait(lambda: len(watched.files) == 3)
        assert (watched.deaths, second.pid) == (1, before)
        watched.wait_ready()
        watched.group.submit(order("after", num_images_per_prompt=2))
        watched.wait(lambda: len(watched.files) == 5)
    made = {"prompt": "own", "seed": 7}
    assert watched.files["own", 0] == PNG + repr((made, 150)).encode()


def test_an_engine_sees_its_card_alone(tmp_path):
    engines = [ProcessEngine(replace(SETTINGS, card=n), command=COMMAND) for n in (1, 3)]
    watched = Watched()
    watched.group = EngineGroup(engines)
    with watched:
        for number in (0, 1):
            watched.group.submit(order(f"card {tmp_path / str(number)}", num_inference_steps=150))
        watched.wait(lambda: len(watched.files) == 2)
    assert [(tmp_path / name).read_text() for name in "01"] == ["1", "3"]


def test_two_engines_of_the_model_that_ships_draw_the_same_bits(tmp_path):
    with Watched() as watched:
        watched.group.submit(order("a hat", num_images_per_prompt=4))
        assert all(engine._unfinished.orders for engine in watched.group.engines)
        watched.wait(lambda: len(watched.files) == 4)
    with load("pictogram") as pipeline:
        drawn = pipeline("a hat", seed=7, num_inference_steps=6, num_images_per_prompt=4).images
    for index, image in enumerate(drawn):
        path = tmp_path / f"{index}.png"
        path.write_bytes(watched.files["a hat", index])
        np.testing.assert_array_equal(np.asarray(read_image(path)), np.asarray(image))


def test_cards_are_an_engine_each():
    assert isinstance(make_engine(SETTINGS, []), ProcessEngine)
    one = make_engine(SETTINGS, [2])
    assert isinstance(one, ProcessEngine)
    assert one.settings.card == 2
    group = make_engine(SETTINGS, [0, 1])
    assert [engine.settings.card for engine in group.engines] == [0, 1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--devices", "0,1"], "backend left open"),
        (["--devices", "0", "--backend", "cpu"], "backend cpu"),
        (["--devices", "0,x", "--backend", "cuda"], "--devices is 0,x"),
        (["--devices", "0,0", "--backend", "cuda"], "each once"),
        (["--devices", "", "--backend", "cuda"], "numbers of GPUs"),
        (["--devices=-1", "--backend", "tensorrt"], "numbers of GPUs"),
        (["--devices", "99999", "--backend", "cuda"], "numbers of GPUs"),
        (["--devices", "0,", "--backend", "cuda"], "numbers of GPUs"),
    ],
)
def test_devices_are_numbers_of_gpus(given, said):
    with pytest.raises(RequestError, match=said):
        read_cards(make_parser("serve").parse_args(given))


def test_devices_are_read():
    parse = make_parser("serve").parse_args
    assert read_cards(parse([])) == []
    assert read_cards(parse(["--devices", "0, 3", "--backend", "cuda"])) == [0, 3]
