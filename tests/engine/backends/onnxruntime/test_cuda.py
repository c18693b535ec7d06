import builtins
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest

from engine.backends.onnxruntime import cuda as onnxruntime_cuda
from engine.backends.onnxruntime.cpu import OnnxRuntimeEngine
from engine.backends.onnxruntime.cuda import PROVIDER, OnnxRuntimeCudaEngine
from engine.checkpoints.families.sd import SD1
from engine.configs.diffusion import AutoencoderConfig
from engine.errors import BackendError, GraphError, ModelError
from engine.graphs.graph import find_graph, graph_folders
from engine.model import Model, find_model
from tests.support.fake_cuda import FakeDevice
from tests.support.real_signatures import check_call, strict

MODEL = Model.open(find_model("pictogram"))
GRAPH = find_graph(
    "preview_decoder", MODEL.config("preview_decoder"), "float32", graph_folders(), MODEL.path
)
WEIGHTS = dict(MODEL.weights("preview_decoder"))
BIAS = "decoder.layers.0.bias"
INSTALL = r"pip install 'onnxruntime-gpu.*'\.\[gpu\]'"


class FakeLibrary:
    """onnxruntime-gpu on a `FakeDevice`: its sessions are the processor's."""

    OrtValue = onnxruntime.OrtValue
    SessionOptions = onnxruntime.SessionOptions
    RunOptions = onnxruntime.RunOptions

    def __init__(self, device):
        self.device = device
        self.sessions = []
        self.available = [PROVIDER, "CPUExecutionProvider"]
        self.started = [PROVIDER, "CPUExecutionProvider"]

    def InferenceSession(self, data, options, providers, enable_fallback):  # noqa: N802
        arguments = (data, options), {"providers": providers, "enable_fallback": enable_fallback}
        check_call(onnxruntime.InferenceSession, *arguments, of_class=True)
        session = _Session(self, data, options, providers)
        self.sessions.append(session)
        return strict(onnxruntime.InferenceSession, session)

    def get_available_providers(self):
        return self.available

    def preload_dlls(self, directory):
        assert directory == ""


class _Session:
    def __init__(self, library, data, options, providers):
        self.library = library
        self.settings = dict(providers[0][1])
        self.runs = []
        self.fail = None
        cpu = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(data, options, providers=cpu)

    def get_providers(self):
        return self.library.started

    def get_inputs(self):
        return self.session.get_inputs()

    def get_outputs(self):
        return self.session.get_outputs()

    def io_binding(self):
        return strict(onnxruntime.IOBinding, _Binding())

    def run_with_iobinding(self, iobinding, run_options):
        if self.fail:
            raise RuntimeError(self.fail)
        key = "disable_synchronize_execution_providers"
        assert run_options.get_run_config_entry(key) == "1"
        binding, device = iobinding._fake, self.library.device
        self.runs.append(binding)
        names = list(binding.outputs)

        def run(given):
            return dict(zip(names, self.session.run(names, given), strict=True))

        if all(place is None for place in binding.outputs.values()):
            zeros = {name: np.zeros(*place[1:]) for name, place in binding.inputs.items()}
            binding.made = [
                SimpleNamespace(shape=lambda a=a: list(a.shape)) for a in run(zeros).values()
            ]
        else:
            device.queue_run(SimpleNamespace(run=run), binding.inputs, binding.outputs)


class _Binding:
    def __init__(self):
        self.inputs, self.outputs, self.made = {}, {}, None

    def bind_input(self, name, device_type, device_id, element_type, shape, buffer_ptr):
        assert (device_type, device_id) == ("cuda", 0)
        self.inputs[name] = buffer_ptr, tuple(shape), np.dtype(element_type)

    def bind_output(
        self, name, device_type, device_id, element_type=None, shape=None, buffer_ptr=None
    ):
        assert (device_type, device_id) == ("cuda", 0)
        bound = None if buffer_ptr is None else (buffer_ptr, tuple(shape), np.dtype(element_type))
        self.outputs[name] = bound

    def get_outputs(self):
        return self.made


@pytest.fixture
def device():
    return FakeDevice()


@pytest.fixture
def library(device, monkeypatch):
    made = FakeLibrary(device)
    monkeypatch.setattr(onnxruntime_cuda, "_import", lambda: made)
    return made


def latents(*shape, seed=0):
    return {"latents": np.random.default_rng(seed).standard_normal(shape).astype(np.float32)}


def expected(inputs, weights=None):
    return OnnxRuntimeEngine(GRAPH, weights or WEIGHTS, 1).run(inputs)["pixels"]


def test_a_run_is_that_of_the_graph(library, device):
    engine = OnnxRuntimeCudaEngine(GRAPH, WEIGHTS, device)
    for shape in ((1, 8, 8, 8), (2, 8, 8, 16)):
        inputs = latents(*shape)
        np.testing.assert_array_equal(engine.run(inputs)["pixels"], expected(inputs))


