"""OpenVINO on the CPU, in float32 or bfloat16: both from the float32 graph."""

import sys
from collections.abc import Collection, Mapping
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends import Arrays, ComputePrecision, bind, processors
from engine.errors import BackendError, GraphError
from engine.graphs import Graph
from engine.onnx_file import weights_as_inputs

HINTS: Mapping[ComputePrecision, str] = {"float32": "f32", "bfloat16": "bf16"}
CONVERTER = "openvino.tools.ovc"  # reports over the network that it was imported


class OpenVinoEngine:
    """A graph as a compiled model whose weights are constants.

    float16 weights stay where they are, in the checkpoint's mapped file, and the library widens
    each as it rearranges it: no float32 copy of all of them is made. bfloat16 is what convolutions
    and matrix products take and give; they sum in float32, as norms do.
    """

    def __init__(
        self, graph: Graph, weights: Arrays, threads: int | None, precision: ComputePrecision
    ) -> None:
        self._library = _import()
        self._graph = graph
        self._core = self._library.Core()
        self._settings = {
            "INFERENCE_PRECISION_HINT": HINTS[precision],
            "INFERENCE_NUM_THREADS": threads or processors(),
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # threads of two processes would share one core
        }
        if precision == "bfloat16" and "BF16" not in self._core.get_property(
            "CPU", "OPTIMIZATION_CAPABILITIES"
        ):
            raise BackendError(
                "this processor has no bfloat16 arithmetic (AVX-512 BF16 or AMX); use the "
                "precision float32"
            )
        self._lock = Lock()
        self._weights: dict[str, NDArray[Any]] = {}
        self._compiled: Any = None
        self.rebind(weights, graph.weights)

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Run once; raises BackendError for inputs that do not fit, or when the library fails."""
        compiled = self._ready()
        self._check(compiled, inputs)
        try:
            # A request of its own for each run: a request's buffers are not for two threads.
            results = compiled.create_infer_request().infer(dict(inputs), share_inputs=True)
        except Exception as error:
            raise BackendError(
                f"OpenVINO failed ({_reason(error)}); is the picture too large for the memory of "
                "this machine?"
            ) from error
        return {output.get_any_name(): results[output] for output in compiled.outputs}

    def rebind(self, weights: Arrays, names: Collection[str]) -> None:
        """Take the weights of these names anew, and compile; see `engine.backends.Engine`."""
        with self._lock:
            for name, array in bind(self._graph, weights, names, keep_float16=True):
                self._weights[name] = array
                self._compiled = None  # its memory goes before that of the next one comes
        self._ready()

    def _ready(self) -> Any:
        with self._lock:
            if self._compiled is None:
                self._compiled = self._compile()
            return self._compiled

    def _compile(self) -> Any:
        try:
            model = self._core.read_model(weights_as_inputs(self._graph.data()))
            for given in model.get_parameters():
                if given.get_friendly_name() in self._weights:
                    self._make_constant(given)
                    model.remove_parameter(given)
            return self._core.compile_model(model, "CPU", self._settings)
        except Exception as error:  # the library's exceptions and Python's own
            raise GraphError(
                f"OpenVINO cannot open {self._graph.path} ({_reason(error)}); make it anew with "
                "`python -m export MODEL`"
            ) from error

    def _make_constant(self, parameter: Any) -> None:
        """Put a weight in the place of the model's parameter, which is float32, without a copy."""
        name, wanted = parameter.get_friendly_name(), parameter.get_partial_shape()
        array = _writable(self._weights[name])
        if not wanted.compatible(self._library.PartialShape(array.shape)):
            raise ValueError(f"{name!r} is {wanted} in it, and {array.shape} in its description")
        value = self._library.op.Constant(array, shared_memory=True)
        value.set_friendly_name(name)
        if array.dtype == np.float16:
            value = self._library.opset13.convert(value, "f32")
            value.get_rt_info()["decompression_0"] = ""  # or all are widened when compiling
        parameter.output(0).replace(value.output(0))

    def _check(self, compiled: Any, inputs: Arrays) -> None:
        """Refuse what the library would fill with zeros, cast or broadcast."""
        ports = {port.get_any_name(): port for port in compiled.inputs}
        if ports.keys() != inputs.keys():
            raise BackendError(
                f"the {self._graph.part} graph takes the inputs {', '.join(sorted(ports))}, and "
                f"{', '.join(sorted(inputs)) or 'none'} came"
            )
        for name, port in ports.items():
            array, dtype = inputs[name], port.get_element_type().to_dtype()
            shape = port.get_partial_shape()
            if array.dtype != dtype or not shape.compatible(
                self._library.PartialShape(array.shape)
            ):
                raise BackendError(
                    f"the {self._graph.part} graph takes {name!r} as {dtype} {shape}, and "
                    f"{array.dtype} {array.shape} came"
                )


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


def _import() -> Any:
    """Import the library without its model converter, whose import sends usage statistics."""
    absent = CONVERTER not in sys.modules
    if absent:
        sys.modules[CONVERTER] = None  # type: ignore[assignment]
    try:
        import openvino
    except ImportError as error:
        raise BackendError(
            "the backend 'openvino' needs openvino, which is not installed; "
            "install it with `pip install 'latentrt[openvino]'`"
        ) from error
    finally:
        if absent:
            sys.modules.pop(CONVERTER, None)
    return openvino


def _reason(error: Exception) -> str:
    """Make one line of the library's account, less where in its source it was."""
    lines = (line.strip() for line in str(error).splitlines())
    told = [line for line in lines if not line.startswith(("Exception from", "Check "))]
    return " ".join(filter(None, told))[:200] or type(error).__name__
