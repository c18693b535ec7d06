"""A device without a GPU: its memory is the processor's, and its work waits until it is waited for.

`FakeDevice` is an `engine.devices.device.Device`; `FakeEngine` lets any engine of the processor
stand for one that lives there. What would be a bug beside a GPU is an error here: an address that
is no longer allocated, allocating or waiting while a graph is recorded, and, because memory starts
as 0xA5 in every byte and nothing is done before it is waited for, reading what was not written
yet.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import partial, wraps
from math import prod
from threading import RLock
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import Arrays, Engine, run_from_host
from engine.devices.device import Device, DeviceArray, HostOrDeviceArray, Shape, out_of_memory

Work = Callable[[], None]
Place = tuple[int, Shape, np.dtype[Any]]
"""An array's address, shape and dtype."""
ALIGNMENT = 256  # bytes, as the driver gives memory


class Memory:
    """A piece of the device's memory; it is free when the last array in it goes."""

    def __init__(self, nbytes: int) -> None:
        self.bytes = np.full(nbytes + ALIGNMENT, 0xA5, np.uint8)
        self.address = -(-self.bytes.ctypes.data // ALIGNMENT) * ALIGNMENT
        self.nbytes = nbytes

    def view(self, address: int, shape: Shape, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Look at an array that lies in it."""
        start = address - self.bytes.ctypes.data
        return self.bytes[start : start + prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


def _alone(method):
    """Let one thread at a time do this, as `engine.devices.cuda` does."""

    @wraps(method)
    def locked(self, *arguments):
        with self.lock:
            return method(self, *arguments)

    return locked


class FakeDevice:
    """A device over the processor's memory; total: its size in bytes.

    has_addresses: whether rows of its arrays are arrays too
    counts: how often each of its methods was called, "replay" for graphs that were queued again and
        "run" for the runs of engines that were done
    """

    def __init__(self, total: int = 2**30, has_addresses: bool = True) -> None:
        self.stream = 0x57
        self.has_addresses = has_addresses
        self.counts: Counter[str] = Counter()
        self.peak = 0
        self._total = total
        self._live: WeakValueDictionary[int, Memory] = WeakValueDictionary()
        self._queue: list[tuple[Work, list[Memory]]] = []
        self._recorded: list[Work] | None = None
        self._used: list[object] = []
        self._scratch: DeviceArray | None = None
        self.lock = RLock()

    @property
    def allocated(self) -> int:
        """The bytes that are allocated now."""
        return sum(memory.nbytes for memory in self._live.values())

    @property
    def recording(self) -> bool:
        """Whether a graph is being recorded."""
        return self._recorded is not None

    @_alone
    def empty(self, shape: Shape, dtype: np.dtype[Any]) -> DeviceArray:
        assert self._recorded is None, "memory is allocated while a graph is recorded"
        self.counts["empty"] += 1
        dtype = np.dtype(dtype)
        nbytes = prod(shape) * dtype.itemsize
        if nbytes > self._total - self.allocated:
            self._drain()  # what is freed is free when the work before is done
        free = self._total - self.allocated
        if nbytes > free:
            raise out_of_memory(nbytes, free, self._total)
        memory = Memory(nbytes)
        self._live[memory.address] = memory
        self.peak = max(self.peak, self.allocated)
        return DeviceArray(
            address=memory.address, shape=shape, dtype=dtype, memory=memory, device=self
        )

    @_alone
    def scratch(self, nbytes: int) -> DeviceArray:
        if self._scratch is None or self._scratch.nbytes < nbytes:
            self._scratch = None
            self._scratch = self.empty((nbytes,), np.dtype(np.uint8))
        return self._scratch

    @_alone
    def upload(self, array: NDArray[Any], to: DeviceArray) -> None:
        assert self._recorded is None, "the processor's memory is read while a graph is recorded"
        assert (array.shape, array.dtype) == (to.shape, to.dtype), "another array is uploaded"
        self.counts["upload"] += 1
        taken = array.copy()
        self.queue(lambda: np.copyto(self.at(to.address, to.shape, to.dtype), taken))

    @_alone
    def copy(self, source: DeviceArray, to: DeviceArray) -> None:
        assert (source.shape, source.dtype) == (to.shape, to.dtype), "another array is copied"
        self.counts["copy"] += 1
        places = [(array.address, array.shape, array.dtype) for array in (to, source)]
        self.queue(lambda: np.copyto(self.at(*places[0]), self.at(*places[1])))

    @_alone
    def download(self, array: DeviceArray) -> NDArray[Any]:
        self.counts["download"] += 1
        self._drain()
        return self.at(array.address, array.shape, array.dtype).copy()

    @_alone
    def record(self, work: Work) -> Work:
        assert self._recorded is None, "a graph is recorded while another is"
        self.counts["record"] += 1
        recorded = self._recorded = []
        try:
            work()
        finally:
            self._recorded = None
            used, self._used = self._used, []

        return partial(self._replay, recorded, (self._scratch, work, used))

    @_alone
    def _replay(self, recorded: list[Work], kept: object) -> None:
        self.counts["replay"] += 1
        for piece in recorded:
            self.queue(piece)

    @_alone
    def keep(self, used: object) -> None:
        if self._recorded is not None:
            self._used.append(used)

    @_alone
    def wait(self) -> None:
        self.counts["wait"] += 1
        self._drain()

    @_alone
    def memory(self) -> tuple[int, int]:
        return self._total - self.allocated, self._total

    @_alone
    def trim(self) -> None:
        self.counts["trim"] += 1
        self._drain()

    @_alone
    def queue(self, work: Work) -> None:
        """Queue what engines do; it finds its arrays with `at` when its turn comes."""
        if self._recorded is not None:
            self._recorded.append(work)
        else:  # what is freed meanwhile is freed behind it, as the driver does
            self._queue.append((work, list(self._live.values())))

    def queue_run(
        self, engine: Engine, inputs: Mapping[str, Place], outputs: Mapping[str, Place]
    ) -> None:
        """Queue a run of an engine of the processor from and to the device's memory."""

        def work() -> None:
            self.counts["run"] += 1
            made = engine.run({name: self.at(*place).copy() for name, place in inputs.items()})
            for name, place in outputs.items():
                np.copyto(self.at(*place), made[name])

        self.queue(work)

    def assert_idle(self) -> None:
        """Refuse what must not be done while work is queued."""
        assert not self._queue, "the device is not waited for"

    def at(self, address: int, shape: Shape, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Look at allocated memory; an AssertionError where an array reaches beyond it."""
        end = address + prod(shape) * dtype.itemsize
        for memory in self._live.values():
            if memory.address <= address and end <= memory.address + memory.nbytes:
                return memory.view(address, shape, dtype)
        raise AssertionError(f"{end - address} bytes at {address:#x} are not allocated")

    def _drain(self) -> None:
        assert self._recorded is None, "the device is waited for while a graph is recorded"
        queue, self._queue = self._queue, []
        for work, _ in queue:
            work()


class FakeEngine:
    """A `DeviceEngine` that runs another engine, on arrays of a `FakeDevice`."""

    records = True
    held = 0

    def __init__(self, engine: Engine, device: FakeDevice) -> None:
        self.device: Device = device
        self._engine = engine
        self._fake = device
        self._prepared: list[dict[str, Shape]] = []

    def run(self, inputs: Mapping[str, HostOrDeviceArray]) -> dict[str, NDArray[Any]]:
        return run_from_host(self, inputs)

    def prepare(self, inputs: Mapping[str, Shape]) -> Mapping[str, DeviceArray]:
        self._prepared.append(dict(inputs))
        made = output_shapes(self._engine, inputs)
        return {name: self.device.empty(shape, dtype) for name, (shape, dtype) in made.items()}

    def enqueue(
        self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]
    ) -> None:
        shapes = {name: array.shape for name, array in inputs.items()}
        assert shapes in self._prepared, "the engine is not prepared for these shapes"
        self._fake.queue_run(
            self._engine,
            {name: (array.address, array.shape, array.dtype) for name, array in inputs.items()},
            {name: (array.address, array.shape, array.dtype) for name, array in outputs.items()},
        )

    def rebind(self, weights: Arrays, names: Collection[str]) -> None:
        self._engine.rebind(weights, names)


def moved(pipeline, device: FakeDevice):
    """Have every engine that a pipeline opens from now on stand for one on a device; return it."""
    engines = pipeline.engines
    for name in ("open", "open_beside"):
        open_engine = getattr(engines, name)
        setattr(engines, name, lambda *given, of=open_engine: FakeEngine(of(*given), device))
    return pipeline


def output_shapes(
    engine: Engine, inputs: Mapping[str, Shape]
) -> dict[str, tuple[Shape, np.dtype[Any]]]:
    """Find the outputs' shapes and dtypes by running an engine on zeros."""
    zeros = {name: np.zeros(shape, input_dtype(name)) for name, shape in inputs.items()}
    return {name: (array.shape, array.dtype) for name, array in engine.run(zeros).items()}


def input_dtype(name: str) -> np.dtype[Any]:
    """Return the dtype that `engine.graphs.graph` gives an input of this name."""
    return np.dtype({"input_ids": np.int64, "pixels": np.uint8}.get(name, np.float32))
