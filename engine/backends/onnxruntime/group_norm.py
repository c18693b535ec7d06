"""Group normalisation as ONNX Runtime's CUDA provider has a kernel for it.

It has none for ONNX's GroupNormalization, which it would take apart into a dozen passes over the
picture in float32. Its own GroupNorm does all in two, and the SiLU behind it too; it wants the
channels last, as convolutions do with `prefer_nhwc`, so the library takes most of the transposes
out again. Its statistics are float32. A thread takes two channels, so a group of an odd number of
them stays ONNX's.
"""

from collections.abc import Iterator, Mapping

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
WIDENED = ".float32"  # what `export.islands` adds to the name of a weight that it casts
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
    written: dict[int, bytes] = {}
    for i, node in nodes.items():
        if kinds[i] != b"GroupNormalization" or _group_size(node, weights) % 2:
            continue
        (out,) = named(node, OUTPUT)
        silu, swish = None, sigmoids.get(out)
        if swish is not None and readers[out] == 2:
            (gate,) = named(nodes[swish], OUTPUT)
            silu = multiplied.get(frozenset((out, gate))) if readers[gate] == 1 else None
        if silu is not None and swish is not None:
            written[swish] = written[silu] = b""
            (out,) = named(nodes[silu], OUTPUT)
        written[i] = b"".join(_group_norm(node, out, silu is not None))
    return found.replaced(written)


def _group_norm(node: Node, out: bytes, silu: bool) -> Iterator[bytes]:
    picture, scale, bias = named(node, INPUT)
    given, groups = attributes_of(node), _groups(node)
    last, normed = out + b".last", out + b".normed"
    yield written_node(b"Transpose", [picture], last, [ints_attribute(b"perm", CHANNELS_LAST)])
    wide = [out + b".scale", out + b".bias"]  # the kernel takes both in float32 only
    for narrow, name in zip((scale, bias), wide, strict=True):
        yield written_node(b"Cast", [narrow], name, [int_attribute(b"to", FLOAT)])
    settings = [
        int_attribute(b"groups", groups),
        int_attribute(b"activation", int(silu)),
        int_attribute(b"channels_last", 1),
    ]
    if b"epsilon" in given:
        settings.append(given[b"epsilon"])
    yield written_node(b"GroupNorm", [last, *wide], normed, settings, CONTRIB)
    yield written_node(b"Transpose", [normed], out, [ints_attribute(b"perm", CHANNELS_FIRST)])


def _group_size(node: Node, weights: Mapping[str, Shape]) -> int:
    """Count the channels of a group; 1 where that cannot be known."""
    scale = named(node, INPUT)[1].decode().removesuffix(WIDENED)
    return weights[scale][0] // _groups(node) if scale in weights else 1


def _groups(node: Node) -> int:
    return int_of(attributes_of(node)[b"num_groups"])
