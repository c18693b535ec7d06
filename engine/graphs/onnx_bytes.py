"""ONNX files as bytes: what a backend reads and changes of one without the onnx library.

An ONNX file is one protobuf message (https://protobuf.dev/programming-guides/encoding), a
ModelProto, whose fields are numbered in onnx.proto. Nodes are found, written and replaced too,
since ONNX Runtime has operators of its own that do in one pass what ONNX's take several for.
"""

import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from numpy.typing import NDArray

# Fields of ModelProto, GraphProto, NodeProto, AttributeProto, TensorProto, ValueInfoProto,
# TypeProto and its tensor's type, and OperatorSetIdProto.
MODEL_VERSION, MODEL_GRAPH, MODEL_OPSET, MODEL_METADATA = 1, 7, 8, 14
GRAPH_NODE, GRAPH_NAME, GRAPH_INITIALIZER, GRAPH_INPUT, GRAPH_OUTPUT = 1, 2, 5, 11, 12
INPUT, OUTPUT, NAME, OP_TYPE, ATTRIBUTE, DOMAIN = 1, 2, 3, 4, 5, 7
ATTRIBUTE_NAME, ATTRIBUTE_FLOAT, ATTRIBUTE_INT, ATTRIBUTE_INTS, ATTRIBUTE_TYPE = 1, 2, 3, 8, 20
TENSOR_DIMS, TENSOR_DTYPE, TENSOR_NAME, TENSOR_RAW_DATA, TENSOR_LOCATION = 1, 2, 8, 9, 14
VALUE_NAME, VALUE_TYPE, TYPE_TENSOR, TYPE_DTYPE = 1, 2, 1, 1
TYPE_SHAPE, SHAPE_DIM, DIM_VALUE, DIM_NAME = 2, 1, 1, 2
OPSET_DOMAIN, OPSET_VERSION = 1, 2
EXTERNAL = 1  # TensorProto.DataLocation
DTYPES = {"float32": 1, "int64": 7, "float16": 10}  # TensorProto.DataType
FLOAT, INT, INTS = 1, 2, 7  # AttributeProto.AttributeType
NUMBER, TEXT, FOUR_BYTES = 0, 2, 5  # protobuf's wire types: a varint; strings or messages; a float
CONTRIB = b"com.microsoft"  # the domain of ONNX Runtime's own operators

Field = tuple[int, bytes | int]
Node = list[Field]


def metadata(data: bytes) -> dict[str, str]:
    """Read `metadata_props` of a serialised ModelProto, without parsing the graph."""
    entries = [dict(fields(_bytes(v))) for field, v in fields(data) if field == MODEL_METADATA]
    return {_bytes(entry[1]).decode(): _bytes(entry[2]).decode() for entry in entries}


def outputs(data: bytes) -> tuple[str, ...]:
    """Read the names of a serialised ModelProto's outputs."""
    graphs = [_bytes(value) for field, value in fields(data) if field == MODEL_GRAPH]
    return tuple(
        _bytes(dict(fields(_bytes(value)))[VALUE_NAME]).decode()
        for graph in graphs
        for field, value in fields(graph)
        if field == GRAPH_OUTPUT
    )


def input_shapes(data: bytes) -> dict[str, tuple[int | str, ...]]:
    """Read the shapes of a serialised ModelProto's inputs; a size that is not fixed is a symbol."""
    graphs = [_bytes(value) for field, value in fields(data) if field == MODEL_GRAPH]
    values = [dict(fields(_bytes(v))) for g in graphs for i, v in fields(g) if i == GRAPH_INPUT]
    return {_bytes(value[VALUE_NAME]).decode(): tuple(_symbols(value)) for value in values}


def _symbols(value: Mapping[int, bytes | int]) -> Iterator[int | str]:
    """Read the sizes of a ValueInfoProto that describes a tensor."""
    kind = dict(fields(_bytes(dict(fields(_bytes(value[VALUE_TYPE])))[TYPE_TENSOR])))
    for _, dim in fields(_bytes(kind.get(TYPE_SHAPE, b""))):
        stated = dict(fields(_bytes(dim)))
        if DIM_VALUE in stated:
            yield int(stated[DIM_VALUE])
        else:
            yield _bytes(stated.get(DIM_NAME, b"")).decode()


def weights_as_inputs(data: bytes) -> bytes:
    """Turn the external initializers of a serialised ModelProto into inputs of the graph."""
    return mapped(data, MODEL_GRAPH, _graph_with_inputs)


