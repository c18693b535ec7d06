"""A device beside the processor: its memory, its queue of work, and the engines that live there.

Work is queued on one stream and done in order, while the processor goes on. Only `download` and
`wait` wait for it.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import Engine

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeviceArray:
    """An array in a device's memory, its numbers side by side.

    address: of its first byte; memory: what it lies in, which it keeps from being freed
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
        """Return one row of the first axis, in the same memory."""
        if not 0 <= index < self.shape[0]:
            raise IndexError(f"row {index} of {self.shape[0]}")
        shape = self.shape[1:]
        offset = index * prod(shape) * self.dtype.itemsize
        return replace(self, address=self.address + offset, shape=shape)

    def head(self, shape: Shape) -> "DeviceArray":
        """Return its first numbers as an array of this shape, in the same memory."""
        if prod(shape) > prod(self.shape):
            raise ValueError(f"{shape} of {self.shape}")
        return replace(self, shape=shape)


Held = NDArray[Any] | DeviceArray


class Device(Protocol):
    """A device and the stream on which all work for it is queued.

    Every method raises BackendError when the device fails; for want of memory, with how much was
    missing.
    """

    @property
    def stream(self) -> int:
        """The stream's handle, a `CUstream`."""
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
        """Queue a copy into the device's memory; the array may change as soon as this returns."""
        ...

    def copy(self, source: DeviceArray, to: DeviceArray) -> None:
        """Queue a copy within the device's memory."""
        ...

    def download(self, array: DeviceArray) -> NDArray[Any]:
        """Wait for all work, and return what the array holds then."""
        ...

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record the work that is queued meanwhile as one graph, and return what queues it again.

        Nothing of it is done yet. All memory that it touches must be allocated before, and be kept.
        """
        ...

    def wait(self) -> None:
        """Wait for all work."""
        ...

    def memory(self) -> tuple[int, int]:
        """Return the bytes that are free, and all that there are."""
        ...


class DeviceEngine(Engine, Protocol):
    """An engine whose inputs and outputs may stay on its device.

    `run` also takes arrays of the device as inputs; what it returns is the processor's.
    """

    @property
    def device(self) -> Device:
        """Where it runs."""
        ...

    def prepare(self, inputs: Mapping[str, Shape]) -> Mapping[str, DeviceArray]:
        """Get ready for inputs of these shapes; return outputs of the shapes that they make.

        The outputs are newly allocated. Raises BackendError when these shapes cannot be run.
        """
        ...

    def enqueue(
        self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]
    ) -> None:
        """Queue a run of shapes that `prepare` has once taken; allocates and waits for nothing."""
        ...


def is_on_device(engine: Engine) -> TypeGuard[DeviceEngine]:
    """Tell whether an engine's arrays may stay on a device."""
    return hasattr(engine, "device")


def on_host(array: Held) -> NDArray[Any]:
    """Return an array that the processor can read; waits for a device's."""
    return array.device.download(array) if isinstance(array, DeviceArray) else array
