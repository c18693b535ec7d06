import gzip

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from engine.backends.onnxruntime.group_norm import fuse_group_norms
from engine.graphs.graph import Graph
from engine.graphs.onnx_bytes import weights_as_inputs
from engine.shipped import GRAPHS
from tests.support.tolerances import GROUP_NORM_FLOAT16

PATHS = sorted(GRAPHS.glob("*-float16.onnx.gz"))
WITH_NORMS = [path for path in PATHS if path.name.split("-")[0] in ("step", "vae_decoder")]
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


def model(nodes, outputs):
    random = np.random.default_rng(0)
    constants = [
        numpy_helper.from_array(random.standard_normal(CHANNELS).astype(np.float16), name)
        for name in ("scale", "bias", "scale2", "bias2")
    ]
    shape = ["B", CHANNELS, "h", "w"]
    graph = helper.make_graph(
        nodes,
        "norms",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, shape)],
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
    "a group of one channel": (lambda: [norm("x", "y", num_groups=CHANNELS)], "y", []),
    "an output": (lambda: [norm("x", "y"), *silu("y", "z")], ["y", "z"], [0]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_fused_graph_computes_the_same(case):
    nodes, outputs, activations = CASES[case]
    built = model(nodes(), list(outputs))
    made = fused(built)
    found = [node for node in made.graph.node if node.op_type == "GroupNorm"]
    assert [helper.get_node_attr_value(node, "activation") for node in found] == activations
    assert kinds(made).count("GroupNormalization") == (not activations)
    x = np.random.default_rng(1).standard_normal((2, CHANNELS, 6, 5)).astype(np.float16)
    x *= np.float16(0.05)  # so that the epsilon counts
    wanted = ReferenceEvaluator(built).run(None, {"x": x})
    results = ReferenceEvaluator(made, new_ops=[GroupNorm]).run(None, {"x": x})
    for result, reference in zip(results, wanted, strict=True):
        assert result.dtype == np.float16
        scale = np.abs(reference.astype(np.float32)).max()
        difference = np.abs(result.astype(np.float32) - reference.astype(np.float32)).max()
        assert difference <= GROUP_NORM_FLOAT16 * scale


@pytest.mark.parametrize("path", WITH_NORMS, ids=lambda path: path.name)
def test_all_norms_of_the_shipped_graphs_are_fused(path):
    data = gzip.decompress(path.read_bytes())
    before = onnx.load_from_string(data)
    fused_data = fuse_group_norms(data, Graph.read(path).weights)
    onnx.checker.check_model(weights_as_inputs(fused_data))
    made = onnx.load_from_string(fused_data)
    norms, swishes = kinds(before).count("GroupNormalization"), kinds(before).count("Sigmoid")
    activations = [
        helper.get_node_attr_value(node, "activation")
        for node in made.graph.node
        if node.op_type == "GroupNorm"
    ]
    assert len(activations) == norms > 0
    assert sum(activations) == swishes - kinds(made).count("Sigmoid") >= 29
    assert "GroupNormalization" not in kinds(made)
    assert [i.name for i in made.graph.initializer] == [i.name for i in before.graph.initializer]
    assert made.graph.output == before.graph.output


def test_a_graph_without_norms_keeps_its_nodes():
    path = next(path for path in PATHS if path.name.startswith("text_encoder"))
    data = gzip.decompress(path.read_bytes())
    made = onnx.load_from_string(fuse_group_norms(data, Graph.read(path).weights))
    assert made.graph == onnx.load_from_string(data).graph


def test_groups_of_an_odd_number_of_channels_stay_as_they_are():
    graph = Graph.read(next(GRAPHS.glob("step-*-float32.onnx")))
    before = kinds(onnx.load_from_string(graph.data()))
    made = kinds(onnx.load_from_string(fuse_group_norms(graph.data(), graph.weights)))
    assert made.count("GroupNorm") == before.count("GroupNormalization") > 0
    narrow = {name: (72,) if shape == (144,) else shape for name, shape in graph.weights.items()}
    made = kinds(onnx.load_from_string(fuse_group_norms(graph.data(), narrow)))
    assert made.count("GroupNorm") > 0
    assert made.count("GroupNormalization") > 0, "72 channels in 8 groups are 9 each"
