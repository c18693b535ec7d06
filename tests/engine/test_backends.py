import builtins
import sys
from dataclasses import replace

import numpy as np
import pytest

from engine.backends import BackendSettings, bind, open_engine
from engine.errors import BackendError, GraphError
from engine.graphs import find_graph, graph_folders
from engine.model import Model
from engine.models import find_model

MODEL = Model.open(find_model("pictogram"))
SETTINGS = BackendSettings(threads=1)


@pytest.fixture(scope="module")
def graph():
    return find_graph("vae_decoder", MODEL.vae, "float32", graph_folders(), MODEL.path)


@pytest.fixture
def weights():
    return dict(MODEL.weights("vae_decoder"))


def latents(batch=1, side=4):
    return np.random.default_rng(0).normal(size=(batch, 4, side, side)).astype(np.float32)


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
    weights["decoder.conv_in.weight"] = weights["decoder.conv_in.weight"][:, :, :2]
    with pytest.raises(
        GraphError, match=r"ONNX Runtime cannot open .*does the graph fit"
    ) as caught:
        open_engine(graph, weights, SETTINGS)
    assert "\n" not in str(caught.value)


def test_bind_takes_the_precision_of_the_graph(graph, weights):
    weights = {name: array.astype(np.float32) for name, array in weights.items()}
    bound = bind(graph, weights)
    assert list(bound) == list(graph.weights)
    for name, array in bound.items():
        assert np.shares_memory(array, weights[name]), "equal dtypes are not copied"
    half = bind(replace(graph, precision="float16"), weights)
    assert {array.dtype for array in half.values()} == {np.dtype(np.float16)}
    scalar = bind(replace(graph, weights=("x",)), {"x": np.array(2.0)})["x"]
    assert scalar.shape == ()


def test_what_numpy_cannot_convert(graph):
    with pytest.raises(BackendError, match="is of complex64, which cannot be taken"):
        bind(replace(graph, weights=("x",)), {"x": np.zeros(3, np.complex64)})


@pytest.mark.parametrize("backend", ["tpu", "", None, ["cpu"]])
def test_an_unknown_backend(backend):
    with pytest.raises(BackendError, match=r"is not known; choose .*cpu"):
        BackendSettings(backend=backend)


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_impossible_threads(threads):
    with pytest.raises(BackendError, match=r"threads is .*; give a whole number from 1"):
        BackendSettings(threads=threads)


def test_onnxruntime_is_not_installed(graph, weights, monkeypatch):
    load = builtins.__import__

    def without(name, *arguments, **keywords):
        if name == "onnxruntime":
            raise ImportError("No module named 'onnxruntime'")
        return load(name, *arguments, **keywords)

    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BackendError, match=r"pip install 'latentrt\[cpu\]'"):
        open_engine(graph, weights, SETTINGS)


def test_a_graph_that_went_away(graph, weights, tmp_path):
    with pytest.raises(GraphError, match="cannot be read"):
        open_engine(replace(graph, path=tmp_path / "gone.onnx"), weights, SETTINGS)


def test_a_graph_that_is_damaged(graph, weights, tmp_path):
    path = tmp_path / "damaged.onnx"
    path.write_bytes(graph.path.read_bytes()[:1000])
    with pytest.raises(GraphError, match=r"ONNX Runtime cannot open .*damaged.onnx"):
        open_engine(replace(graph, path=path), weights, SETTINGS)


@pytest.mark.parametrize(
    "inputs",
    [{}, {"latents": np.zeros((1, 3, 4, 4), "f")}, {"latents": np.zeros((1, 4, 4, 4), "d")}],
)
def test_inputs_that_do_not_fit(graph, weights, inputs):
    with pytest.raises(BackendError, match="ONNX Runtime failed") as caught:
        open_engine(graph, weights, SETTINGS).run(inputs)
    assert "\n" not in str(caught.value)
