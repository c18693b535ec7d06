"""A graph in operators that ONNX Runtime's WebGPU provider has kernels for.

It knows the operators of ONNX 21; of later ones it lacks those that changed, and sends what it
lacks to the processor and back in the middle of a run. What stands here for an operator computes
the same in float32, on any card: WGSL promises nothing for the sine of an angle beyond pi.

Its fused attention, from 32 queries on, takes subgroups for larger than some are: on SwiftShader,
whose have four lanes, the result is 20 % off. So it is tried before it is used, and where it is
wrong all scores are computed.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from engine.backends.onnxruntime.attention import fuse_attention
from engine.graphs.graph import Precision
from engine.graphs.onnx_bytes import (
    CONTRIB,
    DTYPES,
    INPUT,
    MODEL_OPSET,
    OPSET_VERSION,
    OUTPUT,
    Node,
    Nodes,
    attributes_of,
    encode,
    fields,
    float_attribute,
    int_attribute,
    int_of,
    ints_attribute,
    named,
    with_own_operators,
    written_node,
    written_tensor,
)

OPSET = 21
HALF_EVEN = 1.5 * 2**23  # added to a small float32, it leaves no bits behind the point
# Two pi in two parts (Cody and Waite 1980): whole multiples of the first are exact in float32.
TURN = (6.28125, 2 * math.pi - 6.28125)
# The series of sin(r) / r and of cos(r) in r squared, up to where they are exact to pi.
SINE = [(-1) ** i / math.factorial(2 * i + 1) for i in range(10)]
COSINE = [(-1) ** i / math.factorial(2 * i) for i in range(10)]


def for_webgpu(data: bytes, precision: Precision, *, fused_attention: bool) -> bytes:
    """Return a serialised ModelProto that computes the same in the provider's operators.

    precision: the graph's, which its weights have
    fused_attention: whether the provider's own attention is right on this GPU
    """
    dtype = np.dtype(precision)
    if fused_attention:
        data = fuse_attention(data, causal=True)
    return _of_opset(with_own_operators(data, lambda found: _replaced(found, dtype)))


def with_products(data: bytes) -> bytes:
    """Return a serialised float16 ModelProto whose attention is products and a softmax."""

    def written(found: Nodes) -> bytes:
        attentions = _of_kind(found, b"Attention")
        return found.replaced(
            {i: b"".join(_attention(found.nodes[i], narrow=True)) for i in attentions}
        )

    return with_own_operators(data, written)


def _of_opset(data: bytes) -> bytes:
    """Say that a model is of `OPSET`; nothing in it may be of a later one."""

    def changed(opset: bytes) -> bytes:
        ours = [entry for entry in fields(opset) if entry[0] == OPSET_VERSION or entry[1]]
        if any(isinstance(value, bytes) for _, value in ours):  # another domain's
            return opset
        return encode(OPSET_VERSION, OPSET)

    return b"".join(
        encode(
            field, changed(value) if field == MODEL_OPSET and isinstance(value, bytes) else value
        )
        for field, value in fields(data)
    )


def _replaced(found: Nodes, dtype: np.dtype[Any]) -> bytes:
    widened = {_output(found.nodes[i]) for i in _of_kind(found, b"Cast")}
    written = dict(_swishes(found))
    for i, node in found.nodes.items():
        if found.kinds[i] == b"GroupNormalization":
            is_wide = named(node, INPUT)[1] in widened
            written[i] = b"".join(_group_norm(node, np.dtype(np.float32) if is_wide else dtype))
        elif found.kinds[i] == b"Attention":
            written[i] = b"".join(_attention(node, narrow=dtype != np.float32))
        elif found.kinds[i] in WRITERS:
            written[i] = b"".join(WRITERS[found.kinds[i]](node))
    for angles in {named(found.nodes[i], INPUT)[0] for i in _of_kind(found, b"Sin", b"Cos")}:
        first, *others = (
            i for i in _of_kind(found, b"Sin", b"Cos") if named(found.nodes[i], INPUT) == [angles]
        )
        values = {found.kinds[i]: _output(found.nodes[i]) for i in (first, *others)}
        written[first] = b"".join(_periodic(angles, values))
        written.update(dict.fromkeys(others, b""))
    return found.replaced(written)


def _of_kind(found: Nodes, *kinds: bytes) -> list[int]:
    return [i for i, kind in found.kinds.items() if kind in kinds]


def _output(node: Node) -> bytes:
    return named(node, OUTPUT)[0]


def _group_norm(node: Node, dtype: np.dtype[Any]) -> Iterator[bytes]:
    """Write a group norm as a norm of each group, all of whose channels are then scaled.

    dtype: what the picture and the weights are of
    """
    picture, scale, bias = named(node, INPUT)
    out, given = _output(node), attributes_of(node)
    groups = int_of(given[b"num_groups"])

    def name(part: bytes) -> bytes:
        return out + b"." + part

    yield written_tensor(name(b"ones"), np.ones(groups, dtype))
    yield written_tensor(name(b"zeros"), np.zeros(groups, dtype))
    yield written_tensor(name(b"groups"), np.array([0, groups, -1]))
    yield written_tensor(name(b"axes"), np.array([1, 2]))
    yield written_node(b"Reshape", [picture, name(b"groups")], name(b"grouped"), [])
    epsilon = [given[b"epsilon"]] if b"epsilon" in given else []
    inputs = [name(part) for part in (b"grouped", b"ones", b"zeros")]
    yield written_node(b"InstanceNormalization", inputs, name(b"even"), epsilon)
    yield written_node(b"Shape", [picture], name(b"shape"), [])
    yield written_node(b"Reshape", [name(b"even"), name(b"shape")], name(b"joined"), [])
    for vector, part in ((scale, b"scale"), (bias, b"bias")):
        yield written_node(b"Unsqueeze", [vector, name(b"axes")], name(part), [])
    yield written_node(b"Mul", [name(b"joined"), name(b"scale")], name(b"scaled"), [])
    yield written_node(b"Add", [name(b"scaled"), name(b"bias")], out, [])


def _attention(node: Node, *, narrow: bool) -> Iterator[bytes]:
    """Write attention of queries, keys and values, each (B, heads, n, d), with all its scores.

    narrow: whether some attention of the graph is of float16; the softmax is of float32
    """
    (query, key, value), out = named(node, INPUT), _output(node)
    causal = attributes_of(node).get(b"is_causal")
    wide = [int_attribute(b"to", DTYPES["float32"])]

    def name(part: bytes) -> bytes:
        return out + b"." + part

    def step(kind: bytes, part: bytes, *inputs: bytes, of: Sequence[bytes] = ()) -> bytes:
        return written_node(kind, inputs, name(part), of)

    # What comes of the shape is computed once, when the session is opened.
    ends = [int_attribute(b"start", 3), int_attribute(b"end", 4)]
    yield step(b"Shape", b"width", query, of=ends)
    yield step(b"Cast", b"wide", name(b"width"), of=wide)
    yield step(b"Sqrt", b"root", name(b"wide"))
    divisor = name(b"root")
    if narrow:
        yield step(b"CastLike", b"divisor", divisor, query)
        divisor = name(b"divisor")
    yield step(b"Div", b"scaled", query, divisor)
    yield step(b"Transpose", b"keys", key, of=[ints_attribute(b"perm", (0, 1, 3, 2))])
    yield step(b"MatMul", b"scores", name(b"scaled"), name(b"keys"))
    scores = name(b"scores")
    if narrow:
        yield step(b"Cast", b"scores.float32", scores, of=wide)
        scores = name(b"scores.float32")
    if causal is not None and int_of(causal):
        yield from _without_later(query, scores, out)
        scores = name(b"earlier")
    yield step(b"Softmax", b"weights", scores, of=[int_attribute(b"axis", 3)])
    weights = name(b"weights")
    if narrow:
        yield step(b"CastLike", b"weights.narrow", weights, value)
        weights = name(b"weights.narrow")
    yield written_node(b"MatMul", [weights, value], out, [])


def _without_later(query: bytes, scores: bytes, out: bytes) -> Iterator[bytes]:
    """Write the scores without those of keys behind their query, as `out`.earlier."""

    def name(part: bytes) -> bytes:
        return out + b"." + part

    yield written_tensor(name(b"zero"), np.array(0))
    yield written_tensor(name(b"one"), np.array(1))
    yield written_tensor(name(b"first"), np.array([0]))
    yield written_tensor(name(b"second"), np.array([1]))
    yield written_tensor(name(b"never"), np.array(-np.inf, np.float32))
    ends = [int_attribute(b"start", 2), int_attribute(b"end", 3)]
    yield written_node(b"Shape", [query], name(b"lengths"), ends)
    yield written_node(b"Squeeze", [name(b"lengths")], name(b"length"), [])
    limits = [name(part) for part in (b"zero", b"length", b"one")]
    yield written_node(b"Range", limits, name(b"places"), [])
    for axis, part in ((b"first", b"of_keys"), (b"second", b"of_queries")):
        yield written_node(b"Unsqueeze", [name(b"places"), name(axis)], name(part), [])
    yield written_node(b"Less", [name(b"of_queries"), name(b"of_keys")], name(b"later"), [])
    chosen = [name(b"later"), name(b"never"), scores]
    yield written_node(b"Where", chosen, name(b"earlier"), [])


def _rounded(node: Node) -> Iterator[bytes]:
    """Write rounding to the nearest, halves to even, as two sums."""
    (value,), out = named(node, INPUT), _output(node)
    large, added = out + b".large", out + b".added"
    yield written_tensor(large, np.array(HALF_EVEN, np.float32))
    yield written_node(b"Add", [value, large], added, [])
    yield written_node(b"Sub", [added, large], out, [])


def _arg_max(node: Node) -> Iterator[bytes]:
    """Write the place of the largest of whole numbers as that of float32: below 2^24 they are."""
    (value,), out = named(node, INPUT), _output(node)
    yield written_node(
        b"Cast", [value], out + b".float32", [int_attribute(b"to", DTYPES["float32"])]
    )
    settings = list(attributes_of(node).values())
    yield written_node(b"ArgMax", [out + b".float32"], out, settings)


WRITERS = {b"Round": _rounded, b"ArgMax": _arg_max}


def _periodic(angles: bytes, values: Mapping[bytes, bytes]) -> Iterator[bytes]:
    """Write the sine and the cosine of angles, which have up to three axes.

    Less whole turns they are summed up as a series, both at once along a new first axis.
    values: the names of both, by their operators; either may be missing
    """

    def name(part: bytes) -> bytes:
        return angles + b".turned." + part

    def constant(part: bytes, value: float) -> bytes:
        return written_tensor(name(part), np.array(value, np.float32))

    def step(kind: bytes, part: bytes, *inputs: bytes) -> bytes:
        given = [angles if given == b"angles" else name(given) for given in inputs]
        return written_node(kind, given, name(part), [])

    yield constant(b"per_turn", 1 / (2 * math.pi))
    yield constant(b"half", 0.5)
    yield step(b"Mul", b"in_turns", b"angles", b"per_turn")
    yield step(b"Add", b"shifted", b"in_turns", b"half")
    yield step(b"Floor", b"turns", b"shifted")
    rest = b"angles"
    for i, piece in enumerate(TURN):
        n = b"%d" % i
        yield constant(b"turn" + n, piece)
        yield step(b"Mul", b"whole" + n, b"turns", b"turn" + n)
        yield step(b"Sub", b"rest" + n, rest, b"whole" + n)
        rest = b"rest" + n
    yield step(b"Mul", b"square", rest, rest)
    total = b"square"
    for i, (sine, cosine) in enumerate(reversed([*zip(SINE, COSINE, strict=True)])):
        n = b"%d" % i
        both = np.array([sine, cosine], np.float32).reshape(2, 1, 1, 1)
        yield written_tensor(name(b"term" + n), both)
        if i == 0:
            total = b"term" + n
            continue
        yield step(b"Mul", b"product" + n, total, b"square")
        yield step(b"Add", b"sum" + n, b"product" + n, b"term" + n)
        total = b"sum" + n
    yield step(b"Shape", b"shape", b"angles")
    for at, (kind, part) in enumerate(((b"Sin", b"sine"), (b"Cos", b"cosine"))):
        if kind not in values:
            continue
        yield written_tensor(name(part + b".at"), np.array(at))
        yield step(b"Gather", part + b".taken", total, part + b".at")
        shaped = [name(part + b".taken"), name(b"shape")]
        if kind == b"Cos":
            yield written_node(b"Reshape", shaped, values[kind], [])
        else:
            yield written_node(b"Reshape", shaped, name(part), [])
            yield written_node(b"Mul", [name(part), name(rest)], values[kind], [])


def _swishes(found: Nodes) -> Iterator[tuple[int, bytes]]:
    """Yield what stands for x * sigmoid(x): one operator, and nothing in the other's place."""
    gates = {
        (named(found.nodes[i], INPUT)[0], _output(found.nodes[i])): i
        for i in _of_kind(found, b"Sigmoid")
    }
    for i in _of_kind(found, b"Mul"):
        first, second = named(found.nodes[i], INPUT)
        for x, gate in ((first, second), (second, first)):
            if (x, gate) in gates and found.readers[gate] == 1:
                settings, out = [float_attribute(b"alpha", 1)], _output(found.nodes[i])
                yield i, written_node(b"QuickGelu", [x], out, settings, CONTRIB)
                yield gates[x, gate], b""
