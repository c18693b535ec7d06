"""The engines of one model: on which backend, in which precision, with which adapters."""

import math
import platform
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Self

from engine.adapters.choice import AdapterChoice
from engine.backends.base import Arrays, Engine, EngineSpec, Ranges
from engine.backends.openvino.int8 import find_ranges, ranges_name
from engine.backends.registry import BACKENDS
from engine.backends.settings import (
    DEFAULT,
    PRECISIONS,
    BackendSettings,
    ComputePrecision,
    graph_precision,
    precisions,
)
from engine.checkpoints.component import Component, ComponentName
from engine.errors import BackendError, ModelError
from engine.graphs.graph import Graph, Part, find_graph, graph_folders
from engine.graphs.variants import Variant
from engine.model import COMPONENTS, Model

if TYPE_CHECKING:
    from engine.adapters.adapter import Adapted, Adapter
    from engine.backends.memory_estimate import Needed
    from engine.checkpoints.control_lora import ControlLora

OWN_ACTIVATIONS = ("cuda", "webgpu")  # backends whose engines keep theirs, each its own
X86 = ("x86_64", "amd64")
SMALL = 2**26  # numbers of weights: engines of fewer open in less time than a picture takes
# The parts whose layers compute in int8, each with the component that has its weights. (A shallow
# step has the weights of a step.)
QUANTIZED: Mapping[Part, ComponentName] = {"step": "unet", "vae_decoder": "vae"}


