"""The engine's loop on a runner without a model: stages, turns, shares, cancelling, failures."""

import random
import threading
from collections import Counter

import pytest

from engine.errors import BackendError
from serving.bucket_scheduler import MAX_TURNS_WAITED, BucketScheduler
from serving.fair_queue import FairQueue
from serving.limits import Limits
from serving.loop import Loop
from serving.order import Order
from serving.picture_request import PictureRequest
from serving.row_limits import LADDER, RowLimits
from tests.support.model_runners import FakeModelRunner

STEPS = 6


def order(job, caller="", priority=0, **picture_requests):
    extra = {
        name: picture_requests.pop(name)
        for name in ("exact", "preview_every")
        if name in picture_requests
    }
    fields = {"prompt": job, "num_inference_steps": STEPS, "seed": 7, **picture_requests}
    picture_request = PictureRequest(fields=fields, model="fake", **extra).checked(Limits())
    return Order(job=job, picture_request=picture_request, caller=caller, priority=priority)


class Bench:
    """A loop whose stages are called by hand; told: its events."""

    def __init__(self, rows=8, **options):
        self.runner, self.told = FakeModelRunner(), []
        options = {"limits": RowLimits(rows), **options}
        self.loop = Loop(self.runner, self.told.append, clock=self.runner.clock, **options)

    def turn(self):
        """Let each stage do one piece of work, as its thread would meanwhile."""
        return [self.loop.prepare(), self.loop.step(), self.loop.finish()]

    def run(self):
        while any(self.turn()):
            pass
        assert (self.loop.on_board, self.loop.waiting) == (0, 0)
        assert not self.loop._orders
        assert not self.loop._previews

    def of(self, kind):
        return [event for event in self.told if event.kind == kind]


@pytest.fixture
def bench():
    return Bench()


def test_a_picture_goes_through_three_stages(bench):
    bench.loop.submit(order("cat", preview_every=2))
    bench.run()
    assert [stage for stage, _ in bench.runner.done] == [
        *("texts", "enter", *["step"] * STEPS, "finish"),
    ]
    assert [event.kind for event in bench.told if event.kind != "turn"] == [
        *("taken", "started", "preview", "preview", "finished"),
    ]
    (finished,) = bench.of("finished")
    assert finished.data == {"settings": {"prompt": "cat", "seed": 7}, "batched": False}
    assert bench.of("turn")[-1].data == {
        "seconds": 1.0,
        "elapsed": 1.0,
        "limit": 8,
        "rows": [["cat", 0, STEPS, STEPS]],
    }


def test_pictures_of_one_wish_share_its_texts(bench):
    bench.loop.submit(order("cat", num_images_per_prompt=3))
    bench.run()
    assert Counter(stage for stage, _ in bench.runner.done)["texts"] == 1
    assert [event.data["settings"]["seed"] for event in bench.of("finished")] == [7, 8, 9]


def test_rows_join_at_any_step_and_leave_on_their_own(bench):
    for steps in (3, 6, 9):
        bench.loop.submit(order(f"of {steps}", num_inference_steps=steps))
    bench.run()
    assert [event.job for event in bench.of("finished")] == ["of 3", "of 6", "of 9"]
    assert bench.runner.sizes == [1, 2, 3, 2, 2, 2, 2, 1, 1, 1, 1]


def test_a_second_run_is_begun_by_the_stage_that_prepares(bench):
    bench.loop.submit(order("cat", hires={"scale": 2.0}))
    bench.run()
    assert Counter(stage for stage, _ in bench.runner.done)["enter"] == 2
    assert len(bench.of("finished")) == 1
    assert len(bench.of("started")) == 1


def test_a_step_has_so_many_rows_and_the_board_so_many_pictures():
    bench, boards = Bench(rows=4, board=6), []
    for number in range(20):
        bench.loop.submit(order(f"{number}"))
    while any(bench.turn()):
        boards.append(bench.loop.on_board)
    assert max(bench.runner.sizes) == 4
    assert max(boards) <= 6
    assert len(bench.of("finished")) == 20


def test_exact_pictures_are_stepped_alone(bench):
    bench.loop.submit(order("exact", exact=True))
    bench.loop.submit(order("other"))
    bench.run()
    assert bench.runner.sizes == [1] * 2 * STEPS
    assert [event.data["batched"] for event in bench.of("finished")] == [False, False]


