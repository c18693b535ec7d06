"""An engine that TensorRT or TensorRT-RTX has built, on a device.

Its activations lie in the memory that all engines of the device share. Its weights are shared by
all that open the same file, until one of them changes its own.
"""

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from engine.backends.base import Arrays, run_from_host
from engine.backends.binding import bind
from engine.backends.tensorrt.plan_file import LoadedPlan, load_shared, take_own
from engine.devices.device import Device, DeviceArray, HostOrDeviceArray, Shape
from engine.errors import BackendError, OutputError
from engine.graphs.graph import Graph
from engine.store.cache import write_atomically

ALIGNMENT = 256  # bytes: where TensorRT wants every tensor to begin


class TensorRTEngine:
    """A `DeviceEngine` from a file that TensorRT has written.

    library: the module `tensorrt` or `tensorrt_rtx`; plan: the file; graph: what it was built from
    kernels: a file where TensorRT-RTX keeps what it compiles on the device, so that the next
        process need not; TensorRT compiles nothing there
    Raises BackendError when the file cannot be used on this device.
    """

    records = True
    held = 0  # its activations are in the memory that all engines share

    def __init__(
        self, library: Any, plan: Path, graph: Graph, device: Device, kernels: Path | None = None
    ) -> None:
        self.device = device
        self._library = library
        self._graph = graph
        self._kernels = kernels
        self._compiled: Any = None
        self._new_kernels = False
        self._open(load_shared(library, plan, device))

    @property
    def refittable(self) -> bool:
        """Whether its weights can be changed."""
        return bool(self._loaded.engine.refittable)

    def run(self, inputs: Mapping[str, HostOrDeviceArray]) -> dict[str, NDArray[Any]]:
        """Run once, with arrays of the signature; see `engine.backends.base.DeviceEngine`."""
        return run_from_host(self, inputs)

    def prepare(self, inputs: Mapping[str, Shape]) -> Mapping[str, DeviceArray]:
        """Get ready for these shapes; see `engine.backends.base.DeviceEngine`.

        What was recorded of other shapes stays good: each has an execution context.
        """
        with self.device.lock:
            context = self._choose(inputs).context
            return {
                name: self.device.empty(tuple(context.get_tensor_shape(name)), dtype)
                for name, dtype in self._loaded.outputs.items()
            }

    def enqueue(
        self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]
    ) -> None:
        """Queue a run; an input that does not begin at a multiple of 256 bytes is copied first."""
        with self.device.lock:
            chosen = self._choose({name: array.shape for name, array in inputs.items()})
            context, scratch = chosen.context, self.device.scratch(chosen.activations)
            context.set_device_memory(scratch.address, scratch.nbytes)
            for name, array in [*inputs.items(), *outputs.items()]:
                if array.address % ALIGNMENT and name in inputs:
                    self.device.copy(array, chosen.aligned[name])
                    array = chosen.aligned[name]
                if not context.set_tensor_address(name, array.address):
                    raise self._loaded.failure(f"refused the memory of {name}")
            if not context.execute_async_v3(self.device.stream):
                raise self._loaded.failure("could not queue a run")
            self._keep_kernels()  # which are compiled before the first run of a shape returns

    def rebind(self, weights: Arrays, names: Collection[str]) -> None:
        """Change weights in the device's memory; see `engine.backends.base.Engine`.

        What was recorded before must be recorded again. Raises BackendError where the engine was
        built with constant weights.
        """
        if not self.refittable:
            raise BackendError(
                f"the weights of the engine {self._loaded.path.name} are constants, so no adapter "
                "can be put on or taken off; build it again with `--refit`, which costs some speed"
            )
        self.device.wait()
        if (own := take_own(self._library, self._loaded, self.device)) is not self._loaded:
            prepared = [context.shapes for context in self._ready.values()]
            self._loaded.users.discard(self)
            self._open(own)
            for shapes in prepared:
                self._choose(shapes)
        refitter = self._library.Refitter(self._loaded.engine, self._loaded.log)
        kept = self._refit(refitter, weights, names)
        if merged := refitter.get_missing_weights():  # the library has fused them with others
            kept += self._refit(refitter, weights, merged)
        if not refitter.refit_cuda_engine():
            raise self._loaded.failure("could not change the weights")

    def _keep_kernels(self) -> None:
        """Write what was compiled on the device into its file, if there may be anything new."""
        if self._new_kernels and self._compiled is not None and self._kernels:
            data = bytes(self._compiled.serialize())
            with suppress(OutputError):  # a folder that may only be read: it is compiled again
                write_atomically(self._kernels, lambda file: file.write(data))
        self._new_kernels = False

    def _refit(self, refitter: Any, weights: Arrays, names: Collection[str]) -> list[NDArray[Any]]:
        """Hand over weights; they are read later, so they are returned to be kept."""
        known, kept = set(refitter.get_all_weights()), []
        for name, array in bind(self._graph, weights, names):
            if name not in known:
                raise BackendError(
                    f"the weight {name!r} of the engine {self._loaded.path.name} is a constant; "
                    "build it again with `--refit`"
                )
            kept.append(array)
            if not refitter.set_named_weights(name, self._library.Weights(array)):
                raise self._loaded.failure(f"refused the weight {name}")
        return kept

    def _open(self, loaded: LoadedPlan) -> None:
        """Take a loaded file, and settle how its execution contexts are made."""
        library = self._library
        loaded.users.add(self)
        self._loaded = loaded
        self._ready: dict[frozenset[tuple[str, Shape]], _Context] = {}
        self._config = config = loaded.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            library.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if not hasattr(config, "create_runtime_cache"):
            return
        # TensorRT-RTX compiles on the device: before the run returns, as a recorded graph keeps
        # the kernels that it was recorded with.
        strategies = library.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        self._compiled = config.create_runtime_cache()
        with suppress(OSError):
            if self._kernels:
                self._compiled.deserialize(self._kernels.read_bytes())
        config.set_runtime_cache(self._compiled)

    def _choose(self, shapes: Mapping[str, Shape]) -> "_Context":
        """Find the context for these shapes, or make it."""
        key = frozenset((name, tuple(shape)) for name, shape in shapes.items())
        if key not in self._ready:
            self._ready[key] = self._make(dict(shapes))
            self._new_kernels = True
        self.device.scratch(self._ready[key].activations)
        return self._ready[key]

    def _make(self, shapes: dict[str, Shape]) -> "_Context":
        loaded, profile = self._loaded, self._loaded.fitting_profile(shapes)
        context = loaded.engine.create_execution_context(self._config)
        if context is None:
            raise loaded.failure("could not make an execution context")
        if not context.set_optimization_profile_async(profile, self.device.stream):
            raise loaded.failure(f"could not choose the profile {profile}")
        for name, shape in shapes.items():
            if not context.set_input_shape(name, tuple(shape)):
                raise loaded.failure(f"refused the shape {tuple(shape)} of {name}")
        if missing := context.infer_shapes():
            raise loaded.failure(f"does not know the shapes of {', '.join(missing)}")
        # Where rows of a table are given one after the other, most begin in between.
        aligned = {
            name: self.device.empty(shapes[name], dtype)
            for name, dtype in loaded.inputs.items()
            if prod(shapes[name]) * dtype.itemsize % ALIGNMENT
        }
        activations = max(context.update_device_memory_size_for_shapes(), ALIGNMENT)
        return _Context(context=context, shapes=shapes, activations=activations, aligned=aligned)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Context:
    """The library's execution context for some shapes of inputs.

    activations: the bytes that it works in; aligned: memory for inputs that begin in between
    """

    context: Any
    shapes: Mapping[str, Shape]
    activations: int
    aligned: Mapping[str, DeviceArray]
