import builtins
import inspect
import sys
import threading
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest

from engine.backends.base import EngineSpec
from engine.backends.binding import bind
from engine.backends.onnxruntime.cpu import CONSTANT_BYTES
from engine.backends.registry import BACKENDS
from engine.backends.settings import PRECISIONS, BackendSettings, graph_precision
from engine.engines import open_engine
from engine.errors import BackendError, GraphError, ModelError
from engine.graphs.graph import find_graph, graph_folders
from engine.model import Model, find_model
from runtime import Pipeline

MODEL = Model.open(find_model("pictogram"))
SETTINGS = BackendSettings(threads=1)


@pytest.fixture(params=[CONSTANT_BYTES, 0], ids=["constants", "inputs"])
def graph(request, monkeypatch):
    """Give a small graph, opened as a small one and as a large one would be."""
    monkeypatch.setattr("engine.backends.onnxruntime.cpu.CONSTANT_BYTES", request.param)
    return find_graph("vae_decoder", MODEL.vae, "float32", graph_folders(), MODEL.path)


@pytest.fixture
def weights():
    return dict(MODEL.weights("vae_decoder"))


def latents(batch=1, side=4):
    return np.random.default_rng(0).normal(size=(batch, 8, side, side)).astype(np.float32)


@pytest.mark.parametrize("threads", [None, 1, 2])
def test_a_graph_runs_with_its_weights(graph, weights, threads):
    engine = open_engine(graph, weights, BackendSettings(threads=threads))
    for batch, side in ((1, 4), (3, 2)):
        pixels = engine.run({"latents": latents(batch, side)})["pixels"]
        assert pixels.shape == (batch, 8 * side, 8 * side, 3)
        assert pixels.dtype == np.uint8


def test_the_weights_count(graph, weights):
    before = open_engine(graph, weights, SETTINGS).run({"latents": latents()})["pixels"]
    brighter = dict(weights)
    brighter["decoder.conv_out.bias"] = np.full(3, 9, np.float32)
    after = open_engine(graph, brighter, SETTINGS).run({"latents": latents()})["pixels"]
    assert after.astype(int).mean() > before.astype(int).mean()
    assert after.max() == 255


def test_weights_may_go_after_the_engine_is_open(graph):
    engine = open_engine(graph, MODEL.weights("vae_decoder"), SETTINGS)
    first, second = (engine.run({"latents": latents()})["pixels"] for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_a_missing_weight(graph, weights):
    del weights["decoder.conv_in.weight"]
    with pytest.raises(BackendError, match=r"no tensor 'decoder.conv_in.weight'.*vae_decoder"):
        open_engine(graph, weights, SETTINGS)


def test_a_weight_of_another_shape(graph, weights):
    shape = weights["decoder.conv_in.weight"].shape
    weights["decoder.conv_in.weight"] = weights["decoder.conv_in.weight"][:, :, :2]
    with pytest.raises(BackendError, match=r"'decoder.conv_in.weight' has the shape") as caught:
        open_engine(graph, weights, SETTINGS)
    assert f"needs {shape}" in str(caught.value)
    assert graph.path.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_graph_that_wants_other_shapes_than_it_says(graph, weights):
    weights["decoder.conv_in.weight"] = weights["decoder.conv_in.weight"][:, :, :2]
    lying = {**graph.weights, "decoder.conv_in.weight": weights["decoder.conv_in.weight"].shape}
    with pytest.raises((GraphError, BackendError), match="ONNX Runtime") as caught:
        draw(open_engine(replace(graph, weights=lying), weights, SETTINGS))
    assert "\n" not in str(caught.value)


def test_bind_takes_the_precision_of_the_graph(graph, weights):
    weights = {name: array.astype(np.float32) for name, array in weights.items()}
    bound = dict(bind(graph, weights))
    assert list(bound) == list(graph.weights)
    for name, array in bound.items():
        assert np.shares_memory(array, weights[name]), "equal dtypes are not copied"
    half = dict(bind(replace(graph, precision="float16"), weights))
    assert {array.dtype for array in half.values()} == {np.dtype(np.float16)}
    scalar = dict(bind(replace(graph, weights={"x": ()}), {"x": np.array(2.0)}))["x"]
    assert scalar.shape == ()
    assert scalar.dtype == np.float32


def test_bind_takes_what_the_libraries_cannot_read_in_place(graph):
    stored = np.arange(12, dtype=np.float16).reshape(3, 4).T
    (name, taken), *none = bind(replace(graph, weights={"x": (4, 3)}), {"x": stored})
    assert (name, none) == ("x", [])
    assert taken.flags.c_contiguous
    np.testing.assert_array_equal(taken, stored.astype(np.float32), strict=True)


def test_bind_takes_some_names_in_the_order_of_the_graph(graph, weights):
    first, second, *_ = graph.weights
    bound = bind(graph, weights, [second, first, "of another part"])
    assert [name for name, _ in bound] == [first, second]
    assert list(bind(graph, {}, [])) == []


NOT_FINITE = {"nan": np.nan, "infinite": np.inf, "minus infinite": -np.inf}


@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE)
@pytest.mark.parametrize("stored", [np.float16, np.float32, np.float64])
def test_weights_that_are_not_finite_are_named(graph, weights, value, stored):
    array = weights["decoder.conv_in.weight"].astype(stored)
    array[1, 2, 0, 1] = value
    weights["decoder.conv_in.weight"] = array
    with pytest.raises(ModelError, match=r"'decoder.conv_in.weight' holds values.* not finite"):
        open_engine(graph, weights, SETTINGS)


