"""The largest token's place as ONNX Runtime's CUDA provider finds it.

It has no kernel for whole numbers, and would copy them to the processor and wait for it. As float32
they are what they were: ids of tokens are far below 2^24.
"""

from engine.graphs.onnx_bytes import (
    INPUT,
    OUTPUT,
    Nodes,
    attributes_of,
    int_attribute,
    named,
    with_own_operators,
    written_node,
)

FLOAT = 1  # TensorProto.DataType


def with_float_argmax(data: bytes) -> bytes:
    """Return a serialised ModelProto whose ArgMax all read float32."""
    return with_own_operators(data, _cast)


def _cast(found: Nodes) -> bytes:
    written = {}
    for i, node in found.nodes.items():
        if found.kinds[i] == b"ArgMax":
            (given,), (out,) = named(node, INPUT), named(node, OUTPUT)
            wide, settings = out + b".ids", list(attributes_of(node).values())
            cast = written_node(b"Cast", [given], wide, [int_attribute(b"to", FLOAT)])
            written[i] = cast + written_node(b"ArgMax", [wide], out, settings)
    return found.replaced(written)
