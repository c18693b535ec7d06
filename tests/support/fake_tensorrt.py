"""TensorRT without a GPU: its engines run on the processor, on the memory of a `FakeDevice`.

`FakeTensorRT(device)` stands for the module `tensorrt_rtx`, with `rtx=False` for `tensorrt`. Every
object takes only what the installed bindings' signatures take (`real_signatures`). A run overwrites
the activations' memory, so what was kept there is seen to be lost.

    library = FakeTensorRT(device)
    plan = library.write_plan(tmp_path / "step.engine", graph, weights, [profile])
    engine = TensorRTEngine(library, plan, graph, device)
"""

import json
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt_rtx_bindings as real
from numpy.typing import NDArray

from engine.backends.base import Arrays
from engine.backends.onnxruntime.cpu import OnnxRuntimeEngine
from engine.devices.device import Shape
from engine.graphs.graph import Graph
from tests.support.fake_cuda import ALIGNMENT, FakeDevice, input_dtype, output_shapes
from tests.support.real_signatures import check_call, strict, unwrapped

Profile = Mapping[str, tuple[Shape, Shape, Shape]]
"""The smallest, the best and the largest shape of every input."""


class FakeTensorRT:
    """The module; see above.

    constants: weights that engines do not know by name; merged: names that must be given together
    device.counts: "load" for each engine loaded, "refit", "compile" for the shapes compiled for
    """

    def __init__(
        self,
        device: FakeDevice,
        *,
        rtx: bool = True,
        constants: Sequence[str] = (),
        merged: Sequence[str] = (),
    ) -> None:
        self.device = device
        self.rtx = rtx
        self.constants = constants
        self.merged = frozenset(merged)
        self.plans: dict[bytes, dict[str, Any]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(real, name)  # enumerations, Weights, ILogger and nptype need no GPU

    def write_plan(
        self,
        path: Path,
        graph: Graph,
        weights: Arrays,
        profiles: Sequence[Profile],
        *,
        refit: bool = True,
    ) -> Path:
        """Write a file that `TensorRTEngine` opens; profiles: those that the engine has."""
        content = f"plan {len(self.plans)} of {graph.path.name}".encode()
        self.plans[content] = {
            "graph": graph,
            "weights": weights,
            "profiles": profiles,
            "refit": refit,
        }
        path.write_bytes(content)
        return path

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        check_call(real.Runtime, (logger,), {}, of_class=True)
        return strict(real.Runtime, _Runtime(self, logger))

    def Weights(self, a: NDArray[Any]) -> Any:  # noqa: N802
        check_call(real.Weights, (a,), {}, of_class=True)
        return strict(real.Weights, _Weights(a))

    def Refitter(self, engine: Any, logger: Any) -> Any:  # noqa: N802
        check_call(real.Refitter, (engine, logger), {}, of_class=True)
        return strict(real.Refitter, _Refitter(unwrapped(engine)))


class _Runtime:
    def __init__(self, library: FakeTensorRT, logger: Any) -> None:
        self._library = library
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
        plan = self._library.plans.get(bytes(serialized_engine))
        if plan is None:
            self._logger.log(real.ILogger.Severity.ERROR, "magic tag does not match")
            return None
        return strict(real.ICudaEngine, _CudaEngine(self._library, **plan))


class _CudaEngine:
    def __init__(
        self,
        library: FakeTensorRT,
        graph: Graph,
        weights: Arrays,
        profiles: Sequence[Profile],
        refit: bool,
    ) -> None:
        self.library = library
        self.graph = graph
        self.profiles = profiles
        self.refittable = refit
        self.num_io_tensors = len(graph.inputs) + len(graph.outputs)
        self.num_optimization_profiles = len(profiles)
        self.runner = OnnxRuntimeEngine(graph, weights, 1)
        shapes = {name: best for name, (_, best, _) in profiles[0].items()}
        self.dtypes = {name: input_dtype(name) for name in graph.inputs}
        self.dtypes |= {n: dtype for n, (_, dtype) in output_shapes(self.runner, shapes).items()}
        numbers = sum(int(np.prod(shape)) for shape in graph.weights.values())
        self._weights = library.device.empty((numbers,), np.dtype(graph.precision))
        library.device.counts["load"] += 1

    def get_tensor_name(self, index: int) -> str:
        return [*self.graph.inputs, *self.graph.outputs][index]

    def get_tensor_mode(self, name: str) -> Any:
        modes = real.TensorIOMode
        return modes.INPUT if name in self.graph.inputs else modes.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        found = [real.float32, real.float16, real.int64, real.uint8]
        return next(kind for kind in found if real.nptype(kind) == self.dtypes[name])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Any]:
        return [real.Dims(shape) for shape in self.profiles[profile_index][name]]

    def create_runtime_config(self) -> Any:
        config = _RuntimeConfig() if self.library.rtx else _Config()
        return strict(real.IRuntimeConfig, config)

    def create_execution_context(self, runtime_config: Any) -> Any:
        config = unwrapped(runtime_config)
        assert config.strategy == real.ExecutionContextAllocationStrategy.USER_MANAGED
        return strict(real.IExecutionContext, _Context(self, config))


