"""The benchmark of serving: its traffic, ways to choose, simulation, figures and tables."""

import json
import statistics
from itertools import pairwise

import pytest

from benchmarks import plots, report
from benchmarks.__main__ import main
from benchmarks.machine import describe
from benchmarks.serving import kept_memory, step_times
from benchmarks.serving.contenders import ALONE, CONTENDERS, ROWS
from benchmarks.serving.costs import _http_cost
from benchmarks.serving.driving import ProcessorClock, Seen, by_hand, in_threads, make_loop
from benchmarks.serving.load import Drawing, _process
from benchmarks.serving.measure import PARTS, Choice
from benchmarks.serving.processes import FAKE, served
from benchmarks.serving.simulation import (
    CURVES,
    DECODE,
    V100,
    Curve,
    SimulatedRunner,
    line,
    simulate,
)
from benchmarks.serving.simulation import measure as simulated
from benchmarks.serving.traffic import MIXES, at_once, orders, poisson
from engine.errors import OutputError
from serving.bucket_scheduler import BucketScheduler

SGLANG, VLLM = (name for name in CONTENDERS if name not in (ALONE, ROWS))


def test_requests_come_by_chance_at_a_rate():
    times = poisson(4000, 2.0)
    gaps = [after - before for before, after in pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(0.5, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.5, rel=0.05), "exponential"
    assert times == poisson(4000, 2.0)
    assert times[:9] != poisson(9, 2.0, seed=1)


@pytest.mark.parametrize("mix", MIXES)
def test_mixes(mix):
    fields = [order.picture_request.fields for order in orders(mix, 200)]
    chosen = [{k: v for k, v in f.items() if k not in ("prompt", "seed")} for f in fields]
    different = len({json.dumps(choice, sort_keys=True) for choice in chosen})
    assert len({f["prompt"] for f in fields}) == 200
    assert {"mixed": different > 150, "mostly equal": 30 < different < 90, "equal": different == 1}[
        mix
    ]
    assert fields == [order.picture_request.fields for order in orders(mix, 200)]


def test_a_published_curve_goes_through_its_points():
    curve = CURVES[V100]
    assert [curve(rows) for rows in (1, 4, 8)] == pytest.approx([1.0, 8.3 / 2.7, 15.7 / 2.7])
    assert curve(12) - curve(8) == pytest.approx(curve(8) - curve(4)), "the line goes on"
    assert [line(1.0)(rows) for rows in (1, 2, 3)] == pytest.approx([1.0, 1.5, 2.0])


def capacity(contender, curve, mix, rows=8):
    return 60 / max(simulate(contender, curve, mix, at_once(60), rows, seed=1).ends.values())


def test_one_at_a_time_takes_the_sum_of_all():
    steps = sum(o.picture_request.fields["num_inference_steps"] for o in orders("mixed", 60, 1))
    assert capacity(ALONE, line(1.0), "mixed") == pytest.approx(60 / (steps + 60 * DECODE))


def test_rows_are_chosen_by_the_servers_own_scheduler():
    seen = Seen(clock=lambda: 0.0, arrivals=[0.0])
    runner = SimulatedRunner(curve=line(1.0), work=lambda seconds: None)
    assert type(make_loop(ROWS, runner, seen, 8, seen.clock)._scheduler) is BucketScheduler


def test_rows_gain_on_a_v100_what_is_promised():
    gains = {
        (name, mix): capacity(name, CURVES[V100], mix) / capacity(ALONE, CURVES[V100], mix)
        for name in CONTENDERS
        for mix in ("mixed", "equal")
    }
    assert gains[ROWS, "mixed"] >= 1.3
    assert max(gains[SGLANG, "mixed"], gains[VLLM, "mixed"]) < 1.1, "they find nothing that is like"
    for name in (SGLANG, VLLM, ROWS):
        assert gains[name, "equal"] == pytest.approx(gains[ROWS, "equal"], rel=0.02)


def test_rows_begin_soon():
    rate = 0.9 * capacity(ALONE, line(1.0), "mixed")
    waits = {
        name: simulate(name, line(1.0), "mixed", poisson(120, rate, 1), 8, 1).figures()
        for name in (ALONE, ROWS)
    }
    assert waits[ROWS]["first_step_s"]["p95"] < 0.4 * waits[ALONE]["first_step_s"]["p95"]
    assert waits[ALONE]["mean_rows"] == 1
    assert 1 < waits[ROWS]["mean_rows"] <= 8


class Log:
    """A runner that notes the jobs of every step; its steps take no time."""

    def __init__(self):
        self.steps = []
        self.inner = SimulatedRunner(curve=lambda rows: 1.0, work=lambda seconds: None)
        self.unfinished_pictures = self.inner.unfinished_pictures

    def step(self, pictures):
        self.steps.append([picture.prompt.removeprefix("a ") for picture in pictures])
        self.inner.step(pictures)


def steps_of(contender, requests, rows=8):
    """Return which of these, all there from the beginning, were in each step."""
    made = orders("equal", len(requests))
    for order, fields in zip(made, requests, strict=True):
        order.picture_request.fields.update(fields)
    log, clock = Log(), ProcessorClock()
    seen = Seen(clock=clock, arrivals=at_once(len(requests)))
    loop = make_loop(contender, log, seen, rows, clock)
    for order in made:
        loop.submit(order)
    while loop.prepare():
        pass
    by_hand(loop, seen, clock, [])
    return ["".join(step) for step in log.steps]


def test_how_equal_requests_are_batched():
    """From the first step to the last, and whoever is behind waits; two rows at most."""
    like, other = {"num_inference_steps": 2}, {"num_inference_steps": 3}
    assert steps_of(SGLANG, [like, other, like, like, other], rows=2) == [
        *("02", "02", "14", "14", "14", "3", "3"),
    ]


def test_how_equal_settings_are_batched():
    """Steps may differ, a free place is taken at once, and the head of the queue blocks."""
    short, long = {"num_inference_steps": 1}, {"num_inference_steps": 3}
    other = {"num_inference_steps": 1, "sampler": "lms"}
    assert steps_of(VLLM, [long, short, short, other, short], rows=2) == [
        *("01", "02", "0", "3", "4"),
    ]


def test_one_at_a_time_is_one_after_the_other():
    short, long = {"num_inference_steps": 1}, {"num_inference_steps": 2}
    assert steps_of(ALONE, [long, short, long]) == ["0", "0", "1", "2", "2"]
    assert steps_of(ROWS, [long, short, long]) == ["012", "02"]


def test_threads_draw_what_a_hand_does():
    made = orders("mixed", 12)
    seen = Seen(clock=ProcessorClock(), arrivals=at_once(12))
    runner = SimulatedRunner(curve=lambda rows: 0.0, work=lambda seconds: None)
    in_threads(make_loop(ROWS, runner, seen, 8, seen.clock), seen, made)
    assert len(seen.ends) == len(seen.files) == 12
    assert all(seen.first_steps[job] <= end for job, end in seen.ends.items())


def test_memory_rises_by_what_comes_after_the_first_tenth():
    assert kept_memory.risen([50, 100, *[100] * 18]) == 0
    assert kept_memory.risen([50, 100, *[90] * 17, 103]) == pytest.approx(0.03)
    assert kept_memory.risen([100]) == 0


def test_a_server_whose_engine_draws_nothing_costs_and_keeps_something():
    pytest.importorskip("fastapi")
    with served(FAKE) as server:
        cost = _http_cost(server, 20, 1)
        kept = kept_memory._kept(server, 40)
    assert 0 <= cost["http_ms"] < 1000
    assert cost["answer_ms"] > 0
    for process in ("http", "engine"):
        assert len(kept[process]["bytes"]) == kept_memory.POINTS
        assert min(kept[process]["bytes"]) > 10**7
    assert server.ready_s > 0


def test_contenders_draw_the_same_files_in_processes_of_their_own():
    drawing = Drawing(clock="processor")
    alone = _process(drawing, ALONE, "mixed", at_once(2))
    assert len(set(alone["files"].values())) == 2
    rows = _process(drawing, ROWS, "mixed", at_once(2), alone["files"])
    assert rows["equal"] == 2
    assert rows["figures"]["mean_rows"] > 1
    assert rows["memory"]["peak_bytes"] > 10**8


@pytest.fixture(scope="module")
def measured():
    """A report of all parts: steps of this machine, others made up."""
    steps = step_times.measure(Drawing(clock="processor"), repeats=1)
    curve = {rows: found["median"] for rows, found in steps["step_s"].items()}
    waits = {"whole_s": {"p50": 1.0, "p95": 2.0}, "first_step_s": {"p50": 0.5, "p95": 1.5}}
    told = {
        "figures": {**waits, "pictures_per_s": 1.25, "mean_rows": 2.5, "steps": 9},
        "memory": {"peak_bytes": 2**28},
        "equal": 9,
    }
    load = {"0.9": dict.fromkeys(CONTENDERS, told)}
    third = {"median": 1.0, "min": 0.5, "max": 2.0}
    flat = {p: {"bytes": [2**20], "risen": 0.012} for p in ("http", "engine")}
    return {
        "machine": {"processor": "an EPYC", "cores": 2},
        "request": {"model": "pictogram"},
        "step times": json.loads(json.dumps(steps)),
        "load": {
            "request": {**steps["request"], "requests": 9, "rows": 8},
            "mixes": {"mixed": {"capacity_per_s": 1.0, "loads": load}},
        },
        "simulation": simulated(curve, 2.5, 8, [0.9], 20),
        "costs": {
            "request": {"steps": 20},
            "ready_s": third,
            "http": {"20 steps": {"http_ms": 1.25}},
            "one_at_a_time": {"pipeline_s": third, "served_s": third, "ratio": 1.0125},
        },
        "memory": {"request": {}, "real engine": {"requests": 300, **flat}},
    }


def test_steps_of_every_size_are_measured(measured):
    seconds = {int(b): each["median"] for b, each in measured["step times"]["step_s"].items()}
    assert list(seconds) == [1, 2, 3, 4, 6, 8, 12, 16]
    assert 4 * seconds[1] < seconds[16] < 64 * seconds[1]
    assert measured["step times"]["gaining_rows"] in seconds


def test_tables_and_plot_say_what_was_measured(measured):
    tables = {name: report.TABLES[name](measured) for name in report.SOURCES if name != "speed"}
    tables["serving"] = report.TABLES["serving"](measured)
    figures = "1.00 | 2.00 | 0.50 | 1.50 | 1.25 | 2.50 | 256 | 9 of 9"
    assert f"| mixed | 0.9 of 1.00/s | {ROWS} | {figures} |" in tables["serving"]
    assert "| 1 | 2 | 3 | 4 | 6 | 8 | 12 | 16 |" in tables["serving-steps"]
    assert f"| {V100} | equal |" in tables["serving-simulation"]
    assert "1.25 ms" in tables["serving-costs"]
    assert "risen by 1.2%" in tables["serving-costs"]
    for name, made in tables.items():
        widths = [row.count("|") for row in made.splitlines() if row.startswith("|")]
        assert widths, name
    empty = {name: report.TABLES[name]({}) for name in tables}
    assert set(empty.values()) == {"Not measured."}
    assert plots.serving(measured).axes
    with pytest.raises(OutputError, match="lack load and simulation"):
        plots.serving({})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--only", "nothing"], f"there are {', '.join(PARTS)}"),
        (["--loads", "much"], "--loads is 'much'"),
        (["--loads", "0"], "--loads are shares"),
        (["--loads", "nan"], "--loads are shares"),
        (["--rows", "0"], "--rows is 0"),
        (["--requests", "-1"], "--requests is -1"),
        (["--memory", "0"], "--memory is 0"),
        (["--only", "simulation"], "step times; measure that before"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(given, said, capsys):
    assert main(["serving", *given]) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1


def test_a_second_call_goes_on_with_the_figures_that_are_there(tmp_path, measured, capsys):
    path = tmp_path / "serving.json"
    path.write_text(json.dumps({**measured, "machine": describe()}))
    given = ["serving", "--only", "simulation", "--arrivals", "5", "--loads", "1.5"]
    assert main([*given, "--out", str(path)]) == 0
    written = json.loads(path.read_text())
    assert written == json.loads(capsys.readouterr().out)
    assert written["simulation"]["request"]["requests"] == 5
    assert list(written["simulation"]["curves"][V100]["loads"]) == ["1.5"]
    assert written["load"] == measured["load"]


def test_all_parts_are_chosen_where_none_is_named():
    assert tuple(Choice(drawing=Drawing()).parts) == PARTS
    assert Curve({1: 2.0, 2: 3.0})(1) == 1.0
