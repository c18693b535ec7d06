"""A device beside the processor: its memory and its queue of work.

Work is queued on one stream and done in order, while the processor goes on. Only `download` and
`wait` wait for it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.errors import OutOfMemoryError

Shape = tuple[int, ...]
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeviceArray:
    """An array in a device's memory, its numbers side by side.

    address: of its first byte, 0 on a device without addresses
    memory: what it lies in, which it keeps from being freed
    device: whose memory it is
    """

    address: int
    shape: Shape
    dtype: np.dtype[Any]
    memory: object
    device: "Device"

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, index: int) -> "DeviceArray":
        """Return one row of the first axis, in the same memory, which must have addresses."""
        assert self.device.has_addresses
        if not 0 <= index < self.shape[0]:
            raise IndexError(f"row {index} of {self.shape[0]}")
        shape = self.shape[1:]
        offset = index * prod(shape) * self.dtype.itemsize
        return replace(self, address=self.address + offset, shape=shape)

    def head(self, shape: Shape) -> "DeviceArray":
        """Return its first numbers as an array of this shape, in the same memory.

        Raises ValueError when the shape holds more.
        """
        if prod(shape) > prod(self.shape):
            raise ValueError(f"{shape} of {self.shape}")
        return replace(self, shape=shape)


HostOrDeviceArray = NDArray[Any] | DeviceArray


class Device(Protocol):
    """A device and the stream on which all work for it is queued.

    Every method raises BackendError when the device fails; for want of memory, with how much was
    missing.
    """

    @property
    def has_addresses(self) -> bool:
        """Whether memory has addresses, so that rows of an array are arrays too."""
        ...

    @property
    def stream(self) -> int:
        """The stream's handle, a `CUstream`; 0 where there is none."""
        ...

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """Held by a thread while it queues what belongs together, and while it records."""
        ...

    def empty(self, shape: Shape, dtype: np.dtype[Any]) -> DeviceArray:
        """Allocate memory, which is freed when its last array goes."""
        ...

    def scratch(self, nbytes: int) -> DeviceArray:
        """Return at least so many bytes that every engine may use while it runs, and none keeps.

        It is one piece for all engines of the device, and grows: an address of it is good until a
        larger piece is asked for.
        """
        ...

    def upload(self, array: NDArray[Any], to: DeviceArray) -> None:
        """Queue a copy of the same shape and dtype; the array may change once this returns."""
        ...

    def copy(self, source: DeviceArray, to: DeviceArray) -> None:
        """Queue a copy within the device's memory."""
        ...

    def download(self, array: DeviceArray) -> NDArray[Any]:
        """Wait for all work, and return what the array holds then, of its shape and dtype."""
        ...

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record the work that is queued meanwhile as one graph, and return what queues it again.

        Nothing of it is done yet. All memory that it touches must be allocated before, and be kept.
        """
        ...

    def keep(self, used: object) -> None:
        """Keep what queued work uses for as long as the graph that is being recorded, if one is."""
        ...

    def wait(self) -> None:
        """Wait for all work."""
        ...

    def memory(self) -> tuple[int, int]:
        """Return the bytes that are free, and all that there are."""
        ...

    def trim(self) -> None:
        """Wait for all work, and give back the memory that is kept for later arrays."""
        ...


def within_memory(work: Callable[[], Result], let_go: Callable[[], None]) -> Result:
    """Do what takes a device's memory; where that is short, let go of some and do it once more."""
    with suppress(OutOfMemoryError):
        return work()
    let_go()  # outside of the handler, which would keep what had been made
    return work()


def on_host(array: HostOrDeviceArray) -> NDArray[Any]:
    """Return an array of the same shape and dtype on the CPU; waits for a device's."""
    return array.device.download(array) if isinstance(array, DeviceArray) else array


def out_of_memory(asked: int, free: int, total: int) -> OutOfMemoryError:
    """Make the error for a piece of memory that a device has not, in bytes."""
    missing = (
        f"{_size(asked - free)} are missing"
        if asked > free
        else "these are in pieces which are too small"
    )
    return OutOfMemoryError(
        f"{_size(asked)} of the GPU's memory were asked for and {_size(free)} of {_size(total)} "
        f"are free, so {missing}; ask for a smaller picture or fewer at once, or close other "
        "programs that use the GPU"
    )


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**28 else f"{nbytes / 2**20:.1f} MiB"
