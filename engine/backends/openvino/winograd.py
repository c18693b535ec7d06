"""3 x 3 convolutions of an OpenVINO model in fewer products, after Winograd.

The outputs of a convolution are cut in tiles of 2 x 2. A tile is A (U * V) A' with V = B d B' of
the inputs d that it sees and U = G g G' of the kernel g (Lavin and Gray 2015, arXiv:1509.09308,
section 4.1): the work is in sums over channels, and these are of the numbers of U * V alone. A
convolution has sixteen of them for a tile instead of thirty-six products. Behind a
nearest-neighbour enlargement by two a tile comes of one number and those around it, and has nine.

In float32 results differ by rounding (1e-6); in bfloat16, which rounds once more on either side, a
layer's error grows from 0.3 to 0.5 %.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from engine.backends.openvino.layers import CONVOLUTION, as_constant, as_float32
from engine.checkpoints.formats.tensors import widen
from engine.store.scratch import Scratch

IN_PLACE = {"strides": [1, 1], "dilations": [1, 1], "pads_begin": [1, 1], "pads_end": [1, 1]}
ENLARGING = {
    "mode": "nearest",
    "coordinate_transformation_mode": "asymmetric",
    "nearest_mode": "floor",
}
TILE = 2  # outputs on a side
ROWS = 32  # of a weight, that are transformed at a time: they stay in the processor's cache
MIN_CHANNELS = 256  # in and out: with fewer, it costs more to move numbers than to multiply them
MIN_POSITIONS = 256  # of a picture: with fewer, reading the weights costs most, and these grow


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tiling:
    """How one side of a tile is computed.

    seen: B, (n, n) for the n inputs that a tile sees, each a row of factors
    kernel: G, (n, 3); outputs: A, (2, n); stride: from the inputs of a tile to the next one's
    """

    seen: NDArray[np.float32]
    kernel: NDArray[np.float32]
    outputs: NDArray[np.float32]
    stride: int

    def transform(self, weight: NDArray[Any]) -> NDArray[np.float32]:
        """Return U, (n, n, O, I); weight: (O, I, 3, 3)."""
        n, (outputs, inputs, *kernel) = len(self.kernel), weight.shape
        both: NDArray[np.float32] = np.kron(self.kernel, self.kernel)
        return (both @ widen(weight).reshape(-1, math.prod(kernel)).T).reshape(
            n, n, outputs, inputs
        )


def _matrix(*rows: tuple[float, ...]) -> NDArray[np.float32]:
    return np.array(rows, np.float32)


PLAIN = Tiling(
    seen=_matrix((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, -1, 0, 1)),
    kernel=_matrix((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1)),
    outputs=_matrix((1, 1, 1, 0), (0, 1, -1, 1)),
    stride=TILE,
)
ENLARGED = Tiling(
    seen=_matrix((1, -1, 0), (0, 1, 0), (0, -1, 1)),
    kernel=_matrix((1, 0, 0), (1, 1, 1), (0, 0, 1)),
    outputs=_matrix((1, 1, 0), (0, 1, 1)),
    stride=1,
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Convolution:
    """An operation of a model that can be computed in tiles.

    given: what these are cut from; weight: (O, I, 3, 3), the model's own memory
    """

    operation: Any
    given: Any
    weight: NDArray[Any]
    tiling: Tiling

    def shape(self) -> tuple[int, ...]:
        """(n, n, O, I), of its weight in tiles."""
        n = len(self.tiling.kernel)
        return (n, n, *self.weight.shape[:2])


def transform_convolutions(library: Any, model: Any, dtype: DTypeLike) -> Scratch | None:
    """Compute in tiles what of a model gains by it; its weights must be constants.

    dtype: of the new weights; returns the memory that these are in, None where nothing changed
    """
    found = [*_find(model)]
    if not found:
        return None
    shapes = [each.shape() for each in found]
    scratch = Scratch(sum(map(math.prod, shapes)) * np.dtype(dtype).itemsize)
    for each, shape in zip(found, shapes, strict=True):
        there = scratch.take(shape, dtype)
        for start in range(0, len(each.weight), ROWS):
            rows = slice(start, start + ROWS)
            there[:, :, rows] = each.tiling.transform(each.weight[rows])
        scratch.release()
        tiles = _in_tiles(library, each.given, there, each.tiling)
        each.operation.output(0).replace(tiles.output(0))
    return scratch


def _find(model: Any) -> Iterator[Convolution]:
    for operation in model.get_ordered_ops():
        if operation.get_type_name() != CONVOLUTION or not _is_with(operation, IN_PLACE):
            continue
        given, constant = operation.input_value(0), operation.input_value(1).get_node()
        if constant.get_type_name() == "Convert":
            constant = constant.input_value(0).get_node()
        if constant.get_type_name() != "Constant":
            continue  # whole numbers with their scales
        weight = constant.data
        if weight.shape[2:] != (3, 3):
            continue
        if _doubles(given.get_node()):
            given, tiling = given.get_node().input_value(0), ENLARGED
        elif min(weight.shape[:2]) >= MIN_CHANNELS and _is_even(given):
            tiling = PLAIN
        else:
            continue
        yield Convolution(operation=operation, given=given, weight=weight, tiling=tiling)


def _doubles(operation: Any) -> bool:
    """Tell whether an operation is an enlargement to what is known to be twice the size."""
    if operation.get_type_name() != "Interpolate" or not _is_with(operation, ENLARGING):
        return False
    if operation.get_attributes()["shape_calculation_mode"] == "scales":
        scales = operation.input_value(1).get_node()
        return scales.get_type_name() == "Constant" and [*scales.data] == [1, 1, TILE, TILE]
    before, after = (_sides(value) for value in (operation.input_value(0), operation.output(0)))
    return before is not None and after == [TILE * side for side in before]


def _is_with(operation: Any, wanted: dict[str, Any]) -> bool:
    """Tell whether an operation's attributes are those wanted."""
    attributes = operation.get_attributes()
    return all(attributes[name] == value for name, value in wanted.items())


