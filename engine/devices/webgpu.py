"""A GPU that ONNX Runtime drives through WebGPU: Direct3D 12, Vulkan or Metal.

Its memory is the library's, in buffers that have no addresses: an array is a whole buffer, and a
row of one is none. The library queues work and has no other way to wait for it than to read.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.devices.device import DeviceArray, Shape
from engine.errors import BackendError, first_line, install

REGISTERED_AS = "latentrt webgpu"
PACKAGE = "onnxruntime-ep-webgpu"
UNKNOWN = 2**63 - 1  # bytes of a GPU that has memory of its own: WebGPU does not tell


@cache
def find_device() -> "WebGpuDevice":
    """Return the GPU that the library chooses, always the same object.

    Raises BackendError when a package is missing, or no GPU is found.
    """
    try:
        import onnxruntime
        import onnxruntime_ep_webgpu
    except ImportError as error:
        raise BackendError(
            f"the backend 'webgpu' needs onnxruntime and {PACKAGE}, which are not both installed; "
            + install(f"onnxruntime {PACKAGE}", "webgpu")
        ) from error
    onnxruntime.disable_telemetry_events()  # where an app had imported it before `engine`
    try:
        path = onnxruntime_ep_webgpu.get_library_path()
        onnxruntime.register_execution_provider_library(REGISTERED_AS, path)
        name = onnxruntime_ep_webgpu.get_ep_name()
        found = [each for each in onnxruntime.get_ep_devices() if each.ep_name == name]
    except Exception as error:  # the library's own exceptions share no base of their own
        raise BackendError(
            f"{PACKAGE} cannot be used with the onnxruntime that is installed "
            f"({first_line(error)}); `pip install --upgrade onnxruntime {PACKAGE}`"
        ) from error
    if not found:
        raise no_adapter("none was found")
    return WebGpuDevice(onnxruntime, found[0])


def no_adapter(reason: str) -> BackendError:
    """Make the error for a machine whose GPU cannot be used."""
    return BackendError(
        f"the backend 'webgpu' needs a GPU with a driver for Direct3D 12, Vulkan or Metal "
        f"({reason}); install the GPU's driver, and on Linux libvulkan1, or choose the backend "
        "'cpu' or 'openvino'"
    )


class WebGpuDevice:
    """An `engine.devices.device.Device`.

    library: the module `onnxruntime`; ep_device: its description of the GPU
    """

    stream = 0
    has_addresses = False

    def __init__(self, library: Any, ep_device: Any) -> None:
        self.library = library
        self.ep_device = ep_device
        self.lock = threading.RLock()
        self._memory = ep_device.memory_info(library.OrtDeviceMemoryType.DEFAULT)
        self._scratch: DeviceArray | None = None

    @property
    def is_software(self) -> bool:
        """Whether the processor computes, as one that stands for a GPU in tests does."""
        return bool(self.ep_device.device.type == self.library.OrtHardwareDeviceType.CPU)

    def empty(self, shape: Shape, dtype: np.dtype[Any]) -> DeviceArray:
        """Allocate memory; see `engine.devices.device.Device`."""
        dtype = np.dtype(dtype)
        with self._errors():
            buffer = self.library.OrtValue.ortvalue_from_shape_and_type(
                list(shape), dtype.type, memory_info=self._memory
            )
        return DeviceArray(address=0, shape=tuple(shape), dtype=dtype, memory=buffer, device=self)

    def scratch(self, nbytes: int) -> DeviceArray:
        """Return memory that all engines share; see `engine.devices.device.Device`."""
        if self._scratch is None or self._scratch.nbytes < nbytes:
            self._scratch = self.empty((nbytes,), np.dtype(np.uint8))
        return self._scratch

    def upload(self, array: NDArray[Any], to: DeviceArray) -> None:
        """Queue a copy of the same shape and dtype; see `engine.devices.device.Device`."""
        assert (array.shape, array.dtype) == (to.shape, to.dtype)
        if to.nbytes:
            with self._errors():
                source = self.library.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
                self.library.copy_tensors([source], [to.memory])

    def copy(self, source: DeviceArray, to: DeviceArray) -> None:
        """Queue a copy within the device's memory."""
        assert (source.shape, source.dtype) == (to.shape, to.dtype)
        if to.nbytes:
            with self._errors():
                self.library.copy_tensors([source.memory], [to.memory])

    def download(self, array: DeviceArray) -> NDArray[Any]:
        """Wait for all work, and return what the array holds then, of its shape and dtype."""
        # The library's value does not keep the array that it stands for: so it is kept here.
        there = np.empty(array.shape, array.dtype)
        if array.nbytes:
            with self._errors():
                target = self.library.OrtValue.ortvalue_from_numpy(there)
                self.library.copy_tensors([array.memory], [target])
        return there

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Raise BackendError: the library has no graph of several runs."""
        raise BackendError("work that is queued by WebGPU cannot be recorded; queue it again")

    def keep(self, used: object) -> None:
        """Keep nothing: no graph is recorded."""

    def wait(self) -> None:
        """Wait for all work."""
        self.download(self.empty((1,), np.dtype(np.float32)))

    def memory(self) -> tuple[int, int]:
        """Return the bytes that are free, and all there are: neither is told by WebGPU.

        Of a GPU that shares the machine's memory both are all of that, of another `UNKNOWN`.
        """
        shares = self.is_software or self.ep_device.device.metadata.get("Discrete") == "0"
        if not shares or "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", ()):
            return UNKNOWN, UNKNOWN
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total

    def trim(self) -> None:
        """Give nothing back: the library keeps what it keeps."""

    @contextmanager
    def _errors(self) -> Iterator[None]:
        with self.lock:
            try:
                yield
            except Exception as error:  # the library's own exceptions share no base of their own
                if "adapter" in str(error):
                    raise no_adapter(first_line(error)) from error
                raise BackendError(
                    f"the GPU failed through WebGPU ({first_line(error)}); is the picture too "
                    "large for its memory?"
                ) from error
