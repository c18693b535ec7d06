"""How a model's engines are opened: on which backend, in which precision, from which graphs."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Self

from engine.backends.base import (
    DEFAULT,
    ON_GPU,
    PRECISIONS,
    Arrays,
    BackendSettings,
    ComputePrecision,
    Engine,
    Ranges,
    graph_precision,
    open_engine,
)
from engine.backends.openvino.int8 import find_ranges, ranges_name
from engine.backends.tensorrt.library import LIBRARIES
from engine.checkpoints.component import ComponentName
from engine.checkpoints.shapes import tensor_shapes
from engine.errors import BackendError
from engine.graphs.graph import Graph, find_graph, graph_folders
from engine.graphs.signature import Part
from engine.model import Model

SMALL = 2**26  # numbers of weights: engines of fewer open in less time than a picture takes
# The parts whose layers compute in int8, each with the component that has its weights. (A shallow
# step has the weights of a step.)
QUANTIZED: Mapping[Part, ComponentName] = {"step": "unet", "vae_decoder": "vae"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Opener:
    """Opens the parts of a model; ranges: of the inputs of its layers, in int8."""

    model: Model
    folders: Sequence[Path]
    settings: BackendSettings
    precision: ComputePrecision
    ranges: Ranges | None

    @classmethod
    def choose(
        cls,
        model: Model,
        *,
        graphs: Path | None = None,
        settings: BackendSettings | None = None,
        precision: ComputePrecision | None = None,
        soon: bool = False,
    ) -> Self:
        """Choose what is left open: the backend of the settings, and the precision, where None.

        The order is that of `python -m benchmarks latency`: int8 where somebody has calibrated
        it, bfloat16 where the processor computes in it, float32. By `python -m benchmarks quality`
        half of bfloat16's pictures are within 48 dB of float32's, and half of int8's within 34.

        soon: whether it matters more that engines open soon, as ONNX Runtime's do; only for a
            small model, whose pictures take no longer than that
        Raises BackendError.
        """
        settings, folders = settings or BackendSettings(), graph_folders(graphs)
        if settings.backend is None and precision is not None:
            offering = (name for name, offered in PRECISIONS.items() if precision in offered)
            settings = replace(settings, backend=next(offering, None))
        if settings.backend is None:
            # Asking what OpenVINO can do takes 50 ms, so it comes last.
            fast = not (soon and _is_small(model)) and "BF16" in capabilities()
            settings = replace(settings, backend="openvino" if fast else "cpu")
        if precision is None:
            fast = settings.backend == "openvino" and "BF16" in capabilities()
            ranges = _ranges(model, folders) if fast else None
            own: ComputePrecision = next(iter(PRECISIONS[settings.backend or DEFAULT]))
            quick: ComputePrecision = "bfloat16" if ranges is None else "int8"
            precision = quick if fast else own
        else:
            graph_precision(settings, precision)
            ranges = _ranges(model, folders) if precision == "int8" else None
            if ranges is None and precision == "int8":
                raise BackendError(
                    f"int8 must know how large the inputs of the layers of {model.path} become, "
                    f"and nobody has looked yet; run `python -m runtime.calibration {model.path}` "
                    "once, or choose another precision"
                )
        return cls(
            model=model,
            folders=folders,
            settings=settings,
            precision=precision,
            ranges=ranges,
        )

    def graph(self, part: Part) -> Graph:
        """Find a part's graph; raises GraphError."""
        precision = graph_precision(self.settings, self.precision)
        return find_graph(part, self.model.config(part), precision, self.folders, self.model.path)

    def require_memory(
        self, parts: Collection[Part], opened: Collection[Part], **sizes: int
    ) -> None:
        """Raise BackendError when a request does not fit into a GPU's memory.

        parts: that it needs; opened: of these, those whose engines are open
        sizes: fields of `engine.backends.memory_estimate.Sizes`
        """
        if self.settings.backend not in ON_GPU:
            return
        from engine.backends.memory_estimate import Sizes, require_memory
        from engine.devices.cuda import find_device

        graphs = {part: self.graph(part) for part in parts}
        configs = {part: self.model.config(part) for part in parts}
        require_memory(find_device(), graphs, configs, Sizes(**sizes), opened)

    def __call__(self, part: Part, weights: Arrays) -> Engine:
        """Open a part with its weights; raises GraphError, ModelError or BackendError."""
        graph = self.graph(part)
        if self.settings.backend in LIBRARIES:
            from engine.backends.tensorrt.engine_set import open_ladder

            return open_ladder(self.model, part, graph, weights, self.settings)
        return open_engine(graph, weights, self.settings, self.precision, self.ranges)


@cache
def capabilities() -> frozenset[str]:
    """Return what OpenVINO can compute in on this processor; nothing when it is not installed."""
    if find_spec("openvino") is None:
        return frozenset()
    from engine.backends.openvino.engine import capabilities

    return capabilities()


def ranges_of(model: Model) -> dict[Part, str]:
    """Return the names of the files that hold the ranges of a model's parts."""
    return {
        part: ranges_name(model.config(part).key(), model.find(component))
        for part, component in QUANTIZED.items()
    }


def _ranges(model: Model, folders: Sequence[Path]) -> Ranges | None:
    """Return the ranges of all parts, by the names of weights; None if the UNet has none."""
    found = {part: find_ranges(name, folders) for part, name in ranges_of(model).items()}
    if found["step"] is None:
        return None
    return {name: seen for ranges in found.values() for name, seen in (ranges or {}).items()}


def _is_small(model: Model) -> bool:
    return sum(math.prod(shape) for shape in tensor_shapes(model.unet).values()) < SMALL
