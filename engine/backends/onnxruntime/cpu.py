"""ONNX Runtime on the CPU."""

import math
import warnings
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine import TELEMETRY_BEGAN, TELEMETRY_VARIABLE
from engine.backends.base import Arrays, Engine, EngineSpec
from engine.backends.binding import bind, weight_chunks
from engine.backends.onnxruntime.attention import fuse_attention
from engine.checkpoints.formats.files import release
from engine.errors import BackendError, GraphError, first_line, install, memory_hint
from engine.graphs.graph import Graph
from engine.graphs.onnx_bytes import weights_as_inputs

# Weights of a part up to here are constants of its session. The library then copies and rearranges
# them for its fastest convolutions, a quarter faster in a small model; of a larger part that would
# take seconds and the weights' memory again, for a few percent.
CONSTANT_BYTES = 2**28


def open_engine(spec: EngineSpec) -> Engine:
    """Open a graph with its weights; raises BackendError, GraphError or ModelError."""
    return OnnxRuntimeEngine(spec.graph, spec.weights, spec.settings.threads)


class OnnxRuntimeEngine:
    """A graph in an ONNX Runtime session.

    A large part's weights are inputs of the session, handed over with each run: they are read
    where they are, and an adapter changes them without a new session.
    """

    def __init__(self, graph: Graph, weights: Arrays, threads: int | None) -> None:
        self._library = _import()
        self._graph = graph
        self._threads = threads or 0
        numbers = sum(math.prod(shape) for shape in graph.weights.values())
        self._constant = numbers * np.dtype(graph.precision).itemsize <= CONSTANT_BYTES
        self._weights: dict[str, Any] = {}
        self._take(weights, graph.weights)
        self._session = self._open()
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Run once, with arrays of the signature; raises BackendError, as for want of memory."""
        value = self._library.OrtValue.ortvalue_from_numpy
        fed = {} if self._constant else self._weights
        fed = fed | {name: value(array) for name, array in inputs.items()}
        try:
            results = self._session.run_with_ort_values(self._outputs, fed)
        except Exception as error:
            raise BackendError(
                f"ONNX Runtime failed ({first_line(error)}){memory_hint(error)}"
            ) from error
        return {name: result.numpy() for name, result in zip(self._outputs, results, strict=True)}

    def rebind(self, weights: Arrays, names: Collection[str]) -> None:
        """Take the weights of these names anew; see `engine.backends.base.Engine`."""
        self._take(weights, names)
        if self._constant:
            self._session = self._open()

    def _take(self, weights: Arrays, names: Collection[str]) -> None:
        """Wrap weights for the library, which reads these arrays and owns no copy."""
        for chunk in weight_chunks(self._graph, names):
            for name, array in bind(self._graph, weights, chunk):
                self._weights[name] = self._library.OrtValue.ortvalue_from_numpy(array)
            if self._graph.precision == "float32":  # what came as float16 was read for its copy
                release(weights)

    def _open(self) -> Any:
        options = self._library.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        # Planning the reuse of memory takes longer than all else, and the arena that gives memory
        # back step by step peaks no higher without a plan.
        options.enable_mem_reuse = False
        options.enable_mem_pattern = False
        data = self._graph.data()
        try:
            if self._graph.precision == "float32":  # the operator has no other kernel here
                data = fuse_attention(data)
            if self._constant:
                options.add_external_initializers(list(self._weights), [*self._weights.values()])
            else:
                data = weights_as_inputs(data)
            return self._library.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library's own exceptions share no base of their own
            raise GraphError(
                f"ONNX Runtime cannot open {self._graph.path} ({first_line(error)}); make it anew "
                "with `python -m export MODEL`"
            ) from error


def _import() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            "the backend 'cpu' needs onnxruntime, which is not installed; "
            + install("onnxruntime", "cpu")
        ) from error
    onnxruntime.disable_telemetry_events()
    if TELEMETRY_BEGAN:
        warnings.warn(
            "onnxruntime was imported before Latentrt, and reports its use from its import on in "
            f"its makers' wheels; import Latentrt first, or set {TELEMETRY_VARIABLE}=1",
            RuntimeWarning,
            stacklevel=2,
        )
    return onnxruntime
