"""ONNX files as bytes, with the onnx library as the oracle."""

import contextlib

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from engine.backends.settings import BackendSettings
from engine.engines import open_engine
from engine.errors import GraphError
from engine.graphs.graph import Graph
from engine.graphs.onnx_bytes import fields, metadata, weights_as_inputs, without_attribute
from engine.shipped import GRAPHS

WEIGHTS = {
    "scalar": (TensorProto.FLOAT, []),
    "a.weight": (TensorProto.FLOAT, [3, 300]),
    "half.weight": (TensorProto.FLOAT16, [4, 3, 1, 1]),
    "b.weight": (TensorProto.FLOAT, [300, 2**40]),  # a number of several bytes
    "empty": (TensorProto.INT64, [0]),
}


def external(name, dtype, dims):
    tensor = TensorProto(name=name, data_type=dtype, dims=dims)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights")
    return tensor


def hand_made():
    """A graph with weights outside, numbers inside, and all that a file may have besides."""
    inside = [
        numpy_helper.from_array(np.arange(6, dtype=np.float32).reshape(2, 3), "inside"),
        helper.make_tensor("listed", TensorProto.INT64, [2], [-1, 2**62]),
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "a.weight"], ["y"], name="n", alpha=1.5, axes=[-1, 7]),
        helper.make_node("Identity", ["inside"], ["z"], doc_string="a node"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "graph", [x], [y], doc_string="text")
    outside = [external(name, *facts) for name, facts in WEIGHTS.items()]
    graph.initializer.extend([outside[0], inside[0], *outside[1:], inside[1]])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    helper.set_model_props(model, {"latentrt": "{}", "author": "né 😀", "empty": ""})
    return model


def packed(model):
    """Write dims as protobuf's version 3 does: all of them in one field."""

    def number(value):
        low, value = value & 127, value >> 7
        return bytes([low]) if not value else bytes([low | 128]) + number(value)

    def message(field, content):
        return number(field << 3 | 2) + number(len(content)) + content

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    tensors = list(copy.graph.initializer)
    del copy.graph.initializer[:]
    written = b""
    for tensor in tensors:
        dims = b"".join(number(size) for size in tensor.dims)
        del tensor.dims[:]
        written += message(5, message(1, dims) + tensor.SerializeToString())
    graph = copy.graph.SerializeToString() + written
    copy.ClearField("graph")
    return copy.SerializeToString() + message(7, graph)


def check(data):
    """Compare a file's graph with what becomes of it, as the library reads both."""
    before, after = (
        onnx.ModelProto.FromString(data),
        onnx.ModelProto.FromString(weights_as_inputs(data)),
    )
    outside = [t for t in before.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    kept = [t for t in before.graph.initializer if t.data_location != TensorProto.EXTERNAL]
    assert outside
    assert list(after.graph.initializer) == kept
    assert list(after.graph.node) == list(before.graph.node)
    assert list(after.graph.output) == list(before.graph.output)
    names = {tensor.name for tensor in outside}
    assert [v for v in after.graph.input if v.name not in names] == list(before.graph.input)
    added = [value for value in after.graph.input if value.name in names]
    given = {
        value.name: (
            value.type.tensor_type.elem_type,
            [dim.dim_value for dim in value.type.tensor_type.shape.dim],
        )
        for value in added
    }
    assert given == {t.name: (t.data_type, list(t.dims)) for t in outside}
    assert len(added) == len(outside)
    assert all(value.type.tensor_type.HasField("shape") for value in added), "of a scalar too"
    for model in (before, after):
        for name in ("initializer", "input"):
            model.graph.ClearField(name)
    assert after == before, "nothing else changed"


def test_external_initializers_become_inputs():
    check(hand_made().SerializeToString())


def test_packed_dims():
    data = packed(hand_made())
    assert onnx.ModelProto.FromString(data).graph.node == hand_made().graph.node
    check(data)


@pytest.mark.parametrize("path", sorted(GRAPHS.glob("*.onnx")), ids=lambda path: path.name)
def test_graphs_that_ship(path):
    data = path.read_bytes()
    check(data)
    weights = {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in onnx.ModelProto.FromString(weights_as_inputs(data)).graph.input
    }
    graph = Graph.read(path)
    assert graph.weights.items() <= weights.items()


def test_a_graph_without_weights_stays_as_it_is():
    model = hand_made()
    del model.graph.initializer[:]
    assert weights_as_inputs(model.SerializeToString()) == model.SerializeToString()
    assert weights_as_inputs(b"") == b""


@pytest.mark.parametrize("path", sorted(GRAPHS.glob("step*float16*")), ids=lambda path: path.name)
def test_an_attribute_is_left_out_of_one_operator(path):
    data = Graph.read(path).data()
    expected, marked = onnx.ModelProto.FromString(data), 0
    for node in expected.graph.node:
        if node.op_type == "Attention":
            kept = [each for each in node.attribute if each.name != "softmax_precision"]
            marked += len(node.attribute) - len(kept)
            del node.attribute[:]
            node.attribute.extend(kept)
    assert marked or "shallow" in path.name
    left = without_attribute(data, "Attention", "softmax_precision")
    assert onnx.ModelProto.FromString(left) == expected


def test_only_the_attribute_that_is_meant_is_left_out():
    data = hand_made().SerializeToString()
    left = onnx.ModelProto.FromString(without_attribute(data, "MatMul", "alpha"))
    assert [each.name for each in left.graph.node[0].attribute] == ["axes"]
    assert without_attribute(data, "Identity", "alpha") == data
    assert without_attribute(data, "MatMul", "alph") == data


def test_metadata():
    found = metadata(hand_made().SerializeToString())
    assert found == {"latentrt": "{}", "author": "né 😀", "empty": ""}
    assert metadata(b"") == {}


def survives(data):
    """Read bytes that may be anything; a KeyError is a message without a name or a type."""
    for read in (metadata, weights_as_inputs, lambda given: list(fields(given))):
        with contextlib.suppress(ValueError, IndexError, KeyError):
            read(data)


def test_every_truncation():
    whole = hand_made().SerializeToString()
    for length in range(len(whole)):
        survives(whole[:length])


def test_every_changed_byte():
    whole = hand_made().SerializeToString()
    for i in range(len(whole)):
        for mask in (0x01, 0x80, 0xFF):
            survives(whole[:i] + bytes([whole[i] ^ mask]) + whole[i + 1 :])


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200))
def test_random_bytes(data):
    survives(data)


def damaged():
    whole = hand_made().SerializeToString()
    for i in range(len(whole)):
        yield whole[:i]
        yield whole[:i] + bytes([whole[i] ^ 0x81]) + whole[i + 1 :]


def test_damage_is_a_graph_error_wherever_it_is(tmp_path):
    path = tmp_path / "graph.onnx"
    graph = Graph(
        path=path,
        part="step",
        architecture="0",
        precision="float32",
        inputs=(),
        outputs=(),
        shapes={},
        weights={},
    )
    for data in list(damaged())[::7]:
        path.write_bytes(data)
        with pytest.raises(GraphError) as caught:
            open_engine(graph, {}, BackendSettings(threads=1))
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"\x3d\x00\x00\x00\x00",  # a fixed number
        b"\x3a\x05ab",  # a graph that ends early
        b"\x3a" + b"\xff" * 11,  # a number that does not end
        b"\x38\x05",  # a graph that is a number
        b"\x70\x05",  # metadata that is a number
    ],
)
def test_what_is_no_message_of_onnx(data):
    with pytest.raises((ValueError, IndexError)):
        (weights_as_inputs(data), metadata(data))