class Engines:
    """The engines of a model's parts, each opened when it is first asked for, and kept.

    settings, precision: how they run, with nothing left open
    ranges: of the inputs of the layers that compute in int8
    folders: where graphs are looked for
    opened: the engines that are open; opened_variants: those that compute more than their parts
    adapter_notes: what of the adapters is not used, a sentence each
    """

    def __init__(
        self,
        model: Model,
        settings: BackendSettings,
        precision: ComputePrecision,
        *,
        ranges: Ranges | None = None,
        folders: Sequence[Path] = (),
    ) -> None:
        self.model = model
        self.settings = settings
        self.precision = precision
        self.ranges = ranges
        self.folders = folders
        self.opened: dict[Part, Engine] = {}
        self.opened_variants: dict[tuple[Part, Variant], Engine] = {}
        self.adapter_notes: tuple[str, ...] = ()
        self._adapted: Mapping[ComponentName, Adapted] = {}
        self._closed = False

    @classmethod
    def choose(
        cls,
        model: Model,
        *,
        graphs: Path | None = None,
        settings: BackendSettings | None = None,
        precision: ComputePrecision | None = None,
        fast_start: bool = False,
    ) -> Self:
        """Choose what is left open: the backend of the settings, and the precision, where None.

        A GPU whose backend a card has run before is chosen where it passes a test of its own
        (`engine.backends.self_test`). On the processor the order is that of `python -m benchmarks
        processors`: int8 where somebody has calibrated it, bfloat16 where the processor computes
        in it, float32; OpenVINO's wherever its kernels can be used.

        fast_start: whether a small model should rather open soon, as it does on ONNX Runtime
        Raises BackendError.
        """
        settings, folders = settings or BackendSettings(), graph_folders(graphs)
        small = fast_start and _is_small(model)
        if settings.backend is None and not small:
            settings = replace(settings, backend=_proven_gpu(precision))
        if settings.backend is None:
            settings = replace(settings, backend=_fastest(precision, small=small))
        if precision is None:
            on_processor = settings.backend == "openvino" and settings.device in (None, "CPU")
            fast = on_processor and "BF16" in capabilities()
            ranges = _ranges(model, folders) if fast else None
            quick: ComputePrecision = "bfloat16" if ranges is None else "int8"
            precision = quick if fast else own_precision(settings)
        else:
            graph_precision(settings, precision)
            ranges = _ranges(model, folders) if precision == "int8" else None
            if ranges is None and precision == "int8":
                raise BackendError(
                    f"int8 must know how large the inputs of the layers of {model.path} become, "
                    f"and nobody has looked yet; run `python -m runtime.calibration {model.path}` "
                    "once, or choose another precision"
                )
        return cls(model, settings, precision, ranges=ranges, folders=folders)

    @property
    def is_exact(self) -> bool:
        """Whether a picture is the same bits whatever is beside it in a batch of guided ones."""
        return (self.settings.backend or DEFAULT, self.precision) == ("cpu", "float32")

    @property
    def is_small(self) -> bool:
        """Whether engines of the model open in less time than a picture takes."""
        return _is_small(self.model)

    @property
    def precision_beside(self) -> ComputePrecision:
        """What networks beside the model compute in: as it does, or without int8."""
        if self.precision != "int8":
            return self.precision
        return "bfloat16" if "BF16" in capabilities() else "float32"

    def open_beside(self, graph: Graph, weights: "Component | ControlLora | None" = None) -> Engine:
        """Open a network beside the model, and let go of its file's pages; raises BackendError."""
        if weights is None:  # it computes in its graph's precision
            return open_engine(graph, {}, self.settings)
        engine = open_engine(graph, weights, self.settings, self.precision_beside)
        weights.release()
        return engine

    def graph(self, part: Part) -> Graph:
        """Find a part's graph; raises GraphError."""
        precision = graph_precision(self.settings, self.precision)
        return find_graph(part, self.model.config(part), precision, self.folders, self.model.path)

    def engine(self, part: Part, variant: Variant | None = None) -> Engine:
        """Return a part's engine, or that of a variant of it, opening it at the first call.

        Raises ModelError, GraphError or BackendError.
        """
        if variant is not None:
            key = part, variant
            if key not in self.opened_variants:
                self.opened_variants[key] = self._opened(part, variant)
            return self.opened_variants[key]
        if part not in self.opened:
            self.opened[part] = self._opened(part)
        return self.opened[part]

    def open(self, part: Part, weights: Arrays, variant: Variant | None = None) -> Engine:
        """Open a part with its component's weights; GraphError, ModelError or BackendError."""
        name = COMPONENTS[part]
        graph = self.graph(part)
        spec = EngineSpec(
            graph=graph if variant is None else variant.of(graph),
            weights=weights,
            settings=self.settings,
            precision=self.precision,
            ranges=self.ranges,
            model=self.model,
            kin=[engine for other, engine in self._all() if COMPONENTS[other] == name],
        )
        return _open(spec)

    def require_memory(
        self,
        parts: Collection[Part],
        variants: Mapping[Part, Variant],
        beside: "Mapping[str, Needed]",
        **sizes: int,
    ) -> None:
        """Raise BackendError when a request does not fit into the memory of the backend's GPU.

        parts, variants: that it needs; beside: other networks' parts
        sizes: fields of `engine.backends.memory_estimate.Sizes`
        """
        from engine.backends.memory_estimate import Needed, Sizes, find_gpu, name_of, require_memory

        needed = dict[str, Needed](beside)
        for part in parts:
            found, chosen = self.opened.get(part), variants.get(part)
            if chosen is not None:
                found = self.opened_variants.get((part, chosen))
            needed[name_of(part, chosen)] = Needed(self.graph(part), self.model.config(part), found)
        backend = self.settings.backend or DEFAULT
        shared = backend not in OWN_ACTIVATIONS
        require_memory(find_gpu(backend), needed, Sizes(**sizes), shared=shared)

    def set_loras(self, adapters: "Sequence[tuple[Adapter, AdapterChoice]]") -> None:
        """Put these adapters on in place of those that are on; none gives the base back.

        Raises ModelError when one does not fit, and then the adapters stay as they were.
        """
        if not adapters and not self._adapted:
            return
        from engine.adapters.adapter import apply_adapters

        adapted, notes = apply_adapters(self.model, adapters)
        self._rebind(adapted)
        self.adapter_notes = tuple(notes)
        for weights in adapted.values():
            weights.release()

    def close(self) -> None:
        """Let go of all engines with their memory; nothing can be opened any more."""
        self._closed = True
        self.opened.clear()
        self.opened_variants.clear()
        self._adapted = {}

    def _opened(self, part: Part, variant: Variant | None = None) -> Engine:
        if self._closed:
            raise BackendError(f"the engines of {self.model.path} were closed; load it again")
        found = self.model.weights(part)
        with self._naming_the_model():
            engine = self.open(part, self._adapted.get(COMPONENTS[part]) or found, variant)
        found.weights.release()
        return engine

    def _all(self) -> list[tuple[Part, Engine]]:
        variants = ((part, engine) for (part, _), engine in self.opened_variants.items())
        return [*self.opened.items(), *variants]

    def _rebind(self, adapted: "Mapping[ComponentName, Adapted]") -> None:
        """Hand the weights that differ to the open engines: to all of them or, failing, to none."""
        before, changed = self._adapted, []
        try:
            for part, engine in self._all():
                if (name := COMPONENTS[part]) in adapted:
                    old = before.get(name)
                    touched = adapted[name].touched | (old.touched if old else frozenset())
                    changed.append((engine, old or adapted[name].base, touched))
                    with self._naming_the_model():
                        engine.rebind(adapted[name], touched)
        except BaseException:
            for engine, former, touched in changed:
                engine.rebind(former, touched)
            raise
        self._adapted = adapted

    @contextmanager
    def _naming_the_model(self) -> Iterator[None]:
        """Say whose weights an engine refuses; it sees arrays and no files."""
        try:
            yield
        except (BackendError, ModelError) as error:
            raise type(error)(f"{self.model.path}: {error}") from error


