"""How many rows a call may have: by the times of calls, by memory, and by what was kept."""

import json

import numpy as np
import pytest

from engine.backends.settings import BackendSettings
from engine.errors import RequestError
from runtime import Pipeline
from runtime.denoising.rows import rows_of
from runtime.request import Request
from serving import memory, model_memory
from serving.model_memory import fitting_rows, weight_bytes
from serving.row_limits import FORMS, LADDER, SAMPLES, RowLimits, gaining_rows, parse_rows

CURVES = {  # what a call takes, a + c * rows, and the rung up to which a row more gains 1 %
    "no gain": (0.0, 1.0, 1),
    "a processor": (0.18, 1.0, 4),
    "a V100": (0.46, 1.0, 6),
    "a larger card": (3.0, 1.0, 16),
}


class Call:
    def __init__(self, form="square", fitting=100):
        self.form, self.fitting, self.asked = form, fitting, 0

    def fitting_rows(self):
        self.asked += 1
        return self.fitting


def drawn(limits, call, constant, slope, turns=100):
    """Let calls be as large as they may; return how large they were."""
    sizes = []
    for _ in range(turns):
        sizes.append(limits.limit(call))
        limits.took(call.form, sizes[-1], constant + slope * sizes[-1])
    return sizes


@pytest.mark.parametrize(("constant", "slope", "rows"), CURVES.values(), ids=CURVES)
def test_rows_that_gain(constant, slope, rows):
    assert gaining_rows({b: constant + slope * b for b in LADDER}) == rows


@pytest.mark.parametrize(("constant", "slope", "rows"), CURVES.values(), ids=CURVES)
def test_capacity_climbs_to_where_rows_gain_and_stays(constant, slope, rows):
    limits, call = RowLimits("capacity"), Call()
    sizes = drawn(limits, call, constant, slope)
    assert sizes[-1] == limits.largest == rows
    assert sizes[0] == 1
    above = {size for size in sizes if size > rows}
    assert all(sizes.count(size) == SAMPLES for size in above), "what does not gain is tried once"
    assert len(above) <= 1


@pytest.mark.parametrize(("constant", "slope", "rows"), CURVES.values(), ids=CURVES)
def test_previews_want_eight_at_least(constant, slope, rows):
    limits, call = RowLimits("preview"), Call()
    for size in LADDER:
        for _ in range(SAMPLES):
            limits.took(call.form, size, constant + slope * size)
    assert limits.limit(call) == max(rows, 8)


def test_a_number_is_that_many_and_is_not_measured():
    limits = RowLimits(3)
    assert set(drawn(limits, Call(), 3.0, 1.0)) == {3}
    assert limits.save() is False


def test_memory_bounds_every_choice_and_is_asked_once_a_form():
    for rows in ("preview", "capacity", 12):
        limits, call = RowLimits(rows), Call(fitting=2)
        assert max(drawn(limits, call, 3.0, 1.0)) == 2
        assert call.asked == 1
        assert limits.limit(Call("other", fitting=0)) == 1, "one is always tried"


def test_what_failed_as_a_whole_and_not_in_halves_is_not_tried_again():
    limits, call = RowLimits(8), Call()
    assert limits.limit(call) == 8
    limits.too_many("square", 8)
    assert limits.limit(call) == 4
    limits.too_many("square", 4)
    assert limits.limit(call) == 2
    assert limits.limit(Call("wide")) == 8


def test_times_are_kept_for_the_next_process(tmp_path):
    path = tmp_path / "cache" / "times.json"
    limits = RowLimits("capacity", path)
    drawn(limits, Call(), 0.18, 1.0)
    assert limits.save() is True
    assert limits.save() is False, "nothing new"
    again = RowLimits("capacity", path)
    assert set(drawn(again, Call(), 0.18, 1.0)) == {4}, "nothing is tried again"
    assert again.save() is False


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "null", "\xff", "[" * 10_000, '{"a": 1}', '{"a": {"x": [1]}}'),
        *('{"a": {"1": ["x"]}}', '{"a": {"1": 3}}', '{"a": {"1": [-1, 1, 1, 1, 1]}}'),
        '{"a": {"1": [NaN]}}',
    ],
)
def test_a_file_that_is_none_counts_as_none(tmp_path, text):
    path = tmp_path / "times.json"
    path.write_bytes(text.encode("latin-1"))
    assert RowLimits("capacity", path).limit(Call("a")) == 1


def test_a_folder_that_cannot_be_written_costs_nothing(tmp_path):
    (tmp_path / "file").touch()
    limits = RowLimits("capacity", tmp_path / "file" / "times.json")
    drawn(limits, Call(), 0.18, 1.0)
    assert limits.save() is True


def test_forms_are_bounded(tmp_path):
    path = tmp_path / "times.json"
    limits = RowLimits("capacity", path)
    for number in range(3 * FORMS):
        drawn(limits, Call(f"{number}"), 1.0, 1.0, turns=SAMPLES)
    assert len(limits._times) == len(limits._fitting) == FORMS
    limits.save()
    assert len(json.loads(path.read_text())) == FORMS


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "", "many", "٣"])
def test_rows_that_are_none(text):
    with pytest.raises(RequestError, match="--rows is"):
        parse_rows(text)


def test_rows_that_are_some():
    assert [parse_rows(text) for text in ("12", "preview", "capacity")] == [
        *(12, "preview", "capacity")
    ]


def test_a_models_memory_by_its_sizes(monkeypatch):
    pipeline = Pipeline.load("pictogram", settings=BackendSettings(backend="cpu", threads=1))
    weights = sum(
        np.prod(shape)
        for component in pipeline.model.configs
        for shape in pipeline.model.find(component).shapes.values()
    )
    assert weight_bytes(pipeline) == pytest.approx(4 * weights, rel=0.01)
    monkeypatch.setattr(model_memory, "free_bytes", lambda: 2**30)

    def fits(**sizes):
        request = Request(prompt="a cat", num_inference_steps=1, seed=1, **sizes)
        (row,) = rows_of(pipeline.plan(request))
        row.enter(pipeline.start)
        return fitting_rows(pipeline, row)

    one = fits(height=128, width=128)
    assert fits(height=256, width=256) == pytest.approx(one / 4, abs=1)
    assert fits(height=128, width=128, guidance_scale=1.0) == pytest.approx(2 * one, abs=2)
    monkeypatch.setattr(model_memory, "free_bytes", lambda: None)
    assert fits(height=128, width=128) == 16, "nobody knows"


def test_a_containers_bound_counts(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 4096 kB\nMemFree: 1 kB\nMemAvailable: 2048 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CONTAINER", tmp_path)
    assert (memory.total_bytes(), memory.free_bytes()) == (4 << 20, 2 << 20)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert (memory.total_bytes(), memory.free_bytes()) == (4 << 20, 2 << 20)
    (tmp_path / "memory.max").write_text("1500000\n")
    assert (memory.total_bytes(), memory.free_bytes()) == (1_500_000, 500_000)
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "none")
    (tmp_path / "memory.max").unlink()
    assert (memory.total_bytes(), memory.free_bytes()) == (None, None)
    assert memory.resident_bytes(2**30) is None


def test_only_numbers_that_a_call_is_made_for_are_tried():
    """Three rows in four slots take as long as four, which must not end the search at two."""
    seconds = {1: 1.0, 2: 1.1, 4: 1.4, 8: 2.8}
    assert gaining_rows(seconds, (1, 2, 4, 8, 16)) == 4
    assert gaining_rows({1: 1.0, 2: 1.1, 3: 1.7}) == 2
