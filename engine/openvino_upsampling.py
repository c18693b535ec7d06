"""Enlarging and convolving as one operation of an OpenVINO model.

Behind a nearest-neighbour enlargement by two, a 3 x 3 convolution meets every number up to four
times, with weights that can be added first: of nine products four are left. They are a transposed
convolution of stride 2, whose 4 x 4 kernel is the 3 x 3 one, turned by half a turn and summed over
squares of 2 x 2. Nothing is lost but the order in which is summed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends import Ranges
from engine.openvino_layers import CONVOLUTION, as_constant, round_value
from engine.quantization import input_range, quantize

ENLARGING = {
    "mode": "nearest",
    "coordinate_transformation_mode": "asymmetric",
    "nearest_mode": "floor",
}
CONVOLVING = {"strides": [1, 1], "dilations": [1, 1], "pads_begin": [1, 1], "pads_end": [1, 1]}
KERNEL = (3, 3)
DOUBLED = [1, 1, 2, 2]  # of (B, C, h, w)


@dataclass(frozen=True, slots=True, kw_only=True)
class Enlargement:
    """Two operations that are one where the first doubles; weight: the name of the second's."""

    weight: str
    enlarging: Any
    convolving: Any

    def doubles(self) -> bool:
        """Tell whether height and width are known to become twice as large."""
        factors = self.enlarging.input_value(1).get_node()
        if self.enlarging.get_attributes()["shape_calculation_mode"] == "scales":
            return factors.get_type_name() == "Constant" and [*factors.data] == DOUBLED
        sizes = [
            value.get_partial_shape()
            for value in (self.enlarging.input_value(0), self.enlarging.output(0))
        ]
        if any(size.is_dynamic for size in sizes):
            return False
        before, after = (np.array(size.to_shape()) for size in sizes)
        return bool((after == before * DOUBLED).all())


def find_enlargements(model: Any) -> Iterator[Enlargement]:
    """Yield those of a model, whether its weights are still parameters or constants."""
    for operation in model.get_ordered_ops():
        if operation.get_type_name() != CONVOLUTION:
            continue
        enlarging, weight = (operation.input_value(i).get_node() for i in range(2))
        if (
            enlarging.get_type_name() == "Interpolate"
            and _is(enlarging, ENLARGING)
            and _is(operation, CONVOLVING)
            and tuple(operation.input_value(1).get_shape())[2:] == KERNEL
        ):
            name = _uncast(weight).get_friendly_name()
            yield Enlargement(weight=name, enlarging=enlarging, convolving=operation)


def merge_enlargements(library: Any, model: Any, ranges: Ranges) -> None:
    """Make one operation of every two of a model that double, in int8 where the ranges are known.

    The model's weights must be constants.
    """
    ops = library.opset13
    for found in [*find_enlargements(model)]:
        if not found.doubles():
            continue
        kernel = merged_kernel(_uncast(found.convolving.input_value(1).get_node()).data)
        given = found.enlarging.input_value(0)
        if found.weight in ranges:
            ends = input_range(*ranges[found.weight], shifted=False)
            given = round_value(library, given, ends)
            quantized = quantize(kernel)
            weight = as_constant(library, _inputs_first(quantized.values))
            weight = ops.multiply(ops.convert(weight, "f32"), _inputs_first(quantized.scales))
        else:
            weight = as_constant(library, _inputs_first(kernel))
        merged = ops.convolution_backprop_data(
            given, weight, DOUBLED[2:], pads_begin=[1, 1], pads_end=[1, 1], dilations=[1, 1]
        )
        found.convolving.output(0).replace(merged.output(0))


def merged_kernel(weight: NDArray[Any]) -> NDArray[np.float32]:
    """Return the kernel, (O, I, 4, 4), of the transposed convolution; weight: (O, I, 3, 3)."""
    turned = weight[:, :, ::-1, ::-1].astype(np.float32)
    kernel = np.zeros((*weight.shape[:2], 4, 4), np.float32)
    for row, column in product(range(2), repeat=2):
        kernel[:, :, row : row + 3, column : column + 3] += turned
    return kernel


def _inputs_first(kernel: NDArray[Any]) -> NDArray[Any]:
    """(O, I, ...) -> (I, O, ...), as a transposed convolution takes it."""
    return np.ascontiguousarray(kernel.swapaxes(0, 1))


def _is(operation: Any, wanted: dict[str, Any]) -> bool:
    attributes = operation.get_attributes()
    return all(attributes[name] == value for name, value in wanted.items())


def _uncast(node: Any) -> Any:
    return node.input_value(0).get_node() if node.get_type_name() == "Convert" else node
