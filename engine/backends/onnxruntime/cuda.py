"""ONNX Runtime on a GPU of NVIDIA's."""

from collections.abc import Collection, Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from io import StringIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import Arrays, Engine, EngineSpec, run_from_host
from engine.backends.onnxruntime.device_weights import DeviceWeights, widened
from engine.backends.onnxruntime.fixed_sizes import FormSessions, Sizes, fix_sizes
from engine.backends.onnxruntime.rewrites import rewritten
from engine.devices.cuda import find_device
from engine.devices.device import Device, DeviceArray, HostOrDeviceArray, Shape, within_memory
from engine.errors import (
    BackendError,
    GraphError,
    OutOfMemoryError,
    first_line,
    install,
    memory_hint,
)
from engine.graphs.graph import Graph

PROVIDER = "CUDAExecutionProvider"
PACKAGES = "'onnxruntime-gpu[cuda,cudnn]' nvidia-cublas cuda-core cuda-bindings"
ASSIGNMENT = "session.record_ep_graph_assignment_info"
DISABLED = ["GatherSliceToSplitFusion"]  # a split copies its sizes to the GPU in every run
WARM_UP = 2  # runs until the library allocates no more
NEEDS_PROVIDER = "Could not find an implementation"  # of an operator that it alone has
DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
}


def open_engine(spec: EngineSpec) -> Engine:
    """Open a graph with its weights; raises BackendError, GraphError or ModelError."""
    kin = [each for each in spec.kin if isinstance(each, OnnxRuntimeCudaEngine)]
    return OnnxRuntimeCudaEngine(spec.graph, spec.weights, find_device(), kin=kin)


@dataclass(slots=True, kw_only=True, eq=False)
class Form:
    """A session for inputs of certain shapes.

    binding: to the arrays of the last run; outputs: their shapes; dtypes: of inputs and outputs
    elsewhere: the operators that do not run on the GPU
    unread: inputs that nothing reads once their sizes are known
    weights: what the session's memory must be kept with
    free: bytes of the device before it was opened; held: bytes that it has taken, once it is ready
    """

    session: Any
    binding: Any
    outputs: dict[str, Shape]
    dtypes: dict[str, np.dtype[Any]]
    elsewhere: tuple[str, ...]
    unread: frozenset[str]
    weights: DeviceWeights
    free: int
    held: int = 0
    is_ready: bool = False

    @classmethod
    def of(cls, session: Any, weights: DeviceWeights, free: int) -> "Form":
        """Ask a session for all of that."""
        inputs, outputs, binding = session.get_inputs(), session.get_outputs(), session.io_binding()
        dtypes = {a.name: np.dtype(DTYPES[a.type]) for a in (*inputs, *outputs)}
        elsewhere = tuple(
            node.op_type
            for assigned in session.get_provider_graph_assignment_info()
            for node in assigned.get_nodes()
            if assigned.ep_name != PROVIDER
        )
        unread = set()
        for given, place in zip(inputs, session.get_input_memory_infos(), strict=True):
            # The library expects there what nothing reads, and would copy it in every run.
            if place.name == "Cpu" and not elsewhere:
                unread.add(given.name)
                binding.bind_cpu_input(given.name, np.zeros(given.shape, dtypes[given.name]))
        return cls(
            session=session,
            binding=binding,
            outputs={output.name: tuple(output.shape) for output in outputs},
            dtypes=dtypes,
            elsewhere=elsewhere,
            unread=frozenset(unread),
            weights=weights,
            free=free,
        )


