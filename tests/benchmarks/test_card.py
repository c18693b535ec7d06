"""Every section in its smallest form, on a device of the processor's memory."""

import json
import sys
from functools import partial

import onnxruntime
import pytest

from benchmarks import card
from benchmarks.__main__ import main
from benchmarks.card import SECTIONS, UNMEASURED, Card, measure
from benchmarks.contenders import load_pipeline
from benchmarks.sanitizer import find_tool, sanitizer_figures
from engine.backends.onnxruntime.cuda import PROVIDER
from engine.backends.settings import BackendSettings
from engine.errors import BackendError, OutputError, RequestError
from tests.support.fake_cuda import FakeDevice, FakeEngine

PARTS = ("text_encoder", "step", "vae_decoder")


def on_a_device(device, scenario, precision, settings):
    """Load a pipeline of the processor's, on a device unless it is asked for by name."""
    pipeline = load_pipeline(scenario, "float32", BackendSettings(backend="cpu", threads=1))
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


# It opens sessions of the CUDA provider: tests/standin runs it dry, beside the others.
PROVIDERS_OWN = "settings"


@pytest.mark.parametrize("name", [name for name in SECTIONS if name != PROVIDERS_OWN])
def test_every_section_runs_dry(lines, name):
    assert UNMEASURED.isdisjoint(lines[name]), lines[name]
    assert 0 < lines[name]["took_s"] < SECTIONS[name].seconds


def test_settings_want_the_provider(lines):
    if PROVIDER not in onnxruntime.get_available_providers():
        assert "needs onnxruntime-gpu" in lines[PROVIDERS_OWN]["failed"]


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
    with pytest.raises(RequestError, match="no section is called speed; there are parts; "):
        measure(dry, only=["speed"])


def test_the_command(counted, tmp_path, capsys):
    out = str(tmp_path / "card.json")
    assert main(["card", "--out", out]) == 1
    assert main(["card", "--out", out]) == 0
    printed = capsys.readouterr()
    assert [json.loads(line)["section"] for line in printed.out.splitlines()] == ["one", "two"] * 2
    assert f"the figures are in {out}" in printed.err
    assert "attach them to an issue" in printed.err


@pytest.mark.parametrize(
    ("section", "backend", "reason"),
    [
        ("sanitizer", "cuda", "compute-sanitizer is neither on the path nor in CUDA's folder"),
        ("sanitizer", "webgpu", "WebGPU has none"),
        ("webgpu", "cuda", "wants Vulkan, whose library is not on this machine"),
        ("settings", "tensorrt", "the settings are those of the backend cuda"),
    ],
)
def test_what_a_machine_has_not_is_skipped_and_tried_again(
    section, backend, reason, tmp_path, monkeypatch
):
    monkeypatch.setattr("benchmarks.resumable.describe", lambda: {"processor": "a", "cores": 2})
    monkeypatch.setattr(card, "find_tool", lambda: None)
    monkeypatch.setattr(card, "find_library", lambda name: None)
    monkeypatch.setattr("sys.platform", "linux")
    out = tmp_path / "card.json"
    report = measure(Card(backend=backend), only=[section], out=out, show=str)
    assert reason in report["sections"][section]["skipped"]
    assert card.failed(report) == []
    monkeypatch.setitem(SECTIONS, section, card.Section(seconds=1, measure=lambda card: {"ms": 1}))
    again = measure(Card(backend=backend), only=[section], out=out, show=str)
    assert again["sections"][section]["ms"] == 1


SANITIZER = """#!{python}
import subprocess, sys
tool, _, log, report, *command = sys.argv[1:]
with open(report, "w") as file:
    print("========= COMPUTE-SANITIZER", file=file)
    {wrong}
    print("========= ERROR SUMMARY: {errors} errors", file=file)
sys.exit(subprocess.run(command).returncode)
"""


def sanitizer(folder, errors=0, wrong="pass"):
    """Write a program with the tool's arguments that reports errors and runs the command."""
    program = folder / "compute-sanitizer"
    program.write_text(SANITIZER.format(python=sys.executable, errors=errors, wrong=wrong))
    program.chmod(0o755)
    return str(program)


def test_what_the_sanitizer_says_is_read(tmp_path):
    invalid = "print('========= Invalid __global__ read of size 4 bytes', file=file)"
    found = sanitizer_figures(sanitizer(tmp_path, errors=2, wrong=invalid), "cpu", 60)
    assert (found["tool"], found["errors"]) == ("memcheck", 2)
    assert "Invalid __global__ read of size 4 bytes" in found["first"]


@pytest.mark.parametrize(
    ("wrong", "seconds", "reason"),
    [
        ("sys.exit(3)", 60, "no picture was drawn, with the status 3"),
        ("file.close(); sys.exit(subprocess.run(command).returncode)", 60, "wrote no summary"),
        ("import time; time.sleep(20)", 1, "was not drawn within 1 s"),
    ],
)
def test_a_sanitizer_without_a_result_is_a_failure(tmp_path, wrong, seconds, reason):
    with pytest.raises(BackendError, match=reason):
        sanitizer_figures(sanitizer(tmp_path, wrong=wrong), "cpu", seconds)


def test_the_sanitizer_is_found_in_cudas_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("benchmarks.sanitizer.DEFAULT", str(tmp_path))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert find_tool() is None
    (tmp_path / "bin").mkdir()
    program = sanitizer(tmp_path / "bin")
    assert find_tool() == program
    monkeypatch.setattr("benchmarks.sanitizer.DEFAULT", "/nowhere")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert find_tool() == program
