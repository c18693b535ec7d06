"""The WebGPU backend on the processor's provider; tests/webgpu has it on a Vulkan of software."""

import sys
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

from engine.backends.base import EngineSpec
from engine.backends.onnxruntime import webgpu, webgpu_trials
from engine.backends.onnxruntime.cpu import OnnxRuntimeEngine
from engine.backends.onnxruntime.webgpu import OnnxRuntimeWebGpuEngine, open_engine
from engine.backends.settings import BackendSettings
from engine.devices.webgpu import UNKNOWN, WebGpuDevice, find_device
from engine.engines import Engines
from engine.errors import BackendError, GraphError
from engine.graphs.graph import find_graph, graph_folders
from engine.model import Model, find_model
from runtime import Pipeline
from tests.support.fake_webgpu import PROVIDER, Library, ep_device

MODEL = Model.open(find_model("pictogram"))
SETTINGS = BackendSettings(backend="webgpu")
REQUEST = {"prompt": "a red apple", "seed": 3, "num_inference_steps": 2}
REQUEST |= {"height": 64, "width": 64}


def graph(part="vae_decoder", precision="float32"):
    return find_graph(part, MODEL.config(part), precision, graph_folders(), MODEL.path)


def latents(batch=1, side=4):
    return np.random.default_rng(0).normal(size=(batch, 8, side, side)).astype(np.float32)


@pytest.fixture
def library(monkeypatch):
    """Put a library in the place of the real one, with a GPU."""
    made = Library(has_float16=False)
    device = WebGpuDevice(made, ep_device())
    monkeypatch.setattr(webgpu, "find_device", lambda: device)
    monkeypatch.setattr("engine.devices.webgpu.find_device", lambda: device)
    return made


def opened(part="vae_decoder", precision="float32"):
    weights = MODEL.weights(part)
    return open_engine(
        EngineSpec(
            graph=graph(part, precision), weights=weights, settings=SETTINGS, precision=precision
        )
    )


def test_a_session_for_each_form_and_the_weights_once(library):
    engine = opened()
    before = library.opened  # by what was tried
    host = OnnxRuntimeEngine(graph(), MODEL.weights("vae_decoder"), 1)
    held = {name: array.memory for name, array in engine._weights.items()}
    for batch, side, sessions in ((1, 4, 1), (2, 4, 2), (1, 4, 2)):
        given = {"latents": latents(batch, side)}
        found, expected = engine.run(given)["pixels"], host.run(given)["pixels"]
        assert np.abs(found.astype(int) - expected).max() <= 1
        assert library.opened - before == sessions
    assert {name: array.memory for name, array in engine._weights.items()} == held


def test_an_adapter_changes_the_weights_where_they_are(library):
    engine, weights = opened(), dict(MODEL.weights("vae_decoder"))
    given = {"latents": latents()}
    before = engine.run(given)["pixels"]
    sessions = library.opened
    name = "decoder.conv_out.bias"
    engine.rebind({**weights, name: np.full(3, 9, np.float32)}, [name])
    assert engine.run(given)["pixels"].min() == 255
    engine.rebind(weights, [name])
    np.testing.assert_array_equal(engine.run(given)["pixels"], before)
    assert library.opened == sessions


def test_pictures_are_the_processors(library):
    host = Pipeline.load(settings=BackendSettings(backend="cpu"), precision="float32")
    pipeline = Pipeline.load(settings=SETTINGS)
    assert pipeline.engines.precision == "float32", "the GPU lacks float16"
    for options in ({}, {"sampler": "euler_a"}, {"num_images_per_prompt": 2}):
        expected, found = (p(**REQUEST | options).images for p in (host, pipeline))
        difference = np.stack(expected).astype(int) - np.stack(found)
        assert np.abs(difference).max() <= 1
        assert (difference != 0).mean() < 1e-3


@pytest.mark.parametrize("wrong", [1.0, 1.05])
def test_attention_that_is_wrong_on_a_gpu_is_not_used(library, wrong):
    library.attention = wrong
    engine = opened("step")
    assert (b"MultiHeadAttention" in engine._model) == (wrong == 1)
    assert (b"Softmax" in engine._model) == (wrong != 1)


def test_float16_where_the_gpu_has_it(library):
    with pytest.raises(BackendError, match=r"does not compute in float16.*float32"):
        opened(precision="float16")
    assert Engines.choose(MODEL, settings=SETTINGS).precision == "float32"
    webgpu_trials.has_float16.cache_clear()
    library.has_float16 = True
    assert Engines.choose(MODEL, settings=SETTINGS).precision == "float16"


def test_it_is_never_chosen_by_itself(library):
    assert Engines.choose(MODEL).settings.backend in ("cpu", "openvino")
    assert Engines.choose(MODEL, precision="float32").settings.backend == "cpu"


