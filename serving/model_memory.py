"""The memory of a model that serves: of its weights, and of one row more in a call."""

import math

from engine.backends.memory_estimate import ITEM_BYTES, Sizes, find_gpu
from engine.backends.settings import ON_GPU, graph_precision
from engine.configs.base import Config
from runtime.denoising.rows import Row
from runtime.images.upscaler import Upscaler
from runtime.pipeline import Pipeline
from serving.memory import free_bytes
from serving.row_limits import LADDER

__all__ = ["fitting_rows", "upscaler_bytes", "weight_bytes"]

FREE_SHARE = 0.5  # of the free memory that the rows of a call may take
LIBRARYS_OWN = 1.8  # times the estimate, as `engine.backends.memory_estimate` has it measured


def weight_bytes(pipeline: Pipeline) -> int:
    """Count what a pipeline's weights take when all is open, what stands beside it included."""
    configs: list[Config] = [*pipeline.model.configs.values(), *pipeline.control_nets.configs]
    configs += pipeline.ip_adapters.configs
    numbers = sum(math.prod(s) for config in configs for s in config.tensor_shapes().values())
    return _item_bytes(pipeline) * numbers


def upscaler_bytes(upscaler: Upscaler) -> int:
    """Count what an upscaler's weights take; it computes in float32."""
    shapes = upscaler.file.config.tensor_shapes().values()
    return ITEM_BYTES["float32"] * sum(map(math.prod, shapes))


def fitting_rows(pipeline: Pipeline, row: Row) -> int:
    """Return how many rows of a row's next call fit, by an estimate of its activations."""
    free = _free_bytes(pipeline)
    return LADDER[-1] if free is None else int(FREE_SHARE * free / _row_bytes(pipeline, row))


def _row_bytes(pipeline: Pipeline, row: Row) -> float:
    """Estimate what a row more takes in the part of its next call that needs most."""
    nets = {control.net for control in row.controls}
    parts: list[tuple[str, Config]] = [(row.part, pipeline.model.config(row.part))]
    parts += [("control", pipeline.control_nets.config(net)) for net in nets]
    groups = len(row.inputs()["guidance"])
    height, width = (pipeline.model.vae.compression * side for side in row.latents.shape[2:])

    def more(part: str, config: Config) -> int:
        one, two = (
            config.activations(part, Sizes(height=height, width=width, groups=groups, batch=rows))
            for rows in (1, 2)
        )
        return two - one

    return LIBRARYS_OWN * _item_bytes(pipeline) * max(more(*each) for each in parts)


def _item_bytes(pipeline: Pipeline) -> int:
    """Return the bytes of a number in the graphs that a pipeline runs."""
    chosen = pipeline.engines
    return ITEM_BYTES[graph_precision(chosen.settings, chosen.precision)]


def _free_bytes(pipeline: Pipeline) -> int | None:
    """Return what is free where a pipeline's engines compute, None where nobody knows."""
    backend = pipeline.engines.settings.backend
    if backend is not None and backend in ON_GPU:
        return find_gpu(backend).memory()[0]
    return free_bytes()