def _is_even(value: Any) -> bool:
    sides = _sides(value)
    return (
        sides is not None
        and math.prod(sides) >= MIN_POSITIONS
        and not any(side % TILE for side in sides)
    )


def _sides(value: Any) -> list[int] | None:
    """Return the height and the width of a value, if they are known."""
    sides = [*value.get_partial_shape()][2:]
    return None if any(side.is_dynamic for side in sides) else [s.get_length() for s in sides]


def _in_tiles(library: Any, value: Any, weight: NDArray[Any], tiling: Tiling) -> Any:
    """Return the convolution of a value, (B, I, h, w), with a weight as `Tiling` makes it."""
    ops, channels = library.opset13, weight.shape[-1]

    def see(value: Any, factors: NDArray[np.float32]) -> Any:
        """Multiply a column, (n, 1), or a row of what every tile sees."""
        along = [size > 1 for size in factors.shape]
        strides, pads = [tiling.stride if is_it else 1 for is_it in along], [*map(int, along)]
        kernel = np.tile(factors, (channels, 1, 1, 1, 1))
        return ops.group_convolution(value, kernel, strides, pads, pads, [1, 1])

    def multiply(value: Any, factor: NDArray[Any]) -> Any:
        kernel = as_float32(library, as_constant(library, factor[..., np.newaxis, np.newaxis]))
        return ops.convolution(value, kernel, [1, 1], [0, 0], [0, 0], [1, 1])

    rows = []
    for factors, weights in zip(tiling.seen, weight, strict=True):
        row = see(value, factors[:, np.newaxis])
        products = [
            multiply(see(row, others[np.newaxis]), factor)
            for others, factor in zip(tiling.seen, weights, strict=True)
        ]
        rows.append([_sum(ops, products, signs) for signs in tiling.outputs])
    outputs = [
        _sum(ops, column, signs) for signs in tiling.outputs for column in zip(*rows, strict=True)
    ]
    return ops.depth_to_space(ops.concat(outputs, 1), "blocks_first", TILE)


def _sum(ops: Any, values: Sequence[Any], signs: NDArray[np.float32]) -> Any:
    """Add and subtract; the first, which no other output has, last: the library multiplies and adds
    it at once.
    """
    (total, _), *others = [
        (value, sign)
        for value, sign in zip((*values[1:], values[0]), np.roll(signs, -1), strict=True)
        if sign
    ]
    for value, sign in others:
        total = ops.add(total, value) if sign > 0 else ops.subtract(total, value)
    return total
