"""What the driver tells of an NVIDIA GPU, through NVML, which comes with it.

It needs no CUDA context, so a process that only watches takes none of the GPU's memory.
"""

import ctypes
import os
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from engine.errors import BackendError

LIBRARY = "libnvidia-ml.so.1" if os.name == "posix" else "nvml.dll"
TEXT_LENGTH = 96  # of names; NVML_DEVICE_NAME_V2_BUFFER_SIZE
EVERY_S = 0.005  # how often memory is looked at


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gpu:
    """A GPU; sm: its compute capability, such as "sm90"."""

    name: str
    driver: str
    sm: str
    total_bytes: int
    library: Any
    handle: Any

    def memory(self) -> tuple[int, int]:
        """Return the bytes that are free and those that any process uses."""
        found = _Memory()
        _ask(self.library.nvmlDeviceGetMemoryInfo, self.handle, ctypes.byref(found))
        return found.free, found.used

    def described(self) -> dict[str, Any]:
        """Return what figures are valid for, as JSON's values."""
        return {
            "name": self.name,
            "sm": self.sm,
            "driver": self.driver,
            "memory_bytes": self.total_bytes,
        }


def find_gpu() -> Gpu:
    """Return the first GPU that programs may use; raises BackendError when there is none."""
    try:
        library = ctypes.CDLL(LIBRARY)
        _ask(library.nvmlInit_v2)
        handle = ctypes.c_void_p()
        _ask(library.nvmlDeviceGetHandleByIndex_v2, _index(), ctypes.byref(handle))
        return _described(library, handle)
    except OSError as error:
        raise BackendError(
            f"no NVIDIA GPU was found ({error}); run this on a machine that has one and its driver"
        ) from error


def _described(library: Any, handle: Any) -> Gpu:
    major, minor, memory = ctypes.c_int(), ctypes.c_int(), _Memory()
    capability = ctypes.byref(major), ctypes.byref(minor)
    _ask(library.nvmlDeviceGetCudaComputeCapability, handle, *capability)
    _ask(library.nvmlDeviceGetMemoryInfo, handle, ctypes.byref(memory))
    return Gpu(
        name=_text(library.nvmlDeviceGetName, handle),
        driver=_text(library.nvmlSystemGetDriverVersion),
        sm=f"sm{major.value}{minor.value}",
        total_bytes=memory.total,
        library=library,
        handle=handle,
    )


def _index() -> int:
    """Return the number of the first GPU that CUDA shows to programs."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    return int(first) if first.isdigit() else 0


def _ask(function: Any, *arguments: Any) -> None:
    """Call NVML; raises OSError when it fails."""
    if status := function(*arguments):
        raise OSError(f"NVML's status is {status}")


def _text(function: Any, *arguments: Any) -> str:
    buffer = ctypes.create_string_buffer(TEXT_LENGTH)
    _ask(function, *arguments, buffer, ctypes.c_uint(TEXT_LENGTH))
    return buffer.value.decode(errors="replace")


class PeakMemory:
    """While it is open, looks at a GPU's memory; `used` is the most that was used."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu, self._ended = gpu, threading.Event()
        self.used = 0

    def __enter__(self) -> Self:
        """Begin to look."""
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Look once more, and end."""
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while True:
            ended = self._ended.is_set()
            self.used = max(self.used, self._gpu.memory()[1])
            if ended:
                return
            time.sleep(EVERY_S)
