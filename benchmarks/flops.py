"""Floating-point operations of a graph, counted node by node at the shapes that go in.

A multiplication and an addition are two. Counted are convolutions, matrix products and fused
attention, its two products over all pairs of tokens whether a mask hides them or not; everything
else (norms, activations, softmax, the sampler) is under one percent of a UNet.
"""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from benchmarks.control_nets import COUNTS, HINT, NETS, write_control_nets
from benchmarks.rounds import total
from benchmarks.scenarios import ENGINES, Scenario, engine_inputs
from engine.checkpoints.control_net import open_control_net
from engine.configs.base import Config
from engine.graphs.graph import Part, find_graph, graph_folders, signature
from engine.graphs.onnx_bytes import weights_as_inputs
from engine.model import Model

if TYPE_CHECKING:
    import onnx_ir

Shape = tuple[int, ...]
TOKENS = 77  # of a text


def count(graph: bytes, inputs: Mapping[str, Shape]) -> int:
    """Count the operations of one run of a serialised ModelProto.

    inputs: the shape of each of its inputs, weights aside; raises ValueError when one is missing
    or the shapes do not determine those inside.
    """
    import onnx  # here and not above: the other benchmarks do without these libraries
    import onnx_ir
    from onnxscript import optimizer

    model = onnx.load_model_from_string(weights_as_inputs(graph))
    for value in model.graph.input:
        sizes = value.type.tensor_type.shape.dim
        if any(size.dim_param for size in sizes):
            if value.name not in inputs:
                raise ValueError(f"the graph's input {value.name!r} has free sizes; give its shape")
            for size, number in zip(sizes, inputs[value.name], strict=True):
                size.dim_value = number
    del model.graph.value_info[:]
    for node in model.graph.node:
        if node.op_type == "GroupNormalization":  # the library does not infer its shape
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    inferred = onnx_ir.from_proto(model)
    for _ in range(2):  # shapes that are computed become constants, which give further shapes
        optimizer.fold_constants(inferred, onnx_shape_inference=True)
    return sum(COUNTED[node.op_type](node) for node in inferred.graph if node.op_type in COUNTED)


def request_flops(scenario: Scenario) -> dict[str, int]:
    """Count the operations of every part of a request, and of each whole request."""
    model = Model.open(scenario.model())
    counted = dict.fromkeys(ENGINES, 0)
    names = {part: name for name, part in ENGINES.items()}
    for part, inputs in engine_inputs(scenario, model).items():
        graph = find_graph(part, model.config(part), "float32", graph_folders(), model.path)
        shapes = {key: array.shape for key, array in inputs.items()}
        counted[names.get(part, "text")] += count(graph.data(), shapes)
    return counted | {name: total(counted, steps) for name, steps in scenario.wholes.items()}


def control_flops(scenario: Scenario) -> dict[str, int]:
    """Count the operations of a step without ControlNets, with one and with two, and of a hint."""
    model = Model.open(scenario.model())
    unet, side = model.unet, scenario.size // model.vae.compression
    sizes = {"g": 1 + scenario.is_guided, "B": scenario.batch, "r": 1, "r + 2": 3, "n": TOKENS}
    sizes |= {"h or 1": 1, "w or 1": 1, "H": scenario.size, "W": scenario.size}
    for level in range(len(unet.block_out_channels)):
        sizes |= {f"{axis}{level or ''}": -(-side // 2**level) for axis in "hw"}

    def counted(part: Part, config: Config) -> int:
        known = {**sizes, **config.symbols()}
        shapes = {
            name: tuple(known[size] if isinstance(size, str) else size for size in tensor.shape)
            for name, tensor in signature(part, config).inputs.items()
        }
        graph = find_graph(part, config, "float32", graph_folders(), model.path)
        return count(graph.data(), shapes)

    net, _ = open_control_net(write_control_nets(scenario)[NETS[0]], unet)
    steered, own = counted("step_controlled", unet), counted("control", net)
    return {
        "step": counted("step", unet),
        **{name: steered + nets * own for name, nets in COUNTS.items()},
        HINT: counted("control_hint", net),
    }


def _convolution(node: "onnx_ir.Node") -> int:
    _, per_group, *kernel = _shape(node, node.inputs[1])
    return 2 * math.prod(_shape(node, node.outputs[0])) * per_group * math.prod(kernel)


def _product(node: "onnx_ir.Node") -> int:
    shared = _shape(node, node.inputs[0])
    transposed = node.attributes.get_int("transA", 0) if node.op_type == "Gemm" else 0
    return 2 * math.prod(_shape(node, node.outputs[0])) * shared[0 if transposed else -1]


def _attention(node: "onnx_ir.Node") -> int:
    """Count softmax(Q Kᵀ) V of (batch, heads, tokens, width)."""
    query, key, value = (_shape(node, given) for given in node.inputs[:3])
    if len(query) != 4:
        raise ValueError(f"{node.name} is attention of {len(query)} axes; 4 can be counted")
    batch, heads, tokens, width = query
    return 2 * batch * heads * tokens * key[2] * (width + value[3])


COUNTED: Mapping[str, Callable[["onnx_ir.Node"], int]] = {
    "Conv": _convolution,
    "MatMul": _product,
    "Gemm": _product,
    "Attention": _attention,
}


def _shape(node: "onnx_ir.Node", value: Any) -> Shape:
    if value is None or value.shape is None or not all(isinstance(n, int) for n in value.shape):
        raise ValueError(f"the shapes of {node.op_type} {node.name} are not known from the inputs'")
    return tuple(value.shape)
