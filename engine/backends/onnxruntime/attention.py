"""Attention as ONNX Runtime computes it on a processor without all its scores in memory.

Its kernel for ONNX's Attention multiplies all queries with all keys before anything else: 2 GiB in
a Stable Diffusion 1.5 at 512 x 512. Its own MultiHeadAttention goes by blocks that stay in the
processor's cache (Dao et al. 2022, FlashAttention, arXiv:2205.14135), and splits the heads itself.
"""

from collections.abc import Mapping, Sequence

from engine.graphs.onnx_bytes import (
    CONTRIB,
    GRAPH_INITIALIZER,
    INPUT,
    OUTPUT,
    TENSOR_NAME,
    Node,
    Nodes,
    attributes_of,
    fields,
    int_attribute,
    int_of,
    ints_of,
    named,
    with_own_operators,
    written_node,
)

TENSOR_RAW_DATA = 9  # of TensorProto
SPLIT = (0, 2, 1, 3)  # (B, n, heads, d) to (B, heads, n, d), and back


def fuse_attention(data: bytes, *, causal: bool = False, standard: bool = False) -> bytes:
    """Return a serialised ModelProto whose attention is ONNX Runtime's own.

    Attention over (B, n, heads * d), split into heads before it and joined behind it, becomes one
    node. What is masked, or scaled otherwise than by the root of d, stays as it is.
    causal: also where no token sees those behind it
    standard: whether the node is ONNX's Attention, of three dimensions
    """
    return with_own_operators(data, lambda found: _fused(found, causal, standard))


def _fused(found: Nodes, causal: bool, standard: bool) -> bytes:
    makers = {name: i for i, node in found.nodes.items() for name in named(node, OUTPUT)}
    takers = {name: i for i, node in found.nodes.items() for name in named(node, INPUT)}
    numbers = _numbers(found.graph)

    def maker(name: bytes, kind: bytes) -> Node | None:
        i = makers.get(name)
        return found.nodes[i] if i is not None and found.kinds[i] == kind else None

    def whole(split: bytes) -> tuple[bytes, int, int | None] | None:
        """Return what a value is before it is split into heads, how many these are, and n."""
        transposed = maker(split, b"Transpose")
        if transposed is None or not _swaps(transposed):
            return None
        reshaped = maker(named(transposed, INPUT)[0], b"Reshape")
        shape = maker(named(reshaped, INPUT)[1], b"Concat") if reshaped is not None else None
        if reshaped is None or shape is None or len(named(shape, INPUT)) != len(SPLIT):
            return None
        length, heads = (numbers.get(name) for name in named(shape, INPUT)[1:3])
        return None if heads is None else (named(reshaped, INPUT)[0], heads, length)

    def reader(name: bytes, kind: bytes) -> int | None:
        i = takers.get(name)
        return i if i is not None and found.readers[name] == 1 and found.kinds[i] == kind else None

    written: dict[int, bytes] = {}
    for i, node in found.nodes.items():
        if found.kinds[i] != b"Attention" or b"scale" in attributes_of(node):
            continue
        if _is_causal(node) and not causal:
            continue
        given = [whole(name) for name in named(node, INPUT)]
        if len(given) != 3 or None in given:
            continue
        names, heads, lengths = zip(*filter(None, given), strict=True)
        (out,) = named(node, OUTPUT)
        swapped = reader(out, b"Transpose")
        if swapped is not None and _swaps(found.nodes[swapped]):
            joined = reader(named(found.nodes[swapped], OUTPUT)[0], b"Reshape")
            if joined is None:
                continue
            (out,) = named(found.nodes[joined], OUTPUT)
            written[swapped] = written[joined] = b""
        elif lengths[0] != 1 or reader(out, b"Reshape") is None:  # one query is joined as it is
            continue
        written[i] = _node(names, out, heads[0], _is_causal(node), standard)
    return found.replaced(written)


def _node(names: Sequence[bytes], out: bytes, heads: int, is_causal: bool, standard: bool) -> bytes:
    if standard:
        counts = [int_attribute(name, heads) for name in (b"q_num_heads", b"kv_num_heads")]
        settings = [*counts, int_attribute(b"is_causal", int(is_causal))]
        return written_node(b"Attention", names, out, settings)
    settings = [int_attribute(b"num_heads", heads)]
    settings.append(int_attribute(b"unidirectional", int(is_causal)))
    return written_node(b"MultiHeadAttention", names, out, settings, CONTRIB)


def _swaps(transpose: Node) -> bool:
    return ints_of(attributes_of(transpose)[b"perm"]) == SPLIT


def _is_causal(attention: Node) -> bool:
    causal = attributes_of(attention).get(b"is_causal")
    return causal is not None and int_of(causal) != 0


def _numbers(graph: bytes) -> Mapping[bytes, int]:
    """Read the initializers that hold one integer, by their names."""
    numbers = {}
    for field, value in fields(graph):
        if field == GRAPH_INITIALIZER and isinstance(value, bytes):
            tensor = dict(fields(value))
            name, data = tensor[TENSOR_NAME], tensor.get(TENSOR_RAW_DATA)
            if isinstance(name, bytes) and isinstance(data, bytes) and len(data) == 8:
                numbers[name] = int.from_bytes(data, "little", signed=True)
    return numbers
