"""A graph's weights on a GPU, one copy for all sessions of the graph.

What products and convolutions are made with lies in the device's memory as the kernels want it.
The sessions are given its addresses, so those of other sizes use it too, and an adapter changes it
where it lies. Other weights, most of them vectors, are constants of each session.
"""

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import Arrays
from engine.backends.binding import bind, weight_chunks
from engine.backends.onnxruntime.device_values import DeviceValue
from engine.backends.onnxruntime.group_norm import CHANNELS_LAST, FLOAT
from engine.backends.settings import cpu_count
from engine.checkpoints.formats.files import release
from engine.devices.device import Device, DeviceArray, Shape
from engine.graphs.graph import Graph
from engine.graphs.onnx_bytes import (
    GRAPH_INITIALIZER,
    INPUT,
    MODEL_GRAPH,
    OUTPUT,
    TENSOR_DIMS,
    TENSOR_DTYPE,
    TENSOR_NAME,
    Node,
    Nodes,
    attributes_of,
    encode,
    fields,
    int_of,
    mapped,
    named,
    with_own_operators,
)

FLOAT32 = np.dtype(np.float32)
# Operators that leave a weight as it lies, and which of their inputs it is. Any other may be
# computed when a session is opened, from what the library is then told that the weight holds.
SHARING = {(b"NhwcConv", 1), (b"FusedMatMul", 1), (b"Gemm", 1), (b"Gather", 0)}
CONVOLUTION = (b"NhwcConv", 1)


def widened(data: bytes, weights: Mapping[str, Shape]) -> tuple[bytes, frozenset[str]]:
    """Have a serialised ModelProto take those weights in float32 that it casts and reads so alone.

    weights: the graph's; returns the model and the names of what is to be float32
    """
    names: set[bytes] = set()
    data = with_own_operators(data, lambda found: _without_casts(found, weights, names))

    def typed(tensor: Node) -> Node:
        if named(tensor, TENSOR_NAME)[0] not in names:
            return tensor
        return [(f, FLOAT if f == TENSOR_DTYPE else value) for f, value in tensor]

    return _with_initializers(data, typed), frozenset(name.decode() for name in names)


def _without_casts(found: Nodes, weights: Mapping[str, Shape], widened: set[bytes]) -> bytes:
    casts = {
        named(node, OUTPUT)[0]: named(node, INPUT)[0]
        for i, node in found.nodes.items()
        if found.kinds[i] == b"Cast" and _widens(node, weights, found)
    }
    widened.update(casts.values())
    return found.replaced(found.renamed(casts))


def _widens(cast: Node, weights: Mapping[str, Shape], found: Nodes) -> bool:
    (name,) = named(cast, INPUT)
    alone = name.decode() in weights and found.readers[name] == 1
    return alone and int_of(attributes_of(cast)[b"to"]) == FLOAT


def _with_initializers(data: bytes, change: Callable[[Node], Node]) -> bytes:
    """Return a serialised ModelProto whose initializers, as fields of TensorProto, are changed."""

    def changed(tensor: bytes) -> bytes:
        return b"".join(encode(*entry) for entry in change(list(fields(tensor))))

    return mapped(data, MODEL_GRAPH, lambda graph: mapped(graph, GRAPH_INITIALIZER, changed))


