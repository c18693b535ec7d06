"""How engines run: the backends by name, what each computes in, and the settings that choose."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from engine.errors import BackendError, choice
from engine.graphs.graph import Precision

ComputePrecision = Literal["float32", "float16", "bfloat16", "int8"]

# What each computes in, its default first, and the precision of the graph that it does this from.
PRECISIONS: Mapping[str, Mapping[ComputePrecision, Precision]] = {
    "cpu": {"float32": "float32", "float16": "float16"},
    "openvino": {"float32": "float32", "bfloat16": "float32", "int8": "float32"},
    "cuda": {"float16": "float16", "float32": "float32"},
    "webgpu": {"float32": "float32", "float16": "float16"},
    "tensorrt": {"float16": "float16", "float32": "float32"},
    "tensorrt_rtx": {"float16": "float16"},  # no fused attention of its takes float32
}
# And OpenVINO beside the processor. No such device has run it yet.
DEVICES: Mapping[str, Mapping[ComputePrecision, Precision]] = {
    "CPU": PRECISIONS["openvino"],
    "GPU": {"float16": "float32", "float32": "float32"},
    "NPU": {"float16": "float32"},
}
DEFAULT = "cpu"
MAX_THREADS = 1024  # more than any machine has cores; libraries make as many as they are told
ON_GPU = ("cuda", "webgpu", "tensorrt", "tensorrt_rtx")
# Those whose engines are built beforehand, of the graphs that models and steps have as they are.
BUILT_BEFOREHAND = ("tensorrt", "tensorrt_rtx")


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendSettings:
    """Choices of how engines run.

    backend: "cpu" is ONNX Runtime, "openvino"; on an NVIDIA GPU "tensorrt", "tensorrt_rtx" or
        "cuda", which is ONNX Runtime there, on any GPU "webgpu", which is ONNX Runtime there; None
        lets `engine.engines` choose for a model, and is "cpu" for an engine alone
    device: "CPU", "GPU" or "NPU", by which OpenVINO computes; None is the processor
    threads: of one engine's computation; None takes one for each processor core.
    build_missing: whether engines of TensorRT that the cache lacks are built when they are needed
    """

    backend: str | None = None
    device: str | None = None
    threads: int | None = None
    build_missing: bool = False

    def __post_init__(self) -> None:
        """Refuse unknown backends and impossible thread counts."""
        if self.backend not in (None, *PRECISIONS):
            raise BackendError(f"backend is {self.backend!r}; {choice(self.backend, PRECISIONS)}")
        if (name := str(self.device).lower().partition(":")[0]) in PRECISIONS and name != DEFAULT:
            raise BackendError(
                f"device is {self.device!r}, which is a backend; give it as the backend "
                f"{name!r}, and leave the device out"
            )
        if self.device is not None and self.backend != "openvino":
            raise BackendError(
                f"device is {self.device!r} and came without backend 'openvino', of which it is a "
                "setting; give both, or leave the device out"
                + ("; an NVIDIA GPU is the backend 'cuda'" if self.device == "GPU" else "")
            )
        if self.device not in (None, *DEVICES):
            raise BackendError(f"device is {self.device!r}; {choice(self.device, DEVICES)}")
        if self.build_missing and self.backend not in BUILT_BEFOREHAND:
            raise BackendError(
                f"build_missing came without backend {_listed([*map(repr, BUILT_BEFOREHAND)])}, "
                "which alone build engines; leave it out"
            )
        if self.threads is not None and (
            type(self.threads) is not int or not 1 <= self.threads <= MAX_THREADS
        ):
            raise BackendError(
                f"threads is {self.threads!r}; give a whole number from 1 to {MAX_THREADS}, or "
                "leave it out"
            )


def _listed(names: Sequence[str]) -> str:
    """Write a choice as a sentence has it: "a", "a or b", "a, b or c"."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def precisions(settings: BackendSettings) -> Mapping[ComputePrecision, Precision]:
    """Return what is computed in with these settings, as `PRECISIONS` has it."""
    return DEVICES[settings.device] if settings.device else PRECISIONS[settings.backend or DEFAULT]


def graph_precision(settings: BackendSettings, precision: ComputePrecision) -> Precision:
    """Return the precision of the graphs from which a backend computes in this one.

    Raises BackendError when it cannot.
    """
    backend = settings.backend or DEFAULT
    offered = precisions(settings)
    if precision not in offered:
        others = [name for name in PRECISIONS if precision in PRECISIONS[name]]
        where = f" on the device {settings.device!r}" if settings.device else ""
        raise BackendError(
            f"the backend {backend!r} does not compute in {precision}{where}; choose the "
            f"precision {', '.join(offered)}"
            + (f", or the backend {_listed(others)}" if others else "")
        )
    return offered[precision]


def on_processor(settings: BackendSettings | None) -> BackendSettings:
    """Return settings for a network beside the model: the processor's, wherever the model runs.

    By OpenVINO where that was chosen, else by ONNX Runtime.
    """
    given = settings or BackendSettings()
    backend = given.backend if given.backend == "openvino" else DEFAULT
    return BackendSettings(backend=backend, threads=given.threads)


def cpu_count() -> int:
    """Count the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
