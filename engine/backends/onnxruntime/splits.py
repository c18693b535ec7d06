"""Splits as ONNX Runtime's CUDA provider makes them without the processor.

Its kernel for pieces of stated sizes uploads these in every run, from memory of the processor that
a recorded graph would have to keep. A Slice for each piece has what it needs when it is opened.
"""

from collections.abc import Collection

import numpy as np

from engine.graphs.onnx_bytes import (
    GRAPH_INITIALIZER,
    INPUT,
    OUTPUT,
    TENSOR_NAME,
    TENSOR_RAW_DATA,
    Nodes,
    attributes_of,
    fields,
    int_of,
    named,
    with_own_operators,
    written_node,
    written_tensor,
)


def with_slices(data: bytes) -> bytes:
    """Return a serialised ModelProto whose splits into pieces of stated sizes are slices."""
    return with_own_operators(data, _sliced)


def _sliced(found: Nodes) -> bytes:
    stated = {
        named(node, INPUT)[1]
        for i, node in found.nodes.items()
        if found.kinds[i] == b"Split" and len(named(node, INPUT)) > 1
    }
    sizes = _whole_numbers(found.graph, stated)
    written = {}
    for i, node in found.nodes.items():
        given = named(node, INPUT)
        if found.kinds[i] != b"Split" or len(given) < 2 or given[1] not in sizes:
            continue
        attributes, at = attributes_of(node), 0
        axis = int_of(attributes[b"axis"]) if b"axis" in attributes else 0
        axis -= (axis >> 63) << 64  # one from behind is written as an unsigned number
        written[i] = b""
        for out, size in zip(named(node, OUTPUT), sizes[given[1]], strict=True):
            ends = {b".start": at, b".end": at + size, b".axis": axis}
            for name, number in ends.items():
                written[i] += written_tensor(out + name, np.array([number], np.int64))
            written[i] += written_node(b"Slice", [given[0], *(out + n for n in ends)], out, [])
            at += size
    return found.replaced(written)


def _whole_numbers(graph: bytes, names: Collection[bytes]) -> dict[bytes, list[int]]:
    """Read the initializers of these names, which hold whole numbers."""
    numbers = {}
    for field, value in fields(graph):
        if field == GRAPH_INITIALIZER and isinstance(value, bytes):
            tensor = dict(fields(value))
            name, data = tensor[TENSOR_NAME], tensor.get(TENSOR_RAW_DATA)
            if isinstance(name, bytes) and isinstance(data, bytes) and name in names:
                numbers[name] = np.frombuffer(data, "<i8").tolist()
    return numbers
