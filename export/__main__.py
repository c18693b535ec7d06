"""`python -m export MODEL`: trace a model's parts to ONNX graphs and check each against torch."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from engine.cache import cache_folder, write_atomically
from engine.errors import LatentrtError, ModelError, OutputError
from engine.graphs import Precision, graph_name
from engine.model import FOLDERS, Model
from engine.models import find_model
from engine.signature import Part
from export.parity import check
from export.tracing import build_module, trace

USER_ERROR = 2
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        model = Model.open(find_model(options.model))
        folder = options.out or cache_folder() / "graphs"
        _make_folder(folder)
        for part in options.parts:
            export_part(model, part, options.precision, folder)
    except LatentrtError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("\ncancelled; the graphs listed above are whole", file=sys.stderr)
        return INTERRUPTED
    return 0


def export_part(model: Model, part: Part, precision: Precision, folder: Path) -> Path:
    """Trace one part, check it against torch and write it; print its size and its error.

    Raises ModelError when the weights do not fit, GraphError when the graph does not agree.
    """
    config, weights = model.config(part), model.weights(part)
    module = build_module(part, config)
    assert isinstance(module.model, nn.Module)
    load_weights(module.model, weights, model.path / FOLDERS[part])
    traced = trace(part, config, precision, module)
    error = check(traced, weights)
    path = folder / graph_name(part, config, precision)
    data = traced.model.SerializeToString()
    write_atomically(path, lambda file: file.write(data))
    nodes = len(traced.model.graph.node)
    print(f"{path}  {len(data) / 1e3:.0f} kB  {nodes} nodes  relative error {error:.1e}")
    return path


def load_weights(module: nn.Module, weights: Mapping[str, NDArray[Any]], source: Path) -> None:
    """Load a checkpoint's tensors strictly, in float32; raises ModelError for any that differ."""
    ignored = "text_model.embeddings.position_ids"  # 0, 1, 2, …, in files of old transformers
    state = {
        name: torch.from_numpy(np.array(value, np.float32))
        for name, value in weights.items()
        if name != ignored
    }
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        detail = " ".join(str(error).split("\n", 2)[1].split())[:200]
        raise ModelError(
            f"the weights in {source} do not fit its config.json ({detail}); "
            "are both of the same model?"
        ) from error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the folder {folder} cannot be made ({error}); choose another"
        ) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m export", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="a model that ships, or a folder")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where the graphs go (default: the cache, where the runtime finds them)",
    )
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="float32",
        help="what the graphs compute in (default: %(default)s)",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=list(FOLDERS),
        default=list(FOLDERS),
        metavar="PART",
        help=f"some of {', '.join(FOLDERS)} (default: all)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
