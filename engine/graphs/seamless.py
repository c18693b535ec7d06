"""Seamless graphs: what lies beyond an edge of the picture is its other side.

Convolutions that fill the outside with zeros show where a picture ends. Here the other side is laid
there instead, along one axis or both, as PyTorch's `padding_mode="circular"` does, and every layer
of a UNet or an autoencoder then sees a ring or a torus: copies of the picture join without a seam.
"""

from collections.abc import Mapping

import numpy as np

from engine.graphs.editing import Editor, edited
from engine.graphs.onnx_bytes import (
    ATTRIBUTE,
    GRAPH_INITIALIZER,
    GRAPH_NODE,
    INPUT,
    TENSOR_NAME,
    TENSOR_RAW_DATA,
    attributes_of,
    encode,
    fields,
    int_attribute,
    ints_attribute,
    ints_of,
    written_node,
)

__all__ = ["AXES", "made_seamless"]

# The axes of (B, C, h, w) along which copies are to join, by what a request calls them.
AXES: Mapping[str, tuple[int, ...]] = {"x": (3,), "y": (2,), "both": (2, 3)}
END = 2**63 - 1  # of a slice: as far as there is something
RANK = 4


def made_seamless(data: bytes, along: str) -> bytes:
    """Return a serialised ModelProto whose convolutions join opposite edges.

    along: "x" joins left and right, "y" top and bottom, "both" all
    """
    return edited(data, "seamless", lambda editor: _Wrapping(editor, AXES[along]).write())


class _Wrapping:
    """The padding of a graph's convolutions, along these axes.

    joined: values with their ends laid on, by what was laid on what; two that read one share it
    """

    def __init__(self, editor: Editor, axes: tuple[int, ...]) -> None:
        self._editor = editor
        self._axes = axes
        self._joined: dict[tuple[bytes, int, int, int], bytes] = {}

    def write(self) -> None:
        """Put other nodes in the place of those that pad."""
        constants = _pads(self._editor.found.graph)
        for i in self._editor.found.nodes:
            if self._editor.kind(i) == b"Conv":
                self._convolution(i)
            elif self._editor.kind(i) == b"Pad":  # an encoder's, before it halves a map
                self._padding(i, constants[self._editor.inputs(i)[1]])

    def _convolution(self, i: int) -> None:
        """Write a convolution that pads with zeros along the other axes alone."""
        node = self._editor.found.nodes[i]
        attributes = attributes_of(node)
        sides = ints_of(attributes[b"pads"]) if b"pads" in attributes else (0,) * 4
        pads = [0, 0, *sides[:2], 0, 0, *sides[2:]]
        x, nodes = self._wrapped(self._editor.inputs(i)[0], pads)
        if not nodes and x == self._editor.inputs(i)[0]:
            return
        attributes[b"pads"] = ints_attribute(b"pads", [*pads[2:4], *pads[6:]])
        kept = [entry for entry in node if entry[0] != ATTRIBUTE]
        kept[next(at for at, (field, _) in enumerate(kept) if field == INPUT)] = INPUT, x
        kept += [(ATTRIBUTE, attribute) for attribute in attributes.values()]
        content = b"".join(encode(*entry) for entry in kept)
        self._editor.replace(i, nodes + encode(GRAPH_NODE, content))

    def _padding(self, i: int, amounts: list[int]) -> None:
        """Write what pads a map on its own."""
        pads = list(amounts)
        x, nodes = self._wrapped(self._editor.inputs(i)[0], pads)
        given = [x, self._editor.whole(*pads)]
        self._editor.replace(i, nodes + written_node(b"Pad", given, self._editor.output(i), []))

    def _wrapped(self, x: bytes, pads: list[int]) -> tuple[bytes, bytes]:
        """Lay the far ends on a value and take them out of its padding; returns it and its nodes.

        pads: before every axis, then behind
        """
        nodes = b""
        for axis in self._axes:
            before, after = pads[axis], pads[axis + RANK]
            pads[axis] = pads[axis + RANK] = 0
            key = x, axis, before, after
            if before or after:
                if key not in self._joined:
                    self._joined[key] = b"%s.joined_%d_%d_%d" % key
                    nodes += self._ends(*key, self._joined[key])
                x = self._joined[key]
        return x, nodes

    def _ends(self, x: bytes, axis: int, before: int, after: int, out: bytes) -> bytes:
        """Write the far end, the value and its near end, one behind the other."""
        whole, nodes, parts = self._editor.whole, b"", [x]
        if before:
            parts.insert(0, out + b".before")
            limits = [whole(-before), whole(END), whole(axis)]
            nodes += written_node(b"Slice", [x, *limits], parts[0], [])
        if after:
            parts.append(out + b".after")
            limits = [whole(0), whole(after), whole(axis)]
            nodes += written_node(b"Slice", [x, *limits], parts[-1], [])
        return nodes + written_node(b"Concat", parts, out, [int_attribute(b"axis", axis)])


def _pads(graph: bytes) -> dict[bytes, list[int]]:
    """Read the initializers that may pad a map: twice as many whole numbers as it has axes."""
    numbers = {}
    for field, value in fields(graph):
        if field == GRAPH_INITIALIZER and isinstance(value, bytes):
            tensor = dict(fields(value))
            name, data = tensor[TENSOR_NAME], tensor.get(TENSOR_RAW_DATA)
            if isinstance(name, bytes) and isinstance(data, bytes) and len(data) == 16 * RANK:
                numbers[name] = np.frombuffer(data, "<i8").tolist()
    return numbers
