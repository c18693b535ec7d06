import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from engine.backends.onnxruntime.splits import with_slices

SHAPE = (2, 6, 4)


def split(sizes, axis=None, *, even=False):
    """Return a graph that splits x, and doubles the first piece; sizes: of the pieces."""
    outputs = [f"piece_{i}" for i in range(len(sizes))]
    given = {} if axis is None else {"axis": axis}
    if even:
        given["num_outputs"] = len(sizes)
    nodes = [
        helper.make_node("Split", ["x"] if even else ["x", "sizes"], outputs, **given),
        helper.make_node("Add", [outputs[0], outputs[0]], ["twice"]),
    ]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        for name in (*outputs[1:], "twice")
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)
    stated = [] if even else [numpy_helper.from_array(np.array(sizes, np.int64), "sizes")]
    graph = helper.make_graph(nodes, "split", [x], values, stated)
    opsets = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def run(data, x):
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


def kinds(data):
    return [node.op_type for node in onnx.load_model_from_string(data).graph.node]


@pytest.mark.parametrize(
    ("sizes", "axis"),
    [((1, 2, 3), 1), ((2, 2, 2), 1), ((1, 3), 2), ((3, 1), -1), ((1, 1), None), ((4,), 2)],
)
def test_slices_are_the_pieces(sizes, axis):
    data = split(sizes, axis)
    sliced = with_slices(data)
    assert kinds(sliced) == ["Slice"] * len(sizes) + ["Add"]
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    for ours, theirs in zip(run(sliced, x), run(data, x), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_pieces_of_one_size_that_is_not_stated_stay():
    data = split((3, 3), 1, even=True)
    assert kinds(with_slices(data)) == ["Split", "Add"]


def test_a_piece_that_nothing_reads_is_left_out():
    model = onnx.load_model_from_string(split((1, 2, 3), 1))
    del model.graph.output[0]
    assert kinds(with_slices(model.SerializeToString())).count("Slice") == 2