@pytest.mark.parametrize("state", ["queued", "texts", "enter", "step", "finish"])
def test_cancelled_in_any_state_its_row_is_free_within_two_steps(state):
    bench = Bench(rows=1, board=1) if state == "queued" else Bench()
    other, leaving = order("stays"), order("leaves", preview_every=1)
    bench.runner.hooks[state, "leaves"] = lambda: bench.loop.cancel("leaves")
    bench.loop.submit(other)
    bench.loop.submit(leaving)
    if state == "queued":
        bench.turn()
        bench.loop.cancel("leaves")
    bench.run()
    bench.loop.cancel("leaves")  # twice does no harm
    done = [stage for stage, prompt in bench.runner.done if prompt == "leaves"]
    assert done.count("step") <= {"step": 1, "finish": STEPS}.get(state, 0)
    assert [event.job for event in bench.of("finished")] in (["stays"], ["stays", "leaves"])
    if state != "finish":
        assert [event.job for event in bench.of("finished")] == ["stays"]
    assert bench.of("failed") == []


def test_what_fails_alone_fails_alone(bench):
    """One row cannot be stepped: the others of its batch go on, and lose nothing."""
    for name in ("a", "bad", "c", "d"):
        bench.loop.submit(order(name))
    bench.runner.fail["step", "bad"] = BackendError("/home/operator/model: secret 0x7f12")
    bench.run()
    assert sorted(event.job for event in bench.of("finished")) == ["a", "c", "d"]
    (failed,) = bench.of("failed")
    assert (failed.job, failed.data["code"]) == ("bad", "engine_failed")
    assert "secret" not in failed.data["message"]
    assert "operator" not in failed.data["message"]


def test_out_of_memory_halves_the_batch(bench):
    bench.runner.most = 2
    for number in range(8):
        bench.loop.submit(order(f"{number}"))
    bench.run()
    assert len(bench.of("finished")) == 8
    assert max(bench.runner.sizes) == 2
    wanted = [len(event.data["rows"]) for event in bench.of("turn")]
    assert wanted[:3] == [1, 2, 3]
    assert set(wanted[3:]) == {1, 2}, "what did not fit is not tried again"
    assert bench.of("turn")[-1].data["limit"] == 2


def test_memory_bounds_the_rows_of_a_step(bench):
    bench.runner.fitting = 3
    for number in range(9):
        bench.loop.submit(order(f"{number}"))
    bench.run()
    assert max(bench.runner.sizes) == 3


@pytest.mark.parametrize(("slope", "rows"), [(0.95, 2), (0.5, 8), (0.01, 16)])
def test_rows_that_gain_are_found_while_pictures_are_drawn(tmp_path, slope, rows):
    """A step of b rows takes 1 + slope * (b - 1); the next engine begins with what was found."""
    path, tried = tmp_path / "times.json", []
    for _ in range(2):
        bench = Bench(limits=RowLimits("capacity", path))
        bench.runner.slope = slope
        for number in range(100):
            bench.loop.submit(order(f"{number}", num_inference_steps=20))
        bench.run()
        assert len(bench.of("finished")) == 100
        assert max(set(bench.runner.sizes), key=bench.runner.sizes.count) == rows
        tried.append(max(bench.runner.sizes))
    assert tried == [next((b for b in LADDER if b > rows), rows), rows]


@pytest.mark.parametrize("stage", ["enter", "finish"])
def test_a_stage_that_fails_fails_one_picture(bench, stage):
    bench.runner.fail[stage, "bad"] = MemoryError()
    for name in ("bad", "good"):
        bench.loop.submit(order(name))
    bench.run()
    assert [event.job for event in bench.of("failed")] == ["bad"]
    assert [event.job for event in bench.of("finished")] == ["good"]


def test_what_is_refused_is_told_in_its_own_words(bench):
    bench.loop.submit(order("refused"))
    bench.run()
    (failed,) = bench.of("failed")
    assert failed.data == {"code": "invalid_request", "message": "the prompt is refused"}


