"""OpenVINO, from the float32 graph: on the CPU in float32, bfloat16 or int8, on other devices too.

On a GPU or an NPU, none of which has run it yet, what is particular to the CPU is left out.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from threading import Event, Lock, Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import Arrays, Engine, EngineSpec, Ranges
from engine.backends.binding import bind, weight_chunks
from engine.backends.openvino.float32_ends import UNREAD, keep_ends
from engine.backends.openvino.gates import part_gates
from engine.backends.openvino.int8 import QuantizedWeight, is_quantized, quantize
from engine.backends.openvino.layers import put_weight, round_inputs
from engine.backends.openvino.library import CAPABILITIES, CPU, import_library
from engine.backends.openvino.winograd import transform_convolutions
from engine.backends.settings import ComputePrecision, cpu_count
from engine.checkpoints.formats.files import release
from engine.checkpoints.formats.tensors import is_mapped
from engine.errors import BackendError, GraphError, LatentrtError, memory_hint
from engine.graphs.graph import Graph
from engine.graphs.onnx_bytes import weights_as_inputs
from engine.store.scratch import Scratch

FILE_BYTES = 2**26  # of weights in memory alone, from where on they are put into a file
RELEASE_S = 0.1  # between two times that this is done
HINTS = {"float32": "f32", "float16": "f16"}  # to other devices

Shapes = Mapping[str, tuple[int, ...]]
ANY = -1  # size of a dimension


def open_engine(spec: EngineSpec) -> Engine:
    """Open a graph with its weights; raises BackendError, GraphError or ModelError."""
    settings = spec.settings
    return OpenVinoEngine(
        spec.graph,
        spec.weights,
        settings.threads,
        spec.precision,
        spec.ranges,
        device=settings.device or CPU,
    )


class OpenVinoEngine:
    """A graph as a compiled model whose weights are constants.

    float16 weights stay where they are, in the checkpoint's mapped file, and the library widens
    each as it rearranges it: no float32 copy of all of them is made. Those that a file holds as
    other numbers (bfloat16, float8, GGML's blocks) are put into a file of their own, where nothing
    is computed in float32 as float16. bfloat16 is what convolutions and matrix products take and
    give; they sum in float32, as norms do, and both ends of a model are float32 (`float32_ends`).
    In int8 the layers whose `ranges` are known take whole numbers, and all else is bfloat16 where
    the processor has it.

    The shapes of the first run are compiled in: then the library lets go of the weights as they
    came, and convolutions whose heights and widths are known take fewer products. When other shapes
    come, it is compiled once more, for any size of those dimensions that changed.
    """

    def __init__(
        self,
        graph: Graph,
        weights: Arrays,
        threads: int | None,
        precision: ComputePrecision,
        ranges: Ranges | None = None,
        device: str = CPU,
    ) -> None:
        self._library = import_library()
        self._graph = graph
        self._core = self._library.Core()
        self._device = device
        self._settings = (
            self._cpu_settings(threads, precision) if device == CPU else self._hints(precision)
        )
        self._precision = precision
        self._ranges = {  # of the layers that compute in int8
            name: seen
            for name, seen in (ranges or {}).items()
            if is_quantized(name) and name in graph.weights
        }
        self._lock = Lock()
        self._compiled: Any = None
        self._settled = False  # whether it has run
        self._shapes: Shapes = {}  # of the inputs, compiled in; ANY where several came
        self._take(weights)

    def _hints(self, precision: ComputePrecision) -> dict[str, Any]:
        """Return the settings of a device beside the processor; raises BackendError."""
        there = sorted({name.partition(".")[0] for name in self._core.available_devices})
        if self._device not in there:
            raise BackendError(
                f"OpenVINO finds no device {self._device!r} here (it has {', '.join(there)}); "
                "install the device's driver, or leave the device out"
            )
        return {"INFERENCE_PRECISION_HINT": HINTS[precision], "PERFORMANCE_HINT": "LATENCY"}

    def _cpu_settings(self, threads: int | None, precision: ComputePrecision) -> dict[str, Any]:
        """Return the settings of the processor; raises BackendError where it lacks bfloat16."""
        able = "BF16" in self._core.get_property("CPU", CAPABILITIES)
        if precision == "bfloat16" and not able:
            raise BackendError(
                "this processor has no bfloat16 arithmetic (AVX-512 BF16 or AMX); use the "
                "precision float32"
            )
        return {
            "INFERENCE_PRECISION_HINT": "bf16" if able and precision != "float32" else "f32",
            "INFERENCE_NUM_THREADS": threads or cpu_count(),
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # threads of two processes would share one core
        }

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Run once, with arrays of the signature; raises BackendError, also for other shapes."""
        self._check(inputs)
        inputs = {name: inputs[name] for name in self._ports}
        compiled = self._ready({name: array.shape for name, array in inputs.items()})
        try:
            # A request of its own for each run: a request's buffers are not for two threads.
            results = compiled.create_infer_request().infer(dict(inputs), share_inputs=True)
        except Exception as error:
            raise BackendError(f"OpenVINO failed ({_reason(error)}){memory_hint(error)}") from error
        if compiled is self._compiled and not self._settled:  # weights of any size are packed now
            self._release()
            self._settled = True
        found = {output.get_any_name(): results[output] for output in compiled.outputs}
        return {name: array for name, array in found.items() if not name.startswith(UNREAD)}

    def rebind(self, weights: Arrays, names: Collection[str]) -> None:
        """Take the weights anew; see `engine.backends.base.Engine`."""
        if not any(name in self._graph.weights for name in names):
            return
        self._take(weights)

    def _take(self, weights: Arrays) -> None:
        """Put weights into the model, of which a graph may want none."""
        with self._lock:
            self._compiled = self._model = None  # their memory goes before that of the next comes
            self._shapes = {}
            self._weights = weights
            self._model = self._assembled()
            self._ports = {
                given.get_friendly_name(): (
                    given.get_element_type().to_dtype(),
                    given.get_partial_shape(),
                )
                for given in self._model.get_parameters()
            }

    def _ready(self, shapes: Shapes) -> Any:
        """Return the model compiled for these shapes, and for others that came."""
        with self._lock:
            joined = self._shapes and self._device == CPU  # others are best with fixed sizes
            wanted = _joined(self._shapes, shapes) if joined else shapes
            if self._compiled is None or wanted != self._shapes:
                self._compiled = None  # its memory goes before that of the next comes
                model, self._model = self._model or self._assembled(), None
                with self._graph_errors():
                    model.reshape({name: [*shape] for name, shape in wanted.items()})
                    self._transform(model)
                    with self._releasing():
                        self._compiled = self._core.compile_model(
                            model, self._device, self._settings
                        )
                self._shapes, self._settled = wanted, False
            return self._compiled

    def _transform(self, model: Any) -> None:
        """Compute the processor's convolutions in tiles."""
        if self._device == CPU:
            dtype = np.float32 if self._precision == "float32" else np.float16
            added = transform_convolutions(self._library, model, dtype)
            self._scratches += [added] if added else []

    @contextmanager
    def _releasing(self) -> Iterator[None]:
        """Give back the memory of weights again and again, as the library packs them one by one."""
        done = Event()

        def work() -> None:
            while not done.wait(RELEASE_S):
                self._release()

        worker = Thread(target=work, daemon=True)
        worker.start()
        try:
            yield
        finally:
            done.set()
            worker.join()
            self._release()

    def _release(self) -> None:
        release(self._weights)
        for scratch in self._scratches:
            scratch.release()

    def _assembled(self) -> Any:
        """Return the model with its weights in it, for any shapes of its inputs."""
        with self._graph_errors():
            model = self._read()
            self._prepare(model)
            parameters: dict[str, list[Any]] = {}
            for given in model.get_parameters():
                parameters.setdefault(given.get_friendly_name(), []).append(given)
        size = sum(math.prod(self._graph.weights[name]) for name in self._ranges)
        scratch = Scratch(size) if size else None
        self._scratches = [scratch] if scratch else []

        def taken(named: tuple[str, NDArray[Any]]) -> tuple[str, NDArray[Any] | QuantizedWeight]:
            name, array = named
            return name, quantize(array) if name in self._ranges else array

        with ThreadPoolExecutor(cpu_count()) as pool:
            for names in weight_chunks(self._graph):
                bound = bind(self._graph, self._weights, names, keep_float16=True)
                for name, weight in self._put_into_file(dict(pool.map(taken, bound))).items():
                    if scratch and isinstance(weight, QuantizedWeight):  # the library copies it
                        weight = replace(weight, values=scratch.put(weight.values))
                    with self._graph_errors():
                        if name in parameters:
                            put_weight(self._library, model, parameters[name], weight)
                release(self._weights)
        return model

    def _put_into_file(
        self, weights: Mapping[str, NDArray[Any] | QuantizedWeight]
    ) -> Mapping[str, NDArray[Any] | QuantizedWeight]:
        """Put arrays into a file if many of them are in memory alone."""
        arrays = {
            name: array
            for name, array in weights.items()
            if not isinstance(array, QuantizedWeight) and not is_mapped(array)
        }
        size = sum(array.nbytes for array in arrays.values())
        if size < FILE_BYTES:
            return weights
        scratch = Scratch(size)
        self._scratches.append(scratch)
        narrow = self._precision != "float32"
        return {
            **weights,
            **{n: scratch.put(_narrow(a) if narrow else a) for n, a in arrays.items()},
        }

    def _read(self) -> Any:
        """Return the graph as a model of the library, its weights being parameters."""
        return self._core.read_model(weights_as_inputs(self._graph.data()))

    def _prepare(self, model: Any) -> None:
        """Change a model whose weights are still parameters."""
        part_gates(self._library, model)
        round_inputs(self._library, model, self._ranges)
        if self._device == CPU and self._precision != "float32":
            keep_ends(self._library, model, self._graph.weights)

    def _check(self, inputs: Arrays) -> None:
        """Refuse what the library would fill with zeros, cast or broadcast."""
        # The library drops inputs that nothing reads: an encoder's noise without a posterior.
        wanted = self._ports.keys() | set(self._graph.inputs)
        if wanted != inputs.keys():
            raise BackendError(
                f"the {self._graph.part} graph takes the inputs {', '.join(sorted(wanted))}, "
                f"and {', '.join(sorted(inputs)) or 'none'} came"
            )
        for name, (dtype, shape) in self._ports.items():
            array = inputs[name]
            if array.dtype != dtype or not shape.compatible(
                self._library.PartialShape(array.shape)
            ):
                raise BackendError(
                    f"the {self._graph.part} graph takes {name!r} as {dtype} {shape}, and "
                    f"{array.dtype} {array.shape} came"
                )

    @contextmanager
    def _graph_errors(self) -> Iterator[None]:
        try:
            yield
        except LatentrtError:
            raise
        except Exception as error:  # the library's exceptions and Python's own
            raise GraphError(
                f"OpenVINO cannot open {self._graph.path} ({_reason(error)}); make it anew with "
                "`python -m export MODEL`"
            ) from error


def _narrow(array: NDArray[Any]) -> NDArray[Any]:
    """Return a matrix as float16 numbers, unless they leave its range; vectors stay as they are."""
    if array.ndim < 2 or np.abs(array).max(initial=0) > np.finfo(np.float16).max:
        return array
    return array.astype(np.float16)


def _joined(some: Shapes, others: Shapes) -> Shapes:
    """Return shapes that have both; in each, an input has equally many dimensions."""
    return {
        name: tuple(a if a == b else ANY for a, b in zip(shape, others[name], strict=True))
        for name, shape in some.items()
    }


def _reason(error: Exception) -> str:
    """Make one line of the library's account, less where in its source it was."""
    lines = (line.strip() for line in str(error).splitlines())
    reasons = [line for line in lines if not line.startswith(("Exception from", "Check "))]
    return " ".join(filter(None, reasons))[:200] or type(error).__name__