class DeviceWeights:
    """The weights of a graph, for sessions that are opened from `model`.

    data: the graph, a serialised ModelProto, as it is to be run
    in_float32: those weights that it takes so whatever the graph's precision is
    index: the GPU's number
    model: the same graph, with the shared weights in the shapes that they have on the device
    """

    def __init__(
        self, graph: Graph, data: bytes, in_float32: Collection[str], device: Device, index: int
    ) -> None:
        self._graph = graph
        self._in_float32 = in_float32
        self._device = device
        self._index = index
        uses = _uses(data, graph.weights)
        arrays = {name for name, shape in graph.weights.items() if len(shape) > 1}
        self._shared = {name for name in arrays if uses[name] <= SHARING}
        self._last = {name for name in self._shared if CONVOLUTION in uses[name]}
        self.model = _with_initializers(data, self._rearranged)
        self._arrays: dict[str, DeviceArray] = {}
        self._values: dict[str, DeviceValue] = {}
        self._constants: dict[str, NDArray[Any]] = {}

    def adopt(self, others: Collection["DeviceWeights"]) -> set[str]:
        """Take over the arrays of others that hold the same weights; return their names.

        Whoever is told of other weights changes them for all, so all must be told.
        """
        for name in self._shared:
            for other in others:
                if name in other._arrays and self._form(name) == other._form(name):
                    self._arrays[name] = other._arrays[name]
        return set(self._arrays)

    def take(self, weights: Arrays, names: Collection[str]) -> bool:
        """Upload the weights of these names; say whether sessions must be opened again for them.

        Raises BackendError or ModelError as `engine.backends.binding.bind` does; some are new then.
        """
        for chunk in weight_chunks(self._graph, names):
            bound = list(bind(self._graph, weights, chunk))
            with ThreadPoolExecutor(cpu_count()) as pool:  # as `bind` does
                laid_out = pool.map(self._laid_out, *zip(*bound, strict=True)) if bound else ()
                for (name, _), array in zip(bound, laid_out, strict=False):
                    if name in self._shared:
                        self._upload(name, array)
                    else:
                        self._constants[name] = array
            release(weights)
        return not self._shared.issuperset(names)

    def give(self, options: Any, library: Any) -> object:
        """Have a session that is opened with these SessionOptions use the weights.

        library: the module onnxruntime; returns what must be kept until the session is open
        """
        value, kept = library.OrtValue.ortvalue_from_numpy, self._constants
        constants = {name: value(array) for name, array in kept.items()}
        # The library wants to see what an array holds before it takes another's memory for it.
        # Where it computed with that, contrary to `SHARING`, every number would come out as NaN.
        size = max((prod(array.shape) for array in self._arrays.values()), default=0)
        blanks = {dtype: np.full(size, np.nan, dtype) for dtype in self._dtypes()}
        for name, array in self._arrays.items():
            blank = blanks[array.dtype][: prod(array.shape)]
            constants[name] = value(blank.reshape(array.shape))
            if name not in self._values:
                self._values[name] = DeviceValue(library, array, self._index)
            options.add_initializer(name, self._values[name].value)
        options.add_external_initializers(list(constants), list(constants.values()))
        return constants

    def _form(self, name: str) -> tuple[object, ...]:
        """Say how a weight lies on the device."""
        return self._graph.precision, name in self._in_float32, name in self._last

    def _dtypes(self) -> set[np.dtype[Any]]:
        return {array.dtype for array in self._arrays.values()}

    def _laid_out(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        if name in self._last:
            array = array.transpose(CHANNELS_LAST)
        return np.ascontiguousarray(array, FLOAT32 if name in self._in_float32 else None)

    def _upload(self, name: str, array: NDArray[Any]) -> None:
        if name not in self._arrays:
            self._arrays[name] = self._device.empty(array.shape, array.dtype)
        self._device.upload(array, self._arrays[name])

    def _rearranged(self, tensor: Node) -> Node:
        name = named(tensor, TENSOR_NAME)[0].decode()
        if name not in self._last:
            return tensor
        shape = self._graph.weights[name]
        dims: Node = [(TENSOR_DIMS, shape[axis]) for axis in CHANNELS_LAST]
        return [*dims, *(entry for entry in tensor if entry[0] != TENSOR_DIMS)]


def _uses(data: bytes, weights: Collection[str]) -> dict[str, set[tuple[bytes, int]]]:
    """Find which operators read each weight, and as which of their inputs."""
    uses: dict[str, set[tuple[bytes, int]]] = {name: set() for name in weights}
    found = Nodes.of(data)
    for i, node in found.nodes.items():
        for place, name in enumerate(named(node, INPUT)):
            uses.get(name.decode(), set()).add((found.kinds[i], place))
    return uses
