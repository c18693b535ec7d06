"""No process of this project sends usage statistics, or writes what they need into the home."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DRAW = """
from runtime import Pipeline
from engine.backends.settings import BackendSettings
settings = BackendSettings(backend="cpu", threads=1)
Pipeline.load("pictogram", settings=settings)("a cat", num_inference_steps=1)
"""
MODEL = "engine/shipped/pictogram"
PROCESSES = {
    "API": ["-c", DRAW],
    "command": ["-m", "runtime", "a cat", "--steps", "1", "--threads", "1", "--out", "{out}"],
    "info": ["-m", "export", "info", MODEL],
}


def written(home, arguments, **variables):
    """Run Python in a fresh home; return what it has left there, less our own cache."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ORT_", "XDG_"))}
    folders = {"HOME": str(home), "LATENTRT_CACHE": str(home / "ours")}
    out = str(home.parent / "cat.png")
    command = [sys.executable, *(part.replace("{out}", out) for part in arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env={**kept, **folders, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [path for path in home.rglob("*") if path.is_file() and "ours" not in path.parts]


@pytest.fixture
def home(tmp_path):
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_the_library_alone_would_write(home):
    """What the other tests rest on; wheels without telemetry, such as those of a distribution."""
    if not written(home, ["-c", "import onnxruntime"]):
        pytest.skip("this build of ONNX Runtime reports nothing")


@pytest.mark.parametrize("process", PROCESSES)
def test_a_process_of_ours_writes_nothing_into_the_home(home, process):
    assert written(home, PROCESSES[process]) == []


def test_it_is_off_whatever_the_environment_says(home):
    assert written(home, PROCESSES["API"], ORT_DISABLE_TELEMETRY="0") == []


def test_events_are_stopped_where_the_library_was_imported_before(monkeypatch):
    import onnxruntime

    from engine.backends.onnxruntime.cpu import _import

    calls = []
    monkeypatch.setattr(onnxruntime, "disable_telemetry_events", lambda: calls.append(True))
    assert _import() is onnxruntime
    assert calls == [True]
