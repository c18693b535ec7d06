"""Group normalisation as ONNX Runtime's CUDA provider has kernels for it.

It has none for ONNX's GroupNormalization, which it would take apart into a dozen passes over the
picture in float32. Its own GroupNorm does all in two, and the SiLU behind it too; its SkipGroupNorm
also the sum before it, be it a residual or a time embedding. Both want the channels last, as
convolutions do, so the library takes most of the transposes out again. Their statistics are
float32. A thread takes two channels, so groups of an odd number become InstanceNormalization.
"""

from collections.abc import Iterator, Mapping, Sequence

from engine.devices.device import Shape
from engine.graphs.onnx_bytes import (
    CONTRIB,
    INPUT,
    OUTPUT,
    Node,
    Nodes,
    attributes_of,
    int_attribute,
    int_of,
    ints_attribute,
    named,
    with_own_operators,
    written_node,
)

FLOAT = 1  # TensorProto.DataType
PICTURES = (b"Conv", b"Add", b"Concat", b"Transpose", b"Reshape", b"Resize")
"""Operators whose results, added to a picture, are as large."""
CHANNELS_LAST, CHANNELS_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


def fuse_group_norms(data: bytes, weights: Mapping[str, Shape]) -> bytes:
    """Return a serialised ModelProto whose group norms are ONNX Runtime's own.

    Their inputs must be pictures, (B, C, h, w), as in all graphs of this project.
    weights: the graph's, with their shapes
    """
    return with_own_operators(data, lambda found: _fused(found, weights))


def _fused(found: Nodes, weights: Mapping[str, Shape]) -> bytes:
    nodes, kinds, readers = found.nodes, found.kinds, found.readers
    multiplied = {
        frozenset(named(node, INPUT)): i for i, node in nodes.items() if kinds[i] == b"Mul"
    }
    sigmoids = {named(node, INPUT)[0]: i for i, node in nodes.items() if kinds[i] == b"Sigmoid"}
    makers = {name: i for i, node in nodes.items() for name in named(node, OUTPUT)}
    written: dict[int, bytes] = {}
    for i, node in nodes.items():
        if kinds[i] != b"GroupNormalization":
            continue
        if _group_size(node, weights) % 2:
            written[i] = b"".join(_instance_norm(node))
            continue
        (out,) = named(node, OUTPUT)
        silu, swish = None, sigmoids.get(out)
        if swish is not None and readers[out] == 2:
            (gate,) = named(nodes[swish], OUTPUT)
            silu = multiplied.get(frozenset((out, gate))) if readers[gate] == 1 else None
        if silu is not None and swish is not None:
            written[swish] = written[silu] = b""
            (out,) = named(nodes[silu], OUTPUT)
        add = makers.get(named(node, INPUT)[0])
        terms = _terms(found, makers, add) if add is not None and add not in written else None
        if terms is None or add is None:
            written[i] = b"".join(_group_norm(node, out, silu is not None))
        else:
            written[i] = b""
            written[add] = b"".join(_group_norm(node, out, silu is not None, *terms))
    return found.replaced(written)


def _terms(found: Nodes, makers: Mapping[bytes, int], add: int) -> tuple[bytes, bytes, bool] | None:
    """Return the two terms of a sum, and whether the second is a vector for each picture.

    One is a convolution's. The other is as large, or a linear layer's, (B, C), of which only the
    axes of height and width are still missing.
    """

    def kind(name: bytes) -> bytes:
        return found.kinds[makers[name]] if name in makers else b""

    given = named(found.nodes[add], INPUT)
    if found.kinds[add] != b"Add":
        return None
    for image, other in (given, given[::-1]):
        if kind(image) != b"Conv":
            continue
        if kind(other) in PICTURES:
            return image, other, False
        if kind(other) == b"Unsqueeze":
            (vector,) = named(found.nodes[makers[other]], INPUT)[:1]
            return (image, vector, True) if kind(vector) == b"Gemm" else None
    return None


