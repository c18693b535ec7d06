from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from engine.backends.onnxruntime.convolution import with_channels_last
from engine.backends.onnxruntime.cuda import rewritten
from engine.backends.onnxruntime.device_weights import SHARING, DeviceWeights, widened
from engine.backends.onnxruntime.products import with_weights_as_they_lie
from engine.graphs.graph import Graph
from engine.graphs.onnx_bytes import INPUT, Nodes, named
from engine.shipped import GRAPHS
from tests.support.fake_cuda import FakeDevice

PATHS = sorted(GRAPHS.glob("*-float16.onnx*"))


def shared_of(graph, device):
    data, wide = widened(graph.data(), graph.weights)
    data = rewritten(data, graph.weights)
    return data, DeviceWeights(graph, data, wide, device, 0)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name.split(".")[0])
def test_weights_of_graphs_that_ship(path):
    """All but what is small is shared; the library could compute with nothing that is shared."""
    graph = Graph.read(path)
    data, weights = shared_of(graph, FakeDevice())
    found = Nodes.of(data)
    for i, node in found.nodes.items():
        for place, name in enumerate(named(node, INPUT)):
            if name.decode() in weights._shared:
                assert (found.kinds[i], place) in SHARING
    sizes = {name: int(np.prod(shape)) for name, shape in graph.weights.items()}
    own = sum(size for name, size in sizes.items() if name not in weights._shared)
    assert own < 0.02 * sum(sizes.values()) or own < 2**18
    made = onnx.load_model_from_string(weights.model)
    stated = {t.name: tuple(t.dims) for t in made.graph.initializer if t.data_location == 1}
    convolved = {n.input[1] for n in made.graph.node if n.op_type == "NhwcConv"}
    assert convolved == weights._last
    for name, shape in graph.weights.items():
        out, *rest = shape
        assert stated[name] == ((out, *rest[1:], rest[0]) if name in convolved else shape)


def hand_made():
    """Return a graph with a convolution, a product, and a weight that is read in float32."""
    half = TensorProto.FLOAT16
    shapes = {"kernel": (4, 3, 2, 2), "bias": (4,), "wide": (5, 4), "both": (5, 4)}
    nodes = [
        helper.make_node("Conv", ["x", "kernel", "bias"], ["y"]),
        helper.make_node("Cast", ["wide"], ["wide.float32"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["wide.float32"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["z", "turned"], ["first"]),
        helper.make_node("Cast", ["both"], ["both.float32"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["both.float32"], ["turned2"], perm=[1, 0]),
        helper.make_node("MatMul", ["z", "turned2"], ["second"]),
        helper.make_node("Transpose", ["both"], ["third"], perm=[1, 0]),
    ]
    weights = []
    for name, shape in shapes.items():
        tensor = TensorProto(name=name, data_type=half, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="weights")
        weights.append(tensor)
    graph = helper.make_graph(
        nodes,
        "hand made",
        [
            helper.make_tensor_value_info("x", half, ["B", 3, "h", "w"]),
            helper.make_tensor_value_info("z", TensorProto.FLOAT, ["B", 4]),
        ],
        [helper.make_tensor_value_info(name, half, None) for name in ("y", "first", "second")]
        + [helper.make_tensor_value_info("third", half, [4, 5])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    return model.SerializeToString(), shapes


def test_what_is_only_read_in_float32_is_taken_so():
    data, shapes = hand_made()
    made, names = widened(data, shapes)
    model = onnx.load_model_from_string(made)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert names == {"wide"}
    assert types["wide"] == TensorProto.FLOAT
    assert types["both"] == types["kernel"] == TensorProto.FLOAT16
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    assert [list(node.input) for node in casts] == [["both"]]


def test_weights_lie_as_kernels_want_them():
    data, shapes = hand_made()
    data, names = widened(data, shapes)
    data = with_weights_as_they_lie(with_channels_last(data, shapes), shapes)
    graph = SimpleNamespace(weights=shapes, precision="float16", part="step", path=Path("made"))
    device, random = FakeDevice(), np.random.default_rng(0)
    weights = DeviceWeights(graph, data, names, device, 0)
    given = {n: random.standard_normal(s).astype(np.float16) for n, s in shapes.items()}
    assert weights.take(given, shapes), "the bias is a session's own"
    assert not weights.take(given, {"kernel"})
    device.wait()
    placed = {n: device.at(a.address, a.shape, a.dtype) for n, a in weights._arrays.items()}
    assert set(placed) == {"kernel", "wide"}, "the other is read in two dtypes"
    np.testing.assert_array_equal(placed["kernel"], given["kernel"].transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(placed["wide"], given["wide"].astype(np.float32), strict=True)
