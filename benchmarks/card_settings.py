"""What each setting of the backend `cuda` is worth: a step without it, beside the step with all.

A setting is the provider's own, a rewriting of the graph, or how a session is opened.
"""

import math
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.distances import relative_error
from benchmarks.scenarios import QUEUED
from engine.backends.base import Arrays
from engine.backends.onnxruntime import cuda
from engine.backends.onnxruntime.fixed_sizes import Sizes
from engine.backends.onnxruntime.rewrites import REWRITES, rewritten
from engine.devices.device import Device, DeviceArray
from engine.errors import BackendError, first_line
from engine.graphs.graph import Graph

__all__ = ["CHOICES", "settings_figures"]

OURS = "all settings"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """How a step is opened other than the backend opens it.

    settings: of the provider, in place of the backend's; without: rewritings that are left out
    fixed: whether sizes are fixed; splits: whether the library makes splits of its own
    """

    settings: Mapping[str, str] = field(default_factory=dict)
    without: Collection[str] = ()
    fixed: bool = True
    splits: bool = False


# One setting each; of the precision's own two, what a graph in float16 has is the backend's.
CHOICES: Mapping[str, Choices] = {
    OURS: Choices(),
    "sizes free": Choices(fixed=False),
    "no tensor cores": Choices(settings={"use_tf32": "0"}),
    "bias apart": Choices(settings={"fuse_conv_bias": "0"}),
    "channels first": Choices(settings={"prefer_nhwc": "0"}, without=("channels last",)),
    "convolutions by heuristic": Choices(settings={"cudnn_conv_algo_search": "HEURISTIC"}),
    "small workspaces": Choices(settings={"cudnn_conv_use_max_workspace": "0"}),
    "splits by the library": Choices(splits=True),
    **{f"without {name}": Choices(without=(name,)) for name in REWRITES},
}


class _Engine(cuda.OnnxRuntimeCudaEngine):
    """The backend's engine with other choices."""

    def __init__(self, graph: Graph, weights: Arrays, device: Device, choices: Choices) -> None:
        self._choices = choices
        super().__init__(graph, weights, device)

    def _rewritten(self, data: bytes) -> bytes:
        return rewritten(data, self._graph.weights, without=self._choices.without)

    def _settings(self, free: int) -> dict[str, str]:
        return {**super()._settings(free), **self._choices.settings}

    def _disabled(self) -> list[str]:
        return [] if self._choices.splits else super()._disabled()

    def _open(self, sizes: Sizes) -> cuda.Form:
        form = super()._open(sizes)
        if self._choices.fixed:
            return form
        outputs = form.outputs  # a session of free sizes gives symbols
        del form
        return replace(super()._open({}), outputs=outputs)


def settings_figures(
    graph: Graph,
    weights: Arrays,
    device: Device,
    inputs: Arrays,
    timed: Callable[[Callable[[], object]], Mapping[str, float]],
) -> dict[str, Any]:
    """Run a step with each of `CHOICES`, in milliseconds a step; see `_figures`.

    weights, inputs: of the step; timed: times something, in milliseconds
    relative_error: of the latents, beside those with all settings; None where these are zeros, as
        in a dry run, or one of them is no number
    Raises BackendError where the backend cannot be used at all.
    """
    found: dict[str, Any] = {}
    expected = None
    for name, choices in CHOICES.items():
        try:
            engine = _Engine(graph, weights, device, choices)
            found[name], latents = _figures(engine, inputs, timed)
        except BackendError as failure:
            if name == OURS:
                raise
            found[name] = {"failed": str(failure)[:300]}
            continue
        expected = latents if expected is None else expected
        error = relative_error(latents, expected) if expected.any() else math.nan
        found[name]["relative_error"] = error if math.isfinite(error) else None
        del engine
    return found


def _figures(
    engine: _Engine, inputs: Arrays, timed: Callable[[Callable[[], object]], Mapping[str, float]]
) -> tuple[dict[str, Any], NDArray[Any]]:
    """Time several steps that are queued, and as one recorded graph; return the latents too.

    ready_s: until the first step is done; held: bytes that the session keeps
    elsewhere: operators that are not on the GPU, and how often
    recorded: why not, where it could not be
    """
    device, placed = engine.device, dict[str, DeviceArray]()
    for name, array in inputs.items():
        placed[name] = device.empty(array.shape, array.dtype)
        device.upload(np.ascontiguousarray(array), placed[name])
    began = time.perf_counter()
    outputs = engine.prepare({name: array.shape for name, array in inputs.items()})
    figures: dict[str, Any] = {"ready_s": time.perf_counter() - began, "held": engine.held}
    (form,) = engine.opened()
    figures["elsewhere"] = {kind: form.elsewhere.count(kind) for kind in set(form.elsewhere)}

    def queue() -> None:
        for _ in range(QUEUED):
            engine.enqueue(placed, outputs)

    def run(work: Callable[[], object]) -> Callable[[], None]:
        def done() -> None:
            work()
            device.wait()

        return done

    figures["queued"] = _each(timed(run(queue)))
    latents = device.download(outputs["next_registers"])[:, 0]
    try:
        figures["recorded"] = _each(timed(run(device.record(queue))))
    except BackendError as failure:
        figures["recorded"] = {"failed": first_line(failure)}
        with suppress(BackendError):  # whoever comes next would be told of it once more
            engine.prepare({name: array.shape for name, array in inputs.items()})
    return figures, latents


def _each(taken: Mapping[str, float]) -> dict[str, float]:
    return {name: value / QUEUED for name, value in taken.items()}