def open_engine(
    graph: Graph,
    weights: Arrays,
    settings: BackendSettings,
    precision: ComputePrecision | None = None,
    ranges: Ranges | None = None,
) -> Engine:
    """Bind weights to a graph that comes without a model, and make it ready.

    precision: what to compute in, from a graph of `graph_precision`; None computes in the graph's
    ranges: of the inputs of those layers that compute in int8, when that is the precision
    Raises BackendError, GraphError or ModelError.
    """
    precision = precision or graph.precision
    graph_precision(settings, precision)
    return _open(
        EngineSpec(
            graph=graph, weights=weights, settings=settings, precision=precision, ranges=ranges
        )
    )


def own_precision(settings: BackendSettings) -> ComputePrecision:
    """Return what a backend computes in by itself, or through WebGPU the GPU; BackendError."""
    if settings.backend == "webgpu":
        from engine.backends.onnxruntime.webgpu_trials import has_float16
        from engine.devices.webgpu import find_device

        return "float16" if has_float16(find_device()) else "float32"
    return next(iter(precisions(settings)))


def _open(spec: EngineSpec) -> Engine:
    engine: Engine = import_module(BACKENDS[spec.settings.backend or DEFAULT]).open_engine(spec)
    return engine


def _proven_gpu(precision: ComputePrecision | None) -> str | None:
    """Return the backend of a GPU that may be chosen for a precision, None where there is none."""
    if find_spec("cuda") is None:  # NVIDIA's package
        return None
    from engine.backends.self_test import choose_gpu

    found = choose_gpu()
    return found if found and precision in (None, *PRECISIONS[found]) else None


def _fastest(precision: ComputePrecision | None, *, small: bool) -> str:
    """Return the processor's backend that is fastest in a precision, or in its own.

    OpenVINO's was with AVX2, AVX-512 and its bfloat16; without AVX2 it has no group norms. Where
    neither has been measured, as on ARM, ONNX Runtime stays.
    """
    able = [name for name, offered in PRECISIONS.items() if precision in (None, *offered)]
    if small or able[:1] != [DEFAULT] or "openvino" not in able:
        return next(iter(able), DEFAULT)
    there = capabilities()  # takes 50 ms, so it comes last
    measured = platform.machine().lower() in X86 and "GROUP_NORM" in there
    return "openvino" if measured or "BF16" in there else DEFAULT


@cache
def capabilities() -> frozenset[str]:
    """Return what OpenVINO can compute in on this processor; nothing when it is not installed."""
    if find_spec("openvino") is None:
        return frozenset()
    from engine.backends.openvino.library import capabilities

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
    return sum(math.prod(shape) for shape in model.unet.tensor_shapes().values()) < SMALL
