"""A GPU of NVIDIA's: its memory, the one stream on which all work is queued, recorded graphs.

Through `cuda.core`; the driver's own functions where that has none. Nothing is imported or started
before `find_device`.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial, wraps
from math import prod
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.devices.device import DeviceArray, Shape, out_of_memory
from engine.devices.pinned_memory import Staging
from engine.errors import BackendError, first_line, install


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """What an engine may depend on.

    name: as the driver gives it; sm: "sm89" for compute capability 8.9; driver: its version
    """

    name: str
    sm: str
    driver: str


@cache
def find_device(index: int = 0) -> "CudaDevice":
    """Return a GPU by its number, always the same object, so that engines share its stream.

    Raises BackendError when there is no package, no driver or no such GPU.
    """
    try:
        from cuda import core
        from cuda.bindings import driver
    except ImportError as error:
        raise BackendError(
            f"NVIDIA's packages for a GPU are not installed ({first_line(error)}); "
            + install("cuda-core cuda-bindings", "cuda")
        ) from error
    try:
        return CudaDevice(core, driver, index)
    except Exception as error:  # without a driver the libraries raise errors of many kinds
        raise BackendError(
            f"no GPU {index} of NVIDIA's can be used ({first_line(error)}); install NVIDIA's "
            "driver, or choose the backend 'cpu' or 'openvino'"
        ) from error


KEPT = 2**64 - 1  # bytes that the pool keeps for later: all, until it is trimmed

P = ParamSpec("P")
R = TypeVar("R")


def _alone(
    method: Callable[Concatenate["CudaDevice", P], R],
) -> Callable[Concatenate["CudaDevice", P], R]:
    """Let one thread at a time do this, on the GPU that the object stands for."""

    @wraps(method)
    def locked(self: "CudaDevice", /, *arguments: P.args, **named: P.kwargs) -> R:
        with self.lock:
            self._enter()
            return method(self, *arguments, **named)

    return locked


class CudaDevice:
    """An `engine.devices.device.Device`.

    core, driver: the modules `cuda.core` and `cuda.bindings.driver`
    index: the GPU's number; facts: which GPU and driver it is
    """

    has_addresses = True

    def __init__(self, core: Any, driver: Any, index: int) -> None:
        self._core = core
        self._driver = driver
        self.index = index
        self.lock = threading.RLock()
        self._thread = threading.local()
        self._recording = False
        self._kept: list[Any] = []
        self._used: list[object] = []
        self._scratch: DeviceArray | None = None
        device = self._enter()
        self._stream = device.create_stream()
        self._pool = core.DeviceMemoryResource(device.device_id)
        with suppress(Exception):  # else the pool gives all that is free back at every wait
            threshold = driver.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
            driver.cuMemPoolSetAttribute(self._pool.handle, threshold, driver.cuuint64_t(KEPT))
        self._staging = Staging(core.LegacyPinnedMemoryResource().allocate, device.create_event)
        version = core.system.get_user_mode_driver_version()
        with suppress(Exception):  # it needs the management library too
            version = core.system.get_kernel_mode_driver_version()
        self.facts = DeviceFacts(
            name=device.name, sm=f"sm{device.arch}", driver=".".join(map(str, version))
        )

    @property
    def stream(self) -> int:
        """The stream's handle."""
        return int(self._stream.handle)

    @_alone
    def empty(self, shape: Shape, dtype: np.dtype[Any]) -> DeviceArray:
        """Allocate memory; see `engine.devices.device.Device`."""
        self._refuse_recording("memory is allocated")
        dtype = np.dtype(dtype)
        buffer = self._allocate(prod(shape) * dtype.itemsize)
        memory = _Memory(buffer, self)
        return DeviceArray(
            address=int(buffer.handle), shape=shape, dtype=dtype, memory=memory, device=self
        )

    def _allocate(self, nbytes: int) -> Any:
        size = max(nbytes, 1)  # an empty array has an address too
        with suppress(MemoryError):
            return self._take(size)
        self.trim()  # what the pool keeps for later may be in pieces that are too small
        try:
            return self._take(size)
        except MemoryError as error:
            raise out_of_memory(size, *self.memory()) from error

    def _take(self, size: int) -> Any:
        with self._errors():
            try:
                return self._pool.allocate(size, stream=self._stream)
            except Exception as error:
                if "OUT_OF_MEMORY" in str(error):
                    raise MemoryError from error
                raise

    @_alone
    def scratch(self, nbytes: int) -> DeviceArray:
        """Return memory that all engines share; see `engine.devices.device.Device`.

        A recorded graph keeps the piece that it was recorded with.
        """
        if self._scratch is None or self._scratch.nbytes < nbytes:
            self._scratch = None  # never two at once
            self._scratch = self.empty((nbytes,), np.dtype(np.uint8))
        return self._scratch

    @_alone
    def upload(self, array: NDArray[Any], to: DeviceArray) -> None:
        """Queue a copy of the same shape and dtype; see `engine.devices.device.Device`."""
        self._refuse_recording("the processor's memory is read")
        assert (array.shape, array.dtype) == (to.shape, to.dtype)
        if not to.nbytes:
            return
        with self._errors():
            piece = self._staging.take(to.nbytes)
            piece.view(to.shape, to.dtype)[...] = array
            self._copy(to.address, piece.address, to.nbytes)
            self._stream.record(piece.event)

    @_alone
    def copy(self, source: DeviceArray, to: DeviceArray) -> None:
        """Queue a copy within the device's memory."""
        if to.nbytes:
            with self._errors():
                self._copy(to.address, source.address, to.nbytes)

    @_alone
    def download(self, array: DeviceArray) -> NDArray[Any]:
        """Wait for all work, and return what the array holds then, of its shape and dtype."""
        if not array.nbytes:
            return np.empty(array.shape, array.dtype)
        with self._errors():
            piece = self._staging.take(array.nbytes)
            self._copy(piece.address, array.address, array.nbytes)
            self._stream.record(piece.event)
            self._stream.sync()
        return piece.view(array.shape, array.dtype).copy()

    @_alone
    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record work as one graph; see `engine.devices.device.Device`."""
        self._refuse_recording("a graph is recorded")
        with self._errors():
            builder = self._stream.create_graph_builder()
            # An allocation or a wait within is an error rather than left out of the graph.
            builder.begin_building("thread_local")
            self._recording = True
            try:
                work()
            except BaseException:
                with suppress(Exception):
                    builder.end_building()
                raise
            else:
                graph = builder.end_building().complete()
                graph.upload(self._stream)
            finally:
                self._recording = False
                self._kept.clear()
                used, self._used = self._used, []
                builder.close()
        return partial(self._replay, graph, (self._scratch, work, used))

    @_alone
    def _replay(self, graph: Any, kept: object) -> None:
        """Queue a graph again; kept: the memory and the engines that it uses."""
        with self._errors():
            graph.launch(self._stream)

    @_alone
    def keep(self, used: object) -> None:
        """Keep this for a graph that is being recorded; see `engine.devices.device.Device`."""
        if self._recording:
            self._used.append(used)

    @_alone
    def wait(self) -> None:
        """Wait for all work."""
        with self._errors():
            self._stream.sync()

    @_alone
    def memory(self) -> tuple[int, int]:
        """Return the bytes that are free, those that the pool keeps for us among them, and all."""
        with self._errors():
            free, total = self._check(self._driver.cuMemGetInfo())
            pool = self._pool.attributes
            return free + pool.reserved_mem_current - pool.used_mem_current, total

    @_alone
    def trim(self) -> None:
        """Wait for all work, and give back the memory that the pool keeps for later."""
        with self._errors():
            self._stream.sync()
            self._check(self._driver.cuMemPoolTrimTo(self._pool.handle, 0))

    def _copy(self, to: int, source: int, nbytes: int) -> None:
        self._check(self._driver.cuMemcpyAsync(to, source, nbytes, self._stream.handle))

    def _check(self, result: tuple[Any, ...]) -> Any:
        """Return what a function of the driver gives, whose first part is its error."""
        error, *values = result
        if error != self._driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"the driver says {error.name}")
        return values

    def _enter(self) -> Any:
        """Make the GPU this thread's, once, and return it."""
        if not hasattr(self._thread, "device"):
            device = self._core.Device(self.index)
            device.set_current()
            self._thread.device = device
        return self._thread.device

    def _refuse_recording(self, what: str) -> None:
        if self._recording:
            raise BackendError(f"{what} while a graph is recorded; do it before")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (BackendError, MemoryError):
            raise
        except Exception as error:  # what cuda.core raises has no public base
            raise BackendError(f"the GPU failed ({first_line(error)}); start again") from error


@dataclass(slots=True)
class _Memory:
    """A piece of memory, not to be freed while a graph is recorded: that would be recorded too."""

    buffer: Any
    device: CudaDevice

    def __del__(self) -> None:
        if self.device._recording:
            self.device._kept.append(self.buffer)
