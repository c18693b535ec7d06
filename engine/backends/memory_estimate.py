"""How much memory of a device a request takes, before anything is built or run.

Weights are counted exactly. Activations are estimated from the architecture: where the most
numbers are alive at once, each held once in the precision that the graph computes in, attention
and norms without copies of their own. TensorRT-RTX 1.7.1 plans within an eighth of that for UNets
and decoders, and a fifth less for shallow steps. Libraries that fuse less need more: ONNX Runtime
on a processor took 1.8 times as much for a decoder. Workspaces and the driver's context come on
top. Once an engine is built it says itself what it needs.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from engine.backends.base import DeviceEngine, Engine
from engine.configs.base import Config, Sizes
from engine.devices.device import Device
from engine.errors import BackendError
from engine.graphs.graph import Graph, Part
from engine.graphs.variants import Variant
from engine.model import COMPONENTS

__all__ = [
    "MemoryEstimate",
    "Needed",
    "Sizes",
    "activation_bytes",
    "estimate",
    "estimate_build",
    "find_gpu",
    "name_of",
    "require_memory",
    "session_bytes",
    "weight_bytes",
]

GIB = 2**30
STEP = "step"  # the beginning of the parts that call a UNet, which have the same tables
FLOAT32 = 4  # bytes
# Times the estimates, that ONNX Runtime's sessions keep by what they took on the stand-in for CUDA,
# by the beginning of a part's name; and times that, that their first runs take.
KEPT = {
    **{"step_shallow_ip": 1.5, "step_shallow": 1.3, "vae_decoder": 1.2},
    **{"step_ip": 3.2, "step_controlled_ip": 3.2, "step": 2.7, "": 1.7},
}
FIRST_RUN, JOINED = 1.5, 1.8  # the latter of parts whose edges join, which they copy
SEAMLESS = " seamless"  # the end of such a part's name
ITEM_BYTES = {"float32": FLOAT32, "float16": 2}


class Needed(NamedTuple):
    """A part that a request needs on a device, and its engine where that is open."""

    graph: Graph
    config: Config
    engine: Engine | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes by kind.

    weights: of all parts; activations: of the part that needs most, which all parts share, or of
        all where each keeps its own
    tables: registers, noise and texts; images: bytes of pixels
    """

    weights: int
    activations: int
    tables: int
    images: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.activations + self.tables + self.images

    def require(self, free: int, doing: str = "this request") -> None:
        """Raise BackendError when so many free bytes are too few, saying how many are missing."""
        if self.total > free:
            raise BackendError(
                f"{doing} takes about {_gib(self.total)} of the device's memory (weights "
                f"{_gib(self.weights)}, activations {_gib(self.activations)}, the rest "
                f"{_gib(self.tables + self.images)}) and {_gib(free)} are free, so "
                f"{_gib(self.total - free)} are missing; close what else uses the device, or ask "
                "for fewer or smaller pictures"
            )


def estimate(
    graphs: Mapping[str, Graph],
    configs: Mapping[str, Config],
    sizes: Sizes,
    measured: Mapping[str, int] | None = None,
    *,
    shared: bool = True,
) -> MemoryEstimate:
    """Estimate a request on engines of these parts, all of them loaded.

    graphs, configs: by the parts, and by what begins so for what is beside the model
    measured: bytes of activations that engines said themselves, in place of the estimate
    shared: whether the parts have one piece of memory for activations, and weights each of its own;
        or activations each, and one set of weights a component
    """
    measured = measured or {}
    activations = [
        measured.get(part, activation_bytes(graph, configs[part], sizes))
        for part, graph in graphs.items()
    ]
    tables = {part: config.tables(sizes) for part, config in configs.items()}
    steps = [tables.pop(part) for part in [*tables] if part.startswith(STEP)]
    return MemoryEstimate(
        weights=_all_weights(graphs, shared=shared),
        activations=max(activations, default=0) if shared else _of_sessions(graphs, activations),
        tables=FLOAT32 * (max(steps, default=0) + sum(tables.values())),
        images=3 * sizes.batch * sizes.height * sizes.width,
    )


def estimate_build(
    graph: Graph, config: Config, sizes: Sizes, workspace_bytes: int = 0
) -> MemoryEstimate:
    """Estimate the build of one part where the builder times kernels on the device.

    Its weights are there twice: those that came in, and those that kernels want in another order.
    workspace_bytes: the limit that the builder was given
    """
    return MemoryEstimate(
        weights=2 * weight_bytes(graph),
        activations=activation_bytes(graph, config, sizes) + workspace_bytes,
        tables=0,
        images=0,
    )


def require_memory(
    device: Device, needed: Mapping[str, Needed], sizes: Sizes, *, shared: bool = True
) -> None:
    """Raise BackendError when a request on these parts does not fit; see `MemoryEstimate.require`.

    Weights of open engines are on the device already, and so is the memory that engines share. What
    open engines keep of their own, for these sizes or others, they let go of where that is wanted.
    needed, shared: as `estimate` has them
    """
    opened = {part: each.graph for part, each in needed.items() if each.engine is not None}
    there = device.scratch(0).nbytes + _all_weights(opened, shared=shared)
    for each in needed.values():
        if isinstance(each.engine, DeviceEngine):
            there += each.engine.held
    graphs = {part: each.graph for part, each in needed.items()}
    configs = {part: each.config for part, each in needed.items()}
    estimate(graphs, configs, sizes, shared=shared).require(device.memory()[0] + there)


def find_gpu(backend: str) -> Device:
    """Return the GPU that a backend runs on; raises BackendError."""
    if backend == "webgpu":
        from engine.devices import webgpu

        return webgpu.find_device()
    from engine.devices import cuda

    return cuda.find_device()


def session_bytes(part: str, activations: int) -> int:
    """Estimate what a session keeps for activations of its own, of their bytes by the estimate."""
    times = next(times for name, times in KEPT.items() if part.startswith(name))
    return int(times * (JOINED if part.endswith(SEAMLESS) else 1) * activations)


def name_of(part: Part, variant: Variant | None) -> str:
    """Return what a part of a model is called here, as a variant of it."""
    return part + SEAMLESS if variant is not None and variant.seamless else part


def _of_sessions(parts: Iterable[str], activations: Iterable[int]) -> int:
    """Return what the sessions of all parts keep, and the first run of the largest beside it."""
    kept = [session_bytes(*each) for each in zip(parts, activations, strict=True)]
    return sum(kept) + int((FIRST_RUN - 1) * max(kept, default=0))


def _all_weights(graphs: Mapping[str, Graph], *, shared: bool) -> int:
    components = {} if shared else {str(part): name for part, name in COMPONENTS.items()}
    largest: dict[str, int] = {}
    for part, graph in graphs.items():
        name = components.get(part.removesuffix(SEAMLESS), part)
        largest[name] = max(largest.get(name, 0), weight_bytes(graph))
    return sum(largest.values())


def weight_bytes(graph: Graph) -> int:
    """Count the bytes of a graph's weights in its precision."""
    return ITEM_BYTES[graph.precision] * sum(math.prod(s) for s in graph.weights.values())


def activation_bytes(graph: Graph, config: Config, sizes: Sizes) -> int:
    """Estimate the most that is alive at once while a part runs."""
    item = FLOAT32 if config.overflows_float16 else ITEM_BYTES[graph.precision]
    return item * config.activations(graph.part, sizes)


def _gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB"