def test_the_newest_preview_replaces_one_that_waits(bench):
    """Whoever draws previews is slow here: steps go on, and it gets the last."""
    bench.loop.submit(order("cat", preview_every=1))
    bench.loop.prepare()
    for _ in range(STEPS - 1):
        bench.loop.step()
    bench.loop.finish()
    (preview,) = bench.of("preview")
    assert preview.data["step"] == STEPS - 1


def test_no_bucket_waits_more_than_its_patience():
    """Sixteen buckets, most rows in one: none is passed over more than sixteen turns."""
    random.seed(1)

    class Row:
        def __init__(self, bucket):
            self.bucket = bucket

    turns, passed = BucketScheduler(lambda row: 2), Counter()
    rows = [Row(0) for _ in range(20)] + [Row(bucket) for bucket in range(1, MAX_TURNS_WAITED)]
    worst = 0
    for turn in range(3000):
        if turn % 50 == 0:
            random.shuffle(rows)
        chosen = turns.choose(rows)[0].bucket
        for bucket in range(MAX_TURNS_WAITED):
            passed[bucket] = 0 if bucket == chosen else passed[bucket] + 1
        worst = max(worst, *passed.values())
    assert worst <= MAX_TURNS_WAITED


def test_an_unlucky_bucket_is_drawn_beside_a_flood():
    bench = Bench(rows=4, board=16)
    for number in range(12):
        bench.loop.submit(order(f"{number}", num_inference_steps=60))
    bench.loop.submit(order("other", height=256))
    bench.run()
    waits, last = [], None
    for turn, bucket in enumerate(bench.runner.buckets):
        if bucket[0] == 256:
            waits.append(turn - last if last is not None else 0)
            last = turn
    assert len(waits) == STEPS
    assert max(waits) <= MAX_TURNS_WAITED + 1


def test_callers_have_equal_shares():
    """One caller floods, another asks now and then: it waits no longer than its share."""
    queue = FairQueue()
    for number in range(100):
        queue.put(("flood", number), caller="flood", cost=1.0)
    for number in range(5):
        queue.put(("small", number), caller="small", cost=2.0)
    taken = [queue.take()[0] for _ in range(20)]
    assert taken.count("small") == 5
    assert taken[:6].count("small") == 2
    assert queue.take() == ("flood", 15), "in the order of arrival"


def test_nobody_saves_up_and_priority_is_among_ones_own():
    queue = FairQueue()
    for number in range(10):
        queue.put(number, caller="busy", cost=1.0)
    for _ in range(8):
        queue.take()
    queue.put("late", caller="idle", cost=1.0)
    queue.put("urgent", caller="idle", cost=1.0, priority=2)
    taken = [queue.take() for _ in range(4)]
    assert taken.index("urgent") < taken.index("late")
    assert {8, 9} & set(taken), "whoever was away does not make up for it"
    first = FairQueue()
    first.put("low", caller="one", cost=1.0, priority=-1)
    first.put("high", caller="one", cost=1.0, priority=1)
    first.put("other", caller="two", cost=1.0)
    assert {first.take(), first.take()} == {"high", "other"}
    assert first.take() == "low"
    assert first.take() is None


def test_ten_thousand_pictures_leave_nothing_behind():
    bench = Bench()
    for number in range(10_000):
        if number % 50 == 0:
            while any(bench.turn()):
                pass
            bench.told.clear()
            for log in (bench.runner.done, bench.runner.sizes, bench.runner.buckets):
                log.clear()
        bench.loop.submit(order(f"{number}", num_inference_steps=1))
        if number % 7 == 0:
            bench.loop.cancel(f"{number}")
    bench.run()
    assert len(bench.loop._scheduler._waited) <= 1
    assert not bench.loop._queue._waiting


def test_threads_draw_what_stages_do():
    told, finished = [], threading.Semaphore(0)

    def tell(event):
        told.append(event)
        if event.kind == "finished":
            finished.release()

    loop = Loop(FakeModelRunner(), tell)
    threads = loop.start()
    for number in range(30):
        loop.submit(order(f"{number}", caller=f"{number % 3}"))
    for _ in range(30):
        assert finished.acquire(timeout=10)
    loop.stop()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    assert len({event.job for event in told if event.kind == "finished"}) == 30
