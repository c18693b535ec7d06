"""Does a graph compute what its module computes? Random inputs, two sizes, relative error."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from engine.backends.settings import BackendSettings
from engine.engines import open_engine
from engine.errors import GraphError
from engine.graphs.graph import Graph, Precision, signature
from export.tracing import TracedPart, example_inputs

# Relative error (norm of the difference over the norm of the module's output) that is allowed.
# float16 has 11 bits; a deep network loses a few of them.
TOLERANCES: Mapping[Precision, float] = {"float32": 1e-4, "float16": 3e-2}


def check(traced: TracedPart, module: nn.Module, weights: Mapping[str, NDArray[Any]]) -> float:
    """Run the graph in ONNX Runtime beside the float32 module; return the largest error.

    module: of `build_module`, with the same weights.
    Raises GraphError when it is above the tolerance of the precision.
    """
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        path.write_bytes(traced.model.SerializeToString())
        engine = open_engine(Graph.read(path), weights, BackendSettings())
        for seed, sizes in enumerate(_sizes(traced)):
            generator = torch.Generator().manual_seed(seed)
            inputs = example_inputs(traced.part, traced.config, sizes, generator)
            expected = _run(module, traced, inputs)
            given = engine.run({name: value.numpy() for name, value in inputs.items()})
            for name in signature(traced.part, traced.config).outputs:
                worst = max(worst, relative_error(given[name], expected[name]))
    if not worst <= TOLERANCES[traced.precision]:
        raise GraphError(
            f"the {traced.precision} graph of {traced.part} differs from the module by "
            f"{worst:.1e} (allowed {TOLERANCES[traced.precision]:.0e}); it was not written: "
            "try --precision float32, or another version of torch"
        )
    return worst


def relative_error(given: NDArray[Any], expected: NDArray[Any]) -> float:
    """Return |given - expected| / |expected| in the Euclidean norm; infinite for other shapes."""
    if given.shape != expected.shape:
        return float("inf")
    difference = given.astype(np.float64) - expected.astype(np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))


def _sizes(traced: TracedPart) -> list[dict[str, int]]:
    """One image without guidance, and several with it on another shape; the same of texts."""
    if traced.part == "language_model":
        return [{"B": 1, "r": 1, "n": 6, "p": 0}, {"B": 2, "r": 1, "n": 1, "p": 5}]
    side = traced.config.latent_multiple
    tokens = traced.config.tokens_per_row or 7
    return [
        {"B": 1, "g": 1, "r": 1, "n": tokens, "e": 1, "h": side, "w": side} | {"k": 1, "t": 4},
        {"B": 3, "g": 2, "r": 3, "n": tokens, "e": 2, "h": 2 * side, "w": side} | {"k": 3, "t": 2},
    ]


@torch.no_grad()
def _run(
    module: nn.Module, traced: TracedPart, inputs: Mapping[str, torch.Tensor]
) -> dict[str, NDArray[Any]]:
    outputs = module(**inputs)
    names = signature(traced.part, traced.config).outputs
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return {name: value.numpy() for name, value in zip(names, outputs, strict=True)}