def _group_norm(
    node: Node,
    out: bytes,
    silu: bool,
    image: bytes = b"",
    skip: bytes = b"",
    vector: bool = False,
) -> Iterator[bytes]:
    """Write a norm, and the sum of two terms before it where there are any."""
    given, scale, bias = named(node, INPUT)
    attributes = attributes_of(node)
    last, normed = out + b".last", out + b".normed"
    yield _transposed(image or given, last, CHANNELS_LAST)
    wide = [out + b".scale", out + b".bias"]  # the kernel takes both in float32 only
    for narrow, name in zip((scale, bias), wide, strict=True):
        yield written_node(b"Cast", [narrow], name, [int_attribute(b"to", FLOAT)])
    settings = [
        int_attribute(b"groups", _groups(node)),
        int_attribute(b"activation", int(silu)),
        int_attribute(b"channels_last", 1),
    ]
    if b"epsilon" in attributes:
        settings.append(attributes[b"epsilon"])
    if not skip:
        yield written_node(b"GroupNorm", [last, *wide], normed, settings, CONTRIB)
    else:
        added, total = skip if vector else out + b".skip", out + b".sum"
        if not vector:
            yield _transposed(skip, added, CHANNELS_LAST)
        inputs = [last, *wide, added]
        yield written_node(b"SkipGroupNorm", inputs, normed, settings, CONTRIB, [total])
        yield _transposed(total, given, CHANNELS_FIRST)
    yield _transposed(normed, out, CHANNELS_FIRST)


def _transposed(name: bytes, out: bytes, axes: Sequence[int]) -> bytes:
    return written_node(b"Transpose", [name], out, [ints_attribute(b"perm", axes)])


def _instance_norm(node: Node) -> Iterator[bytes]:
    """Write a norm as one of each group, all of whose channels are then scaled."""
    image, scale, bias = named(node, INPUT)
    (out,) = named(node, OUTPUT)

    def part(name: bytes) -> bytes:
        return out + b"." + name

    def constant(name: bytes, *values: int) -> bytes:
        return written_node(b"Constant", [], part(name), [ints_attribute(b"value_ints", values)])

    ones, zeros = part(b"ones"), part(b"zeros")
    yield constant(b"groups", _groups(node))
    yield written_node(b"ConstantOfShape", [part(b"groups")], part(b"zero"), [])
    yield written_node(b"CastLike", [part(b"zero"), scale], zeros, [])
    yield written_node(b"Exp", [zeros], ones, [])
    yield constant(b"grouped", 0, _groups(node), -1)
    yield written_node(b"Reshape", [image, part(b"grouped")], part(b"split"), [])
    epsilon = [a for name, a in attributes_of(node).items() if name == b"epsilon"]
    even = part(b"even")
    yield written_node(b"InstanceNormalization", [part(b"split"), ones, zeros], even, epsilon)
    yield written_node(b"Shape", [image], part(b"shape"), [])
    yield written_node(b"Reshape", [even, part(b"shape")], part(b"joined"), [])
    yield constant(b"axes", 1, 2)
    yield written_node(b"Unsqueeze", [scale, part(b"axes")], part(b"scale"), [])
    yield written_node(b"Unsqueeze", [bias, part(b"axes")], part(b"bias"), [])
    yield written_node(b"Mul", [part(b"joined"), part(b"scale")], part(b"scaled"), [])
    yield written_node(b"Add", [part(b"scaled"), part(b"bias")], out, [])


def _group_size(node: Node, weights: Mapping[str, Shape]) -> int:
    """Count the channels of a group; 1 where that cannot be known."""
    scale = named(node, INPUT)[1].decode()
    return weights[scale][0] // _groups(node) if scale in weights else 1


def _groups(node: Node) -> int:
    return int_of(attributes_of(node)[b"num_groups"])
