"""What a cluster's gateways and engines do by themselves, without Ray."""

import asyncio
from dataclasses import dataclass, field
from functools import partial

import pytest

from engine.errors import BackendError, RequestError
from runtime.batch import cluster
from runtime.batch.__main__ import main
from runtime.batch.lines import Line
from runtime.batch.work import Work
from serving.configuration import parse_options
from serving.engine_settings import EngineSettings
from serving.events import Event
from serving.limits import Limits
from serving.options import make_parser
from serving.order import Order
from serving.picture_request import PictureRequest
from serving.ray import client
from serving.ray import engine as ray_engine
from serving.ray.client import ClusterEngine
from serving.ray.engine import SETS_KEPT, EngineReplica
from serving.ray.routing import WARM, caller_key, model_set, ranked
from serving.supervisor import ProcessEngine
from tests.support.dying import COMMAND

SETTINGS = EngineSettings(models={"pictogram": "pictogram"}, backend="cpu", threads=1)


def request(prompt="a hat", model="pictogram", loras=(), **fields):
    fields = {"prompt": prompt, "seed": 7, "num_inference_steps": 6, **fields}
    return PictureRequest(fields=fields, model=model, loras=loras).checked(Limits())


def order(job, **given):
    return Order(job=job, picture_request=request(job, **given))


@dataclass
class Told:
    replica_id: str
    routing_stats: dict = field(default_factory=dict)


def test_models_with_other_adapters_are_other_sets():
    plain, more = request(), request(loras=(("ink", 0.5),))
    named = request("a hat<lora:ink:0.5>")
    assert model_set(plain) == model_set(request("a cat", num_inference_steps=2)) == "pictogram"
    sets = [plain, more, named, request(loras=(("ink", 0.6),)), request(model="other")]
    assert len({model_set(each) for each in sets}) == len(sets)


def test_replicas_that_have_the_models_come_first():
    replicas = [Told(name) for name in "abcde"]
    replicas[3].routing_stats[WARM] = ["other", "pictogram"]
    replicas[1].routing_stats[WARM] = ["pictogram"]
    first, *others = ranked("pictogram", replicas)
    assert [replica.replica_id for replica in first] == ["b", "d"]
    assert sorted(replica.replica_id for (replica,) in others) == ["a", "c", "e"]


def test_models_that_nobody_has_are_spread_and_stay():
    replicas = [Told(name) for name in "abcd"]
    chosen = {f"set {n}": ranked(f"set {n}", replicas)[0][0].replica_id for n in range(40)}
    assert set(chosen.values()) == set("abcd")
    left = replicas[:-1]
    for models, before in chosen.items():
        assert ranked(models, reversed(replicas))[0][0].replica_id == before
        if before != "d":
            assert ranked(models, left)[0][0].replica_id == before, "others stay where they are"


def test_a_caller_is_its_key_or_its_address():
    def scope(client=("10.0.0.7", 5000), **headers):
        return {"client": client, "headers": [(k.encode(), v.encode()) for k, v in headers.items()]}

    anna, bert = (caller_key(scope(authorization=f"Bearer {n}")) for n in ("anna", "bert"))
    assert anna != bert
    assert anna == caller_key(scope(("10.0.0.8", 1), authorization="Bearer anna", accept="a"))
    assert "anna" not in anna
    assert caller_key(scope()) == "10.0.0.7"
    assert caller_key(scope(None)) is None
    assert caller_key(None) is None


async def events_of(replica, gateway, given):
    return [event async for event in replica.draw(gateway, given)]


@pytest.fixture(scope="module")
def replica():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ray_engine, "ProcessEngine", partial(ProcessEngine, pause=0.01))
        made = EngineReplica(SETTINGS, COMMAND)
    yield made
    made.__del__()


def on_a_loop(replica, work):
    """Run what asks a replica, which is used to one event loop."""
    replica._inbox = None
    return asyncio.run(work)


def test_an_engine_tells_each_order_what_becomes_of_it(replica):
    async def both():
        drawn = [events_of(replica, "g", order(job, num_inference_steps=20)) for job in "ab"]
        other = events_of(replica, "h", order("c", num_inference_steps=20))
        return await asyncio.gather(*drawn, other)

    first, second, other = on_a_loop(replica, both())
    for job, events in zip("abc", (first, second, other), strict=True):
        assert {event.job for event in events if event.kind != "turn"} == {job}
        assert events[-1].kind == "finished"
    turns = [e for e in (*first, *second) if e.kind == "turn"]
    steps = [tuple(row) for turn in turns for row in turn.data["rows"] if row[0] in "ab"]
    assert len(set(steps)) == len(steps), "a step is told to a gateway once"
    assert replica._streams == {}


def test_what_nobody_waits_for_is_dropped(replica):
    async def leave():
        stream = replica.draw("g", order("left", num_inference_steps=150))
        async for event in stream:
            if event.kind == "turn":
                break
        await stream.aclose()
        return await events_of(replica, "g", order("next"))

    assert on_a_loop(replica, leave())[-1].kind == "finished"
    assert "left" not in replica._engine._unfinished.orders


def test_a_picture_that_kills_the_engine_fails_and_the_replica_lives(replica):
    async def both():
        bad = events_of(replica, "g", order("poison"))
        return await asyncio.gather(bad, events_of(replica, "g", order("beside")))

    poison, beside = on_a_loop(replica, both())
    assert poison[-1].data["code"] == "engine_failed"
    assert beside[-1].kind == "finished"
    replica.check_health()


