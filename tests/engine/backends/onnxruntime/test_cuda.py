import builtins
import ctypes
import gc
import weakref
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from engine.backends.onnxruntime import cuda as onnxruntime_cuda
from engine.backends.onnxruntime import device_values, device_weights
from engine.backends.onnxruntime.cpu import OnnxRuntimeEngine
from engine.backends.onnxruntime.cuda import PROVIDER, WARM_UP, OnnxRuntimeCudaEngine
from engine.backends.onnxruntime.fixed_sizes import LIMIT
from engine.checkpoints.families.sd import SD1
from engine.configs.diffusion import AutoencoderConfig
from engine.errors import BackendError, GraphError, ModelError, OutOfMemoryError
from engine.graphs.graph import find_graph, graph_folders
from engine.graphs.onnx_bytes import GRAPH_NODE, MODEL_GRAPH, encode
from engine.model import Model, find_model
from tests.support.fake_cuda import FakeDevice
from tests.support.real_signatures import check_call, checked, strict

MODEL = Model.open(find_model("pictogram"))
GRAPH = find_graph(
    "preview_decoder", MODEL.config("preview_decoder"), "float32", graph_folders(), MODEL.path
)
WEIGHTS = dict(MODEL.weights("preview_decoder"))
BIAS, ARRAY = "decoder.layers.0.bias", "decoder.layers.0.weight"
INSTALL = r"pip install 'onnxruntime-gpu.*'\.\[gpu\]'"


class FakeLibrary:
    """onnxruntime-gpu on a `FakeDevice`: its sessions are the processor's."""

    RunOptions = onnxruntime.RunOptions

    def __init__(self, device):
        self.device = device
        self.sessions = []
        self.failures = []  # of the next runs
        self.elsewhere = []
        self.available = [PROVIDER, "CPUExecutionProvider"]
        self.started = [PROVIDER, "CPUExecutionProvider"]
        self.OrtValue = SimpleNamespace(
            ortvalue_from_numpy=onnxruntime.OrtValue.ortvalue_from_numpy,
            from_dlpack=checked(onnxruntime.OrtValue.from_dlpack, _described),
        )

    def SessionOptions(self):  # noqa: N802
        return strict(onnxruntime.SessionOptions, _Options())

    def InferenceSession(  # noqa: N802
        self, data, options, providers, enable_fallback, disabled_optimizers
    ):
        given = {
            "providers": providers,
            "enable_fallback": enable_fallback,
            "disabled_optimizers": disabled_optimizers,
        }
        check_call(onnxruntime.InferenceSession, (data, None), given, of_class=True)
        session = _Session(self, data, options._fake, providers)
        self.sessions.append(session)
        return strict(onnxruntime.InferenceSession, session)

    def get_available_providers(self):
        return self.available

    def preload_dlls(self, directory):
        assert directory == ""


