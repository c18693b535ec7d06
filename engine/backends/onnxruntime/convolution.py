"""Convolutions as ONNX Runtime's CUDA provider has them for pictures with the channels last.

Tensor cores want the channels last, of pictures and of weights. ONNX's Conv has both first; the
library can rearrange them, but makes a copy of the weights in every session that does. Its own
NhwcConv takes them as they are to lie, so all sessions can use one array on the device.
"""

from collections.abc import Iterator, Mapping

from engine.backends.onnxruntime.group_norm import CHANNELS_FIRST, CHANNELS_LAST
from engine.devices.device import Shape
from engine.graphs.onnx_bytes import (
    CONTRIB,
    INPUT,
    OUTPUT,
    Node,
    Nodes,
    attributes_of,
    ints_attribute,
    named,
    with_own_operators,
    written_node,
)


def with_channels_last(data: bytes, weights: Mapping[str, Shape]) -> bytes:
    """Return a serialised ModelProto whose convolutions of pictures are NhwcConv.

    Each then wants its weight as (out, height, width, in). One without a bias stays: the library
    knows by the bias, a constant, how the weight lies.
    weights: the graph's, with their shapes
    """
    return with_own_operators(data, lambda found: _rearranged(found, weights))


def _rearranged(found: Nodes, weights: Mapping[str, Shape]) -> bytes:
    written = {
        i: b"".join(_convolution(node))
        for i, node in found.nodes.items()
        if found.kinds[i] == b"Conv" and _has_bias(node, weights)
    }
    return found.replaced(written)


def _has_bias(convolution: Node, weights: Mapping[str, Shape]) -> bool:
    _, weight, *bias = (name.decode() for name in named(convolution, INPUT))
    return len(weights.get(weight, ())) == 4 and len(bias) == 1 and bias[0] in weights


def _convolution(node: Node) -> Iterator[bytes]:
    picture, weight, bias = named(node, INPUT)
    (out,) = named(node, OUTPUT)
    last, made = out + b".last", out + b".made"
    yield written_node(b"Transpose", [picture], last, [ints_attribute(b"perm", CHANNELS_LAST)])
    settings = list(attributes_of(node).values())
    yield written_node(b"NhwcConv", [last, weight, bias], made, settings, CONTRIB)
    yield written_node(b"Transpose", [made], out, [ints_attribute(b"perm", CHANNELS_FIRST)])
