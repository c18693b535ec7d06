"""Arrays of a GPU's memory as values of ONNX Runtime, which then owns nothing of them.

Its own constructors allocate, or copy from the processor. DLPack (https://dmlc.github.io/dlpack,
version 0) describes memory that is there already.
"""

import ctypes
from typing import Any

import numpy as np

from engine.devices.device import DeviceArray

CUDA = 2  # DLDeviceType
CODES = {"i": 0, "u": 1, "f": 2}  # DLDataTypeCode, by numpy's kinds
NAME = b"dltensor"  # of the capsule


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),  # none: the numbers lie side by side
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class DeviceValue:
    """An array of a GPU's memory, as ONNX Runtime takes it; keep it while a session uses it.

    library: the module onnxruntime; array: keeps its memory; index: the GPU's number
    value: an OrtValue
    """

    def __init__(self, library: Any, array: DeviceArray, index: int) -> None:
        self._array = array
        sizes = ctypes.c_int64 * len(array.shape)
        # The library frees this description when it likes, be it after the interpreter's end.
        start = _function("PyMem_RawMalloc", ctypes.c_void_p, ctypes.c_size_t)(
            ctypes.sizeof(_Tensor) + ctypes.sizeof(sizes)
        )
        shape = sizes.from_address(start + ctypes.sizeof(_Tensor))
        shape[:] = list(array.shape)
        tensor = _Tensor.from_address(start)
        dtype = np.dtype(array.dtype)
        tensor.data, tensor.byte_offset = array.address, 0
        tensor.device_type, tensor.device_id = CUDA, index
        tensor.code, tensor.bits, tensor.lanes = CODES[dtype.kind], 8 * dtype.itemsize, 1
        tensor.ndim, tensor.shape = len(shape), ctypes.addressof(shape)
        tensor.strides = tensor.manager = None
        tensor.deleter = ctypes.cast(ctypes.pythonapi.PyMem_RawFree, ctypes.c_void_p)
        capsule = _function(
            "PyCapsule_New", ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
        )
        self.value: Any = library.OrtValue.from_dlpack(capsule(start, NAME, None))


def _function(name: str, result: Any, *arguments: Any) -> Any:
    """Return a function of the interpreter's C API."""
    return ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))
