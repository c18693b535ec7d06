import gzip

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from engine.backends.onnxruntime.device_weights import widened
from engine.backends.onnxruntime.group_norm import fuse_group_norms
from engine.configs.tiny_autoencoder import TinyAutoencoderConfig
from engine.graphs.graph import Graph
from engine.graphs.onnx_bytes import weights_as_inputs
from engine.shipped import GRAPHS
from tests.support.tolerances import GROUP_NORM_FLOAT16

PATHS = sorted(GRAPHS.glob("*-float16.onnx.gz"))
TAESD = TinyAutoencoderConfig().key()
WITH_NORMS = [
    path
    for path in PATHS
    if path.name.split("-")[0] in ("step", "vae_decoder") and TAESD not in path.name
]
CHANNELS, GROUPS = 8, 4
SHAPES = dict.fromkeys(("scale", "scale2"), (CHANNELS,))


class GroupNorm(OpRun):
    """ONNX Runtime's operator, from its documentation: channels last, statistics in float32."""

    op_domain = "com.microsoft"

    def _run(self, x, gamma, beta, activation, channels_last, groups, epsilon=1e-5):
        assert (channels_last, gamma.dtype, beta.dtype) == (1, np.float32, np.float32)
        batch, height, width, channels = x.shape
        grouped = x.astype(np.float32).reshape(batch, height * width, groups, channels // groups)
        mean = grouped.mean(axis=(1, 3), keepdims=True)
        deviation = np.sqrt(grouped.var(axis=(1, 3), keepdims=True) + epsilon)
        y = ((grouped - mean) / deviation).reshape(x.shape) * gamma + beta
        if activation:
            y = y / (1 + np.exp(-y))
        return (y.astype(x.dtype),)


class SkipGroupNorm(OpRun):
    """The same of a sum, which it gives too; skip: as large, or a vector for each picture."""

    op_domain = "com.microsoft"

    def _run(self, x, gamma, beta, skip, activation, channels_last, groups, epsilon=1e-5):
        total = x + (skip[:, None, None] if skip.ndim == 2 else skip)
        (y,) = GroupNorm._run(self, total, gamma, beta, activation, channels_last, groups, epsilon)
        return y, total


def model(nodes, outputs):
    random = np.random.default_rng(0)
    constants = [
        numpy_helper.from_array(random.standard_normal(CHANNELS).astype(np.float16), name)
        for name in ("scale", "bias", "scale2", "bias2")
    ]
    weights = {"kernel": (CHANNELS, CHANNELS, 1, 1), "layer": (CHANNELS, CHANNELS)}
    constants += [
        numpy_helper.from_array(random.standard_normal(shape).astype(np.float16), name)
        for name, shape in weights.items()
    ]
    constants.append(numpy_helper.from_array(np.array([2, 3]), "axes"))
    shape = ["B", CHANNELS, "h", "w"]
    graph = helper.make_graph(
        nodes,
        "norms",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT16, shape),
            helper.make_tensor_value_info("time", TensorProto.FLOAT16, ["B", CHANNELS]),
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape) for name in outputs],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])


def norm(x, y, number="", **settings):
    inputs = [x, f"scale{number}", f"bias{number}"]
    settings = {"num_groups": GROUPS, "stash_type": 1} | settings
    return helper.make_node("GroupNormalization", inputs, [y], **settings)


def silu(x, y, gate="gate"):
    return [helper.make_node("Sigmoid", [x], [gate]), helper.make_node("Mul", [x, gate], [y])]


def fused(built):
    made = onnx.load_from_string(fuse_group_norms(built.SerializeToString(), SHAPES))
    onnx.checker.check_model(made)
    return made


def kinds(made):
    return [node.op_type for node in made.graph.node]


def embedded(term="embedding", total="sum"):
    """Return the sum of a convolution and of a linear layer's vector for each picture."""
    return [
        helper.make_node("Conv", ["x", "kernel"], ["made"]),
        helper.make_node("Gemm", ["time", "layer"], ["linear"]),
        helper.make_node("Unsqueeze", ["linear", "axes"], ["embedding"]),
        helper.make_node("Add", ["made", term], [total]),
    ]


SUMS = {
    "a time embedding": (lambda: [*embedded(), norm("sum", "n"), *silu("n", "y")], "y"),
    "a residual": (
        lambda: [
            helper.make_node("Conv", ["x", "kernel"], ["made"]),
            helper.make_node("Add", ["x", "x"], ["other"]),
            helper.make_node("Add", ["other", "made"], ["sum"]),
            norm("sum", "y", epsilon=1e-3),
        ],
        "y",
    ),
    "a sum that others read": (
        lambda: [*embedded(), norm("sum", "n"), helper.make_node("Add", ["sum", "n"], ["y"])],
        "y",
    ),
    "a sum that two norms read": (
        lambda: [*embedded(), norm("sum", "y"), norm("sum", "z", 2)],
        "yz",
    ),
}
PLAIN_SUMS = {
    "of what is no picture": lambda: [
        helper.make_node("Conv", ["x", "kernel"], ["made"]),
        helper.make_node("Add", ["made", "layer"], ["sum"]),
        norm("sum", "y"),
    ],
    "of no convolution": lambda: [helper.make_node("Add", ["x", "x"], ["sum"]), norm("sum", "y")],
}


