"""Every section in its smallest form, on a device of the processor's memory."""

import json
from functools import partial

import pytest

from benchmarks import card
from benchmarks.__main__ import main
from benchmarks.card import SECTIONS, Card, measure
from benchmarks.contenders import load_pipeline
from engine.backends.settings import BackendSettings
from engine.errors import BackendError, OutputError, RequestError
from tests.support.fake_cuda import FakeDevice, FakeEngine

PARTS = ("text_encoder", "step", "vae_decoder")


def on_a_device(device, scenario, precision, settings):
    """Load a pipeline of the processor's, on a device unless it is asked for by name."""
    pipeline = load_pipeline(scenario, "float32", BackendSettings(backend="cpu"))
    if settings.backend != "cpu":
        for part in PARTS:
            pipeline.engines.opened[part] = FakeEngine(pipeline.engine(part), device)
    return pipeline


@pytest.fixture(scope="module")
def dry():
    return Card(backend="cuda", dry=True, load=partial(on_a_device, FakeDevice()))


@pytest.fixture(scope="module")
def lines(dry):
    """What a dry run of all sections prints."""
    pytest.importorskip("torch")
    shown = []
    report = measure(dry, show=shown.append)
    printed = {line.pop("section"): line for line in map(json.loads, shown)}
    assert printed == report["sections"]
    return printed


@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_runs_dry(lines, name):
    assert "failed" not in lines[name], lines[name]
    assert lines[name]["took_s"] > 0


def test_the_figures_of_a_dry_run(lines):
    for part in PARTS:
        errors = lines["parts"]["pictogram-128"][part]["relative_errors"]
        assert set(errors.values()) == {0}, "the same engine on both sides"
    assert lines["pictures"]["pictogram-128"]["records"]
    assert [each["psnr_db"] for each in lines["pictures"]["pictogram-128"]["pictures"]] == [
        None
    ] * 3
    assert lines["request"]["steps"] == 2
    assert lines["request"]["queued_step"]["ms"] > 0
    assert set(lines["batches"]) == {"1", "2", "took_s"}
    assert lines["torch"]["eager"]["ms"] > 0


@pytest.fixture
def counted(monkeypatch):
    """Sections that count how often they are measured, the second of which fails at first."""
    counts = {"one": 0, "two": 0}

    def one(card):
        counts["one"] += 1
        return {"ms": 1}

    def two(card):
        counts["two"] += 1
        if counts["two"] == 1:
            raise BackendError("no memory\nmore")
        return {"ms": 2}

    sections = {
        name: card.Section(seconds=60, measure=work) for name, work in (("one", one), ("two", two))
    }
    monkeypatch.setattr(card, "SECTIONS", sections)
    machine = {"processor": "a processor", "cores": 2}
    monkeypatch.setattr("benchmarks.resumable.describe", lambda: machine)
    return counts


def test_a_second_call_goes_on_and_tries_again_what_failed(counted, tmp_path):
    out = tmp_path / "card.json"
    first = measure(Card(backend="cuda"), out=out, show=str)
    assert first["sections"]["two"]["failed"] == "no memory"
    assert card.failed(first) == ["two"]
    second = measure(Card(backend="cuda"), out=out, show=str)
    assert (counted["one"], counted["two"]) == (1, 2)
    assert card.failed(second) == []
    assert json.loads(out.read_text()) == second
    with pytest.raises(OutputError, match="another request"):
        measure(Card(backend="webgpu"), out=out)


def test_a_section_that_has_not_its_seconds_is_left(counted):
    lines = []
    report = measure(Card(backend="cuda"), seconds=30, show=lines.append)
    assert report["sections"] == {}
    assert [json.loads(line)["left"] for line in lines] == ["60 s are wanted"] * 2


def test_a_section_that_is_none(dry):
    with pytest.raises(RequestError, match="no section is called speed; there are parts, "):
        measure(dry, only=["speed"])


def test_the_command(counted, tmp_path, capsys):
    out = str(tmp_path / "card.json")
    assert main(["card", "--out", out]) == 1
    assert main(["card", "--out", out]) == 0
    printed = capsys.readouterr()
    assert [json.loads(line)["section"] for line in printed.out.splitlines()] == ["one", "two"] * 2
    assert f"the figures are in {out}" in printed.err
    assert "attach them to an issue" in printed.err
