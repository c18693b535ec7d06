"""Seconds and memory of training on: the command is run as users run it, and kept."""

import json

import pytest

from benchmarks import resumable, tuning
from benchmarks.__main__ import main
from benchmarks.worker import ContenderError
from engine.errors import BackendError, OutputError
from tests.support.small_models import SMALL


@pytest.fixture
def small_machine(monkeypatch):
    described = {"processor": "P", "cores": 1, "peak_gflops": 1.0}
    monkeypatch.setattr(resumable, "describe", lambda: dict(described))
    monkeypatch.setattr(
        type(tuning.SCENARIOS["sd15"]), "model", lambda scenario: "sd15.safetensors"
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_training_is_run_and_measured(tmp_path):
    file = SMALL["sd1"].write_file(tmp_path)
    found = tuning.trained(tuning.TRAININGS["lora"], str(file), 2, 64, 1)
    assert found["parameters"] > 1000
    assert found["seconds"] > 0
    assert found["peak_bytes"] > 2**27
    whole = tuning.trained(tuning.TRAININGS["fine-tune"], str(file), 1, 64, 1)
    assert whole["parameters"] > found["parameters"]
    with pytest.raises(BackendError, match="multiples of"):
        tuning.trained(["lora"], str(file), 1, 65, 1)


def test_rounds_are_kept_and_shown(small_machine, tmp_path, monkeypatch, capsys):
    calls = []

    def once(module, function, arguments, *given, threads, bound_s):
        calls.append((arguments, given))
        if arguments[0] == "fine-tune":
            raise ContenderError("the process ended")
        return {"seconds": 2.0 * len(calls), "peak_bytes": 3 * 2**30, "parameters": 797_184}

    monkeypatch.setattr(tuning, "once", once)
    out = tmp_path / "tuning.json"
    command = ["tuning", "--threads", "1", "--out", str(out)]
    assert main(command) == 0
    assert [tuple(arguments) for arguments, _ in calls] == list(tuning.TRAININGS.values())
    assert {given for _, given in calls} == {("sd15.safetensors", 6, 512, 1)}
    assert main([*command, "--repeats", "2", "--only", "no-recompute"]) == 0
    assert len(calls) == len(tuning.TRAININGS) + 1
    table = tuning.tuning_table(json.loads(out.read_text())).splitlines()
    assert "| `lora` | 0.8 million | 2.00 s, 2.00 s to 2.00 s | 3.0 GiB |" in table
    assert "| `lora --no-recompute` | 0.8 million | 8.00 s, 4.00 s to 12.00 s | 3.0 GiB |" in table
    assert "- not measured: fine-tune (the process ended)" in table
    capsys.readouterr()


def test_what_cannot_be_measured_is_said(small_machine, tmp_path, capsys):
    assert main(["tuning", "--only", "adapter"]) == 2
    assert "no training is called adapter" in capsys.readouterr().err
    assert main(["tuning", "--steps", "0"]) == 2
    assert "give 1 or more" in capsys.readouterr().err
    out = tmp_path / "tuning.json"
    out.write_text(json.dumps({"machine": {"processor": "P", "cores": 1}, "request": {}}))
    with pytest.raises(OutputError, match="another request"):
        tuning.measure(out=out)