def test_infinities_of_both_signs_do_not_cancel_out(graph):
    array = np.array([np.inf, -np.inf], np.float32)
    with pytest.raises(ModelError, match="not finite"):
        list(bind(replace(graph, weights={"x": (2,)}), {"x": array}))


def test_numbers_too_large_for_the_precision_are_refused_and_large_ones_taken(graph):
    half = replace(graph, weights={"x": (2,)}, precision="float16")
    with pytest.raises(ModelError, match="too large for float16"):
        list(bind(half, {"x": np.array([1, 1e5], np.float32)}))
    large = np.full(2, 60000, np.float32)  # whose sum is not finite in float16, as they are
    ((_, taken),) = bind(half, {"x": large})
    np.testing.assert_array_equal(taken, large.astype(np.float16), strict=True)


def test_what_numpy_cannot_convert(graph):
    with pytest.raises(BackendError, match="is of complex64, which cannot be taken"):
        list(bind(replace(graph, weights={"x": (3,)}), {"x": np.zeros(3, np.complex64)}))


@pytest.mark.parametrize("backend", ["tpu", "", ["cpu"]])
def test_an_unknown_backend(backend):
    with pytest.raises(BackendError, match=r"backend is .*cpu, openvino, cuda"):
        BackendSettings(backend=backend)


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_impossible_threads(threads):
    with pytest.raises(BackendError, match=r"threads is .*; give a whole number from 1"):
        BackendSettings(threads=threads)


@pytest.mark.parametrize(
    ("backend", "module", "extra"),
    [("cpu", "onnxruntime", "cpu"), ("openvino", "openvino", "openvino")],
)
def test_a_library_is_not_installed(graph, weights, monkeypatch, backend, module, extra):
    load = builtins.__import__

    def without(name, *arguments, **keywords):
        if name == module:
            raise ImportError(f"No module named {module!r}")
        return load(name, *arguments, **keywords)

    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BackendError, match=rf"pip install '\.\[{extra}\]'"):
        open_engine(graph, weights, replace(SETTINGS, backend=backend))


@pytest.mark.parametrize(
    ("backend", "precision", "said"),
    [
        ("cpu", "bfloat16", "float32, float16, or the backend openvino"),
        (
            "openvino",
            "float16",
            "float32, bfloat16, int8, or the backend cpu, cuda, webgpu, tensorrt or tensorrt_rtx",
        ),
        ("cpu", "int4", "float32, float16"),
    ],
)
def test_a_precision_that_a_backend_does_not_compute_in(graph, weights, backend, precision, said):
    settings = replace(SETTINGS, backend=backend)
    said = f"'{backend}' does not compute in {precision}; choose the precision {said}"
    with pytest.raises(BackendError, match=f"{said}$"):
        graph_precision(settings, precision)
    with pytest.raises(BackendError, match=said):
        open_engine(graph, weights, settings, precision)
    with pytest.raises(BackendError, match=said):
        Pipeline.load(precision=precision, settings=settings)


def test_the_graphs_that_a_precision_is_computed_from():
    openvino = replace(SETTINGS, backend="openvino")
    assert (
        graph_precision(openvino, "bfloat16") == graph_precision(openvino, "float32") == "float32"
    )
    assert graph_precision(SETTINGS, "float16") == "float16"


def test_bind_can_leave_float16_as_it_is(graph):
    half, double = np.ones(2, np.float16), np.ones(2, np.float64)
    small = replace(graph, weights={"half": (2,), "double": (2,)})
    taken = dict(bind(small, {"half": half, "double": double}, keep_float16=True))
    assert np.shares_memory(taken["half"], half)
    assert taken["half"].dtype == np.float16
    assert taken["double"].dtype == np.float32


def test_a_graph_that_went_away(graph, weights, tmp_path):
    with pytest.raises(GraphError, match="cannot be read"):
        open_engine(replace(graph, path=tmp_path / "gone.onnx"), weights, SETTINGS)


def test_a_graph_that_is_damaged(graph, weights, tmp_path):
    path = tmp_path / "damaged.onnx"
    path.write_bytes(graph.path.read_bytes()[:1000])
    with pytest.raises(GraphError, match=r"damaged.onnx"):
        open_engine(replace(graph, path=path), weights, SETTINGS)


