"""OpenVINO's devices beside the processor, which stands for them here."""

import numpy as np
import openvino
import pytest

from engine.backends.openvino import engine as backend
from engine.backends.settings import BackendSettings, graph_precision
from engine.engines import Engines, open_engine
from engine.errors import BackendError
from engine.graphs.graph import find_graph, graph_folders
from engine.model import Model, find_model

MODEL = Model.open(find_model("pictogram"))


def graph():
    return find_graph("vae_decoder", MODEL.vae, "float32", graph_folders(), MODEL.path)


def latents(side):
    return np.random.default_rng(0).normal(size=(1, 8, side, side)).astype(np.float32)


@pytest.fixture
def compiled(monkeypatch):
    """Let the processor stand for all devices; yields (device, settings, model) of each time."""
    seen, real = [], openvino.Core

    class Core:
        def __init__(self):
            self._core = real()
            self.available_devices = ["CPU", "GPU.0", "GPU.1", "NPU"]

        def __getattr__(self, name):
            return getattr(self._core, name)

        def compile_model(self, model, device, settings):
            seen.append((device, settings, model.is_dynamic()))
            return self._core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    monkeypatch.setattr(openvino, "Core", Core)
    return seen


@pytest.mark.parametrize("device", ["GPU", "NPU"])
def test_a_device_gets_fixed_sizes_and_nothing_of_the_processors(compiled, device):
    settings = BackendSettings(backend="openvino", device=device)
    weights = MODEL.weights("vae_decoder")
    engine = open_engine(graph(), weights, settings, "float16")
    host = open_engine(graph(), weights, BackendSettings(backend="cpu"))
    for side in (4, 2, 4):
        found, expected = (
            each.run({"latents": latents(side)})["pixels"].astype(int) for each in (engine, host)
        )
        assert np.abs(found - expected).max() <= 1
    hints = {"INFERENCE_PRECISION_HINT": "f16", "PERFORMANCE_HINT": "LATENCY"}
    assert compiled == [(device, hints, False)] * 3


@pytest.mark.parametrize(("device", "precision"), [("GPU", "float16"), ("NPU", "float16")])
def test_what_a_device_computes_in(device, precision):
    settings = BackendSettings(backend="openvino", device=device)
    assert Engines.choose(MODEL, settings=settings).precision == precision
    assert graph_precision(settings, precision) == "float32"
    with pytest.raises(BackendError, match=f"compute in int8 on the device '{device}'"):
        Engines.choose(MODEL, settings=settings, precision="int8")


def test_the_processor_by_its_name():
    named, open_ = (
        Engines.choose(MODEL, settings=BackendSettings(backend="openvino", device=device))
        for device in ("CPU", None)
    )
    assert named.precision == open_.precision


@pytest.mark.parametrize("device", ["GPU", "NPU"])
def test_a_device_that_is_not_there(device, monkeypatch):
    if any(name.startswith(device) for name in openvino.Core().available_devices):
        pytest.skip("it is there")
    settings = BackendSettings(backend="openvino", device=device)
    with pytest.raises(BackendError, match=rf"no device '{device}' here \(it has CPU"):
        open_engine(graph(), MODEL.weights("vae_decoder"), settings, "float16")
    assert backend.CPU in openvino.Core().available_devices


@pytest.mark.parametrize("given", [None, "cpu", "cuda", "webgpu"])
def test_a_device_without_openvino(given):
    with pytest.raises(BackendError, match="'GPU' and came without backend 'openvino'"):
        BackendSettings(backend=given, device="GPU")


@pytest.mark.parametrize(("device", "backend"), [("cuda", "cuda"), ("CUDA:0", "cuda")])
def test_a_device_that_is_a_backend(device, backend):
    with pytest.raises(BackendError, match=f"is a backend; give it as the backend '{backend}'"):
        BackendSettings(device=device)


def test_a_device_that_is_none():
    with pytest.raises(
        BackendError, match=r"device is 'gpu'; did you mean 'GPU'\? There are CPU, GPU, NPU"
    ):
        BackendSettings(backend="openvino", device="gpu")