def without_attribute(data: bytes, operator: str, attribute: str) -> bytes:
    """Leave an attribute out of all nodes of an operator, for a library that does not take it."""

    # The name is written first; further on are floats, which `fields` does not read.
    named = (ATTRIBUTE_NAME, attribute.encode())

    def node(content: bytes) -> bytes:
        found = list(fields(content))
        if (OP_TYPE, operator.encode()) not in found:
            return content
        return b"".join(
            encode(field, value)
            for field, value in found
            if field != ATTRIBUTE or next(fields(_bytes(value)), None) != named
        )

    return mapped(data, MODEL_GRAPH, lambda graph: mapped(graph, GRAPH_NODE, node))


def mapped(data: bytes, chosen: int, change: Callable[[bytes], bytes]) -> bytes:
    """Return a message with other messages in one of its fields."""
    return b"".join(
        encode(field, change(_bytes(value)) if field == chosen else value)
        for field, value in fields(data)
    )


def _graph_with_inputs(graph: bytes) -> bytes:
    kept = []
    for field, value in fields(graph):
        if field == GRAPH_INITIALIZER and isinstance(value, bytes):
            tensor = list(fields(value))
            if (TENSOR_LOCATION, EXTERNAL) in tensor:
                kept.append(_message(GRAPH_INPUT, value_info(tensor)))
                continue
        kept.append(encode(field, value))
    return b"".join(kept)


def value_info(tensor: Sequence[Field]) -> bytes:
    """Describe a TensorProto as a ValueInfoProto: its name, dtype and shape."""
    dims = b"".join(_message(SHAPE_DIM, encode(DIM_VALUE, size)) for size in _sizes(tensor))
    facts = dict(tensor)
    kind = encode(TYPE_DTYPE, facts[TENSOR_DTYPE]) + _message(TYPE_SHAPE, dims)
    return encode(VALUE_NAME, facts[TENSOR_NAME]) + _message(
        VALUE_TYPE, _message(TYPE_TENSOR, kind)
    )


def _sizes(tensor: Sequence[Field]) -> Iterator[int]:
    """Read a TensorProto's dims, which writers give one by one or packed."""
    for field, value in tensor:
        if field != TENSOR_DIMS:
            continue
        if isinstance(value, int):
            yield value
            continue
        position = 0
        while position < len(value):
            size, position = _varint(value, position)
            yield size


def fields(data: bytes) -> Iterator[Field]:
    """Walk a message's fields; raises ValueError or IndexError where it is none."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        value, position = _varint(data, position)
        if tag & 7 == NUMBER:
            yield tag >> 3, value
        elif tag & 7 == TEXT:
            if position + value > len(data):
                raise ValueError("the file ends early")
            yield tag >> 3, data[position : position + value]
            position += value
        else:
            raise ValueError(f"unexpected wire type {tag & 7}")


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")


def encode(field: int, value: bytes | int) -> bytes:
    """Write a field of a message: a number, or bytes."""
    if isinstance(value, int):
        return _number(field << 3 | NUMBER) + _number(value)
    return _message(field, value)


def _message(field: int, content: bytes) -> bytes:
    return _number(field << 3 | TEXT) + _number(len(content)) + content


def _number(value: int) -> bytes:
    encoded = bytearray()
    value &= 2**64 - 1  # a negative number is written as what it is as an unsigned one of 64 bits
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _bytes(value: bytes | int) -> bytes:
    if isinstance(value, int):
        raise ValueError("a message is expected, and there is a number")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """The nodes of a serialised GraphProto, each by its place among the graph's fields.

    kinds: their operators; readers: how often each value is read, by nodes or as an output
    outputs: the values that the graph gives
    """

    graph: bytes
    nodes: Mapping[int, Node]
    kinds: Mapping[int, bytes]
    readers: Mapping[bytes, int]
    outputs: Sequence[bytes]

    @classmethod
    def of(cls, data: bytes) -> Self:
        """Read the nodes of a serialised ModelProto."""
        return cls.read(
            next(_bytes(value) for field, value in fields(data) if field == MODEL_GRAPH)
        )

    @classmethod
    def read(cls, graph: bytes) -> Self:
        """Read a graph's nodes; raises ValueError or IndexError where there are none."""
        nodes = {
            i: list(fields(value))
            for i, (field, value) in enumerate(fields(graph))
            if field == GRAPH_NODE and isinstance(value, bytes)
        }
        given = [
            named(list(fields(value)), VALUE_NAME)[0]
            for field, value in fields(graph)
            if field == GRAPH_OUTPUT and isinstance(value, bytes)
        ]
        readers = Counter(name for node in nodes.values() for name in named(node, INPUT))
        readers.update(given)
        kinds = {i: next(iter(named(node, OP_TYPE)), b"") for i, node in nodes.items()}
        return cls(graph=graph, nodes=nodes, kinds=kinds, readers=readers, outputs=given)

    def renamed(self, names: Mapping[bytes, bytes]) -> dict[int, bytes]:
        """Write the nodes that read one of these values, so that they read others in its place."""
        return {
            i: encode(GRAPH_NODE, b"".join(encode(*_renamed(entry, names)) for entry in node))
            for i, node in self.nodes.items()
            if not names.keys().isdisjoint(named(node, INPUT))
        }

    def replaced(self, written: Mapping[int, bytes]) -> bytes:
        """Return the graph with other fields, any number of them, in these places."""
        return b"".join(
            written[i] if i in written else encode(field, value)
            for i, (field, value) in enumerate(fields(self.graph))
        )


