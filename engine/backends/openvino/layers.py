"""The layers of an OpenVINO model that have weights: how these are put in, whole numbers included.

The library turns a rounding of a layer's input (FakeQuantize) and a weight of whole numbers with
its scale into one operation on whole numbers.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import Ranges
from engine.backends.openvino.int8 import LEVELS, QuantizedWeight, input_range, is_quantized

CONVOLUTION = "Convolution"
LAYERS = (CONVOLUTION, "MatMul")
REARRANGED = ("Transpose", "Reshape")  # what may stand between a weight and its layer
MIN, MAX = "min input of ", "max input of "


def put_weight(
    library: Any, model: Any, parameters: Sequence[Any], weight: NDArray[Any] | QuantizedWeight
) -> None:
    """Put a weight in the place of a model's parameters, which are float32, without a copy.

    parameters: one, or several that have equal shares of the weight's rows

    Raises ValueError where the shapes differ.
    """
    ops = library.opset13
    array = weight.values if isinstance(weight, QuantizedWeight) else weight
    for parameter, piece in zip(parameters, _shares(len(array), len(parameters)), strict=True):
        name, wanted = parameter.get_friendly_name(), parameter.get_partial_shape()
        rows = array[piece]
        if not wanted.compatible(library.PartialShape(rows.shape)):
            raise ValueError(f"{name!r} is {wanted} in it, and {rows.shape} in its description")
        value = as_constant(library, rows)
        value.set_friendly_name(name)
        if isinstance(weight, QuantizedWeight):
            value = ops.multiply(ops.convert(value, "f32"), weight.scales[piece])
        else:
            value = as_float32(library, value)
        parameter.output(0).replace(value.output(0))
        model.remove_parameter(parameter)


def _shares(rows: int, count: int) -> list[slice]:
    return [slice(i * rows // count, (i + 1) * rows // count) for i in range(count)]


def round_inputs(library: Any, model: Any, ranges: Ranges) -> None:
    """Round the input of every layer whose range is known; inputs that several share once."""
    rounded: dict[tuple[Any, ...], Any] = {}
    for name, layer in _layers(model, ranges):
        given = layer.input_value(0)
        ends = input_range(*ranges[name], shifted=layer.get_type_name() == CONVOLUTION)
        key = given.get_node().get_friendly_name(), given.get_index(), ends
        if key not in rounded:
            rounded[key] = _round_value(library, given, ends)
        layer.input(0).replace_source_output(rounded[key].output(0))


def _round_value(library: Any, value: Any, ends: tuple[float, float]) -> Any:
    """Return a value rounded to 256 levels between two ends, as `input_range` gives them."""
    numbers = [np.float32(end) for end in ends]
    return library.opset13.fake_quantize(value, *numbers, *numbers, levels=LEVELS)


def as_float32(library: Any, constant: Any) -> Any:
    """Widen a constant if it is of float16, without the library's doing so when it compiles."""
    if constant.get_element_type() != library.Type.f16:
        return constant
    value = library.opset13.convert(constant, "f32")
    value.get_rt_info()["decompression_0"] = ""  # or all are widened when compiling
    return value


def as_constant(library: Any, array: NDArray[Any]) -> Any:
    """Return an array of any shape and dtype as a constant, without a copy."""
    return library.op.Constant(_writable(array), shared_memory=True)


def add_observers(library: Any, model: Any, weights: Collection[str]) -> None:
    """Make the smallest and the largest input of every layer outputs of a model."""
    ops, added = library.opset13, []
    for name, layer in _layers(model, weights):
        given = layer.input_value(0)
        axes = np.arange(len(given.get_partial_shape()))
        for title, reduce in ((MIN, ops.reduce_min), (MAX, ops.reduce_max)):
            value = reduce(given, axes, keep_dims=False)
            value.output(0).get_tensor().set_names({title + name})
            added.append(ops.result(value))
    model.add_results(added)


def _layers(model: Any, weights: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Yield the layers that int8 can compute, each with the name of its weight."""
    for operation in model.get_ordered_ops():
        if operation.get_type_name() in LAYERS:
            source = operation.input_value(1).get_node()
            while source.get_type_name() in REARRANGED:
                source = source.input_value(0).get_node()
            name = source.get_friendly_name()
            if name in weights and is_quantized(name):
                yield name, operation


class _Writable:
    """Memory that is mapped for reading, in numpy's array interface, as if it could be written.

    The library takes no other arrays. It does not write to constants.
    """

    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array  # whoever holds a view of this holds the array
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def _writable(array: NDArray[Any]) -> NDArray[Any]:
    return array if array.flags.writeable else np.asarray(_Writable(array))