def compare(built, made):
    random = np.random.default_rng(1)
    x = random.standard_normal((2, CHANNELS, 8, 8)).astype(np.float16)
    x *= np.float16(0.05)  # so that the epsilon counts
    given = {"x": x, "time": random.standard_normal((2, CHANNELS)).astype(np.float16)}
    wanted = ReferenceEvaluator(built).run(None, given)
    results = ReferenceEvaluator(made, new_ops=[GroupNorm, SkipGroupNorm]).run(None, given)
    for result, reference in zip(results, wanted, strict=True):
        assert result.dtype == np.float16
        scale = np.abs(reference.astype(np.float32)).max()
        difference = np.abs(result.astype(np.float32) - reference.astype(np.float32)).max()
        assert difference <= GROUP_NORM_FLOAT16 * scale


@pytest.mark.parametrize("case", SUMS)
def test_a_sum_before_a_norm_is_fused_with_it(case):
    nodes, outputs = SUMS[case]
    built = model(nodes(), list(outputs))
    made = fused(built)
    assert kinds(made).count("SkipGroupNorm") == 1
    compare(built, made)


@pytest.mark.parametrize("case", PLAIN_SUMS)
def test_other_sums_stay(case):
    built = model(PLAIN_SUMS[case](), ["y"])
    made = fused(built)
    assert kinds(made).count("SkipGroupNorm") == 0
    assert kinds(made).count("GroupNorm") == kinds(made).count("Add") == 1


def test_groups_of_an_odd_number_of_channels_are_instance_norms():
    built = model([norm("x", "n", num_groups=CHANNELS, epsilon=1e-3), *silu("n", "y")], ["y"])
    made = fused(built)
    assert {"GroupNorm", "GroupNormalization"}.isdisjoint(kinds(made))
    assert kinds(made).count("InstanceNormalization") == 1
    compare(built, made)


CASES = {
    "alone": (lambda: [norm("x", "y", epsilon=1e-3)], ["y"], [0]),
    "before SiLU": (lambda: [norm("x", "n", epsilon=1e-6), *silu("n", "y")], ["y"], [1]),
    "both": (lambda: [norm("x", "n"), *silu("n", "m"), norm("m", "y", 2)], ["y"], [1, 0]),
    "read twice": (lambda: [norm("x", "n"), *silu("n", "y"), norm("n", "z", 2)], "yz", [0, 0]),
    "gate read twice": (
        lambda: [norm("x", "n"), *silu("n", "y"), norm("gate", "z", 2)],
        ["y", "z"],
        [0, 0],
    ),
    "an output": (lambda: [norm("x", "y"), *silu("y", "z")], ["y", "z"], [0]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_fused_graph_computes_the_same(case):
    nodes, outputs, activations = CASES[case]
    built = model(nodes(), list(outputs))
    made = fused(built)
    found = [node for node in made.graph.node if node.op_type == "GroupNorm"]
    assert [helper.get_node_attr_value(node, "activation") for node in found] == activations
    assert kinds(made).count("GroupNormalization") == 0
    compare(built, made)


@pytest.mark.parametrize("path", WITH_NORMS, ids=lambda path: path.name)
def test_all_norms_of_the_shipped_graphs_are_fused(path):
    weights = Graph.read(path).weights
    data, _ = widened(gzip.decompress(path.read_bytes()), weights)
    before = onnx.load_from_string(data)
    fused_data = fuse_group_norms(data, weights)
    onnx.checker.check_model(weights_as_inputs(fused_data))
    made = onnx.load_from_string(fused_data)
    norms, swishes = kinds(before).count("GroupNormalization"), kinds(before).count("Sigmoid")
    activations = [
        helper.get_node_attr_value(node, "activation")
        for node in made.graph.node
        if node.op_type in ("GroupNorm", "SkipGroupNorm")
    ]
    assert len(activations) == norms > 0
    assert sum(activations) == swishes - kinds(made).count("Sigmoid") >= 19
    assert "GroupNormalization" not in kinds(made)
    assert [i.name for i in made.graph.initializer] == [i.name for i in before.graph.initializer]
    assert made.graph.output == before.graph.output


def test_a_graph_without_norms_keeps_its_nodes():
    path = next(path for path in PATHS if path.name.startswith("text_encoder"))
    data = gzip.decompress(path.read_bytes())
    made = onnx.load_from_string(fuse_group_norms(data, Graph.read(path).weights))
    assert made.graph == onnx.load_from_string(data).graph
