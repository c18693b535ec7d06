"""Backends: what runs a graph with its weights. Each imports its library where it is opened."""

import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.checkpoints.formats.files import require_finite
from engine.errors import BackendError
from engine.float16 import widen
from engine.graphs.graph import Graph, Precision

Arrays = Mapping[str, NDArray[Any]]
Ranges = Mapping[str, tuple[float, float]]
"""By the name of a layer's weight: the least and the greatest input that were seen."""
ComputePrecision = Literal["float32", "float16", "bfloat16", "int8"]


class Engine(Protocol):
    """A graph with its weights, ready to run on one device."""

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Run once; names, dtypes and shapes are those of `engine.graphs.signature`."""
        ...

    def rebind(self, weights: Arrays, names: Collection[str]) -> None:
        """Take the weights of these names anew, as when an adapter is put on or taken off.

        weights: all that the graph needs; those of other names are what they were
        One after the other, so that never two of all are in memory. Raises BackendError or
        ModelError, and then some are new: the former weights must be bound again.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendSettings:
    """Choices of how engines run.

    backend: "cpu" is ONNX Runtime, "openvino"; on an NVIDIA GPU "tensorrt", "tensorrt_rtx" or
        "cuda", which is ONNX Runtime there; None lets `engine.engines` choose for a model, and is
        "cpu" for an engine alone
    threads: of one engine's computation; None takes one for each processor core.
    build_missing: whether engines of TensorRT that the cache lacks are built when they are needed
    """

    backend: str | None = None
    threads: int | None = None
    build_missing: bool = False

    def __post_init__(self) -> None:
        """Refuse unknown backends and impossible thread counts."""
        if self.backend not in (None, *BACKENDS):
            raise BackendError(
                f"the backend {self.backend!r} is not known; choose {', '.join(BACKENDS)}"
            )
        if self.threads is not None and (type(self.threads) is not int or self.threads < 1):
            raise BackendError(
                f"threads is {self.threads!r}; give a whole number from 1, or leave it out"
            )


def _listed(names: Sequence[str]) -> str:
    """Write a choice as a sentence has it: "a", "a or b", "a, b or c"."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def graph_precision(settings: BackendSettings, precision: ComputePrecision) -> Precision:
    """Return the precision of the graphs from which a backend computes in this one.

    Raises BackendError when it cannot.
    """
    backend = settings.backend or DEFAULT
    offered = PRECISIONS[backend]
    if precision not in offered:
        others = [name for name in PRECISIONS if precision in PRECISIONS[name]]
        raise BackendError(
            f"the backend {backend!r} does not compute in {precision}; choose the "
            f"precision {', '.join(offered)}"
            + (f", or the backend {_listed(others)}" if others else "")
        )
    return offered[precision]


def open_engine(
    graph: Graph,
    weights: Arrays,
    settings: BackendSettings,
    precision: ComputePrecision | None = None,
    ranges: Ranges | None = None,
) -> Engine:
    """Bind weights to a graph and make it ready.

    precision: what to compute in, from a graph of `graph_precision`; None computes in the graph's
    ranges: of the inputs of those layers that compute in int8, when that is the precision
    Raises BackendError, GraphError or ModelError.
    """
    precision = precision or graph.precision
    graph_precision(settings, precision)
    asked = _Asked(
        graph=graph, weights=weights, settings=settings, precision=precision, ranges=ranges
    )
    return BACKENDS[settings.backend or DEFAULT](asked)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Asked:
    """What a backend is asked to open; see `open_engine`."""

    graph: Graph
    weights: Arrays
    settings: BackendSettings
    precision: ComputePrecision
    ranges: Ranges | None


def _open_cpu(asked: _Asked) -> Engine:
    from engine.backends.onnxruntime.cpu import OnnxRuntimeEngine

    return OnnxRuntimeEngine(asked.graph, asked.weights, asked.settings.threads)


def _open_openvino(asked: _Asked) -> Engine:
    from engine.backends.openvino.engine import OpenVinoEngine

    return OpenVinoEngine(
        asked.graph, asked.weights, asked.settings.threads, asked.precision, asked.ranges
    )


def _open_cuda(asked: _Asked) -> Engine:
    from engine.backends.onnxruntime.cuda import OnnxRuntimeCudaEngine
    from engine.devices.cuda import find_device

    return OnnxRuntimeCudaEngine(asked.graph, asked.weights, find_device())


def _refuse_tensorrt(asked: _Asked) -> Engine:
    raise BackendError(
        f"the backend {asked.settings.backend!r} opens the parts of a model, and "
        f"{asked.graph.path.name} came alone; open the model with `runtime.Pipeline.load`"
    )


PORTION = 2**26  # numbers of weights that are read before their memory is given back
DEFAULT = "cpu"
BACKENDS = {
    "cpu": _open_cpu,
    "openvino": _open_openvino,
    "cuda": _open_cuda,
    "tensorrt": _refuse_tensorrt,  # `engine.engines` has what these need to know of the model
    "tensorrt_rtx": _refuse_tensorrt,
}
ON_GPU = ("cuda", "tensorrt", "tensorrt_rtx")
# What each computes in, its default first, and the precision of the graph that it does this from.
PRECISIONS: Mapping[str, Mapping[ComputePrecision, Precision]] = {
    "cpu": {"float32": "float32", "float16": "float16"},
    "openvino": {"float32": "float32", "bfloat16": "float32", "int8": "float32"},
    "cuda": {"float16": "float16", "float32": "float32"},
    "tensorrt": {"float16": "float16", "float32": "float32"},
    "tensorrt_rtx": {"float16": "float16"},  # no fused attention of its takes float32
}


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
    with ThreadPoolExecutor(processors()) as pool:  # numpy converts without the interpreter's lock
        taken = pool.map(lambda name: _take(graph, weights, name, keep_float16), chosen)
        yield from zip(chosen, taken, strict=True)


def portions(graph: Graph, names: Collection[str] | None = None) -> Iterator[list[str]]:
    """Cut the names of a graph's weights, or of some, where each piece is beyond `PORTION`."""
    piece, numbers = [], 0
    for name, shape in graph.weights.items():
        if names is None or name in names:
            piece.append(name)
            numbers += math.prod(shape)
        if numbers > PORTION:
            yield piece
            piece, numbers = [], 0
    yield piece


def processors() -> int:
    """Count the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
