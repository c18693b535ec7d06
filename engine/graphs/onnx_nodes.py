"""The nodes of an ONNX graph as bytes: found, written and replaced without the onnx library.

ONNX Runtime has operators of its own that do in one pass what ONNX's take several for.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from engine.graphs.onnx_bytes import (
    GRAPH_NODE,
    GRAPH_OUTPUT,
    MODEL_GRAPH,
    VALUE_NAME,
    encode,
    fields,
)

# Fields of ModelProto, NodeProto, AttributeProto and OperatorSetIdProto.
MODEL_OPSET = 8
INPUT, OUTPUT, NAME, OP_TYPE, ATTRIBUTE, DOMAIN = 1, 2, 3, 4, 5, 7
ATTRIBUTE_NAME, ATTRIBUTE_INT, ATTRIBUTE_INTS, ATTRIBUTE_TYPE = 1, 3, 8, 20
INT, INTS = 2, 7  # AttributeProto.AttributeType
OPSET_DOMAIN, OPSET_VERSION = 1, 2
CONTRIB = b"com.microsoft"  # the domain of ONNX Runtime's own operators

Node = list[tuple[int, bytes | int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """The nodes of a serialised GraphProto, each by its place among the graph's fields.

    kinds: their operators; readers: how often each value is read, by nodes or as an output
    """

    graph: bytes
    nodes: Mapping[int, Node]
    kinds: Mapping[int, bytes]
    readers: Mapping[bytes, int]

    @classmethod
    def read(cls, graph: bytes) -> Self:
        """Read a graph's nodes; raises ValueError or IndexError where there are none."""
        nodes = {
            i: list(fields(value))
            for i, (field, value) in enumerate(fields(graph))
            if field == GRAPH_NODE and isinstance(value, bytes)
        }
        readers = Counter(name for node in nodes.values() for name in named(node, INPUT))
        readers.update(
            named(list(fields(value)), VALUE_NAME)[0]
            for field, value in fields(graph)
            if field == GRAPH_OUTPUT and isinstance(value, bytes)
        )
        kinds = {i: next(iter(named(node, OP_TYPE)), b"") for i, node in nodes.items()}
        return cls(graph=graph, nodes=nodes, kinds=kinds, readers=readers)

    def replaced(self, written: Mapping[int, bytes]) -> bytes:
        """Return the graph with other fields, any number of them, in these places."""
        return b"".join(
            written[i] if i in written else encode(field, value)
            for i, (field, value) in enumerate(fields(self.graph))
        )


def with_own_operators(data: bytes, change: Callable[[Nodes], bytes]) -> bytes:
    """Return a serialised ModelProto with another graph, which may use ONNX Runtime's operators."""
    opset = encode(OPSET_DOMAIN, CONTRIB) + encode(OPSET_VERSION, 1)
    return b"".join(
        encode(
            field,
            change(Nodes.read(value))
            if field == MODEL_GRAPH and isinstance(value, bytes)
            else value,
        )
        for field, value in fields(data)
    ) + encode(MODEL_OPSET, opset)


def written_node(
    kind: bytes,
    inputs: Sequence[bytes],
    out: bytes,
    attributes: Sequence[bytes],
    domain: bytes = b"",
) -> bytes:
    """Write a node as a field of a graph; it is named after its one output."""
    content = [encode(INPUT, name) for name in inputs]
    content += [encode(OUTPUT, out), encode(NAME, out), encode(OP_TYPE, kind)]
    content += [encode(ATTRIBUTE, attribute) for attribute in attributes]
    return encode(GRAPH_NODE, b"".join(content) + (encode(DOMAIN, domain) if domain else b""))


def int_attribute(name: bytes, value: int) -> bytes:
    """Write an attribute that is a number."""
    kind = encode(ATTRIBUTE_TYPE, INT)
    return encode(ATTRIBUTE_NAME, name) + encode(ATTRIBUTE_INT, value) + kind


def ints_attribute(name: bytes, values: Sequence[int]) -> bytes:
    """Write an attribute that is a list of numbers."""
    content = b"".join(encode(ATTRIBUTE_INTS, value) for value in values)
    return encode(ATTRIBUTE_NAME, name) + content + encode(ATTRIBUTE_TYPE, INTS)


def named(node: Node, kind: int) -> list[bytes]:
    """Return the texts and messages of one field."""
    return [value for field, value in node if field == kind and isinstance(value, bytes)]


def attributes_of(node: Node) -> dict[bytes, bytes]:
    """Return a node's attributes, as they are written, by their names."""
    # Not all of each is read: further on may be floats, which `fields` does not know.
    return {
        next(value for _, value in fields(attribute) if isinstance(value, bytes)): attribute
        for attribute in named(node, ATTRIBUTE)
    }


def int_of(attribute: bytes) -> int:
    """Return the number that an attribute holds."""
    return next(
        value
        for field, value in fields(attribute)
        if field == ATTRIBUTE_INT and isinstance(value, int)
    )


def ints_of(attribute: bytes) -> tuple[int, ...]:
    """Return the numbers that an attribute holds, which are written one by one."""
    return tuple(
        value
        for field, value in fields(attribute)
        if field == ATTRIBUTE_INTS and isinstance(value, int)
    )
