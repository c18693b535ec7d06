import math
from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from engine.backends.onnxruntime.products import with_exact_states, with_weights_as_they_lie
from engine.backends.onnxruntime.transformer import fuse_transformers
from engine.graphs.graph import Graph
from engine.shipped import GRAPHS
from tests.support.tolerances import PARITY_RTOL

WIDTH, GATED = 320, 2560
SHAPES = {
    **dict.fromkeys(("bias", "scale", "shift"), (WIDTH,)),
    **{"layer": (WIDTH, WIDTH), "up": (GATED, WIDTH), "up_bias": (GATED,)},
}


class FusedMatMul(OpRun):
    op_domain = "com.microsoft"

    def _run(self, x, y, transB):  # noqa: N803
        return (x @ (y.T if transB else y),)


class SkipLayerNormalization(OpRun):
    """ONNX Runtime's operator, from its documentation."""

    op_domain = "com.microsoft"

    def _run(self, x, skip, gamma, beta, bias, epsilon=1e-5):
        total = x + skip + bias
        mean, variance = total.mean(-1, keepdims=True), total.var(-1, keepdims=True)
        normed = (total - mean) / np.sqrt(variance + epsilon) * gamma + beta
        return normed, mean, variance, total


class BiasAdd(OpRun):
    op_domain = "com.microsoft"

    def _run(self, x, bias, skip):
        assert x.ndim == 3
        assert x.shape[2] in (320, 640, 1280)
        return (x + bias + skip,)


class BiasSplitGelu(OpRun):
    op_domain = "com.microsoft"

    def _run(self, x, bias):
        assert x.shape[2] in (2560, 5120, 10240)
        left, right = np.split(x + bias, 2, axis=-1)
        erf = np.vectorize(math.erf)(right / math.sqrt(2))
        return ((left * right * 0.5 * (1 + erf)).astype(x.dtype),)


OPERATORS = [FusedMatMul, SkipLayerNormalization, BiasAdd, BiasSplitGelu]


def linear(x, y, weight="layer", bias="bias", *, swapped=False):
    """Return a linear layer as tracing writes it."""
    terms = [f"{y}.made", bias]
    return [
        helper.make_node("Transpose", [weight], [f"{y}.turned"], perm=[1, 0]),
        helper.make_node("MatMul", [x, f"{y}.turned"], [f"{y}.made"]),
        helper.make_node("Add", terms[::-1] if swapped else terms, [y]),
    ]


def norm(x, y):
    return helper.make_node("LayerNormalization", [x, "scale", "shift"], [y], epsilon=1e-3)


def gate(x, y, **settings):
    return [
        *linear(x, "wide", "up", "up_bias"),
        helper.make_node("Split", ["wide"], ["left", "right"], axis=2, num_outputs=2),
        helper.make_node("Gelu", ["right"], ["gelu"], **settings),
        helper.make_node("Mul", ["gelu", "left"], [y]),
    ]


def model(nodes, outputs):
    random = np.random.default_rng(0)
    constants = [
        numpy_helper.from_array(random.standard_normal(s).astype(np.float32) / 8, name)
        for name, s in SHAPES.items()
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "layers",
        [value("x", TensorProto.FLOAT, ["B", "n", WIDTH])],
        [value(name, TensorProto.FLOAT, None) for name in outputs],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])


def kinds(made):
    return Counter(node.op_type for node in made.graph.node)


def add(x, y, out):
    return helper.make_node("Add", [x, y], [out])


CASES = {
    "residual and norm": (
        lambda: [*linear("x", "y"), add("x", "y", "sum"), norm("sum", "z")],
        ["z"],
        {"SkipLayerNormalization": 1},
    ),
    "the other way round": (
        lambda: [*linear("x", "y", swapped=True), add("y", "x", "sum"), norm("sum", "z")],
        ["z"],
        {"SkipLayerNormalization": 1},
    ),
    "a sum that others read": (
        lambda: [
            *linear("x", "y"),
            add("x", "y", "sum"),
            norm("sum", "normed"),
            *linear("normed", "w"),
            add("sum", "w", "z"),
        ],
        ["z"],
        {"SkipLayerNormalization": 1, "BiasAdd": 1},
    ),
    "residual alone": (lambda: [*linear("x", "y"), add("x", "y", "z")], ["z"], {"BiasAdd": 1}),
    "a layer that others read": (
        lambda: [*linear("x", "y"), add("x", "y", "z"), norm("y", "w")],
        ["z", "w"],
        {"Add": 2, "LayerNormalization": 1},
    ),
    "gate": (lambda: gate("x", "z"), ["z"], {"BiasSplitGelu": 1}),
    "approximate gate": (
        lambda: gate("x", "z", approximate="tanh"),
        ["z"],
        {"Gelu": 1, "Split": 1, "Add": 1, "Mul": 1},
    ),
    "gate that is read": (
        lambda: gate("x", "z"),
        ["z", "gelu"],
        {"Gelu": 1, "Split": 1, "Add": 1, "Mul": 1},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_fused_graph_computes_the_same(case):
    nodes, outputs, expected = CASES[case]
    built = model(nodes(), outputs)
    data = with_weights_as_they_lie(built.SerializeToString(), SHAPES)
    made = onnx.load_model_from_string(fuse_transformers(data, SHAPES))
    found = kinds(made)
    assert found.pop("FusedMatMul") >= 1
    assert found == expected
    given = {"x": np.random.default_rng(1).standard_normal((2, 3, WIDTH)).astype(np.float32)}
    wanted = ReferenceEvaluator(built).run(None, given)
    results = ReferenceEvaluator(made, new_ops=OPERATORS).run(None, given)
    for result, reference in zip(results, wanted, strict=True):
        np.testing.assert_allclose(result, reference, rtol=PARITY_RTOL, atol=1e-4)


@pytest.mark.parametrize("width", [96, 144])
def test_other_widths_have_no_kernel_but_the_norm_s(width):
    shapes = {
        name: tuple(width if s == WIDTH else s for s in shape) for name, shape in SHAPES.items()
    }
    nodes = [*linear("x", "y"), add("x", "y", "sum"), *gate("sum", "z")]
    data = model(nodes, ["z"]).SerializeToString()
    made = onnx.load_model_from_string(fuse_transformers(data, {**shapes, "up_bias": (2 * width,)}))
    assert {"BiasAdd", "BiasSplitGelu"}.isdisjoint(kinds(made))


@pytest.mark.parametrize("path", sorted(GRAPHS.glob("step-*-float16.onnx*")), ids=lambda p: p.name)
def test_the_sampler_s_matrices_are_applied_in_float64(path):
    before = onnx.load_model_from_string(Graph.read(path).data())
    made = onnx.load_model_from_string(with_exact_states(Graph.read(path).data()))
    added = kinds(made) - kinds(before)
    assert added == {"Cast": 3}
    makers = {out: node for node in made.graph.node for out in node.output}
    wide = [n for n in made.graph.node if n.op_type == "MatMul" and n.input[0].endswith(".float64")]
    assert len(wide) == 1
    read = makers[makers[wide[0].input[0]].input[0]]
    assert "matrices" in read.input
