"""Engines of TensorRT and TensorRT-RTX, built into the cache where the runtime finds them."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from engine.adapters.adapter import adapt_model
from engine.backends.base import Arrays
from engine.backends.tensorrt.build import BuildProgress, Built, build
from engine.backends.tensorrt.build_request import BuildSettings
from engine.backends.tensorrt.engine_store import EngineStore, weights_hash
from engine.backends.tensorrt.facts import build_request, engine_facts, require_to_build
from engine.backends.tensorrt.profiles import relevant
from engine.devices.cuda import find_device
from engine.errors import GraphError
from engine.graphs.graph import Graph, Part, Precision, find_graph, graph_folders
from engine.model import COMPONENTS, Model
from engine.store.cache import cache_folder

BAR_WIDTH = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What to build of a model.

    library: "tensorrt" or "tensorrt_rtx"
    targets: the GPUs, such as "sm89"; None is the one at hand
    loras: adapters that are built in
    """

    library: str
    precision: Precision
    settings: BuildSettings
    targets: Sequence[str | None] = (None,)
    loras: tuple[str, ...] = ()


def build_engines(model: Model, parts: Sequence[Part], choices: Choices) -> Iterator[str]:
    """Build what the cache lacks; yields a line on each engine when it is there.

    Raises GraphError, ModelError, BackendError or OutputError.
    """
    for part in parts:
        graph = _graph(model, part, choices.precision)
        weights = cache(partial(_hash, model, part, graph, choices.loras))  # once for all targets
        profiles = dict.fromkeys(relevant(part, each) for each in choices.settings.profiles)
        for target in choices.targets:
            settings = replace(choices.settings, profiles=tuple(profiles), target=target)
            yield _build_part(model, part, graph, settings, choices, weights)


def _graph(model: Model, part: Part, precision: Precision) -> Graph:
    """Find a part's graph, and trace it where there is none yet."""
    wanted = (part, model.config(part), precision, graph_folders(), model.path)
    try:
        return find_graph(*wanted)
    except GraphError:
        from export.writing import export_part

        folder = cache_folder() / "graphs"
        folder.mkdir(parents=True, exist_ok=True)
        export_part(model, part, precision, folder)
        return find_graph(*wanted)


def _build_part(
    model: Model,
    part: Part,
    graph: Graph,
    settings: BuildSettings,
    choices: Choices,
    weights: Callable[[], str],
) -> str:
    """Build one engine, unless it is there; weights: hashes those that are built in."""
    facts = engine_facts(choices.library, graph, settings, weights)
    request = build_request(choices.library, model, part, graph, settings, loras=choices.loras)
    made: list[Built] = []

    def make(path: Path) -> None:
        if settings.target is None:
            require_to_build(find_device(), graph, model.config(part), settings)
        label = f"{part} for {facts.sm}"
        made.append(build(request, path, lambda progress: _show(label, progress)))

    path = EngineStore().get_or_build(facts, make)
    line = f"{part}  {facts.sm}  {path.stat().st_size / 1e6:.1f} MB"
    if not made:
        return f"{line}  was there"
    peak = made[0].peak_bytes
    took = f"{line}  {made[0].seconds:.1f} s"
    return took if peak is None else f"{took}  {peak / 2**30:.1f} GiB at most"


def _hash(model: Model, part: Part, graph: Graph, loras: Sequence[str]) -> str:
    """Hash the weights of a part as the runtime will hash those that it binds."""
    name = COMPONENTS[part]
    adapted = adapt_model(model, loras) if loras else {}
    weights: Arrays = adapted.get(name) or model.weights(part)
    return weights_hash({name: weights[name] for name in graph.weights})


def _show(label: str, progress: BuildProgress) -> None:
    """Draw a bar on a terminal; in a pipe stay quiet."""
    if not sys.stderr.isatty():
        return
    done = round(BAR_WIDTH * progress.fraction)
    bar = "█" * done + "░" * (BAR_WIDTH - done)
    end = "\n" if progress.fraction >= 1 else ""
    print(f"\r{bar} {label}: {progress.phase[:40]:40}", end=end, file=sys.stderr, flush=True)


__all__ = ["Choices", "build_engines"]
