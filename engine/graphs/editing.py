"""Changing a graph in its bytes: nodes in the place of others, constants and inputs beside them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import GraphError
from engine.graphs.onnx_bytes import (
    DIM_NAME,
    DIM_VALUE,
    DTYPES,
    GRAPH_INPUT,
    GRAPH_NODE,
    INPUT,
    MODEL_GRAPH,
    OUTPUT,
    SHAPE_DIM,
    TYPE_DTYPE,
    TYPE_SHAPE,
    TYPE_TENSOR,
    VALUE_NAME,
    VALUE_TYPE,
    Nodes,
    encode,
    mapped,
    named,
    written_tensor,
)

__all__ = ["Editor", "edited"]


def edited(data: bytes, name: str, change: Callable[["Editor"], None]) -> bytes:
    """Return a serialised ModelProto whose graph was changed; raises GraphError.

    name: of the change, after which its constants are called
    """

    def written(graph: bytes) -> bytes:
        editor = Editor(graph, name)
        change(editor)
        return editor.graph()

    return mapped(data, MODEL_GRAPH, written)


class Editor:
    """A graph that is being changed.

    found: what it was; a node is its place there, a value its name
    """

    def __init__(self, graph: bytes, name: str) -> None:
        self._name = name.encode()
        self.found = Nodes.read(graph)
        self._makers = {
            name: i for i, node in self.found.nodes.items() for name in named(node, OUTPUT)
        }
        self._written: dict[int, bytes] = {}
        self._beside: list[bytes] = []
        self._constants: dict[tuple[Any, ...], bytes] = {}

    def graph(self) -> bytes:
        """Return what the graph has become."""
        return self.found.replaced(self._written) + b"".join(self._beside)

    def kind(self, i: int) -> bytes:
        """Return the operator of a node."""
        return self.found.kinds[i]

    def inputs(self, i: int) -> list[bytes]:
        """Return the values that a node reads."""
        return named(self.found.nodes[i], INPUT)

    def output(self, i: int) -> bytes:
        """Return the first value that a node makes."""
        return named(self.found.nodes[i], OUTPUT)[0]

    def maker(self, value: bytes) -> int:
        """Return the node that makes a value, -1 for an input or a weight."""
        return self._makers.get(value, -1)

    def reader(self, value: bytes, kind: bytes, *, first: bool = False) -> int:
        """Return the node of a kind that reads a value, as its first input; raises GraphError."""
        for i in self.found.nodes:
            if self.kind(i) == kind:
                read = self.inputs(i)[:1] if first else self.inputs(i)
                if value in read:
                    return i
        raise GraphError(
            f"the graph has no {kind.decode()} of {value.decode()!r}; make it anew with "
            "`python -m export MODEL`"
        )

    def constant(self, array: NDArray[Any]) -> bytes:
        """Return a constant of any shape and dtype, which is written once."""
        key = array.dtype.name, array.shape, array.tobytes()
        if key not in self._constants:
            self._constants[key] = b"%s.constant_%d" % (self._name, len(self._constants))
            self._beside.append(written_tensor(self._constants[key], array))
        return self._constants[key]

    def whole(self, *numbers: int) -> bytes:
        """Return whole numbers, such as axes."""
        return self.constant(np.array(numbers, np.int64))

    def add_input(self, name: str, shape: Sequence[int | str]) -> bytes:
        """Add an input of float32; a size that is not fixed is a symbol."""
        dims = b"".join(
            encode(
                SHAPE_DIM,
                encode(DIM_VALUE, size)
                if isinstance(size, int)
                else encode(DIM_NAME, size.encode()),
            )
            for size in shape
        )
        kind = encode(TYPE_DTYPE, DTYPES["float32"]) + encode(TYPE_SHAPE, dims)
        described = encode(VALUE_TYPE, encode(TYPE_TENSOR, kind))
        value = encode(VALUE_NAME, name.encode())
        self._beside.append(encode(GRAPH_INPUT, value + described))
        return name.encode()

    def replace(self, i: int, nodes: bytes) -> None:
        """Put nodes in the place of one, any number of them."""
        self._written[i] = nodes

    def copied(self, i: int, out: bytes | None = None) -> bytes:
        """Write a node as it was, or so that its first value has another name."""
        node, before = self.found.nodes[i], self.output(i)
        return encode(
            GRAPH_NODE,
            b"".join(
                encode(field, out if out and field == OUTPUT and value == before else value)
                for field, value in node
            ),
        )