NO_ADAPTER = "Failed to get a WebGPU adapter: No supported adapters\nsecond line"


def test_a_machine_without_an_adapter(library):
    library.lacking = NO_ADAPTER
    with pytest.raises(
        BackendError, match=r"needs a GPU with a driver.*No supported adapters"
    ) as e:
        opened()
    assert "\n" not in str(e.value)


def test_a_graph_that_the_library_cannot_open(library):
    engine = opened()
    library.lacking = "the model is broken"
    with pytest.raises(GraphError, match=r"cannot open .*the model is broken"):
        engine.run({"latents": latents()})


def test_inputs_that_are_none_of_the_graphs(library):
    engine = opened()
    with pytest.raises(BackendError, match=r"latents.*\(1, 8, 4\)"):
        engine.run({"latents": latents()[..., 0]})


def test_a_failing_run(library):
    engine = opened()
    given = {"latents": latents()}
    engine.run(given)
    engine._forms.get({"latents": (1, 8, 4, 4)}).session.run_with_iobinding = lambda binding: 1 / 0
    with pytest.raises(BackendError, match=r"failed on the GPU.*too large"):
        engine.run(given)


class TestFindingTheDevice:
    @pytest.fixture(autouse=True)
    def afresh(self):
        find_device.cache_clear()
        yield
        find_device.cache_clear()

    @pytest.fixture
    def package(self, monkeypatch):
        """Install the provider's package, and a library that finds what is in the list."""
        found = []
        package = SimpleNamespace(get_library_path=lambda: "x.so", get_ep_name=lambda: PROVIDER)
        monkeypatch.setitem(sys.modules, "onnxruntime_ep_webgpu", package)
        for name, value in (
            ("register_execution_provider_library", lambda name, path: None),
            ("get_ep_devices", lambda: found),
        ):
            monkeypatch.setattr(onnxruntime, name, value)
        return found

    def test_the_first_of_its_devices(self, package):
        package += [SimpleNamespace(ep_name="CPUExecutionProvider"), ep_device()]
        assert find_device() is find_device()
        assert find_device().ep_device is package[1]

    def test_the_package_is_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnxruntime_ep_webgpu", None)
        with pytest.raises(BackendError, match=r"onnxruntime-ep-webgpu.*pip install.*\[webgpu\]"):
            find_device()

    def test_no_gpu(self, package):
        with pytest.raises(BackendError, match=r"none was found.*libvulkan1.*'cpu' or 'openvino'"):
            find_device()

    def test_a_library_that_does_not_fit(self, package, monkeypatch):
        def refuse(name, path):
            raise RuntimeError("is below the minimum\nrequired version")

        monkeypatch.setattr(onnxruntime, "register_execution_provider_library", refuse)
        with pytest.raises(BackendError, match=r"below the minimum.*pip install --upgrade"):
            find_device()


def test_memory_is_told_where_it_is_the_machines():
    kinds = onnxruntime.OrtHardwareDeviceType
    for device, known in (
        (ep_device(), False),
        (ep_device(Discrete="1"), False),
        (ep_device(Discrete="0"), True),
        (ep_device(kind=kinds.CPU), True),
    ):
        free, total = WebGpuDevice(Library(), device).memory()
        assert (total != UNKNOWN) == known
        assert free == total > 2**20


def test_a_request_that_cannot_fit_is_refused(library, monkeypatch):
    monkeypatch.setattr(WebGpuDevice, "memory", lambda self: (2**20, 2**20))
    with pytest.raises(BackendError, match="GiB are missing"):
        Pipeline.load(settings=SETTINGS)(**REQUEST)


def test_arrays_of_the_device():
    device = WebGpuDevice(Library(), ep_device())
    for array in (latents(), np.zeros((0, 3), np.float32), np.arange(6).reshape(2, 3).T):
        there, again = (device.empty(array.shape, array.dtype) for _ in range(2))
        device.upload(array, there)
        device.copy(there, again)
        device.wait()
        np.testing.assert_array_equal(device.download(again), array, strict=True)
    with pytest.raises(AssertionError):
        device.empty((2, 3), np.dtype(np.float32))[0]
    with pytest.raises(BackendError, match="cannot be recorded"):
        device.record(lambda: None)


def test_the_probe_of_a_gpu_that_fails():
    device = WebGpuDevice(Library(lacking="out of memory"), ep_device())
    assert not webgpu_trials.has_float16(device)
    assert not webgpu_trials.has_attention(device, "float32")
    assert isinstance(device, WebGpuDevice)
    with pytest.raises(BackendError, match="needs a GPU"):
        webgpu_trials.has_float16(WebGpuDevice(Library(lacking=NO_ADAPTER), ep_device()))
    assert OnnxRuntimeWebGpuEngine.records is False