class _Config:
    strategy: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy


class _RuntimeConfig(_Config):
    dynamic_shapes_kernel_specialization_strategy: Any = None
    cache: Any = None

    def create_runtime_cache(self) -> Any:
        return strict(real.IRuntimeCache, _RuntimeCache())

    def set_runtime_cache(self, cache: Any) -> bool:
        self.cache = unwrapped(cache)
        return True


class _RuntimeCache:
    def __init__(self) -> None:
        self.kernels: set[str] = set()

    def serialize(self) -> bytes:
        return json.dumps(sorted(self.kernels)).encode()

    def deserialize(self, blob: Any) -> bool:
        try:
            self.kernels |= set(json.loads(bytes(blob)))
        except ValueError:
            return False
        return True


class _Context:
    def __init__(self, engine: _CudaEngine, config: Any) -> None:
        self.active_optimization_profile = 0
        self._engine = engine
        self._device = engine.library.device
        self._cache = getattr(config, "cache", None)
        self._shapes: dict[str, Shape] = {}
        self._made: dict[str, tuple[Shape, np.dtype[Any]]] = {}
        self._addresses: dict[str, int] = {}
        self._memory = (0, 0)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self.active_optimization_profile = profile_index
        self._shapes.clear()
        return 0 <= profile_index < len(self._engine.profiles) and stream_handle != 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        profile = self._engine.profiles[self.active_optimization_profile]
        if name not in profile:
            return False
        smallest, _, largest = profile[name]
        self._shapes[name] = shape
        return len(shape) == len(smallest) and all(
            a <= b <= c for a, b, c in zip(smallest, shape, largest, strict=True)
        )

    def infer_shapes(self) -> list[str]:
        missing = [name for name in self._engine.graph.inputs if name not in self._shapes]
        if not missing:
            self._made = output_shapes(self._engine.runner, self._shapes)
        return missing

    def get_tensor_shape(self, name: str) -> Any:
        return real.Dims(self._shapes[name] if name in self._shapes else self._made[name][0])

    def update_device_memory_size_for_shapes(self) -> int:
        return sum(int(np.prod(shape)) for shape in self._shapes.values())

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % ALIGNMENT == 0
        assert size >= self.update_device_memory_size_for_shapes(), "too little memory is given"
        self._memory = (memory, size)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return memory % ALIGNMENT == 0 and name in self._engine.dtypes

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle == self._device.stream
        compiled = repr(sorted(self._shapes.items()))
        if self._cache is not None and compiled not in self._cache.kernels:
            assert not self._device.recording, "kernels are compiled while a graph is recorded"
            self._cache.kernels.add(compiled)
            self._device.counts["compile"] += 1
        shapes = self._shapes | {name: shape for name, (shape, _) in self._made.items()}
        places = {
            name: (self._addresses[name], shape, self._engine.dtypes[name])
            for name, shape in shapes.items()
        }
        memory, size = self._memory
        self._device.queue(lambda: self._device.at(memory, (size,), np.dtype(np.uint8)).fill(0xEE))
        graph = self._engine.graph
        self._device.queue_run(
            self._engine.runner,
            {name: places[name] for name in graph.inputs},
            {name: places[name] for name in graph.outputs},
        )
        return True


class _Weights:
    """Looks at an array, which somebody else must keep."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = weakref.ref(array)

    def numpy(self) -> NDArray[Any]:
        array = self._array()
        assert array is not None, "weights are gone before they are read"
        return array


class _Refitter:
    def __init__(self, engine: _CudaEngine) -> None:
        self._engine = engine
        self._given: dict[str, Any] = {}

    def get_all_weights(self) -> list[str]:
        constants = self._engine.library.constants
        return [name for name in self._engine.graph.weights if name not in constants]

    def set_named_weights(self, name: str, weights: Any) -> bool:
        shape, array = self._engine.graph.weights[name], weights.numpy()
        if name not in self.get_all_weights() or array.size != np.prod(shape):
            return False
        self._given[name] = weights  # read when the engine is refitted
        return bool(array.dtype == self._engine.graph.precision)

    def get_missing_weights(self) -> list[str]:
        merged = self._engine.library.merged
        return sorted(merged - set(self._given)) if merged & set(self._given) else []

    def refit_cuda_engine(self) -> bool:
        self._engine.library.device.assert_idle()
        if self.get_missing_weights():
            return False
        shapes = self._engine.graph.weights
        new = {name: w.numpy().reshape(shapes[name]).copy() for name, w in self._given.items()}
        self._engine.runner.rebind(new, new.keys())
        self._engine.library.device.counts["refit"] += 1
        return True
