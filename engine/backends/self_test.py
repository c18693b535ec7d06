"""A GPU that is chosen by nobody: one step of the model that ships is compared there first.

Only of a backend that a card has run before. The result is kept in the cache for the GPU, its
driver and the library's version, so it is tried once for each.
"""

import hashlib
import json
import logging
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import Arrays, EngineSpec
from engine.backends.registry import BACKENDS
from engine.backends.settings import BackendSettings, ComputePrecision, graph_precision
from engine.devices.cuda import DeviceFacts, find_device
from engine.errors import BackendError, LatentrtError, OutputError
from engine.graphs.graph import find_graph, graph_folders
from engine.model import Model, find_model
from engine.store.cache import cache_folder, write_atomically

HAVE_RUN = ("cuda",)
"""The backends that a card has run, of which `benchmarks/results` has the record."""
PRECISION: ComputePrecision = "float16"
MAX_ERROR = 0.02  # relative, of a step in float16; an H100 was 0.0025 off
SIDE, TOKENS = 16, 32
log = logging.getLogger(__name__)


@cache
def choose_gpu() -> str | None:
    """Return the backend of a GPU that passes the test, None where there is none."""
    for backend in HAVE_RUN:
        if _is_installed() and _passes(backend):
            return backend
    return None


def _is_installed() -> bool:
    """Tell whether ONNX Runtime has its CUDA provider, without importing anything."""
    found = find_spec("onnxruntime")
    if found is None or found.origin is None or find_spec("cuda") is None:
        return False
    return any(Path(found.origin).parent.glob("capi/*onnxruntime_providers_cuda.*"))


def _passes(backend: str) -> bool:
    try:
        error = _kept_error(backend, find_device().facts)
    except LatentrtError as failure:  # no driver, no memory: another time it may be there
        log.info("the GPU is not used: %s", failure)
        return False
    if not error <= MAX_ERROR:
        log.warning("the GPU is not used: a step on the backend %s is %.2g off", backend, error)
    return error <= MAX_ERROR


def _kept_error(backend: str, facts: DeviceFacts) -> float:
    """Return the relative error of a step, measured once for a GPU, its driver and the library."""
    try:
        library = version("onnxruntime-gpu")
    except PackageNotFoundError:
        library = "unknown"
    told = {"backend": backend, "library": library, "gpu": facts.name, "driver": facts.driver}
    key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    path = cache_folder() / "self-tests" / f"{key}.json"
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["relative_error"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not measured yet, or damaged
    error = measured_error(backend)
    content = json.dumps({**told, "relative_error": error}, indent=2).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(content))
    except (OSError, OutputError) as failure:
        log.info("the result of the GPU's test is not kept: %s", failure)
    return error


def measured_error(backend: str) -> float:
    """Return how far a step of the model that ships is from the processor's, relatively.

    Raises BackendError, GraphError or ModelError; NaN where the GPU made what is no number.
    """
    model = Model.open(find_model("pictogram"))
    found, expected = (
        _step(model, BackendSettings(backend=name), precision)
        for name, precision in ((backend, PRECISION), ("cpu", "float32"))
    )
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _step(
    model: Model, settings: BackendSettings, precision: ComputePrecision
) -> NDArray[np.float32]:
    from_precision = graph_precision(settings, precision)
    graph = find_graph("step", model.unet, from_precision, graph_folders(), model.path)
    spec = EngineSpec(
        graph=graph,
        weights=model.weights("step"),
        settings=settings,
        precision=precision,
        model=model,
    )
    assert settings.backend is not None
    engine = import_module(BACKENDS[settings.backend]).open_engine(spec)
    result: NDArray[np.float32] = engine.run(_inputs(model))["next_registers"]
    if result.dtype != np.float32:
        raise BackendError(f"the backend {settings.backend!r} gave {result.dtype}")
    return result


def _inputs(model: Model) -> Arrays:
    """Return what a guided step takes, of random numbers."""
    rng, channels = np.random.default_rng(0), model.vae.latent_channels
    latent = (1, channels, SIDE, SIDE)
    shapes = {
        "registers": (1, 1, channels, SIDE, SIDE),
        "context": (2, 1, TOKENS, model.unet.cross_attention_dim),
        "noise": latent,
    }
    given = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    rows = {
        "matrices": [[[0.9, -0.3, 0.1]]],
        "timestep": [500],
        "input_scale": [1],
        "guidance": [[[[[-2]]]], [[[[3]]]]],
        "guidance_rescale": [0],
        "outside": [[0, 0, 0]],
    }
    given |= {name: np.array(row, np.float32) for name, row in rows.items()}
    return {**given, "mask": np.ones((1, 1, SIDE, SIDE), np.float32)}
