"""Writing a graph node by node, without torch or onnx.

Graphs that cannot ship, because files of one architecture come in any width and depth, are written
when such a file is opened. As in a traced graph (`export`), the weights are external initializers
that bear the checkpoint's names and hold nothing.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.configs.base import Config
from engine.graphs.graph import (
    METADATA_KEY,
    Graph,
    Part,
    Precision,
    Symbol,
    Tensor,
    graph_name,
    signature,
)
from engine.graphs.onnx_bytes import (
    ATTRIBUTE_NAME,
    ATTRIBUTE_TYPE,
    DIM_NAME,
    DIM_VALUE,
    DTYPES,
    EXTERNAL,
    GRAPH_INITIALIZER,
    GRAPH_INPUT,
    GRAPH_NAME,
    GRAPH_OUTPUT,
    MODEL_GRAPH,
    MODEL_METADATA,
    MODEL_OPSET,
    MODEL_VERSION,
    OPSET_DOMAIN,
    OPSET_VERSION,
    SHAPE_DIM,
    TENSOR_DIMS,
    TENSOR_DTYPE,
    TENSOR_LOCATION,
    TENSOR_NAME,
    TYPE_DTYPE,
    TYPE_SHAPE,
    TYPE_TENSOR,
    VALUE_NAME,
    VALUE_TYPE,
    encode,
    float_attribute,
    int_attribute,
    ints_attribute,
    written_node,
    written_tensor,
)

__all__ = ["GraphWriter"]

IR_VERSION, OPSET = 10, 20  # the first with Gelu
ATTRIBUTE_TEXT, TEXT = 4, 3  # AttributeProto's field of a string, and its type
TENSOR_EXTERNAL, KEY, VALUE = 13, 1, 2  # TensorProto's field, and those of its entries
Attribute = int | float | str | Sequence[int]


class GraphWriter:
    """A graph that grows node by node; a value is its name, which every method returns.

    part, config, precision: what it is the graph of; inputs and outputs are as the signature has
        them, floats between them of this precision
    """

    def __init__(self, part: Part, config: Config, precision: Precision) -> None:
        self._part = part
        self._config = config
        self._precision = precision
        self._signature = signature(part, config)
        self._shapes = config.tensor_shapes()
        self._nodes: list[tuple[str, Sequence[str], str, Mapping[str, Attribute]]] = []
        self._constants: dict[tuple[Any, ...], str] = {}
        self._initializers: list[bytes] = []
        self._used: set[str] = set()

    def op(self, kind: str, *inputs: str, **attributes: Attribute) -> str:
        """Add a node of one of ONNX's operators; returns its output."""
        name = f"{kind}_{len(self._nodes)}"
        self._nodes.append((kind, inputs, name, attributes))
        return name

    def weight(self, name: str) -> str:
        """Return a tensor of the checkpoint, one of the configuration's."""
        assert name in self._shapes, name
        self._used.add(name)
        return name

    def numbers(self, values: Iterable[float] | float) -> str:
        """Return constants in the graph's precision."""
        return self._constant(np.asarray(values, self._precision))

    def whole(self, *values: int) -> str:
        """Return whole numbers, such as a shape."""
        return self._constant(np.array(values, np.int64))

    def array(self, values: NDArray[np.int64]) -> str:
        """Return whole numbers of any shape, such as indices."""
        return self._constant(values)

    def given(self, name: str) -> str:
        """Return an input, floats in the graph's precision."""
        return name if self._precision == "float32" else self._cast(name, self._precision)

    def give(self, name: str, value: str) -> None:
        """Make the last node's value an output, of the signature's dtype."""
        if self._precision != "float32":
            value = self._cast(value, "float32")
        kind, inputs, last, attributes = self._nodes.pop()
        assert last == value
        self._nodes.append((kind, inputs, name, attributes))

    def conv(self, x: str, name: str, *, bias: bool = True, stride: int = 1) -> str:
        """Convolve (1, C, h, w) with a layer's weights; at a stride of 1 it keeps its size."""
        shape = self._shapes[f"{name}.weight"]
        padding = [(side - 1) // 2 for side in shape[2:]] if stride == 1 else [0, 0]
        tensors = [self.weight(f"{name}.weight")]
        tensors += [self.weight(f"{name}.bias")] if bias else []
        return self.op(
            "Conv", x, *tensors, kernel_shape=shape[2:], pads=padding * 2, strides=[stride] * 2
        )

    def linear(self, x: str, name: str, *, bias: bool = True) -> str:
        """Multiply the last axis with a layer's weights of (outputs, inputs)."""
        turned = self.op("Transpose", self.weight(f"{name}.weight"), perm=[1, 0])
        product = self.op("MatMul", x, turned)
        return self.op("Add", product, self.weight(f"{name}.bias")) if bias else product

    def layer_norm(self, x: str, name: str, epsilon: float = 1e-5) -> str:
        """Normalise the last axis."""
        scale, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self.op("LayerNormalization", x, scale, bias, epsilon=epsilon)

    def leaky_relu(self, x: str, slope: float) -> str:
        """Let a part of what is below 0 through."""
        return self.op("LeakyRelu", x, alpha=slope)

    def enlarged(self, x: str, factor: int) -> str:
        """Repeat every pixel of (1, C, h, w)."""
        scales = self._constant(np.array([1, 1, factor, factor], np.float32))
        options = {"mode": "nearest", "nearest_mode": "floor"}
        return self.op(
            "Resize", x, "", scales, coordinate_transformation_mode="asymmetric", **options
        )

    def shuffled(self, x: str, factor: int) -> str:
        """Make larger pictures of more channels (torch's pixel_shuffle)."""
        return self.op("DepthToSpace", x, blocksize=factor, mode="CRD")

    def graph(self) -> Graph:
        """Return the graph, which is in memory alone."""
        assert self._used == self._shapes.keys(), self._shapes.keys() - self._used
        return Graph(
            path=Path(graph_name(self._part, self._config, self._precision)),
            part=self._part,
            architecture=self._config.key(),
            precision=self._precision,
            inputs=tuple(self._signature.inputs),
            outputs=tuple(self._signature.outputs),
            shapes={name: tensor.shape for name, tensor in self._signature.inputs.items()},
            weights=self._shapes,
            content=self._written(),
        )

    def _cast(self, value: str, dtype: str) -> str:
        return self.op("Cast", value, to=DTYPES[dtype])

    def _constant(self, array: NDArray[Any]) -> str:
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = f"constant_{len(self._constants)}"
            self._initializers.append(written_tensor(self._constants[key].encode(), array))
        return self._constants[key]

    def _written(self) -> bytes:
        """Write the ModelProto."""
        weights = (self._external(name, shape) for name, shape in self._shapes.items())
        inputs = (self._value(GRAPH_INPUT, *each) for each in self._signature.inputs.items())
        outputs = (self._value(GRAPH_OUTPUT, *each) for each in self._signature.outputs.items())
        name = encode(GRAPH_NAME, self._part.encode())
        content = (
            *(_node(*each) for each in self._nodes),
            name,
            *self._initializers,
            *weights,
            *inputs,
            *outputs,
        )
        facts = {
            "part": self._part,
            "architecture": self._config.key(),
            "precision": self._precision,
            "inputs": list(self._signature.inputs),
            "weights": self._shapes,
        }
        return b"".join(
            (
                encode(MODEL_VERSION, IR_VERSION),
                encode(MODEL_OPSET, encode(OPSET_DOMAIN, b"") + encode(OPSET_VERSION, OPSET)),
                encode(MODEL_GRAPH, b"".join(content)),
                encode(MODEL_METADATA, _entry(METADATA_KEY, json.dumps(facts))),
            )
        )

    def _value(self, field: int, name: str, tensor: Tensor) -> bytes:
        """Describe an input or an output; sizes that the architecture sets are numbers."""
        fixed = self._config.symbols()
        sizes = [fixed.get(size, size) if isinstance(size, str) else size for size in tensor.shape]
        dims = b"".join(encode(SHAPE_DIM, _size(size)) for size in sizes)
        kind = encode(TYPE_DTYPE, DTYPES[tensor.dtype]) + encode(TYPE_SHAPE, dims)
        described = encode(VALUE_TYPE, encode(TYPE_TENSOR, kind))
        return encode(field, encode(VALUE_NAME, name.encode()) + described)

    def _external(self, name: str, shape: Sequence[int]) -> bytes:
        size = math.prod(shape) * np.dtype(self._precision).itemsize
        entries = {"location": "weights", "offset": "0", "length": str(size)}
        tensor = [encode(TENSOR_DIMS, side) for side in shape]
        tensor += [
            encode(TENSOR_DTYPE, DTYPES[self._precision]),
            encode(TENSOR_NAME, name.encode()),
        ]
        tensor += [encode(TENSOR_EXTERNAL, _entry(*each)) for each in entries.items()]
        tensor.append(encode(TENSOR_LOCATION, EXTERNAL))
        return encode(GRAPH_INITIALIZER, b"".join(tensor))


def _node(
    kind: str, inputs: Sequence[str], name: str, attributes: Mapping[str, Attribute]
) -> bytes:
    return written_node(
        kind.encode(),
        [given.encode() for given in inputs],
        name.encode(),
        [_attribute(key.encode(), value) for key, value in attributes.items()],
    )


def _attribute(name: bytes, value: Attribute) -> bytes:
    if isinstance(value, int):
        return int_attribute(name, value)
    if isinstance(value, float):
        return float_attribute(name, value)
    if isinstance(value, str):
        text = encode(ATTRIBUTE_TEXT, value.encode()) + encode(ATTRIBUTE_TYPE, TEXT)
        return encode(ATTRIBUTE_NAME, name) + text
    return ints_attribute(name, value)


def _entry(key: str, value: str) -> bytes:
    return encode(KEY, key.encode()) + encode(VALUE, value.encode())


def _size(size: Symbol) -> bytes:
    """Write a dimension: its size, or the symbol of one that is free."""
    return encode(DIM_VALUE, size) if isinstance(size, int) else encode(DIM_NAME, size.encode())
