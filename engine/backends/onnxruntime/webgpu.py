"""ONNX Runtime on any GPU, through WebGPU. No card has run it yet: only software has."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import Arrays, Engine, EngineSpec, run_from_host
from engine.backends.binding import bind, weight_chunks
from engine.backends.onnxruntime.fixed_sizes import FormSessions, Sizes, fix_sizes
from engine.backends.onnxruntime.webgpu_graph import for_webgpu
from engine.backends.onnxruntime.webgpu_trials import (
    has_attention,
    has_float16,
    session_options,
)
from engine.checkpoints.formats.files import release
from engine.devices.device import DeviceArray, HostOrDeviceArray, Shape
from engine.devices.webgpu import WebGpuDevice, find_device, no_adapter
from engine.errors import BackendError, GraphError, first_line
from engine.graphs.graph import Graph
from engine.graphs.onnx_bytes import weights_as_inputs

PROVIDER = "WebGpuExecutionProvider"
DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
}


def open_engine(spec: EngineSpec) -> Engine:
    """Open a graph with its weights; raises BackendError, GraphError or ModelError."""
    device = find_device()
    if spec.precision == "float16" and not has_float16(device):
        raise BackendError(
            "this GPU does not compute in float16 through WebGPU (it lacks shader-f16); choose the "
            "precision float32"
        )
    kin = [each for each in spec.kin if isinstance(each, OnnxRuntimeWebGpuEngine)]
    return OnnxRuntimeWebGpuEngine(spec.graph, spec.weights, device, kin)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Form:
    """A session for inputs of certain shapes, to which the weights are bound.

    outputs: their shapes; dtypes: of inputs and outputs
    """

    session: Any
    binding: Any
    outputs: Mapping[str, Shape]
    dtypes: Mapping[str, np.dtype[Any]]


class OnnxRuntimeWebGpuEngine:
    """A `DeviceEngine`: a graph in sessions of ONNX Runtime's WebGPU provider, one for each form.

    The weights are inputs of all sessions: on the device once, and changed there by an adapter.
    kin: engines of the same weights, whose arrays are taken over
    """

    records = False
    held = 0  # nobody knows: WebGPU does not tell what is free

    def __init__(
        self,
        graph: Graph,
        weights: Arrays,
        device: WebGpuDevice,
        kin: Collection["OnnxRuntimeWebGpuEngine"] = (),
    ) -> None:
        self._device = device
        self._library = device.library
        self._graph = graph
        self._weights: dict[str, DeviceArray] = {}
        fused = has_attention(device, graph.precision)
        data = for_webgpu(graph.data(), graph.precision, fused_attention=fused)
        self._model = weights_as_inputs(data)
        self._forms = FormSessions(self._model, self._open)
        for other in kin:
            if other._graph.precision == graph.precision:
                same = graph.weights.keys() & other._weights
                self._weights |= {name: other._weights[name] for name in same}
        self.rebind(weights, graph.weights.keys() - self._weights)

    @property
    def device(self) -> WebGpuDevice:
        """Where it runs."""
        return self._device

    def run(self, inputs: Mapping[str, HostOrDeviceArray]) -> dict[str, NDArray[Any]]:
        """Run once, with arrays of the signature; see `engine.backends.base.DeviceEngine`."""
        return run_from_host(self, inputs)

    def prepare(self, inputs: Mapping[str, Shape]) -> Mapping[str, DeviceArray]:
        """Get ready for these shapes; see `engine.backends.base.DeviceEngine`."""
        with self._device.lock:
            form = self._forms.get(inputs)
        return {
            name: self._device.empty(shape, form.dtypes[name])
            for name, shape in form.outputs.items()
        }

    def enqueue(
        self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]
    ) -> None:
        """Queue a run; see `engine.backends.base.DeviceEngine`. Raises BackendError."""
        with self._device.lock:
            form = self._forms.get({name: array.shape for name, array in inputs.items()})
            for name, array in inputs.items():
                form.binding.bind_ortvalue_input(name, array.memory)
            for name, array in outputs.items():
                form.binding.bind_ortvalue_output(name, array.memory)
            try:
                form.session.run_with_iobinding(form.binding)
            except Exception as error:  # the library's own exceptions share no base of their own
                raise BackendError(
                    f"ONNX Runtime failed on the GPU ({first_line(error)}); is the picture too "
                    "large for its memory?"
                ) from error

    def rebind(self, weights: Arrays, names: Collection[str]) -> None:
        """Take weights anew, in place; see `engine.backends.base.Engine`."""
        for chunk in weight_chunks(self._graph, names):
            for name, array in bind(self._graph, weights, chunk):
                if name not in self._weights:
                    self._weights[name] = self._device.empty(array.shape, array.dtype)
                self._device.upload(array, self._weights[name])
            release(weights)

    def placements(self) -> list[dict[str, list[str]]]:
        """Return, for each session that is open, the operators by the provider that runs them.

        A node that is not on the GPU is waited for in every run.
        """
        found: list[dict[str, list[str]]] = []
        for form in self._forms.opened():
            placed: dict[str, list[str]] = {}
            for part in form.session.get_provider_graph_assignment_info():
                names = [node.op_type for node in part.get_nodes()]
                placed.setdefault(part.ep_name, []).extend(names)
            found.append(placed)
        return found

    def _open(self, sizes: Sizes) -> _Form:
        options = session_options(self._device)
        fix_sizes(options, sizes)
        try:
            session = self._library.InferenceSession(self._model, options)
        except Exception as error:
            if "adapter" in str(error):
                raise no_adapter(first_line(error)) from error
            raise GraphError(
                f"ONNX Runtime cannot open {self._graph.path} on the GPU ({first_line(error)}); "
                "choose another backend, or make the graph anew with `python -m export MODEL`"
            ) from error
        binding = session.io_binding()
        for name, array in self._weights.items():
            binding.bind_ortvalue_input(name, array.memory)
        arguments = [*session.get_inputs(), *session.get_outputs()]
        return _Form(
            session=session,
            binding=binding,
            outputs={output.name: tuple(output.shape) for output in session.get_outputs()},
            dtypes={argument.name: np.dtype(DTYPES[argument.type]) for argument in arguments},
        )
