"""A checkpoint's weights as a graph wants them: by name, checked, in its precision."""

import math
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import Arrays
from engine.backends.settings import cpu_count
from engine.checkpoints.formats.files import require_finite
from engine.checkpoints.formats.tensors import widen
from engine.errors import BackendError
from engine.graphs.graph import Graph

CHUNK = 2**26  # numbers of weights that are read before their memory is given back


def bind(
    graph: Graph,
    weights: Arrays,
    names: Collection[str] | None = None,
    *,
    keep_float16: bool = False,
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Take a graph's weights, or those of some names, in its precision; equal dtypes are no copy.

    keep_float16: leave what is float16 as it is, for a backend that widens it itself
    Raises BackendError when the checkpoint lacks one, or has it in another shape or in numbers of
    another kind, and ModelError when it holds infinities or what is no number.
    """
    chosen = [name for name in graph.weights if names is None or name in names]
    with ThreadPoolExecutor(cpu_count()) as pool:  # numpy converts without the interpreter's lock
        taken = pool.map(lambda name: _take(graph, weights, name, keep_float16), chosen)
        yield from zip(chosen, taken, strict=True)


def weight_chunks(graph: Graph, names: Collection[str] | None = None) -> Iterator[list[str]]:
    """Cut the names of a graph's weights, or of some, where a chunk is beyond `CHUNK`."""
    chunk, numbers = [], 0
    for name, shape in graph.weights.items():
        if names is None or name in names:
            chunk.append(name)
            numbers += math.prod(shape)
        if numbers > CHUNK:
            yield chunk
            chunk, numbers = [], 0
    yield chunk


def _take(graph: Graph, weights: Arrays, name: str, keep_float16: bool) -> NDArray[Any]:
    if name not in weights:
        raise BackendError(
            f"the checkpoint has no tensor {name!r}, which the {graph.part} graph "
            f"{graph.path.name} needs; is it a checkpoint of another architecture?"
        )
    array = weights[name]
    if array.shape != graph.weights[name]:
        raise BackendError(
            f"the checkpoint's tensor {name!r} has the shape {array.shape}, and the {graph.part} "
            f"graph {graph.path.name} needs {graph.weights[name]}; is it a checkpoint of another "
            "architecture?"
        )
    if not np.can_cast(array.dtype, graph.precision, casting="same_kind"):
        raise BackendError(
            f"the checkpoint's tensor {name!r} is of {array.dtype}, which cannot be taken as "
            f"{graph.precision}; save the model in float16, bfloat16 or float32"
        )
    if array.dtype == np.float16 and graph.precision == "float32" and not keep_float16:
        taken: NDArray[Any] = widen(array)
    else:
        with np.errstate(over="ignore"):  # it is refused below
            dtype = array.dtype if keep_float16 and array.dtype == np.float16 else graph.precision
            taken = np.asarray(array, dtype=dtype, order="C")
    require_finite("the checkpoint", name, taken)
    return taken