def test_a_replica_tells_which_models_it_has(replica):
    async def draw():
        for number in range(SETS_KEPT):
            await events_of(replica, "g", order("a", loras=((f"ink{number}", 1.0),)))

    assert "pictogram" in replica.record_routing_stats()[WARM]
    on_a_loop(replica, draw())
    told = replica.record_routing_stats()[WARM]
    assert len(told) == SETS_KEPT
    assert "pictogram ink0:1.0" in told


def test_a_replica_without_a_model_does_not_begin(tmp_path):
    with pytest.raises(BackendError, match="could not start"):
        EngineReplica(EngineSettings(models={"none": str(tmp_path / "none")}, backend="cpu"))


class Handle:
    """Stands for a handle of Ray Serve: replicas that die as often as they are told to."""

    def __init__(self, deaths=0):
        self.deaths, self.asked, self.cancelled = deaths, [], 0
        self.draw = self

    def remote(self, gateway, given):
        self.asked.append(given)
        return Stream(self, given)


class Stream:
    def __init__(self, handle, given):
        self.handle, self.given = handle, given

    def cancel(self):
        self.handle.cancelled += 1

    async def __aiter__(self):
        own = self.given.job
        yield Event(kind="started", job=own, index=self.given.indices[0], data={"total": 2})
        rows = [[own, self.given.indices[0], 1, 2], ["other-0", 0, 1, 2]]
        yield Event(kind="turn", data={"seconds": 1.0, "elapsed": 1.0, "limit": 8, "rows": rows})
        if self.given.picture_request.fields["prompt"] == "for ever":
            await asyncio.Event().wait()
        if self.handle.deaths:
            self.handle.deaths -= 1
            raise ConnectionError("the actor died")
        yield Event(kind="finished", job=own, index=self.given.indices[0], data={}, blob=b"png")


async def drawn_by(handle, given, until, count=lambda: 2):
    """Have an order drawn; returns what was told, up to an event."""
    told, changed = [], asyncio.Event()
    engine = ClusterEngine(handle, "g", count)

    def tell(event):
        told.append(event)
        changed.set()

    deaths = []
    engine.on_death(lambda: deaths.append(1))
    engine.start(tell)
    assert engine.is_ready
    engine.submit(given)
    while not until(told):
        changed.clear()
        await asyncio.wait_for(changed.wait(), 10)
    return engine, told, len(deaths)


def finished(count):
    return lambda told: sum(event.kind in ("finished", "failed") for event in told) == count


def test_each_picture_is_asked_for_and_told_under_the_jobs_name():
    handle, given = Handle(), order("job", num_images_per_prompt=3)
    engine, told, _ = asyncio.run(drawn_by(handle, given, finished(3)))
    assert sorted(list(each.indices) for each in handle.asked) == [[0], [1], [2]]
    assert len({each.job for each in handle.asked}) == 3
    ended = [event for event in told if event.kind == "finished"]
    assert sorted((event.job, event.index) for event in ended) == [("job", n) for n in range(3)]
    turn = next(event for event in told if event.kind == "turn")
    assert turn.data["rows"][1][0] == "other"
    assert turn.data["elapsed"] == 0.5, "two engines work beside each other"
    assert engine._tasks == {}


def test_what_a_dead_replica_owed_is_asked_for_again(monkeypatch):
    monkeypatch.setattr(client, "PAUSE", 0.001)
    handle = Handle(deaths=3)
    _, told, deaths = asyncio.run(drawn_by(handle, order("job"), finished(1)))
    assert (told[-1].kind, deaths, len(handle.asked)) == ("finished", 3, 4)
    handle = Handle(deaths=100)
    _, told, deaths = asyncio.run(drawn_by(handle, order("job"), finished(1)))
    assert (told[-1].data["code"], deaths) == ("engine_failed", client.TRIES)


def test_a_cancelled_job_is_asked_for_no_longer():
    async def cancel():
        handle = Handle()
        given = order("for ever", num_images_per_prompt=2)
        engine, _, _ = await drawn_by(handle, given, lambda told: len(told) == 4)
        engine.cancel("for ever")
        await asyncio.sleep(0.05)
        assert (handle.cancelled, engine._tasks) == (2, {})
        engine.stop()
        await asyncio.sleep(0.05)
        assert not engine.is_ready

    asyncio.run(cancel())


def test_args_are_options_of_the_server():
    def read(args, environment=None):
        return parse_options(make_parser("serve run"), [], environment or {}, args)

    assert read({"model": ["a=b"], "max-queue": 3, "open": True}).models == ["a=b"]
    assert read({"max-queue": 3}, {"LATENTRT_SERVE_MAX_QUEUE": "4"}).max_queue == 4
    with pytest.raises(RequestError, match=r"max-que in args is no option .* mean max-queue"):
        read({"max-que": 3})
    with pytest.raises(RequestError, match="max-queue in args"):
        read({"max-queue": "many"})
    with pytest.raises(RequestError, match="args names another file"):
        read({"config": "a.toml"})


def test_work_is_the_same_after_its_way_to_an_actor():
    line = Line(number=3, fields={"prompt": "\ud800 ☕", "seed": [1, 2**32 - 1], "hires": None})
    work = Work(line=line, pictures=[1], count=2, digest="ab")
    assert cluster._unpacked(cluster._packed(work)) == work
    assert cluster._packed(work).isascii()


@pytest.mark.parametrize(
    ("options", "said"), [(["--actors", "2"], "--actors are those of a Ray"), (["--ray"], "ray")]
)
def test_actors_are_those_of_a_cluster(tmp_path, capsys, monkeypatch, options, said):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    (tmp_path / "a.txt").write_text("a hat\n")
    assert main([str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), *options]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
