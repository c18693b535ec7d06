from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from engine.backends.onnxruntime.attention import fuse_attention
from engine.graphs.graph import Graph
from engine.shipped import GRAPHS
from tests.support.tolerances import PARITY_RTOL

PATHS = sorted({*GRAPHS.glob("*-float32.onnx*")})
# Attention to pictures, in each cross-attention of the graphs of Stable Diffusion 1.x that ship.
MASKED = {"step_ip": 16, "step_controlled_ip": 16}
MASKED |= dict.fromkeys(("step_shallow_ip", "step_shallow_controlled_ip"), 1)
HEADS, WIDTH = 2, 6  # of a model that is as small as the shapes allow
KERNEL_RTOL = 10 * PARITY_RTOL  # two kernels that sum in different orders


def model(*, mask=False, twice=False, swap=(0, 2, 1, 3), one=False, length=5, **attributes):
    """Return a model as tracing writes attention: heads split before it, and joined behind.

    one: whether there is one query, of `length`, whose heads are joined without a transpose
    """
    sizes = ["B", "n", HEADS * WIDTH]
    names = ["q", "k", "v"]
    nodes = [
        helper.make_node("Concat", ["B", "n", "heads", "width"], ["split"], axis=0),
        helper.make_node("Concat", ["B", "length", "heads", "width"], ["split.q"], axis=0),
    ]
    for name in names:
        split = "split.q" if name == "q" else "split"
        nodes += [
            helper.make_node("Reshape", [name, split], [f"{name}.split"]),
            helper.make_node("Transpose", [f"{name}.split"], [f"{name}.heads"], perm=swap),
        ]
    given = [f"{name}.heads" for name in names] + ["mask"] * mask
    attributes = {"is_causal": 0, "softcap": 0.0} | attributes
    nodes.append(helper.make_node("Attention", given, ["out.heads"], **attributes))
    if not one:
        nodes.append(helper.make_node("Transpose", ["out.heads"], ["out.split"], perm=[0, 2, 1, 3]))
    nodes.append(
        helper.make_node("Reshape", ["out.heads" if one else "out.split", "whole"], ["out"])
    )
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, sizes)]
    if twice:
        outputs.append(helper.make_tensor_value_info("out.heads", TensorProto.FLOAT, [None] * 4))
    numbers = {"B": 2, "n": 5, "length": length, "heads": HEADS, "width": WIDTH}
    constants = [
        onnx.numpy_helper.from_array(np.array([number]), name) for name, number in numbers.items()
    ]
    whole = [2, -1, HEADS * WIDTH] if one else [0, 0, -1]
    constants.append(onnx.numpy_helper.from_array(np.array(whole), "whole"))
    constants.append(onnx.numpy_helper.from_array(np.tri(5, dtype=bool), "mask"))
    inputs = [
        helper.make_tensor_value_info(
            name, TensorProto.FLOAT, ["B", length if name == "q" else "n", HEADS * WIDTH]
        )
        for name in names
    ]
    graph = helper.make_graph(nodes, "attention", inputs, outputs, constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return made.SerializeToString()


def operators(data):
    return Counter(node.op_type for node in onnx.load_model_from_string(data).graph.node)


def results(data):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    shapes = {
        value.name: [s if isinstance(s, int) else 5 for s in value.shape[1:]]
        for value in session.get_inputs()
    }
    given = {n: rng.standard_normal((2, *shapes[n])).astype(np.float32) for n in "qkv"}
    return session.run(None, given)


@pytest.mark.parametrize(
    "kind",
    [{}, {"is_causal": 1}, {"one": True, "length": 1}],
    ids=["all see all", "causal", "one query"],
)
def test_it_computes_the_same(kind):
    plain, fused = model(**kind), fuse_attention(model(**kind), causal=True)
    assert operators(fused)["MultiHeadAttention"] == 1
    assert not operators(fused)["Attention"]
    assert not operators(fused)["Transpose"], "the library would run what nobody reads"
    for actual, expected in zip(results(fused), results(plain), strict=True):
        assert np.linalg.norm(actual - expected) < KERNEL_RTOL * np.linalg.norm(expected)


@pytest.mark.parametrize(
    "kind",
    [{"is_causal": 1}, {"scale": 0.5}, {"mask": True}, {"twice": True}, {"one": True, "length": 5}],
    ids=["causal", "scaled", "masked", "read by others", "heads that are not joined"],
)
def test_what_the_operator_does_not_do_stays(kind):
    plain = model(**kind)
    fused = fuse_attention(plain)
    assert operators(fused) == operators(plain)
    for actual, expected in zip(results(fused), results(plain), strict=True):
        assert np.array_equal(actual, expected)


def test_heads_that_are_split_otherwise_stay():
    plain = model(swap=(0, 1, 2, 3))
    assert operators(fuse_attention(plain)) == operators(plain)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name.split(".")[0])
def test_graphs_that_ship(path):
    graph = Graph.read(path)
    before, after = operators(graph.data()), operators(fuse_attention(graph.data()))
    # A token of a text does not see those behind it; what is paid to pictures is masked.
    masked = MASKED.get(graph.part, 0)
    left = before["Attention"] if graph.part == "text_encoder" else masked
    assert after["Attention"] == left
    assert after["MultiHeadAttention"] == before["Attention"] - left
    every = operators(fuse_attention(graph.data(), causal=True))
    assert every["MultiHeadAttention"] == before["Attention"] - masked
