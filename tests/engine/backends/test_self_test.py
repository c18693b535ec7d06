"""The choice of a GPU by itself; the processor stands for the GPU's backend."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engine import engines
from engine.backends import self_test
from engine.backends.self_test import HAVE_RUN, MAX_ERROR, choose_gpu, measured_error
from engine.backends.settings import BackendSettings
from engine.devices.cuda import DeviceFacts
from engine.engines import Engines
from engine.errors import BackendError
from engine.model import Model, find_model

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
MODEL = Model.open(find_model("pictogram"))
FACTS = DeviceFacts(name="NVIDIA Test", sm="sm90", driver="580.1")


@pytest.fixture(autouse=True)
def afresh(monkeypatch, tmp_path):
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path))
    choose_gpu.cache_clear()
    yield
    choose_gpu.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU; `error` is that of a step, `driver` what drives it."""
    machine = SimpleNamespace(error=0.0025, facts=FACTS, measured=0)

    def measure(backend):
        machine.measured += 1
        if isinstance(machine.error, Exception):
            raise machine.error
        return machine.error

    monkeypatch.setattr(self_test, "_is_installed", lambda: True)
    monkeypatch.setattr(self_test, "find_device", lambda: SimpleNamespace(facts=machine.facts))
    monkeypatch.setattr(self_test, "measured_error", measure)
    monkeypatch.setattr(engines, "find_spec", lambda name: object())
    return machine


def chosen(**options):
    choose_gpu.cache_clear()
    return Engines.choose(MODEL, **options).settings.backend


def test_backends_that_have_run_have_a_record():
    records = [json.loads(path.read_text()) for path in RESULTS.glob("gpu-*.json")]
    packages = {"cuda": "onnxruntime-gpu"}
    for backend in HAVE_RUN:
        assert any(packages[backend] in record["software"] for record in records), backend


def test_the_gpu_is_chosen_and_tried_once(gpu):
    assert chosen() == chosen(precision="float16") == chosen(precision="float32") == "cuda"
    assert gpu.measured == 1
    assert Engines.choose(MODEL).precision == "float16"
    gpu.facts = DeviceFacts(name="NVIDIA Test", sm="sm90", driver="581.0")
    assert chosen() == "cuda"
    assert gpu.measured == 2, "another driver"


@pytest.mark.parametrize("error", [2 * MAX_ERROR, float("nan"), BackendError("no memory")], ids=str)
def test_a_gpu_that_fails_is_not(gpu, error):
    gpu.error = error
    assert chosen() in ("cpu", "openvino")
    assert chosen() in ("cpu", "openvino")
    assert gpu.measured == (2 if isinstance(error, Exception) else 1), "a failure is tried again"


def test_what_somebody_chose_comes_first(gpu):
    for backend in ("cpu", "openvino"):
        assert chosen(settings=BackendSettings(backend=backend)) == backend
    assert chosen(precision="bfloat16") == "openvino"
    assert chosen(fast_start=True) in ("cpu", "openvino"), "a small model opens sooner"


def test_a_damaged_result_is_measured_again(gpu, tmp_path):
    chosen()
    (path,) = (tmp_path / "self-tests").iterdir()
    kept = json.loads(path.read_text())
    assert (kept["gpu"], kept["driver"], kept["relative_error"]) == ("NVIDIA Test", "580.1", 0.0025)
    for content in ("{", "[]", "{}", '{"relative_error": "x"}'):
        path.write_text(content)
        assert chosen() == "cuda"
        assert json.loads(path.read_text()) == kept


def test_a_machine_without_the_provider():
    """As this one."""
    if self_test._is_installed():
        pytest.skip("onnxruntime-gpu is installed")
    assert choose_gpu() is None


def test_the_step_that_is_compared(monkeypatch):
    monkeypatch.setattr(self_test, "PRECISION", "float32")
    assert measured_error("cpu") == 0
    assert measured_error("openvino") < 1e-4
    given = self_test._inputs(MODEL)
    monkeypatch.setattr(self_test, "_inputs", lambda model: {**given, "timestep": next(times)})
    times = iter(np.array([[500], [400]], np.float32))
    assert measured_error("cpu") > 0.02
