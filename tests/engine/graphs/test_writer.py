"""Graphs that are written node by node: valid ONNX, and what the file says of itself."""

import numpy as np
import pytest

from engine.backends.settings import BackendSettings
from engine.configs.safety_checker import SafetyCheckerConfig
from engine.configs.upscalers import CompactConfig, ESRGANConfig, SwinIRConfig
from engine.engines import open_engine
from engine.graphs.graph import Graph, graph_name
from engine.graphs.onnx_bytes import input_shapes
from engine.graphs.safety_checker import safety_checker_graph
from engine.graphs.upscalers import upscaler_graph
from tests.support.tolerances import UPSCALER_BFLOAT16, UPSCALER_FLOAT16, UPSCALER_RTOL

onnx = pytest.importorskip("onnx")

SWINIR = {"embed_dim": 12, "depths": (2,), "num_heads": (2,), "hidden_dim": 16, "window_size": 4}
CONFIGS = {
    "esrgan": ESRGANConfig(num_feat=8, num_block=1, num_grow_ch=4, doublings=2, unshuffle=2),
    "plus": ESRGANConfig(num_feat=8, num_block=1, num_grow_ch=4, doublings=1, plus=True),
    "compact": CompactConfig(num_feat=8, num_conv=1, upscale=2),
    "swinir": SwinIRConfig(**SWINIR, upscale=2, num_feat=8),
    "swinir real": SwinIRConfig(**SWINIR, upsampler="nearest+conv", num_feat=8),
    "checker": SafetyCheckerConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=6,
    ),
}


def written(name, precision="float32"):
    config = CONFIGS[name]
    make = safety_checker_graph if isinstance(config, SafetyCheckerConfig) else upscaler_graph
    return make(config, precision)


def weights(graph):
    rng = np.random.default_rng(0)
    return {
        name: (0.3 * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in graph.weights.items()
    }


def run(graph, backend, precision):
    settings = BackendSettings(backend=backend, threads=1)
    engine = open_engine(graph, weights(graph), settings, precision)
    ((given, shape),) = input_shapes(graph.data()).items()
    if "h" in shape:
        shape = (1, 3, 16, 8)
    inputs = np.random.default_rng(1).random(shape, np.float32)
    (found,) = engine.run({given: inputs}).values()
    return found


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_valid_and_says_what_it_is(name, precision, tmp_path):
    graph = written(name, precision)
    path = tmp_path / graph_name(graph.part, CONFIGS[name], precision)
    path.write_bytes(graph.data())
    read = Graph.read(path)
    for field in ("part", "architecture", "precision", "inputs", "outputs", "weights"):
        assert getattr(read, field) == getattr(graph, field)
    model = onnx.load_from_string(graph.data())
    external = [t for t in model.graph.initializer if t.data_location == t.EXTERNAL]
    assert {t.name: tuple(t.dims) for t in external} == CONFIGS[name].tensor_shapes()
    for tensor in external:  # the checker looks for files otherwise
        model.graph.initializer.remove(tensor)
        kind = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        model.graph.input.append(kind)
    onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_backend_computes_the_same(name):
    expected = run(written(name), "cpu", "float32")
    for backend, precision, bound in (
        ("openvino", "float32", UPSCALER_RTOL),
        ("openvino", "bfloat16", UPSCALER_BFLOAT16),
        ("cpu", "float16", UPSCALER_FLOAT16),
    ):
        stored = "float16" if precision == "float16" else "float32"
        found = run(written(name, stored), backend, precision)
        assert found.dtype == np.float32
        assert abs(found - expected).max() / abs(expected).max() < bound, (backend, precision)


@pytest.mark.parametrize("name", CONFIGS)
def test_equal_numbers_are_written_once(name):
    model = onnx.load_from_string(written(name).data())
    constants = [t for t in model.graph.initializer if t.data_location != t.EXTERNAL]
    contents = [(t.data_type, tuple(t.dims), t.raw_data) for t in constants]
    assert len(set(contents)) == len(contents)
