"""The backends: by name the module whose `open_engine(spec: EngineSpec) -> Engine` opens engines.

It is imported when the first engine is opened, and imports its library then.
"""

from collections.abc import Mapping
from types import MappingProxyType

BACKENDS: Mapping[str, str] = MappingProxyType(
    {
        "cpu": "engine.backends.onnxruntime.cpu",
        "openvino": "engine.backends.openvino.engine",
        "cuda": "engine.backends.onnxruntime.cuda",
        "webgpu": "engine.backends.onnxruntime.webgpu",
        "tensorrt": "engine.backends.tensorrt.engine_set",
        "tensorrt_rtx": "engine.backends.tensorrt.engine_set",
    }
)
