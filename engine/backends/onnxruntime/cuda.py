"""ONNX Runtime on a GPU of NVIDIA's."""

from collections.abc import Collection, Mapping
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import Arrays, Engine, EngineSpec, run_from_host
from engine.backends.binding import bind
from engine.backends.onnxruntime.attention import fuse_attention
from engine.backends.onnxruntime.group_norm import fuse_group_norms
from engine.devices.cuda import find_device
from engine.devices.device import Device, DeviceArray, HostOrDeviceArray, Shape
from engine.errors import BackendError, GraphError, first_line, install, memory_hint
from engine.graphs.graph import Graph

PROVIDER = "CUDAExecutionProvider"
PACKAGES = "'onnxruntime-gpu[cuda,cudnn]' nvidia-cublas cuda-core cuda-bindings"
NEEDS_PROVIDER = "implementation for GroupNorm"  # missing, says the library: no other has one
DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
}


def open_engine(spec: EngineSpec) -> Engine:
    """Open a graph with its weights; raises BackendError, GraphError or ModelError."""
    return OnnxRuntimeCudaEngine(spec.graph, spec.weights, find_device())


class OnnxRuntimeCudaEngine:
    """A `DeviceEngine`: a graph in a session of ONNX Runtime's CUDA provider.

    Its work is queued on the device's stream. The weights are constants of the session, so that
    the library may rearrange them for its convolutions; an adapter opens it again.
    index: the GPU's number
    """

    # Sizes that are not fixed are copied to the processor and waited for, which no graph holds; and
    # after it was tried, the next run is told the error of it (seen on an H100).
    records = False

    def __init__(self, graph: Graph, weights: Arrays, device: Device, index: int = 0) -> None:
        self.device = device
        self._library = _import()
        self._graph = graph
        self._index = index
        self._shapes: dict[frozenset[tuple[str, Shape]], dict[str, Shape]] = {}
        self._session: Any = None
        self._open(weights)
        # The caller waits for the stream, and mostly much later.
        self._asynchronous = self._library.RunOptions()
        self._asynchronous.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def run(self, inputs: Mapping[str, HostOrDeviceArray]) -> dict[str, NDArray[Any]]:
        """Run once; see `engine.backends.base.DeviceEngine`."""
        return run_from_host(self, inputs)

    def prepare(self, inputs: Mapping[str, Shape]) -> Mapping[str, DeviceArray]:
        """Get ready for these shapes; see `engine.backends.base.DeviceEngine`.

        New shapes are run once on zeros: the library knows what it makes of them only then, and it
        chooses its convolutions and takes its memory, which it must not do in a recorded graph.
        """
        shapes = {name: tuple(shape) for name, shape in inputs.items()}
        key = frozenset(shapes.items())
        if key not in self._shapes:
            self._shapes[key] = self._run_zeros(shapes)
        return {
            name: self.device.empty(shape, self._dtypes[name])
            for name, shape in self._shapes[key].items()
        }

    def enqueue(
        self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]
    ) -> None:
        """Queue a run; see `engine.backends.base.DeviceEngine`."""
        binding = self._bind(inputs)
        for name, array in outputs.items():
            binding.bind_output(
                name, "cuda", self._index, array.dtype.type, array.shape, array.address
            )
        self._run(binding)

    def rebind(self, weights: Arrays, names: Collection[str]) -> None:
        """Open the session again; see `engine.backends.base.Engine`."""
        self.device.wait()
        self._session = None  # never two of all weights
        self._open(weights)

    def _run_zeros(self, inputs: Mapping[str, Shape]) -> dict[str, Shape]:
        """Run on zeros, and return the shapes of the outputs."""
        placed = {}
        for name, shape in inputs.items():
            placed[name] = self.device.empty(shape, self._dtypes[name])
            self.device.upload(np.zeros(shape, self._dtypes[name]), placed[name])
        binding = self._bind(placed)
        for name in self._graph.outputs:
            binding.bind_output(name, "cuda", self._index)
        self._run(binding)
        self.device.wait()
        made = binding.get_outputs()
        return {
            name: tuple(value.shape())
            for name, value in zip(self._graph.outputs, made, strict=True)
        }

    def _bind(self, inputs: Mapping[str, DeviceArray]) -> Any:
        if self._session is None:
            raise BackendError(
                "the engine has no weights since they could not be changed; open it again"
            )
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(
                name, "cuda", self._index, array.dtype.type, array.shape, array.address
            )
        return binding

    def _run(self, binding: Any) -> None:
        try:
            self._session.run_with_iobinding(binding, self._asynchronous)
        except Exception as error:  # the library's own exceptions share no base of their own
            raise BackendError(
                f"ONNX Runtime failed on the GPU ({first_line(error)}){memory_hint(error)}"
            ) from error

    def _open(self, weights: Arrays) -> None:
        library = self._library
        taken = {
            name: library.OrtValue.ortvalue_from_numpy(array)
            for name, array in bind(self._graph, weights)
        }
        options = library.SessionOptions()
        options.log_severity_level = 3
        options.add_external_initializers(list(taken), list(taken.values()))
        try:
            session = library.InferenceSession(
                self._model(),
                options,
                providers=[(PROVIDER, self._settings()), "CPUExecutionProvider"],
                enable_fallback=0,  # on the processor alone, after some lines of print
            )
        except Exception as error:
            if NEEDS_PROVIDER in str(error):
                raise _not_started() from error
            raise GraphError(
                f"ONNX Runtime cannot open {self._graph.path} on the GPU ({first_line(error)}); "
                "choose another backend, or make the graph anew with `python -m export MODEL`"
            ) from error
        if PROVIDER not in session.get_providers():
            raise _not_started()
        self._session = session
        arguments = [*session.get_inputs(), *session.get_outputs()]
        self._dtypes = {argument.name: np.dtype(DTYPES[argument.type]) for argument in arguments}

    def _model(self) -> bytes:
        """Return the graph with the library's own attention and group norms.

        Of its two kernels for attention, ONNX's was 17 % off on an H100 in a step of Stable
        Diffusion 1.5, or made what is no number; its own is as near to float32 as torch is.
        """
        return fuse_group_norms(fuse_attention(self._graph.data()), self._graph.weights)

    def _settings(self) -> dict[str, str]:
        return {
            "device_id": str(self._index),
            "user_compute_stream": str(self.device.stream),
            "prefer_nhwc": "1",  # as tensor cores want it
            "cudnn_conv_algo_search": "EXHAUSTIVE",  # once for each shape, when it is prepared
            "cudnn_conv_use_max_workspace": "1",
            "arena_extend_strategy": "kSameAsRequested",  # doubling takes up to twice the memory
            "use_tf32": "0",  # float32 is what it says, as on the processor
        }


def _import() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            "the backend 'cuda' needs onnxruntime-gpu, which is not installed; "
            + install(PACKAGES, "gpu")
        ) from error
    if PROVIDER not in onnxruntime.get_available_providers():
        raise BackendError(
            "the backend 'cuda' needs onnxruntime-gpu, and the onnxruntime that is installed has "
            "no CUDA provider; `pip uninstall onnxruntime`, then " + install(PACKAGES, "gpu")
        )
    onnxruntime.disable_telemetry_events()  # where an app had imported it before `engine`
    with redirect_stdout(StringIO()):  # what it misses is said when a session is opened
        onnxruntime.preload_dlls(directory="")  # from NVIDIA's packages, where these are installed
    return onnxruntime


def _not_started() -> BackendError:
    return BackendError(
        "ONNX Runtime could not start its CUDA provider, which needs an NVIDIA GPU with its "
        "driver, CUDA and cuDNN 9; for the latter "
        + install(PACKAGES, "gpu")
        + ", or choose another backend"
    )
