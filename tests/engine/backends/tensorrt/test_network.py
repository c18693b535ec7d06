"""Building in this process, which only tests do: graphs of one product."""

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import tensorrt_rtx_bindings
from onnx import TensorProto, helper

from engine.backends.tensorrt import network as tensorrt_network
from engine.backends.tensorrt.build_request import BuildRequest, BuildSettings
from engine.backends.tensorrt.library import LIBRARIES
from engine.backends.tensorrt.network import build_engine
from engine.backends.tensorrt.profiles import Profile, Range
from engine.errors import BackendError, GraphError

SIDE = Range(64, 64, 64)
REQUEST = BuildRequest(
    library="tensorrt_rtx",
    part="step",
    graph=Path("graph.onnx"),
    model=Path("model"),
    settings=BuildSettings(profiles=(Profile(height=SIDE, width=SIDE),), target="sm89"),
)


def product():
    """x times an external weight (8, 8)."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT16, ["B", 8]) for n in "xy")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "graph", [x], [y])
    tensor = graph.initializer.add(name="w", data_type=TensorProto.FLOAT16, dims=[8, 8])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights")
    opsets = [helper.make_opsetid("", 23)]
    return helper.make_model(graph, opset_imports=opsets).SerializeToString()


SHAPES = {"x": ((1, 8), (2, 8), (4, 8))}
IDENTITY = np.eye(8, dtype=np.float16)


def build(request=REQUEST, weights=IDENTITY, shapes=SHAPES):
    named = [("w", weights)]
    plan = build_engine(tensorrt_rtx_bindings, product(), named, [shapes], request, None)
    return bytes(plan)


def test_the_engine_holds_the_weights_that_it_was_given():
    first = build(weights=np.full((8, 8), 0.375, np.float16))
    second = build(weights=np.full((8, 8), 0.4375, np.float16))
    row = np.full(8, 0.375, np.float16).tobytes()
    assert row in first
    assert row not in second


def test_a_weight_of_another_size_is_an_error():
    with pytest.raises(GraphError, match=r"cannot take the graph graph\.onnx"):
        build(weights=np.ones(3, np.float16))


def test_shapes_that_are_no_range_are_an_error():
    with pytest.raises(BackendError, match="takes no profile of the shapes"):
        build(shapes={"x": ((4, 8), (2, 8), (1, 8))})


def test_shapes_that_the_graph_does_not_have_are_an_error():
    with pytest.raises(BackendError, match=r"step from graph\.onnx \(.+\); choose a smaller"):
        build(shapes={"x": ((1, 7), (2, 7), (4, 7))})


def test_choices_reach_the_library(monkeypatch):
    asked = []

    class Config:
        def set_flag(self, flag):
            asked.append(flag)

        def set_memory_pool_limit(self, pool, limit):
            asked.append((pool, limit))

        def set_compute_capability(self, capability, index):
            asked.append((capability, index))

        def set_preview_feature(self, feature, enable):
            asked.append((feature, enable))

    class Builder:
        create_builder_config = Config

    module = tensorrt_rtx_bindings
    settings = replace(
        REQUEST.settings, refit=True, optimization_level=4, workspace_bytes=2**28, target="sm120"
    )
    config = tensorrt_network._configure(module, Builder(), settings)
    assert (config.builder_optimization_level, config.num_compute_capabilities) == (4, 1)
    assert asked == [
        (module.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10, True),
        module.BuilderFlag.REFIT,
        (module.MemoryPoolType.WORKSPACE, 2**28),
        (module.ComputeCapability.SM120, 0),
    ]


@pytest.mark.filterwarnings("ignore:.*no-ops in TensorRT-RTX")
def test_timings_are_kept_where_the_library_keeps_them(monkeypatch, tmp_path):
    path = tmp_path / "folder" / "timings.bin"
    request = replace(REQUEST, timings=path)
    build(request)
    assert not path.exists()
    keeping = replace(LIBRARIES["tensorrt_rtx"], keeps_timings=True)
    monkeypatch.setattr(tensorrt_network, "LIBRARIES", MappingProxyType({"tensorrt_rtx": keeping}))
    build(request)
    first = path.read_bytes()
    build(request)  # now from what was kept
    assert path.read_bytes() == first
    assert list(path.parent.iterdir()) == [path]
