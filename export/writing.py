"""Graph files: traced, checked against torch where there are weights, written whole."""

import gzip
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from engine.checkpoints.control_net import open_control_net
from engine.checkpoints.gpt2 import LanguageModel
from engine.configs.diffusion import Config
from engine.errors import ModelError
from engine.graphs.graph import COMPRESSED, Part, Precision, graph_name
from engine.model import Model
from engine.store.cache import write_atomically
from export.parity import check
from export.tracing import TracedPart, build_module, trace


def export_part(model: Model, part: Part, precision: Precision, folder: Path) -> str:
    """Trace one part, check it against torch and write it; return a line on its size and error.

    Raises ModelError when the weights do not fit, GraphError when the graph does not agree.
    """
    source = f"{part} of {model.path}"
    return _export(part, model.config(part), model.weights(part), source, precision, folder)


def export_language_model(model: LanguageModel, precision: Precision, folder: Path) -> str:
    """Do the same as `export_part` for a language model."""
    source = f"language model of {model.path}"
    return _export("language_model", model.config, model.weights, source, precision, folder)


def export_control_net(
    model: Model, path: Path, precision: Precision, folder: Path
) -> Iterator[str]:
    """Trace a ControlNet's parts likewise; yields a line on each.

    model: that it steers; raises ModelError when it is not for this one.
    """
    config, weights = open_control_net(path, model.unet, model.weights("step"))
    for part in ("control_hint", "control"):
        yield _export(part, config, weights, f"ControlNet {path}", precision, folder)


def _export(
    part: Part,
    config: Config,
    weights: Mapping[str, NDArray[Any]],
    source: str,
    precision: Precision,
    folder: Path,
) -> str:
    module = build_module(part, config)
    assert isinstance(module.model, nn.Module)
    load_weights(module.model, weights, source)
    traced = trace(part, config, precision)
    error = check(traced, module, weights)
    data = traced.model.SerializeToString()
    path = folder / graph_name(part, config, precision)
    return f"{_write(path, data, traced)}  relative error {error:.1e}"


def write_published(part: Part, config: Config, precision: Precision, folder: Path) -> str:
    """Trace a part of a published architecture and write it, compressed; return a line on it."""
    traced = trace(part, config, precision)
    data = gzip.compress(traced.model.SerializeToString(), mtime=0)
    path = folder / f"{graph_name(part, config, precision)}{COMPRESSED}"
    return _write(path, data, traced)


def _write(path: Path, data: bytes, traced: TracedPart) -> str:
    write_atomically(path, lambda file: file.write(data))
    return f"{path}  {len(data) / 1e3:.0f} kB  {len(traced.model.graph.node)} nodes"


def load_weights(module: nn.Module, weights: Mapping[str, NDArray[Any]], source: str) -> None:
    """Load a checkpoint's tensors strictly, in float32; raises ModelError for any that differ."""
    state = {name: torch.from_numpy(np.array(value, np.float32)) for name, value in weights.items()}
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        detail = " ".join(str(error).split("\n", 2)[1].split())[:200]
        raise ModelError(
            f"the weights of the {source} do not fit its configuration ({detail}); "
            "are both of the same model?"
        ) from error
