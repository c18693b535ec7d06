"""What an engine of TensorRT or TensorRT-RTX is made of: its facts, and the request to build it."""

import hashlib
from collections.abc import Callable
from typing import Any

from engine.backends.memory_estimate import Sizes, estimate_build
from engine.backends.tensorrt.build import timings_path
from engine.backends.tensorrt.build_request import BuildRequest, BuildSettings
from engine.backends.tensorrt.engine_store import EngineFacts
from engine.backends.tensorrt.library import LIBRARIES, library, version
from engine.configs.diffusion import Config
from engine.devices.cuda import CudaDevice, find_device
from engine.devices.device import Device
from engine.graphs.graph import Graph, Part
from engine.model import Model


def engine_facts(
    name: str,
    graph: Graph,
    settings: BuildSettings,
    weights: Callable[[], str],
    device: CudaDevice | None = None,
) -> EngineFacts:
    """Return the facts of an engine; raises BackendError when the library is missing.

    name: "tensorrt" or "tensorrt_rtx"
    weights: hashes those that are built in, if any are
    device: the GPU, unless the settings name a target
    """
    portable = bool(LIBRARIES[name].targets)
    sm = settings.target or (device or find_device()).facts.sm
    return EngineFacts(
        library=name,
        version=version(library(name)),
        part=graph.part,
        architecture=graph.architecture,
        graph=hashlib.sha256(graph.data()).hexdigest(),
        weights=None if settings.refit else weights(),
        precision=graph.precision,
        profiles=tuple(profile.to_dict() for profile in settings.profiles),
        sm=sm,
        device=None if portable else (device or find_device()).facts.name,
        driver=None if portable else (device or find_device()).facts.driver,
        refit=settings.refit,
        optimization_level=settings.optimization_level,
        workspace_bytes=settings.workspace_bytes,
    )


def build_request(
    name: str, model: Model, part: Part, graph: Graph, settings: BuildSettings, **more: Any
) -> BuildRequest:
    """Return what is to be built of a model's part; more: `loras`."""
    timings = None
    if LIBRARIES[name].keeps_timings:
        device = find_device()
        timings = timings_path(name, version(library(name)), device.facts.name)
    return BuildRequest(
        library=name,
        part=part,
        graph=graph.path,
        model=model.path,
        settings=settings,
        timings=timings,
        **model.given,
        **more,
    )


def require_to_build(device: Device, graph: Graph, config: Config, settings: BuildSettings) -> None:
    """Raise BackendError when a build on this GPU would not fit into its memory."""
    for profile in settings.profiles:
        most = {name: getattr(profile, name).max for name in ("height", "width", "batch")}
        sizes = Sizes(**most, groups=profile.groups.max, tokens=profile.tokens.max)
        needed = estimate_build(graph, config, sizes, settings.workspace_bytes or 0)
        needed.require(device.memory()[0], f"building the {graph.part} for {profile.describe()}")
