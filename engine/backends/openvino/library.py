"""The library of OpenVINO, and what it can do on this processor."""

import sys
from typing import Any

import numpy as np

from engine.errors import BackendError, install

CONVERTER = "openvino.tools.ovc"  # reports over the network that it was imported
CAPABILITIES = "OPTIMIZATION_CAPABILITIES"
GROUP_NORM = "GROUP_NORM"
CPU = "CPU"


def capabilities() -> frozenset[str]:
    """Return what the library can compute in on this processor, such as "BF16" and "INT8".

    GROUP_NORM is among it where group norms have a kernel, which they have from AVX2 on.
    Raises BackendError where the library is not installed.
    """
    library = import_library()
    core = library.Core()
    given = library.opset13.parameter([1, 2, 4, 4], np.float32)
    scale = library.opset13.constant(np.ones(2, np.float32))
    norm = library.opset13.group_normalization(given, scale, scale, 2, 1e-5)
    probe = library.Model([library.opset13.result(norm)], [given], "probe")
    able = norm.get_friendly_name() in core.query_model(probe, CPU)
    return frozenset(core.get_property(CPU, CAPABILITIES)) | ({GROUP_NORM} if able else set())


def import_library() -> Any:
    """Import the library without its model converter, whose import sends usage statistics.

    Raises BackendError where it is not installed.
    """
    absent = CONVERTER not in sys.modules
    if absent:
        sys.modules[CONVERTER] = None  # type: ignore[assignment]
    try:
        import openvino
    except ImportError as error:
        raise BackendError(
            "the backend 'openvino' needs openvino, which is not installed; "
            + install("openvino", "openvino")
        ) from error
    finally:
        if absent:
            sys.modules.pop(CONVERTER, None)
    return openvino