def _described(capsule):
    """Return what a capsule of DLPack says: an array's address, shape and dtype."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    said = device_values._Tensor.from_address(pointer(capsule, b"dltensor"))
    assert (said.device_type, said.device_id, said.lanes, said.strides) == (2, 0, 1, None)
    sizes = (ctypes.c_int64 * said.ndim).from_address(said.shape)
    kind = {code: kind for kind, code in device_values.CODES.items()}[said.code]
    return said.data, tuple(sizes), np.dtype(f"{kind}{said.bits // 8}")


class _Options:
    log_severity_level = 2

    def __init__(self):
        self.entries, self.sizes, self.constants, self.shared = {}, {}, {}, {}

    def add_session_config_entry(self, name, value):
        self.entries[name] = value

    def add_free_dimension_override_by_name(self, name, size):
        self.sizes[name] = size

    def add_external_initializers(self, names, values):
        self.constants.update(zip(names, values, strict=True))

    def add_initializer(self, name, value):
        self.shared[name] = value


class _Session:
    def __init__(self, library, data, options, providers):
        self.library = library
        self.settings = dict(providers[0][1])
        self.options = options
        self.data = data
        self.runs = []
        self.fail = None
        assert options.entries["session.record_ep_graph_assignment_info"] == "1"
        assert all(np.isnan(options.constants[name].numpy()).all() for name in options.shared)
        self.session = self.opened(options.constants)

    def opened(self, constants):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        for name, size in self.options.sizes.items():
            options.add_free_dimension_override_by_name(name, size)
        options.add_external_initializers(list(constants), list(constants.values()))
        cpu = ["CPUExecutionProvider"]
        return onnxruntime.InferenceSession(self.data, options, providers=cpu)

    def get_providers(self):
        return self.library.started

    def get_inputs(self):
        return self.session.get_inputs()

    def get_outputs(self):
        return self.session.get_outputs()

    def get_input_memory_infos(self):
        return [SimpleNamespace(name="Cuda") for _ in self.session.get_inputs()]

    def get_provider_graph_assignment_info(self):
        return [
            SimpleNamespace(
                ep_name=name,
                get_nodes=lambda kinds=kinds: [SimpleNamespace(op_type=k) for k in kinds],
            )
            for name, kinds in (
                (PROVIDER, ["Conv"]),
                ("CPUExecutionProvider", self.library.elsewhere),
            )
            if kinds
        ]

    def io_binding(self):
        return strict(onnxruntime.IOBinding, _Binding())

    def run_with_iobinding(self, iobinding, run_options):
        if self.fail:
            raise RuntimeError(self.fail)
        if self.library.failures:
            raise RuntimeError(self.library.failures.pop())
        key = "disable_synchronize_execution_providers"
        assert run_options.get_run_config_entry(key) == "1"
        inputs, outputs = dict(iobinding._fake.inputs), dict(iobinding._fake.outputs)
        self.runs.append({name: place[1] for name, place in inputs.items()})
        value = onnxruntime.OrtValue.ortvalue_from_numpy

        device = self.library.device
        kept, alive = None if device.recording else self, weakref.ref(self)

        def run(given):  # with the weights as they lie on the device when its turn comes
            session = kept or alive()
            assert session is not None, "its memory is gone"
            shared = {n: value(device.at(*p)) for n, p in session.options.shared.items()}
            opened = session.opened(session.options.constants | shared)
            return dict(zip(outputs, opened.run(list(outputs), given), strict=True))

        device.queue_run(SimpleNamespace(run=run), inputs, outputs)


class _Binding:
    def __init__(self):
        self.inputs, self.outputs = {}, {}

    def bind_input(self, name, device_type, device_id, element_type, shape, buffer_ptr):
        assert (device_type, device_id) == ("cuda", 0)
        self.inputs[name] = buffer_ptr, tuple(shape), np.dtype(element_type)

    def bind_output(self, name, device_type, device_id, element_type, shape, buffer_ptr):
        assert (device_type, device_id) == ("cuda", 0)
        self.outputs[name] = buffer_ptr, tuple(shape), np.dtype(element_type)


@pytest.fixture
def device():
    return FakeDevice()


@pytest.fixture
def library(device, monkeypatch):
    made = FakeLibrary(device)
    monkeypatch.setattr(onnxruntime_cuda, "_import", lambda: made)
    # The processor has no kernels for the provider's own operators.
    monkeypatch.setattr(onnxruntime_cuda, "rewritten", lambda data, weights: data)
    monkeypatch.setattr(device_weights, "SHARING", {(b"Conv", 1)})
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
    inputs = latents(1, 8, 8, 8)
    placed = {"latents": device.empty((1, 8, 8, 8), np.dtype(np.float32))}
    outputs = engine.prepare({"latents": (1, 8, 8, 8)})
    assert library.sessions[0].settings["user_compute_stream"] == str(device.stream)
    device.counts.clear()

    replay = device.record(lambda: engine.enqueue(placed, outputs))
    device.upload(inputs["latents"], placed["latents"])
    replay()

    assert device.counts["wait"] == device.counts["empty"] == 0
    np.testing.assert_array_equal(device.download(outputs["pixels"]), expected(inputs))


def test_a_form_is_opened_and_run_on_zeros_once(library, device):
    engine = OnnxRuntimeCudaEngine(GRAPH, WEIGHTS, device)
    for shape in ((1, 8, 8, 8), (1, 8, 8, 8), (1, 8, 16, 8)):
        outputs = engine.prepare({"latents": shape})
        assert outputs["pixels"].shape == (1, shape[2] * 8, shape[3] * 8, 3)
        assert outputs["pixels"].dtype == np.uint8
    first, second = library.sessions
    assert first.options.sizes == {"B": 1, "h": 8, "w": 8}
    assert second.options.sizes == {"B": 1, "h": 16, "w": 8}
    assert len(first.runs) == len(second.runs) == WARM_UP


def test_forms_share_the_arrays_among_the_weights(library, device):
    engine = OnnxRuntimeCudaEngine(GRAPH, WEIGHTS, device)
    arrays = {name for name, shape in GRAPH.weights.items() if len(shape) > 1}
    uploads = device.counts["upload"]
    assert uploads == len(arrays)
    for size in (8, 16):
        engine.prepare({"latents": (1, 8, size, 8)})
    first, second = (session.options for session in library.sessions)
    assert first.shared == second.shared
    assert set(first.shared) == arrays
    assert device.counts["upload"] == uploads + 2, "the zeros of two forms"


def test_engines_of_one_component_share_the_arrays_among_its_weights(library, device):
    """As a step, a shallow one and their variants do; an adapter is told to each of them."""
    first = OnnxRuntimeCudaEngine(GRAPH, WEIGHTS, device)
    uploads, allocated = device.counts["upload"], device.allocated
    second = OnnxRuntimeCudaEngine(GRAPH, WEIGHTS, device, kin=[first])
    assert (device.counts["upload"], device.allocated) == (uploads, allocated)
    inputs = latents(1, 8, 8, 8)
    np.testing.assert_array_equal(second.run(inputs)["pixels"], expected(inputs))
    halved = {name: array / 2 for name, array in WEIGHTS.items()}
    for engine in (first, second):
        engine.rebind(halved, GRAPH.weights)
    for engine in (first, second):
        np.testing.assert_array_equal(engine.run(inputs)["pixels"], expected(inputs, halved))
    del first
    gc.collect()
    np.testing.assert_array_equal(second.run(inputs)["pixels"], expected(inputs, halved))


def test_a_form_that_is_elsewhere_is_not_recorded(library, device):
    engine = OnnxRuntimeCudaEngine(GRAPH, WEIGHTS, device)
    engine.prepare({"latents": (1, 8, 8, 8)})
    assert engine.records
    library.elsewhere = ["ReduceProd"]
    engine.prepare({"latents": (1, 8, 16, 8)})
    assert not engine.records


def test_a_recorded_graph_keeps_its_session(library, device):
    engine = OnnxRuntimeCudaEngine(GRAPH, WEIGHTS, device)
    placed = device.empty((1, 8, 8, 8), np.dtype(np.float32))
    device.upload(latents(1, 8, 8, 8)["latents"], placed)
    outputs = engine.prepare({"latents": (1, 8, 8, 8)})
    replay = device.record(lambda: engine.enqueue({"latents": placed}, outputs))
    session = weakref.ref(library.sessions.pop())
    for height in range(2, 2 + LIMIT):
        engine.prepare({"latents": (1, 8, 8 * height, 8)})
    gc.collect()
    assert session() is not None, "no more among the engine's"
    replay()
    np.testing.assert_array_equal(device.download(outputs["pixels"]), expected(latents(1, 8, 8, 8)))
    del replay
    gc.collect()
    assert session() is None


@pytest.mark.parametrize(("part", "config"), [("step", SD1), ("vae_decoder", AutoencoderConfig())])
def test_no_attention_is_left_to_the_kernel_that_is_wrong(part, config):
    graph = find_graph(part, config, "float16", graph_folders(), MODEL.path)
    data = graph.data()
    made = onnx.load_model_from_string(onnxruntime_cuda.rewritten(data, graph.weights))
    kinds = [node.op_type for node in made.graph.node]
    before = [node.op_type for node in onnx.load_model_from_string(data).graph.node]
    assert "Attention" not in kinds
    assert kinds.count("MultiHeadAttention") == before.count("Attention")


def test_other_arrays_are_changed_in_place(library, device):
    engine = OnnxRuntimeCudaEngine(GRAPH, WEIGHTS, device)
    inputs = latents(1, 8, 8, 8)
    placed = device.empty((1, 8, 8, 8), np.dtype(np.float32))
    device.upload(inputs["latents"], placed)
    outputs = engine.prepare({"latents": (1, 8, 8, 8)})
    replay = device.record(lambda: engine.enqueue({"latents": placed}, outputs))
    changed = WEIGHTS | {ARRAY: WEIGHTS[ARRAY] * np.float32(1.5)}
    for weights in (WEIGHTS, changed, WEIGHTS):
        engine.rebind(weights, {ARRAY})
        replay()
        pixels = device.download(outputs["pixels"])
        np.testing.assert_array_equal(pixels, expected(inputs, weights))
    assert len(library.sessions) == 1


def test_other_vectors_open_sessions_again(library, device):
    engine = OnnxRuntimeCudaEngine(GRAPH, WEIGHTS, device)
    inputs = latents(1, 8, 8, 8)
    weights = WEIGHTS | {BIAS: WEIGHTS[BIAS] + np.float32(0.3)}
    for given in (WEIGHTS, weights, WEIGHTS):
        engine.rebind(given, {BIAS})
        np.testing.assert_array_equal(engine.run(inputs)["pixels"], expected(inputs, given))
    assert len(library.sessions) == 3


def test_weights_that_cannot_be_bound_leave_an_engine_that_can_be_bound_again(library, device):
    engine = OnnxRuntimeCudaEngine(GRAPH, WEIGHTS, device)
    inputs = latents(1, 8, 8, 8)
    with pytest.raises(ModelError, match=BIAS):
        engine.rebind(WEIGHTS | {BIAS: WEIGHTS[BIAS] * np.nan}, {BIAS})
    with pytest.raises(BackendError, match="no weights"):
        engine.run(inputs)
    engine.rebind(WEIGHTS, {BIAS})
    np.testing.assert_array_equal(engine.run(inputs)["pixels"], expected(inputs))


def test_a_session_may_take_what_is_free(library, device):
    engine = OnnxRuntimeCudaEngine(GRAPH, WEIGHTS, device)
    free = device.memory()[0]
    engine.prepare({"latents": (1, 8, 8, 8)})
    assert library.sessions[0].settings["gpu_mem_limit"] == str(free)
    assert free < device.memory()[1], "the weights are on the device"


@pytest.mark.parametrize("failing", [1, 3], ids=["once", "whatever is let go"])
def test_other_forms_go_where_memory_is_short(library, device, failing):
    engine = OnnxRuntimeCudaEngine(GRAPH, WEIGHTS, device)
    engine.prepare({"latents": (1, 8, 8, 8)})
    library.failures = ["Failed to allocate memory for requested buffer"] * failing
    inputs = latents(1, 8, 16, 8)
    if failing > 1:
        with pytest.raises(OutOfMemoryError, match="Failed to allocate"):
            engine.run(inputs)
    np.testing.assert_array_equal(engine.run(inputs)["pixels"], expected(inputs))
    assert [tuple(form.outputs["pixels"]) for form in engine.opened()] == [(1, 128, 64, 3)]
    assert device.counts["trim"] == 1


def test_a_failing_run_is_one_error(library, device):
    engine = OnnxRuntimeCudaEngine(GRAPH, WEIGHTS, device)
    engine.prepare({"latents": (1, 8, 8, 8)})
    library.sessions[0].fail = "Failed to allocate memory for requested buffer\nmore"
    with pytest.raises(BackendError, match=r"GPU \(Failed to allocate memory .* buffer\); is the"):
        engine.run(latents(1, 8, 8, 8))


def test_a_provider_that_does_not_start_is_an_error(library, device, monkeypatch):
    library.started = ["CPUExecutionProvider"]
    engine = OnnxRuntimeCudaEngine(GRAPH, WEIGHTS, device)
    with pytest.raises(BackendError, match=rf"NVIDIA GPU.*cuDNN 9.*{INSTALL}"):
        engine.prepare({"latents": (1, 8, 8, 8)})
    monkeypatch.undo()  # its own operators have a kernel in the provider alone
    monkeypatch.setattr(onnxruntime_cuda, "_import", lambda: library)
    engine = OnnxRuntimeCudaEngine(GRAPH, WEIGHTS, device)
    with pytest.raises(BackendError, match="could not start"):
        engine.prepare({"latents": (1, 8, 8, 8)})


def test_a_graph_that_cannot_be_opened_is_named(library, device, monkeypatch):
    node = helper.make_node("Sqrt", ["latents"], ["latents"], domain="none")
    broken = encode(MODEL_GRAPH, encode(GRAPH_NODE, node.SerializeToString()))
    monkeypatch.setattr(onnxruntime_cuda, "rewritten", lambda data, weights: data + broken)
    engine = OnnxRuntimeCudaEngine(GRAPH, WEIGHTS, device)
    with pytest.raises(GraphError, match=GRAPH.path.name):
        engine.prepare({"latents": (1, 8, 8, 8)})


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