def _renamed(entry: Field, names: Mapping[bytes, bytes]) -> Field:
    field, value = entry
    return (field, names.get(value, value)) if field == INPUT else entry  # type: ignore[arg-type]


def with_own_operators(data: bytes, change: Callable[[Nodes], bytes]) -> bytes:
    """Return a serialised ModelProto with another graph, which may use ONNX Runtime's operators.

    Nodes whose outputs nothing reads any more are left out: the library would run them.
    """
    opset = encode(OPSET_DOMAIN, CONTRIB) + encode(OPSET_VERSION, 1)
    content = b"".join(encode(*entry) for entry in fields(data) if entry != (MODEL_OPSET, opset))
    content = mapped(content, MODEL_GRAPH, lambda graph: _swept(change(Nodes.read(graph))))
    return content + encode(MODEL_OPSET, opset)


def _swept(graph: bytes) -> bytes:
    """Leave out the nodes that no output of the graph needs; nodes stand before their readers."""
    found = Nodes.read(graph)
    needed, dead = set(found.outputs), {}
    for i, node in reversed(list(found.nodes.items())):
        if needed.isdisjoint(named(node, OUTPUT)):
            dead[i] = b""
        else:
            needed.update(named(node, INPUT))
    return found.replaced(dead)


def written_node(
    kind: bytes,
    inputs: Sequence[bytes],
    out: bytes,
    attributes: Sequence[bytes],
    domain: bytes = b"",
    others: Sequence[bytes] = (),
) -> bytes:
    """Write a node as a field of a graph; it is named after its first output.

    others: further outputs; where a name is empty, one that nothing reads
    """
    content = [encode(INPUT, name) for name in inputs]
    content += [encode(OUTPUT, name) for name in (out, *others)]
    content += [encode(NAME, out), encode(OP_TYPE, kind)]
    content += [encode(ATTRIBUTE, attribute) for attribute in attributes]
    return encode(GRAPH_NODE, b"".join(content) + (encode(DOMAIN, domain) if domain else b""))


def written_tensor(name: bytes, array: NDArray[Any]) -> bytes:
    """Write a constant of float32, float16 or int64 as a field of a graph."""
    kind = DTYPES[array.dtype.name]
    content = [encode(TENSOR_DIMS, size) for size in array.shape]
    content += [encode(TENSOR_DTYPE, kind), encode(TENSOR_NAME, name)]
    content.append(encode(TENSOR_RAW_DATA, array.astype(array.dtype.newbyteorder("<")).tobytes()))
    return encode(GRAPH_INITIALIZER, b"".join(content))


def float_attribute(name: bytes, value: float) -> bytes:
    """Write an attribute that is a float32; what holds one is not for `fields`."""
    number = _number(ATTRIBUTE_FLOAT << 3 | FOUR_BYTES) + struct.pack("<f", value)
    return encode(ATTRIBUTE_NAME, name) + number + encode(ATTRIBUTE_TYPE, FLOAT)


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
    return _numbers(attribute, ATTRIBUTE_INT)[0]


def ints_of(attribute: bytes) -> tuple[int, ...]:
    """Return the numbers that an attribute holds, which are written one by one."""
    return _numbers(attribute, ATTRIBUTE_INTS)


def _numbers(message: bytes, kind: int) -> tuple[int, ...]:
    return tuple(v for f, v in fields(message) if f == kind and isinstance(v, int))