def test_a_graph_whose_nodes_are_damaged(graph, weights, tmp_path):
    path = tmp_path / "damaged.onnx"
    path.write_bytes(graph.data().replace(b"Conv", b"Conw"))
    with pytest.raises(GraphError, match=r"ONNX Runtime cannot open .*damaged.onnx") as caught:
        open_engine(replace(graph, path=path), weights, SETTINGS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "inputs",
    [{}, {"latents": np.zeros((1, 3, 4, 4), "f")}, {"latents": np.zeros((1, 8, 4, 4), "d")}],
)
def test_inputs_that_do_not_fit(graph, weights, inputs):
    with pytest.raises(BackendError, match="ONNX Runtime failed") as caught:
        open_engine(graph, weights, SETTINGS).run(inputs)
    assert "\n" not in str(caught.value)


BIAS = "decoder.conv_out.bias"


def draw(engine):
    return engine.run({"latents": latents()})["pixels"]


def test_rebinding_changes_the_results_and_restores_them_bit_for_bit(graph, weights):
    engine = open_engine(graph, weights, SETTINGS)
    before = draw(engine)
    changed = {BIAS: weights[BIAS].astype(np.float32) + 0.5}
    engine.rebind(changed, [BIAS])
    np.testing.assert_array_equal(
        draw(engine), draw(open_engine(graph, weights | changed, SETTINGS))
    )
    assert not np.array_equal(draw(engine), before)
    engine.rebind(weights, [BIAS])
    np.testing.assert_array_equal(draw(engine), before)


def test_both_ways_of_opening_compute_the_same(graph, weights, monkeypatch):
    first = draw(open_engine(graph, weights, SETTINGS)).astype(int)
    monkeypatch.setattr("engine.backends.onnxruntime.cpu.CONSTANT_BYTES", 0)
    second = draw(open_engine(graph, weights, SETTINGS)).astype(int)
    assert np.abs(first - second).max() <= 1, "what lay on the edge of rounding"


def test_only_the_names_given_are_rebound(graph, weights):
    engine = open_engine(graph, weights, SETTINGS)
    before = draw(engine)
    engine.rebind({name: np.zeros_like(array) for name, array in weights.items()}, [])
    engine.rebind({"not of this graph": np.zeros(3)}, ["not of this graph"])
    np.testing.assert_array_equal(draw(engine), before)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (np.full(3, np.nan, np.float32), ModelError),
        (np.zeros(4, np.float32), BackendError),
        (np.zeros(3, np.complex64), BackendError),
    ],
    ids=["nan", "shape", "kind"],
)
def test_after_a_bad_weight_the_former_ones_can_be_bound_again(graph, weights, bad, error):
    engine = open_engine(graph, weights, SETTINGS)
    before = draw(engine)
    names = ["decoder.conv_in.bias", BIAS]
    new = {names[0]: np.ones_like(weights[names[0]]), BIAS: bad}
    with pytest.raises(error, match=BIAS):
        engine.rebind(new, names)
    engine.rebind(weights, names)
    np.testing.assert_array_equal(draw(engine), before)


def test_a_run_that_has_begun_keeps_its_weights(graph, weights):
    engine = open_engine(graph, weights, SETTINGS)
    before, session = draw(engine), engine._session

    class Slow:
        """Lets another thread rebind between a run's beginning and its computation."""

        def run_with_ort_values(self, *arguments):
            thread = threading.Thread(target=engine.rebind, args=(other, [BIAS]))
            thread.start()
            thread.join()
            return session.run_with_ort_values(*arguments)

    other = {BIAS: np.full(3, 9, np.float32)}
    engine._session = Slow()
    np.testing.assert_array_equal(draw(engine), before)
    if isinstance(engine._session, Slow):
        engine._session = session
    assert draw(engine).mean() > before.mean()


@pytest.mark.parametrize("backend", PRECISIONS)
def test_every_backend_has_one_door(backend):
    """Each name of the table of precisions is registered, and its module takes a spec."""
    module = import_module(BACKENDS[backend])
    (parameter,) = inspect.signature(module.open_engine).parameters.values()
    assert parameter.annotation is EngineSpec
    assert list(BACKENDS) == list(PRECISIONS)


def test_cuda_comes_through_the_same_door(monkeypatch, graph, weights):
    from engine.backends.onnxruntime import cuda

    opened = []
    monkeypatch.setattr(cuda, "find_device", lambda: "the GPU")
    monkeypatch.setattr(
        cuda, "OnnxRuntimeCudaEngine", lambda *given, **more: opened.append((*given, more))
    )
    settings = BackendSettings(backend="cuda")
    open_engine(graph, weights, settings, graph.precision)
    assert opened == [(graph, weights, "the GPU", {"kin": []})]
