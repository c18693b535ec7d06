"""Backends: what runs a graph with its weights. Each imports its library where it is opened."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.errors import BackendError
from engine.graphs import Graph

Arrays = Mapping[str, NDArray[Any]]


class Engine(Protocol):
    """A graph with its weights, ready to run on one device."""

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Run once; names, dtypes and shapes are those of `engine.signature`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendSettings:
    """Choices of how engines run.

    threads: of one engine's computation; None takes one for each processor core.
    """

    backend: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        """Refuse unknown backends and impossible thread counts."""
        if self.backend not in tuple(BACKENDS):
            raise BackendError(
                f"the backend {self.backend!r} is not known; choose {', '.join(BACKENDS)}"
            )
        if self.threads is not None and (type(self.threads) is not int or self.threads < 1):
            raise BackendError(
                f"threads is {self.threads!r}; give a whole number from 1, or leave it out"
            )


def open_engine(graph: Graph, weights: Arrays, settings: BackendSettings) -> Engine:
    """Bind weights to a graph and make it ready; raises BackendError or GraphError."""
    return BACKENDS[settings.backend](graph, weights, settings)


def _open_cpu(graph: Graph, weights: Arrays, settings: BackendSettings) -> Engine:
    from engine.onnxruntime_cpu import OnnxRuntimeEngine

    return OnnxRuntimeEngine(graph, weights, settings.threads)


BACKENDS = {"cpu": _open_cpu}


def bind(graph: Graph, weights: Arrays) -> dict[str, NDArray[Any]]:
    """Take a graph's weights in its precision; equal dtypes are not copied.

    Raises BackendError when the checkpoint lacks one, or has it in numbers of another kind.
    """
    bound: dict[str, NDArray[Any]] = {}
    for name in graph.weights:
        if name not in weights:
            raise BackendError(
                f"the checkpoint has no tensor {name!r}, which the {graph.part} graph "
                f"{graph.path.name} needs; is it a checkpoint of another architecture?"
            )
        array = weights[name]
        if not np.can_cast(array.dtype, graph.precision, casting="same_kind"):
            raise BackendError(
                f"the checkpoint's tensor {name!r} is of {array.dtype}, which cannot be taken as "
                f"{graph.precision}; save the model in float16, bfloat16 or float32"
            )
        bound[name] = np.asarray(array, dtype=graph.precision, order="C")
    return bound