class OnnxRuntimeCudaEngine:
    """A `DeviceEngine`: a graph in sessions of ONNX Runtime's CUDA provider, one for each form.

    Their work is queued on the device's stream, and they share the arrays among the weights.
    index: the GPU's number; kin: engines of the same weights, of which arrays are taken over
    """

    def __init__(
        self,
        graph: Graph,
        weights: Arrays,
        device: Device,
        index: int = 0,
        kin: Collection["OnnxRuntimeCudaEngine"] = (),
    ) -> None:
        self.device = device
        self._library = _import()
        self._graph = graph
        self._index = index
        data, in_float32 = widened(graph.data(), graph.weights)
        self._weights = DeviceWeights(graph, self._rewritten(data), in_float32, device, index)
        self._forms = FormSessions(self._weights.model, self._open)
        self._bound = self._failed = False
        there = self._weights.adopt([each._weights for each in kin])
        self._take(weights, graph.weights.keys() - there)
        # The caller waits for the stream, and mostly much later.
        entries = {"disable_synchronize_execution_providers": "1"}
        self._asynchronous = self._run_options(entries)
        shrinking = {"memory.enable_memory_arena_shrinkage": f"gpu:{index}"}
        self._shrinking = self._run_options(entries | shrinking)

    def run(self, inputs: Mapping[str, HostOrDeviceArray]) -> dict[str, NDArray[Any]]:
        """Run once, with arrays of the signature; see `engine.backends.base.DeviceEngine`."""
        return run_from_host(self, inputs)

    @property
    def records(self) -> bool:
        """Whether all that was prepared runs on the GPU alone."""
        return not any(form.elsewhere for form in self.opened())

    @property
    def held(self) -> int:
        """The bytes that its sessions keep, by what was free before and after they were opened."""
        return sum(form.held for form in self.opened())

    def opened(self) -> Collection["Form"]:
        """Return the forms that are open."""
        return self._forms.opened()

    def prepare(self, inputs: Mapping[str, Shape]) -> Mapping[str, DeviceArray]:
        """Get ready for these shapes; see `engine.backends.base.DeviceEngine`.

        New shapes are run on zeros: the library chooses its convolutions in the first run and
        takes its memory in the first and the second, which it must not do in a recorded graph.
        """
        with self.device.lock:
            return self._outputs(self._form(inputs))

    def enqueue(
        self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]
    ) -> None:
        """Queue a run; see `engine.backends.base.DeviceEngine`."""
        with self.device.lock:
            form = self._form({name: array.shape for name, array in inputs.items()})
            self.device.keep(form)
            self._run(form, inputs, outputs, self._asynchronous)

    def rebind(self, weights: Arrays, names: Collection[str]) -> None:
        """Take weights anew, in place where they are shared; see `engine.backends.base.Engine`."""
        with self.device.lock:
            self._take(weights, names)

    def _take(self, weights: Arrays, names: Collection[str]) -> None:
        self._bound = False
        if self._weights.take(weights, names):
            self.device.wait()  # for what the sessions still have to do
            self._forms.clear()
        self._bound = True

    def _form(self, inputs: Mapping[str, Shape]) -> "Form":
        """Return the form of these shapes, ready; where memory is short, without the others."""
        if not self._bound:
            raise BackendError(
                "the engine has no weights since they could not be changed; open it again"
            )
        return within_memory(lambda: self._ready(inputs), self._let_go)

    def _let_go(self) -> None:
        self._forms.clear()
        self.device.trim()

    def _ready(self, inputs: Mapping[str, Shape]) -> "Form":
        """Return the form of these shapes, ready; after a failure all are opened again."""
        failed, self._failed = self._failed, False
        if failed:
            self._forms.clear()
        form = self._forms.get(inputs)
        if not form.is_ready:
            if failed:  # the first to ask is told the error of a recording that failed
                with suppress(BackendError):
                    self._run_zeros(form, inputs)
                self._failed = False
            self._run_zeros(form, inputs)
            form.held = max(0, form.free - self.device.memory()[0])
        return form

    def _outputs(self, form: "Form") -> dict[str, DeviceArray]:
        return {
            name: self.device.empty(shape, form.dtypes[name])
            for name, shape in form.outputs.items()
        }

    def _run_zeros(self, form: "Form", inputs: Mapping[str, Shape]) -> None:
        placed = {}
        for name, shape in inputs.items():
            placed[name] = self.device.empty(shape, form.dtypes[name])
            self.device.upload(np.zeros(shape, form.dtypes[name]), placed[name])
        outputs = self._outputs(form)
        # In the first run the library looks what it needs, piece by piece; for the second it takes
        # one piece, and the first ones would stay.
        for options in (self._shrinking, *[self._asynchronous] * (WARM_UP - 1)):
            self._run(form, placed, outputs, options)
        self.device.wait()
        form.is_ready = True

    def _run(
        self,
        form: "Form",
        inputs: Mapping[str, DeviceArray],
        outputs: Mapping[str, DeviceArray],
        options: Any,
    ) -> None:
        read = {name: array for name, array in inputs.items() if name not in form.unread}
        for bind, arrays in ((form.binding.bind_input, read), (form.binding.bind_output, outputs)):
            for name, array in arrays.items():
                bind(name, "cuda", self._index, array.dtype.type, array.shape, array.address)
        try:
            form.session.run_with_iobinding(form.binding, options)
        except Exception as error:  # the library's own exceptions share no base of their own
            self._failed = True  # who knows what the session has kept of it
            raise _failure(error) from error

    def _run_options(self, entries: Mapping[str, str]) -> Any:
        options = self._library.RunOptions()
        for name, value in entries.items():
            options.add_run_config_entry(name, value)
        return options

    def _open(self, sizes: Sizes) -> "Form":
        library = self._library
        options = library.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry(ASSIGNMENT, "1")
        fix_sizes(options, sizes)
        free = self.device.memory()[0]
        kept = self._weights.give(options, library)
        try:
            session = library.InferenceSession(
                self._weights.model,
                options,
                providers=[(PROVIDER, self._settings(free)), "CPUExecutionProvider"],
                enable_fallback=0,  # on the processor alone, after some lines of print
                disabled_optimizers=self._disabled(),
            )
        except Exception as error:
            if NEEDS_PROVIDER in str(error):
                raise _not_started() from error
            if memory_hint(error):
                raise _failure(error) from error
            raise GraphError(
                f"ONNX Runtime cannot open {self._graph.path} on the GPU ({first_line(error)}); "
                "choose another backend, or make the graph anew with `python -m export MODEL`"
            ) from error
        if PROVIDER not in session.get_providers():
            raise _not_started()
        del kept
        return Form.of(session, self._weights, free)

    def _rewritten(self, data: bytes) -> bytes:
        return rewritten(data, self._graph.weights)

    def _disabled(self) -> list[str]:
        return DISABLED

    def _settings(self, free: int) -> dict[str, str]:
        return {
            "device_id": str(self._index),
            "user_compute_stream": str(self.device.stream),
            # Beyond, some drivers lend the processor's memory, and all is many times slower.
            "gpu_mem_limit": str(free),
            "cudnn_conv_algo_search": "EXHAUSTIVE",  # once for each shape, when it is prepared
            "cudnn_conv_use_max_workspace": "1",
            "fuse_conv_bias": "1",
            "arena_extend_strategy": "kSameAsRequested",  # doubling takes up to twice the memory
            # Without, convolutions in float16 have no tensor cores; float32 is what it says.
            "use_tf32": "1" if self._graph.precision == "float16" else "0",
            "prefer_nhwc": "1",  # for what is not `with_channels_last`
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


def _failure(error: Exception) -> BackendError:
    hint = memory_hint(error)
    kind = OutOfMemoryError if hint else BackendError
    return kind(f"ONNX Runtime failed on the GPU ({first_line(error)}){hint}")


def _not_started() -> BackendError:
    return BackendError(
        "ONNX Runtime could not start its CUDA provider, which needs an NVIDIA GPU with its "
        "driver, CUDA and cuDNN 9; for the latter "
        + install(PACKAGES, "gpu")
        + ", or choose another backend"
    )
