"""`cuda.core` and the driver without a GPU, on the memory of a `FakeDevice`, for `CudaDevice`.

    machine = FakeCuda()
    device = CudaDevice(machine.core, machine.driver, 0)

Every object takes only what the installed packages' signatures take. What is queued is done when
the stream is waited for; page-locked memory is the processor's, with an address.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from cuda import core
from cuda.bindings import driver

from engine.errors import BackendError
from tests.support.fake_cuda import FakeDevice, Memory
from tests.support.real_signatures import check_call, checked, strict

BYTES = np.dtype(np.uint8)


class FakeCuda:
    """A machine with one GPU; memory: the FakeDevice that holds and does everything.

    launches: of recorded graphs; trims: of the pool; current: who made the GPU a thread's
    """

    def __init__(self, total: int = 2**24) -> None:
        self.memory = FakeDevice(total)
        self.page_locked: list[Memory] = []
        self.pool_attributes: dict[Any, int] = {}
        self.launches = self.trims = self.current = 0
        self.core = SimpleNamespace(
            Device=checked(core.Device, self._device),
            DeviceMemoryResource=checked(core.DeviceMemoryResource, self._pool),
            LegacyPinnedMemoryResource=checked(
                core.LegacyPinnedMemoryResource,
                lambda: strict(core.LegacyPinnedMemoryResource, _PageLocked(self)),
            ),
            system=strict(core.system, _System()),
        )
        self.driver = strict(driver, _Driver(self))
        self.stream = strict(core.Stream, _Stream(self))

    def at(self, address: int, nbytes: int) -> Any:
        """Look at bytes of either side's memory."""
        for piece in self.page_locked:
            if piece.address <= address and address + nbytes <= piece.address + piece.nbytes:
                return piece.view(address, (nbytes,), BYTES)
        return self.memory.at(address, (nbytes,), BYTES)

    def _device(self, device_id: int) -> Any:
        if device_id:
            raise ValueError("device_id must be >= 0 and < 1")
        return strict(core.Device, _Gpu(self))

    def _pool(self, device_id: int) -> Any:
        return strict(core.DeviceMemoryResource, _Pool(self))


class _System:
    def get_user_mode_driver_version(self) -> tuple[int, ...]:
        return 13, 0

    def get_kernel_mode_driver_version(self) -> tuple[int, ...]:
        return 580, 65, 6


class _Gpu:
    name = "NVIDIA Made Up 4090"
    arch = "89"
    device_id = 0

    def __init__(self, machine: FakeCuda) -> None:
        self._machine = machine

    def set_current(self) -> None:
        self._machine.current += 1

    def create_stream(self) -> Any:
        return self._machine.stream

    def create_event(self) -> Any:
        return strict(core.Event, _Event())


class _Event:
    is_done = True


class _Pool:
    handle = 0x900

    def __init__(self, machine: FakeCuda) -> None:
        self._machine = machine
        self.attributes = SimpleNamespace(reserved_mem_current=2**20, used_mem_current=2**19)

    def allocate(self, size: int, *, stream: Any) -> Any:
        try:
            array = self._machine.memory.empty((size,), BYTES)
        except BackendError as error:
            raise RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: unable to allocate") from error
        return strict(core.Buffer, SimpleNamespace(handle=array.address, kept=array))


class _PageLocked:
    def __init__(self, machine: FakeCuda) -> None:
        self._machine = machine

    def allocate(self, size: int) -> Any:
        piece = Memory(size)
        self._machine.page_locked.append(piece)
        return strict(core.Buffer, SimpleNamespace(handle=piece.address))


class _Driver:
    CUresult = driver.CUresult
    CUmemPool_attribute = driver.CUmemPool_attribute
    cuuint64_t = driver.cuuint64_t

    def __init__(self, machine: FakeCuda) -> None:
        self._machine = machine

    def cuMemPoolSetAttribute(self, pool: Any, attr: Any, value: Any) -> Any:  # noqa: N802
        self._machine.pool_attributes[attr] = int(value)
        return (driver.CUresult.CUDA_SUCCESS,)

    def cuMemcpyAsync(self, dst: int, src: int, size: int, stream: Any) -> Any:  # noqa: N802
        machine = self._machine
        assert stream == machine.memory.stream

        def work() -> None:
            machine.at(dst, size)[:] = machine.at(src, size)

        machine.memory.queue(work)
        return (driver.CUresult.CUDA_SUCCESS,)

    def cuMemGetInfo(self) -> Any:  # noqa: N802
        return driver.CUresult.CUDA_SUCCESS, *self._machine.memory.memory()

    def cuMemPoolTrimTo(self, pool: Any, minimum: int) -> Any:  # noqa: N802
        self._machine.trims += 1
        return (driver.CUresult.CUDA_SUCCESS,)


class _Stream:
    def __init__(self, machine: FakeCuda) -> None:
        self._machine = machine
        self.handle = machine.memory.stream

    def sync(self) -> None:
        self._machine.memory.wait()

    def record(self, event: Any) -> None:
        event._fake.is_done = False
        self._machine.memory.queue(lambda: setattr(event._fake, "is_done", True))

    def create_graph_builder(self) -> Any:
        return strict(core.graph.GraphBuilder, _Builder(self._machine))


class _Builder:
    def __init__(self, machine: FakeCuda) -> None:
        self._machine = machine
        self._recorded: list[Callable[[], None]] = []

    def begin_building(self, mode: str) -> None:
        assert mode in ("global", "thread_local", "relaxed")
        self._machine.memory._recorded = self._recorded

    def end_building(self) -> Any:
        self._machine.memory._recorded = None
        return strict(core.graph.GraphBuilder, self)

    def complete(self) -> Any:
        return strict(core.graph.Graph, _Graph(self._machine, self._recorded))

    def close(self) -> None:
        assert self._machine.memory._recorded is None, "it is still recording"


class _Graph:
    def __init__(self, machine: FakeCuda, recorded: list[Callable[[], None]]) -> None:
        self._machine = machine
        self._recorded = recorded

    def upload(self, stream: Any) -> None:
        check_call(core.graph.Graph.launch, (stream,), {}, of_class=True)

    def launch(self, stream: Any) -> None:
        self._machine.launches += 1
        for work in self._recorded:
            self._machine.memory.queue(work)
