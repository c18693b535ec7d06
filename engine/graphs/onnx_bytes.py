"""ONNX files as bytes: what a backend reads and changes of one without the onnx library.

An ONNX file is one protobuf message (https://protobuf.dev/programming-guides/encoding), a
ModelProto, whose fields are numbered in onnx.proto.
"""

from collections.abc import Callable, Iterator

# Fields of ModelProto, GraphProto, NodeProto and AttributeProto, TensorProto, ValueInfoProto,
# TypeProto and its tensor's type.
MODEL_GRAPH, MODEL_METADATA = 7, 14
GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_INPUT, GRAPH_OUTPUT = 1, 5, 11, 12
NODE_OPERATOR, NODE_ATTRIBUTE, ATTRIBUTE_NAME = 4, 5, 1
TENSOR_DIMS, TENSOR_DTYPE, TENSOR_NAME, TENSOR_LOCATION = 1, 2, 8, 14
VALUE_NAME, VALUE_TYPE, TYPE_TENSOR, TYPE_DTYPE, TYPE_SHAPE, SHAPE_DIM, DIM_VALUE = (
    1,
    2,
    1,
    1,
    2,
    1,
    1,
)
EXTERNAL = 1  # TensorProto.DataLocation
NUMBER, TEXT = 0, 2  # protobuf's wire types: a varint, and strings, bytes or messages

Field = tuple[int, bytes | int]


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


def weights_as_inputs(data: bytes) -> bytes:
    """Turn the external initializers of a serialised ModelProto into inputs of the graph."""
    return _mapped(data, MODEL_GRAPH, _graph_with_inputs)


def without_attribute(data: bytes, operator: str, attribute: str) -> bytes:
    """Leave an attribute out of all nodes of an operator, for a library that does not take it."""

    # The name is written first; further on are floats, which `fields` does not read.
    named = (ATTRIBUTE_NAME, attribute.encode())

    def node(content: bytes) -> bytes:
        found = list(fields(content))
        if (NODE_OPERATOR, operator.encode()) not in found:
            return content
        return b"".join(
            encode(field, value)
            for field, value in found
            if field != NODE_ATTRIBUTE or next(fields(_bytes(value)), None) != named
        )

    return _mapped(data, MODEL_GRAPH, lambda graph: _mapped(graph, GRAPH_NODE, node))


def _mapped(data: bytes, chosen: int, change: Callable[[bytes], bytes]) -> bytes:
    """Change the messages of one field."""
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
                kept.append(_message(GRAPH_INPUT, _as_value(tensor)))
                continue
        kept.append(encode(field, value))
    return b"".join(kept)


def _as_value(tensor: list[Field]) -> bytes:
    """Describe a tensor as a ValueInfoProto: its name, dtype and shape."""
    dims = b"".join(_message(SHAPE_DIM, encode(DIM_VALUE, size)) for size in _sizes(tensor))
    facts = dict(tensor)
    kind = encode(TYPE_DTYPE, facts[TENSOR_DTYPE]) + _message(TYPE_SHAPE, dims)
    return encode(VALUE_NAME, facts[TENSOR_NAME]) + _message(
        VALUE_TYPE, _message(TYPE_TENSOR, kind)
    )


def _sizes(tensor: list[Field]) -> Iterator[int]:
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
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _bytes(value: bytes | int) -> bytes:
    if isinstance(value, int):
        raise ValueError("a message is expected, and there is a number")
    return value
