"""What a backend is: it opens a graph with its weights as an engine, which runs."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from numpy.typing import NDArray

from engine.backends.settings import BackendSettings, ComputePrecision
from engine.devices.device import Device, DeviceArray, HostOrDeviceArray, Shape
from engine.graphs.graph import Graph, Part
from engine.graphs.variants import Variant
from engine.model import Model

Arrays = Mapping[str, NDArray[Any]]
Ranges = Mapping[str, tuple[float, float]]
"""By the name of a layer's weight: the smallest and the largest input that were seen."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EngineSpec:
    """An engine to be opened: a graph, its weights, and how it is to compute.

    settings: with the backend's name
    precision: what to compute in, from a graph of `graph_precision`
    ranges: of the inputs of those layers that compute in int8, when that is the precision
    model: whose part it is, for a backend that builds; None for a graph alone
    kin: open engines of the same weights, with which a backend may share them on a device
    """

    graph: Graph
    weights: Arrays
    settings: BackendSettings
    precision: ComputePrecision
    ranges: Ranges | None = None
    model: Model | None = None
    kin: "Sequence[Engine]" = ()


class Engine(Protocol):
    """A graph with its weights, ready to run on one device."""

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Run once; names, dtypes and shapes are those of `engine.graphs.graph`."""
        ...

    def rebind(self, weights: Arrays, names: Collection[str]) -> None:
        """Take the weights of these names anew, as when an adapter is put on or taken off.

        weights: all that the graph needs; those of other names are what they were
        One after the other, so that never two of all are in memory. Raises BackendError or
        ModelError, and then some are new: the former weights must be bound again.
        """
        ...


class FindEngine(Protocol):
    """As `Engines.engine`: returns the engine of a part, or that of a variant of it."""

    def __call__(self, part: Part, variant: Variant | None = None) -> Engine:
        """Open it at the first call; raises ModelError, GraphError or BackendError."""
        ...


@runtime_checkable
class DeviceEngine(Engine, Protocol):
    """An engine whose inputs and outputs may stay on its device.

    `run` also takes arrays of the device as inputs; what it returns is the processor's.
    """

    @property
    def records(self) -> bool:
        """Whether what it queues, for what it is prepared for, may be recorded as a graph."""
        ...

    @property
    def device(self) -> Device:
        """Where it runs."""
        ...

    @property
    def held(self) -> int:
        """The bytes of its own activations, which it lets go of where memory is short."""
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


class Run(NamedTuple):
    """A run of an engine, with the arrays that it is queued on."""

    engine: DeviceEngine
    inputs: Mapping[str, DeviceArray]
    outputs: Mapping[str, DeviceArray]

    def enqueue(self) -> None:
        """Queue it; raises BackendError."""
        self.engine.enqueue(self.inputs, self.outputs)


def run_from_host(
    engine: DeviceEngine, inputs: Mapping[str, HostOrDeviceArray]
) -> dict[str, NDArray[Any]]:
    """Run an engine once; inputs may lie on either side, and what comes back is the processor's.

    Shapes and dtypes are those of the graph's signature, in and out. Raises BackendError.
    """
    outputs = enqueue_from_host(engine, inputs)
    return {name: engine.device.download(array) for name, array in outputs.items()}


def enqueue_from_host(
    engine: DeviceEngine, inputs: Mapping[str, HostOrDeviceArray]
) -> Mapping[str, DeviceArray]:
    """Queue a run as `run_from_host` does; what it makes stays on the device."""
    device, placed = engine.device, {}
    for name, array in inputs.items():
        if isinstance(array, DeviceArray):
            placed[name] = array
        else:
            placed[name] = device.empty(array.shape, array.dtype)
            device.upload(array, placed[name])
    outputs = engine.prepare({name: array.shape for name, array in placed.items()})
    engine.enqueue(placed, outputs)
    return outputs
