import json

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from engine.backends.onnxruntime.fixed_sizes import FormSessions, fix_sizes, sizes_of
from engine.errors import BackendError
from engine.graphs.graph import Graph
from engine.graphs.onnx_bytes import input_shapes
from engine.shipped import GRAPHS

STEP = {"registers": ("B", "r", 4, "h", "w"), "matrices": ("B", "r", "r + 2"), "guidance": ("g",)}


@pytest.mark.parametrize("path", sorted(GRAPHS.iterdir()), ids=lambda path: path.name)
def test_the_shapes_of_inputs_are_the_library_s(path):
    data = Graph.read(path).data()
    inputs = onnx.load_model_from_string(data).graph.input
    assert input_shapes(data) == {
        i.name: tuple(d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim)
        for i in inputs
    }


def test_sizes_are_what_symbols_stand_for():
    shapes = {"registers": (2, 3, 4, 8, 9), "matrices": (2, 3, 5), "guidance": (0,)}
    assert sizes_of(STEP, shapes) == {"B": 2, "r": 3, "h": 8, "w": 9, "r + 2": 5, "g": 0}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"registers": (2, 3, 5, 8, 9)}, r"registers.*\(2, 3, 5, 8, 9\).*\(B = 2, r = 3, 4, h"),
        ({"registers": (2, 3, 4, 8, 9), "matrices": (1, 3, 5)}, r"matrices.*B = 2, r = 3"),
        ({"registers": (2, 3, 4, 8)}, "registers"),
        ({"latents": (1,)}, "latents"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes, message):
    with pytest.raises(BackendError, match=message):
        sizes_of(STEP, shapes)


def flattened():
    """Return a graph that computes with its sizes: (B, 2, n) to (B, 2 n)."""
    nodes = [
        helper.make_node("Shape", ["x"], ["batch"], start=0, end=1),
        helper.make_node("Shape", ["x"], ["length"], start=2, end=3),
        helper.make_node("Mul", ["length", "two"], ["doubled"]),
        helper.make_node("Concat", ["batch", "doubled"], ["shape"], axis=0),
        helper.make_node("Reshape", ["x", "shape"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "flattened",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 2, "n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", "2 n"])],
        [helper.make_tensor("two", TensorProto.INT64, [1], [2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return model.SerializeToString()


def nodes_run(folder, sizes, x):
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    fix_sizes(options, sizes)
    session = onnxruntime.InferenceSession(flattened(), options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    with open(session.end_profiling()) as file:  # noqa: PTH123
        events = json.load(file)
    return y, [event["args"]["op_name"] for event in events if event["cat"] == "Node"]


def test_fixed_sizes_are_folded_away(tmp_path):
    x = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    y, ran = nodes_run(tmp_path, {}, x)
    assert {"Shape", "Mul", "Concat"} <= set(ran)
    fixed, ran = nodes_run(tmp_path, {"B": 2, "n": 3}, x)
    assert set(ran) <= {"Reshape"}
    np.testing.assert_array_equal(fixed, y)


def test_a_form_is_opened_once_and_the_least_recently_used_goes():
    opened = []

    def open_session(sizes):
        opened.append(sizes)
        return len(opened)

    sessions = FormSessions(flattened(), open_session, limit=2)
    first, second, third = ({"x": (1, 2, n)} for n in (3, 4, 5))
    assert [sessions.get(form) for form in (first, second, first, third)] == [1, 2, 1, 3]
    assert opened == [{"B": 1, "n": 3}, {"B": 1, "n": 4}, {"B": 1, "n": 5}]
    assert sessions.get(first) == 1
    assert sessions.get(second) == 4, "it went when the third came"
    sessions.clear()
    assert sessions.get(first) == 5


def test_what_cannot_be_opened_is_tried_again():
    tries = iter([BackendError("no"), "session"])

    def open_session(sizes):
        if isinstance(result := next(tries), BackendError):
            raise result
        return result

    sessions = FormSessions(flattened(), open_session)
    with pytest.raises(BackendError, match="no"):
        sessions.get({"x": (1, 2, 3)})
    assert sessions.get({"x": (1, 2, 3)}) == "session"
