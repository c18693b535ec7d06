"""The stand-in as a device of the project, through the functions that the provider calls too."""

import ctypes
from collections.abc import Callable
from functools import partial
from math import prod
from threading import RLock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.devices.device import DeviceArray, Shape, out_of_memory
from engine.errors import BackendError

TO_DEVICE, FROM_DEVICE, WITHIN = 1, 2, 3  # cudaMemcpyKind
EXHAUSTED = 2  # cudaErrorMemoryAllocation
DRIVERS_OWN = 2 << 30  # bytes, as standin.cpp has it


class StandInDevice:
    """An `engine.devices.device.Device`, whose every call is in the stand-in's log."""

    has_addresses = True

    def __init__(self) -> None:
        self._runtime = ctypes.CDLL("libcudart.so.13")
        stream = ctypes.c_void_p()
        self._call("cudaStreamCreateWithFlags", ctypes.byref(stream), 1)
        self.stream = stream.value
        self.lock = RLock()
        self.index = 0
        self._recording = False
        self._used: list[object] = []
        self._scratch = self.empty((0,), np.dtype(np.uint8))

    def empty(self, shape: Shape, dtype: np.dtype[Any]) -> DeviceArray:
        dtype, address = np.dtype(dtype), ctypes.c_void_p()
        nbytes = prod(shape) * dtype.itemsize
        asked = ctypes.byref(address), ctypes.c_size_t(nbytes), None, ctypes.c_void_p(self.stream)
        failed = self._runtime.cudaMallocFromPoolAsync(*asked)
        if failed == EXHAUSTED:
            self._runtime.cudaGetLastError()  # else the library finds it
            raise out_of_memory(nbytes, *self.memory())
        if failed:
            raise BackendError(f"cudaMallocFromPoolAsync: {failed}")
        memory = _Memory(self._runtime, address.value)
        return DeviceArray(
            address=memory.address, shape=shape, dtype=dtype, memory=memory, device=self
        )

    def scratch(self, nbytes: int) -> DeviceArray:
        return self._scratch

    def upload(self, array: NDArray[Any], to: DeviceArray) -> None:
        assert (array.shape, array.dtype) == (to.shape, to.dtype)
        array = np.ascontiguousarray(array)
        self._copy(to.address, array.ctypes.data, to.nbytes, TO_DEVICE)

    def copy(self, source: DeviceArray, to: DeviceArray) -> None:
        self._copy(to.address, source.address, to.nbytes, WITHIN)

    def download(self, array: DeviceArray) -> NDArray[Any]:
        made = np.zeros(array.shape, array.dtype)
        self._copy(made.ctypes.data, array.address, array.nbytes, FROM_DEVICE)
        self.wait()
        return made

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        graph, stream = ctypes.c_void_p(), ctypes.c_void_p(self.stream)
        self._call("cudaStreamBeginCapture", stream, 1)
        self._recording = True
        try:
            work()
        finally:
            self._recording = False
            used, self._used = self._used, []
            failed = self._runtime.cudaStreamEndCapture(stream, ctypes.byref(graph))
        if failed:
            raise BackendError(f"the stand-in could not record: {failed}")
        return partial(self._replay, graph, (work, used))

    def keep(self, used: object) -> None:
        if self._recording:
            self._used.append(used)

    def wait(self) -> None:
        self._call("cudaStreamSynchronize", ctypes.c_void_p(self.stream))

    def memory(self) -> tuple[int, int]:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def trim(self) -> None:
        self.wait()

    def _replay(self, graph: Any, kept: object) -> None:
        self._call("cudaGraphLaunch", graph, ctypes.c_void_p(self.stream))

    def _copy(self, to: int, source: int, nbytes: int, kind: int) -> None:
        size, stream = ctypes.c_size_t(nbytes), ctypes.c_void_p(self.stream)
        places = ctypes.c_void_p(to), ctypes.c_void_p(source)
        self._call("cudaMemcpyAsync", *places, size, kind, stream)

    def _call(self, function: str, *arguments: Any) -> None:
        if failed := getattr(self._runtime, function)(*arguments):
            raise BackendError(f"{function}: {failed}")


class CountingDevice(StandInDevice):
    """The stand-in, with the number of recordings."""

    recorded = 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        return super().record(work)


class _Memory:
    def __init__(self, runtime: Any, address: int) -> None:
        self._runtime = runtime
        self.address = address

    def __del__(self) -> None:
        self._runtime.cudaFreeAsync(ctypes.c_void_p(self.address), None)
