"""Group normalisation as ONNX Runtime's CUDA provider has a kernel for it.

It has none for ONNX's GroupNormalization, which it would take apart into a dozen passes over the
picture in float32. Its own GroupNorm does all in two, and the SiLU behind it too; it wants the
channels last, as convolutions do with `prefer_nhwc`, so the library takes most of the transposes
out again. Its statistics are float32. A thread takes two channels, so a group of an odd number of
them stays ONNX's.
"""

from collections import Counter
from collections.abc import Iterator, Mapping

from engine.device import Shape
from engine.onnx_file import GRAPH_OUTPUT, MODEL_GRAPH, VALUE_NAME, encode, fields

# Fields of ModelProto, GraphProto, NodeProto, AttributeProto and OperatorSetIdProto.
MODEL_OPSET, GRAPH_NODE = 8, 1
INPUT, OUTPUT, NAME, OP_TYPE, ATTRIBUTE, DOMAIN = 1, 2, 3, 4, 5, 7
ATTRIBUTE_NAME, ATTRIBUTE_INT, ATTRIBUTE_INTS, ATTRIBUTE_TYPE = 1, 3, 8, 20
INT, INTS = 2, 7  # AttributeProto.AttributeType
FLOAT = 1  # TensorProto.DataType
WIDENED = ".float32"  # what `export.islands` adds to the name of a weight that it casts
CONTRIB = b"com.microsoft"
CHANNELS_LAST, CHANNELS_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)

Node = list[tuple[int, bytes | int]]


def fuse_group_norms(data: bytes, weights: Mapping[str, Shape]) -> bytes:
    """Return a serialised ModelProto whose group norms are ONNX Runtime's own.

    Their inputs must be pictures, (B, C, h, w), as in all graphs of this project.
    weights: the graph's, with their shapes
    """
    opset = encode(1, CONTRIB) + encode(2, 1)
    return b"".join(
        encode(field, _fused(value, weights) if field == MODEL_GRAPH else value)
        for field, value in fields(data)
    ) + encode(MODEL_OPSET, opset)


def _fused(graph: bytes | int, weights: Mapping[str, Shape]) -> bytes:
    assert isinstance(graph, bytes)  # a message
    nodes = {
        i: list(fields(value))
        for i, (field, value) in enumerate(fields(graph))
        if field == GRAPH_NODE and isinstance(value, bytes)
    }
    kinds = {i: _text(node, OP_TYPE) for i, node in nodes.items()}
    readers = Counter(name for node in nodes.values() for name in _names(node, INPUT))
    readers.update(
        _names(list(fields(value)), VALUE_NAME)[0]
        for field, value in fields(graph)
        if field == GRAPH_OUTPUT and isinstance(value, bytes)
    )
    multiplied = {
        frozenset(_names(node, INPUT)): i for i, node in nodes.items() if kinds[i] == b"Mul"
    }
    sigmoids = {_names(node, INPUT)[0]: i for i, node in nodes.items() if kinds[i] == b"Sigmoid"}
    replaced: dict[int, bytes] = {}
    for i, node in nodes.items():
        if kinds[i] != b"GroupNormalization" or _group_size(node, weights) % 2:
            continue
        (out,) = _names(node, OUTPUT)
        silu, swish = None, sigmoids.get(out)
        if swish is not None and readers[out] == 2:
            (gate,) = _names(nodes[swish], OUTPUT)
            silu = multiplied.get(frozenset((out, gate))) if readers[gate] == 1 else None
        if silu is not None and swish is not None:
            replaced[swish] = replaced[silu] = b""
            (out,) = _names(nodes[silu], OUTPUT)
        replaced[i] = b"".join(_group_norm(node, out, silu is not None))
    return b"".join(
        replaced[i] if i in replaced else encode(field, value)
        for i, (field, value) in enumerate(fields(graph))
    )


def _group_norm(node: Node, out: bytes, silu: bool) -> Iterator[bytes]:
    picture, scale, bias = _names(node, INPUT)
    given, groups = _attributes(node), _groups(node)
    last, normed = out + b".last", out + b".normed"
    yield _node(b"Transpose", [picture], last, [_ints(b"perm", CHANNELS_LAST)])
    wide = [out + b".scale", out + b".bias"]  # the kernel takes both in float32 only
    for narrow, name in zip((scale, bias), wide, strict=True):
        yield _node(b"Cast", [narrow], name, [_int(b"to", FLOAT)])
    settings = [_int(b"groups", groups), _int(b"activation", int(silu)), _int(b"channels_last", 1)]
    if b"epsilon" in given:
        settings.append(given[b"epsilon"])
    yield _node(b"GroupNorm", [last, *wide], normed, settings, CONTRIB)
    yield _node(b"Transpose", [normed], out, [_ints(b"perm", CHANNELS_FIRST)])


def _group_size(node: Node, weights: Mapping[str, Shape]) -> int:
    """Count the channels of a group; 1 where that cannot be known."""
    scale = _names(node, INPUT)[1].decode().removesuffix(WIDENED)
    return weights[scale][0] // _groups(node) if scale in weights else 1


def _groups(node: Node) -> int:
    return int(dict(fields(_attributes(node)[b"num_groups"]))[ATTRIBUTE_INT])


def _attributes(node: Node) -> dict[bytes, bytes]:
    return {_attribute_name(value): value for value in _names(node, ATTRIBUTE)}


def _node(
    kind: bytes, inputs: list[bytes], out: bytes, attributes: list[bytes], domain: bytes = b""
) -> bytes:
    content = [encode(INPUT, name) for name in inputs]
    content += [encode(OUTPUT, out), encode(NAME, out), encode(OP_TYPE, kind)]
    content += [encode(ATTRIBUTE, attribute) for attribute in attributes]
    return encode(GRAPH_NODE, b"".join(content) + (encode(DOMAIN, domain) if domain else b""))


def _int(name: bytes, value: bytes | int) -> bytes:
    kind = encode(ATTRIBUTE_TYPE, INT)
    return encode(ATTRIBUTE_NAME, name) + encode(ATTRIBUTE_INT, value) + kind


def _ints(name: bytes, values: tuple[int, ...]) -> bytes:
    content = b"".join(encode(ATTRIBUTE_INTS, value) for value in values)
    return encode(ATTRIBUTE_NAME, name) + content + encode(ATTRIBUTE_TYPE, INTS)


def _names(node: Node, kind: int) -> list[bytes]:
    return [value for field, value in node if field == kind and isinstance(value, bytes)]


def _text(node: Node, kind: int) -> bytes:
    return next(iter(_names(node, kind)), b"")


def _attribute_name(attribute: bytes) -> bytes:
    # Not all of it is read: further on are floats, which `fields` does not know.
    return next(value for _, value in fields(attribute) if isinstance(value, bytes))
