"""How much memory of a device a request takes, before anything is built or run.

Weights are counted exactly. Activations are estimated from the architecture: where the most
numbers are alive at once, each held once in the precision that the graph computes in, attention
and norms without copies of their own. TensorRT-RTX 1.7.1 plans within an eighth of that for UNets
and decoders, and a fifth less for shallow steps. Libraries that fuse less need more: ONNX Runtime
on a processor took 1.8 times as much for a decoder. Workspaces and the driver's context come on
top. Once an engine is built it says itself what it needs.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from engine.configs.base import Config, Sizes
from engine.devices.device import Device
from engine.errors import BackendError
from engine.graphs.graph import Graph, Part

__all__ = [
    "MemoryEstimate",
    "Sizes",
    "activation_bytes",
    "estimate",
    "estimate_build",
    "require_memory",
    "session_bytes",
    "weight_bytes",
]

GIB = 2**30
FLOAT32 = 4  # bytes
# Times the estimates, that ONNX Runtime's sessions keep by what they took on the stand-in for CUDA,
# by the beginning of a part's name; and times that, that their first runs take.
KEPT = {"step_shallow": 1.3, "step": 2.7, "vae_decoder": 1.2, "": 1.7}
FIRST_RUN = 1.5
ITEM_BYTES = {"float32": FLOAT32, "float16": 2}


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
    graphs: Mapping[Part, Graph],
    configs: Mapping[Part, Config],
    sizes: Sizes,
    measured: Mapping[Part, int] | None = None,
    *,
    shared: bool = True,
) -> MemoryEstimate:
    """Estimate a request on engines of these parts, all of them loaded.

    measured: bytes of activations that engines said themselves, in place of the estimate
    shared: whether the parts have one piece of memory for activations, or one each
    """
    measured = measured or {}
    activations = [
        measured.get(part, activation_bytes(graph, configs[part], sizes))
        for part, graph in graphs.items()
    ]
    return MemoryEstimate(
        # The two parts of a UNet have the same weights, and an engine each.
        weights=sum(weight_bytes(graph) for graph in graphs.values()),
        activations=max(activations, default=0) if shared else _of_sessions(graphs, activations),
        tables=FLOAT32 * (configs["step"].tables(sizes) if "step" in configs else 0),
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
    device: Device,
    graphs: Mapping[Part, Graph],
    configs: Mapping[Part, Config],
    sizes: Sizes,
    opened: Collection[Part],
    *,
    shared: bool = True,
    held: int = 0,
) -> None:
    """Raise BackendError when a request on these parts does not fit; see `MemoryEstimate.require`.

    opened: the parts whose weights are on the device already; so is the memory that engines share
    shared: as `estimate` has it; held: bytes that open engines keep of their own, for these sizes
        or others, which they let go of where that is wanted
    """
    there = sum(weight_bytes(graphs[part]) for part in opened) + device.scratch(0).nbytes + held
    needed = estimate(graphs, configs, sizes, shared=shared)
    needed.require(device.memory()[0] + there)


def session_bytes(part: str, activations: int) -> int:
    """Estimate what a session keeps for activations of its own, of their bytes by the estimate."""
    return int(next(times for name, times in KEPT.items() if part.startswith(name)) * activations)


def _of_sessions(parts: Iterable[str], activations: Iterable[int]) -> int:
    """Return what the sessions of all parts keep, and the first run of the largest beside it."""
    kept = [session_bytes(*each) for each in zip(parts, activations, strict=True)]
    return sum(kept) + int((FIRST_RUN - 1) * max(kept, default=0))


def weight_bytes(graph: Graph) -> int:
    """Count the bytes of a graph's weights in its precision."""
    return ITEM_BYTES[graph.precision] * sum(math.prod(s) for s in graph.weights.values())


def activation_bytes(graph: Graph, config: Config, sizes: Sizes) -> int:
    """Estimate the most that is alive at once while a part runs."""
    item = FLOAT32 if config.overflows_float16 else ITEM_BYTES[graph.precision]
    return item * config.activations(graph.part, sizes)


def _gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB"
