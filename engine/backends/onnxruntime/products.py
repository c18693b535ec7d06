"""Products as ONNX Runtime's CUDA provider makes them without copies of the weights.

A linear layer is a product with a transposed weight. The library would transpose the weight when a
session is opened, into an array of that session; its own FusedMatMul reads it as it lies.
"""

from collections.abc import Mapping

from engine.devices.device import Shape
from engine.graphs.onnx_bytes import (
    CONTRIB,
    INPUT,
    OUTPUT,
    Node,
    Nodes,
    attributes_of,
    int_attribute,
    ints_of,
    named,
    with_own_operators,
    written_node,
)

FLOAT, DOUBLE = 1, 11  # TensorProto.DataType


def with_weights_as_they_lie(data: bytes, weights: Mapping[str, Shape]) -> bytes:
    """Return a serialised ModelProto whose products with transposed weights are FusedMatMul.

    weights: the graph's, with their shapes
    """
    return with_own_operators(data, lambda found: _fused(found, weights))


def _fused(found: Nodes, weights: Mapping[str, Shape]) -> bytes:
    transposed = {
        named(node, OUTPUT)[0]: named(node, INPUT)[0]
        for i, node in found.nodes.items()
        if found.kinds[i] == b"Transpose" and _swaps_weight(node, weights)
    }
    written = {}
    for i, node in found.nodes.items():
        given = named(node, INPUT)
        if found.kinds[i] == b"MatMul" and given[1] in transposed:
            inputs = [given[0], transposed[given[1]]]
            settings = [int_attribute(b"transB", 1)]
            (out,) = named(node, OUTPUT)
            written[i] = written_node(b"FusedMatMul", inputs, out, settings, CONTRIB)
    return found.replaced(written)


def _swaps_weight(transpose: Node, weights: Mapping[str, Shape]) -> bool:
    name = named(transpose, INPUT)[0].decode()
    return len(weights.get(name, ())) == 2 and ints_of(attributes_of(transpose)[b"perm"]) == (1, 0)


def with_exact_states(data: bytes) -> bytes:
    """Return a serialised ModelProto of a step that applies the sampler's matrices in float64.

    Tensor cores, which a float16 graph is to use, would round what moves between steps to 11 bits.
    """
    return with_own_operators(data, _widened)


def _widened(found: Nodes) -> bytes:
    makers = {name: node for node in found.nodes.values() for name in named(node, OUTPUT)}
    written = {}
    for i, node in found.nodes.items():
        if found.kinds[i] != b"MatMul":
            continue
        given = named(node, INPUT)
        maker = makers.get(given[0])
        if maker is None or b"matrices" not in named(maker, INPUT):
            continue
        (out,) = named(node, OUTPUT)
        wide = [name + b".float64" for name in given]
        to = int_attribute(b"to", DOUBLE)
        casts = [written_node(b"Cast", [n], w, [to]) for n, w in zip(given, wide, strict=True)]
        product = written_node(b"MatMul", wide, out + b".float64", [])
        back = written_node(b"Cast", [out + b".float64"], out, [int_attribute(b"to", FLOAT)])
        written[i] = b"".join([*casts, product, back])
    return found.replaced(written)
