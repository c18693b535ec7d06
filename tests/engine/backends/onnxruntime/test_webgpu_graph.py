import gzip

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from engine.backends.onnxruntime.webgpu_graph import OPSET, for_webgpu
from engine.shipped import GRAPHS
from tests.support.tolerances import PARITY_RTOL

PATHS = sorted(GRAPHS.glob("*.onnx*"))
LACKING = {"Attention", "GroupNormalization", "Round", "Sin", "Cos"}
"""Operators that the provider has no kernel for, or none of the version in these graphs."""
KERNEL_RTOL = 10 * PARITY_RTOL  # two kernels that sum in different orders
FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "all scores"])


def model(nodes, *inputs, outputs=("y",), kind=TensorProto.FLOAT):
    """Return a serialised model of some nodes; inputs: names with shapes."""
    given = [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs]
    made = [onnx.ValueInfoProto(name=name) for name in outputs]
    graph = helper.make_graph(nodes, "model", given, made)
    opsets = [helper.make_opsetid("", 23)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def results(data, **given):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, given)


def operators(data):
    return {node.op_type for node in onnx.load_model_from_string(data).graph.node}


def compare(data, *, rtol=KERNEL_RTOL, precision="float32", fused=False, **given):
    changed = for_webgpu(data, precision, fused_attention=fused)
    assert not operators(changed) & LACKING
    for actual, expected in zip(results(changed, **given), results(data, **given), strict=True):
        assert actual.shape == expected.shape
        assert actual.dtype == expected.dtype
        difference = actual.astype(np.float64) - expected
        assert np.linalg.norm(difference) <= rtol * np.linalg.norm(expected.astype(np.float64))


@FUSED
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_nothing_that_the_provider_lacks_is_left_in_what_ships(path, fused):
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    precision = "float16" if "float16" in path.name else "float32"
    changed = onnx.load_model_from_string(for_webgpu(data, precision, fused_attention=fused))
    assert {opset.domain: opset.version for opset in changed.opset_import}[""] == OPSET
    assert not {node.op_type for node in changed.graph.node} & LACKING
    names = [name for node in changed.graph.node for name in node.output]
    assert len(names) == len(set(names))
    constants = [tensor.name for tensor in changed.graph.initializer]
    assert len(constants) == len(set(constants))


@pytest.mark.parametrize("kind", ["Sin", "Cos"])
@pytest.mark.parametrize("shape", [(7,), (3, 160), (2, 3, 16)], ids=str)
def test_waves_are_as_exact_as_float32(kind, shape):
    rng = np.random.default_rng(0)
    angles = rng.uniform(-1100, 1100, shape).astype(np.float32)
    angles.flat[:7] = 0, np.pi, -np.pi, 2 * np.pi, 999, 1e-4, -0.5
    data = model([helper.make_node(kind, ["x"], ["y"])], ("x", shape))
    (found,) = results(for_webgpu(data, "float32", fused_attention=True), x=angles)
    right = getattr(np, kind.lower())(angles.astype(np.float64))
    assert np.abs(found - right).max() < 1e-6


def test_both_waves_of_the_same_angles_and_of_others():
    kinds = [("Sin", "x", "a"), ("Cos", "x", "b"), ("Cos", "z", "c")]
    nodes = [helper.make_node(kind, [given], [out]) for kind, given, out in kinds]
    data = model(nodes, ("x", (2, 8)), ("z", (5,)), outputs="abc")
    rng = np.random.default_rng(0)
    x, z = (rng.uniform(-9, 9, shape).astype(np.float32) for shape in ((2, 8), (5,)))
    compare(data, x=x, z=z)


def test_halves_are_rounded_to_even():
    values = np.array([0, 0.5, 1.5, 2.5, 254.5, 0.49999997, 254.99, 255, 127.5], np.float32)
    compare(model([helper.make_node("Round", ["x"], ["y"])], ("x", values.shape)), rtol=0, x=values)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_the_place_of_the_largest_is_the_first_of_several(axis):
    node = helper.make_node("ArgMax", ["x"], ["y"], axis=axis, keepdims=0)
    x = np.array([[1, 49407, 49407], [49407, 49406, 49407]])
    compare(model([node], ("x", x.shape), kind=TensorProto.INT64), rtol=0, x=x)


@pytest.mark.parametrize("groups", [1, 4, 12])
@pytest.mark.parametrize("mean", [0, 30])
def test_a_group_norm(groups, mean):
    """Beside onnxruntime's own; a large mean would show a variance of differences."""
    rng = np.random.default_rng(0)
    shapes = {"x": (2, 12, 5, 7), "scale": (12,), "bias": (12,)}
    given = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    given["x"] += mean
    node = helper.make_node(
        "GroupNormalization", list(shapes), ["y"], num_groups=groups, epsilon=1e-3
    )
    compare(model([node], *shapes.items()), **given)


@pytest.mark.parametrize("readers", [1, 2])
def test_a_swish_where_nothing_else_reads_its_gate(readers):
    nodes = [
        helper.make_node("Sigmoid", ["x"], ["gate"]),
        helper.make_node("Mul", ["gate", "x"], ["y"]),
        helper.make_node("Sigmoid", ["x"], ["other"]),
        helper.make_node("Mul", ["other", "z"], ["w"]),
    ]
    outputs = ("y", "w", "gate")[: 1 + readers]
    data = model(nodes, ("x", (4, 5)), ("z", (4, 5)), outputs=outputs)
    expected = {"Sigmoid", "Mul"} | ({"QuickGelu"} if readers == 1 else set())
    assert operators(for_webgpu(data, "float32", fused_attention=True)) == expected
    rng = np.random.default_rng(0)
    compare(data, **{name: rng.normal(size=(4, 5)).astype(np.float32) for name in "xz"})


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("tokens", [(1, 7), (9, 9), (40, 40), (16, 77)], ids=str)
def test_attention_with_all_its_scores(tokens, causal):
    if causal and len({*tokens}) > 1:
        pytest.skip("a text reads itself")
    rng = np.random.default_rng(0)
    queries, keys = ((2, 3, count, 8) for count in tokens)
    shapes = {"q": queries, "k": keys, "v": keys}
    given = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    node = helper.make_node("Attention", list(shapes), ["y"], is_causal=causal)
    compare(model([node], *shapes.items()), **given)
