"""A graph and its weights become an engine of TensorRT or TensorRT-RTX, in this process.

A builder may crash: programs call `engine.backends.tensorrt.build`, which does this in a child.
"""

import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from engine.backends.tensorrt.build_request import BuildRequest, BuildSettings
from engine.backends.tensorrt.library import LIBRARIES, compute_capability
from engine.backends.tensorrt.profiles import Shapes
from engine.errors import BackendError, GraphError, LatentrtError
from engine.graphs.onnx_bytes import without_attribute
from engine.store.cache import write_atomically


def build_engine(
    module: Any,
    data: bytes,
    weights: Iterable[tuple[str, NDArray[Any]]],
    shapes: Iterable[Shapes],
    request: BuildRequest,
    monitor: Any,
) -> Any:
    """Parse a graph, give it its weights, and build; returns the engine's bytes, a buffer.

    weights: each by its name, of the shape and the dtype that the graph declares

    Raises GraphError when the library cannot take the graph, BackendError when it cannot build.
    """
    logger = _logger(module)
    builder = module.Builder(logger)
    network = builder.create_network(0)
    parser = module.OnnxParser(network, logger)
    _parse(parser, data, weights, request)
    _let_attention_decompose(module, network)
    config = _configure(module, builder, request.settings)
    config.progress_monitor = monitor
    for profile in shapes:
        _add_profile(builder, config, profile)
    if request.timings and LIBRARIES[request.library].keeps_timings:
        past = request.timings.read_bytes() if request.timings.is_file() else b""
        config.set_timing_cache(config.create_timing_cache(past), False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        advice = "choose a smaller profile, another optimization level or more workspace"
        if request.settings.refit and request.settings.target:
            advice = "an engine with weights that may change is built only beside an NVIDIA GPU"
        raise BackendError(
            f"{request.library} cannot build the {request.part} from {request.graph.name} "
            f"({logger.last or 'it does not say why'}); {advice}"
        )
    if request.timings and LIBRARIES[request.library].keeps_timings:
        _keep_timings(config, request.timings)
    return plan


def _parse(
    parser: Any, data: bytes, weights: Iterable[tuple[str, NDArray[Any]]], request: BuildRequest
) -> None:
    try:
        # It is refused; that the library's own attention keeps its softmax in float32 is assumed.
        data = without_attribute(data, "Attention", "softmax_precision")
    except (IndexError, ValueError) as error:
        raise GraphError(
            f"the graph {request.graph.name} is damaged ({error}); make it anew with "
            "`python -m export MODEL`"
        ) from error
    ok = parser.load_model_proto(data)
    for name, array in weights if ok else ():
        ok = ok and parser.load_initializer(name, array.ctypes.data, array.nbytes)
    if ok and parser.parse_model_proto():
        return
    found = [parser.get_error(index) for index in range(parser.num_errors)]
    operators = {error.node_operator(): None for error in found if error.node_operator()}
    refused = [name for name in operators if not parser.supports_operator(name)]
    said = (
        "; ".join({" ".join(error.desc().split()): None for error in found})
        or "it does not say why"
    )
    if refused:
        raise GraphError(
            f"{request.library} has no operator {' and no '.join(refused)}, which the graph "
            f"{request.graph.name} needs; run this part on another backend"
        )
    at = f" at its {' and its '.join(operators)}" if operators else ""
    raise GraphError(
        f"{request.library} cannot take the graph {request.graph.name}{at} ({said}); if the file "
        "is damaged make it anew with `python -m export MODEL`"
    )


def _let_attention_decompose(module: Any, network: Any) -> None:
    """Let attention be computed step by step where no fused kernel takes its dtype and width."""
    for layer in map(network.get_layer, range(network.num_layers)):
        if layer.type == module.LayerType.ATTENTION_INPUT:
            layer.__class__ = module.IAttentionInputLayer  # the bindings give the base class
            layer.attention.decomposable = True


def _configure(module: Any, builder: Any, settings: BuildSettings) -> Any:
    config = builder.create_builder_config()
    # So that an engine of many sizes says how much memory each takes, not what the largest would.
    config.set_preview_feature(module.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10, True)
    if settings.refit:
        config.set_flag(module.BuilderFlag.REFIT)
    if settings.optimization_level is not None:
        config.builder_optimization_level = settings.optimization_level
    if settings.workspace_bytes is not None:
        pool = module.MemoryPoolType.WORKSPACE
        config.set_memory_pool_limit(pool, settings.workspace_bytes)
    if settings.target is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(compute_capability(module, settings.target), 0)
    return config


def _add_profile(builder: Any, config: Any, shapes: Shapes) -> None:
    profile = builder.create_optimization_profile()
    for name, (low, best, high) in shapes.items():
        profile.set_shape(name, low, best, high)
    if config.add_optimization_profile(profile) < 0:
        raise BackendError(
            f"the library takes no profile of the shapes {dict(shapes)}; give smaller ranges"
        )


def _keep_timings(config: Any, path: Path) -> None:
    """Write kernels' times; a build is no worse for want of them."""
    with suppress(LatentrtError, OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(config.get_timing_cache().serialize()))


def _logger(module: Any) -> Any:
    class Logger(module.ILogger):  # type: ignore[misc]
        """Keeps the last error, and writes it and warnings where an obituary finds them."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.last = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (module.ILogger.INTERNAL_ERROR, module.ILogger.ERROR):
                self.last = " ".join(message.split())
                print(self.last, file=sys.stderr, flush=True)

    return Logger()