def test_runs_are_queued_on_the_device_s_stream_without_waiting(library, device):
    engine = OnnxRuntimeCudaEngine(GRAPH, WEIGHTS, device)
    assert library.sessions[0].settings["user_compute_stream"] == str(device.stream)
    inputs = latents(1, 8, 8, 8)
    placed = {"latents": device.empty((1, 8, 8, 8), np.dtype(np.float32))}
    outputs = engine.prepare({"latents": (1, 8, 8, 8)})
    device.counts.clear()

    replay = device.record(lambda: engine.enqueue(placed, outputs))
    device.upload(inputs["latents"], placed["latents"])
    replay()

    assert device.counts["wait"] == device.counts["empty"] == 0
    np.testing.assert_array_equal(device.download(outputs["pixels"]), expected(inputs))


def test_new_shapes_are_run_once_to_know_the_outputs(library, device):
    engine = OnnxRuntimeCudaEngine(GRAPH, WEIGHTS, device)
    for shape in ((1, 8, 8, 8), (1, 8, 8, 8), (1, 8, 16, 8)):
        outputs = engine.prepare({"latents": shape})
        assert outputs["pixels"].shape == (1, shape[2] * 8, shape[3] * 8, 3)
        assert outputs["pixels"].dtype == np.uint8
    assert len(library.sessions[0].runs) == 2


@pytest.mark.parametrize(("part", "config"), [("step", SD1), ("vae_decoder", AutoencoderConfig())])
def test_no_attention_is_left_to_the_kernel_that_is_wrong(part, config):
    graph = find_graph(part, config, "float16", graph_folders(), MODEL.path)
    engine = object.__new__(OnnxRuntimeCudaEngine)
    engine._graph = graph
    kinds = [node.op_type for node in onnx.load_model_from_string(engine._model()).graph.node]
    before = [n.op_type for n in onnx.load_model_from_string(graph.data()).graph.node]
    assert "Attention" not in kinds
    assert kinds.count("MultiHeadAttention") == before.count("Attention")


def test_other_weights_open_the_session_again(library, device):
    engine = OnnxRuntimeCudaEngine(GRAPH, WEIGHTS, device)
    inputs = latents(1, 8, 8, 8)
    weights = WEIGHTS | {BIAS: WEIGHTS[BIAS] + np.float32(0.3)}
    engine.rebind(weights, {BIAS})
    np.testing.assert_array_equal(engine.run(inputs)["pixels"], expected(inputs, weights))
    engine.rebind(WEIGHTS, {BIAS})
    np.testing.assert_array_equal(engine.run(inputs)["pixels"], expected(inputs))


def test_weights_that_cannot_be_bound_leave_an_engine_that_can_be_bound_again(library, device):
    engine = OnnxRuntimeCudaEngine(GRAPH, WEIGHTS, device)
    inputs = latents(1, 8, 8, 8)
    with pytest.raises(ModelError, match=BIAS):
        engine.rebind(WEIGHTS | {BIAS: WEIGHTS[BIAS] * np.nan}, {BIAS})
    with pytest.raises(BackendError, match="no weights"):
        engine.run(inputs)
    engine.rebind(WEIGHTS, {BIAS})
    np.testing.assert_array_equal(engine.run(inputs)["pixels"], expected(inputs))


def test_a_failing_run_is_one_error(library, device):
    engine = OnnxRuntimeCudaEngine(GRAPH, WEIGHTS, device)
    engine.prepare({"latents": (1, 8, 8, 8)})
    library.sessions[0].fail = "Failed to allocate memory for requested buffer\nmore"
    with pytest.raises(BackendError, match=r"GPU \(Failed to allocate memory .* buffer\); is the"):
        engine.run(latents(1, 8, 8, 8))


def test_a_provider_that_does_not_start_is_an_error(library, device):
    library.started = ["CPUExecutionProvider"]
    with pytest.raises(BackendError, match=rf"NVIDIA GPU.*cuDNN 9.*{INSTALL}"):
        OnnxRuntimeCudaEngine(GRAPH, WEIGHTS, device)
    decoder = find_graph(
        "vae_decoder", MODEL.config("vae_decoder"), "float32", graph_folders(), MODEL.path
    )  # its group norms have a kernel in the provider alone
    with pytest.raises(BackendError, match="could not start"):
        OnnxRuntimeCudaEngine(decoder, dict(MODEL.weights("vae_decoder")), device)


def test_a_graph_that_cannot_be_opened_is_named(library, device, monkeypatch):
    monkeypatch.setattr(
        onnxruntime_cuda, "fuse_group_norms", lambda data, _: data[: len(data) // 2]
    )
    with pytest.raises(GraphError, match=GRAPH.path.name):
        OnnxRuntimeCudaEngine(GRAPH, WEIGHTS, device)


def test_the_package_without_the_provider_is_said(monkeypatch):
    if PROVIDER in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is installed")
    with pytest.raises(BackendError, match=rf"pip uninstall onnxruntime.*{INSTALL}"):
        OnnxRuntimeCudaEngine(GRAPH, WEIGHTS, FakeDevice())


def test_a_missing_package_is_said(monkeypatch):
    real = builtins.__import__

    def importing(name, *args, **kwargs):
        if name == "onnxruntime":
            raise ImportError("No module named 'onnxruntime'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importing)
    with pytest.raises(BackendError, match=rf"onnxruntime-gpu.*{INSTALL}"):
        OnnxRuntimeCudaEngine(GRAPH, WEIGHTS, FakeDevice())
