"""Graphs: an architecture without weights, as ONNX, found by what the architecture is.

A graph's file name says the part, the architecture's key and the precision, so one graph serves
every checkpoint of its architecture. Graphs of known architectures ship with the package,
compressed; `python -m export` traces the others.
"""

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, get_args

from engine.configs.diffusion import Config
from engine.errors import GraphError
from engine.graphs.onnx_bytes import metadata, outputs
from engine.graphs.signature import Part, signature
from engine.store.cache import cache_folder

Precision = Literal["float32", "float16"]
METADATA_KEY = "latentrt"
COMPRESSED = ".gz"
SHIPPED = Path(__file__).parents[1] / "shipped" / "graphs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """An ONNX file and what it says of itself.

    inputs, outputs: their names, in the order of `engine.graphs.signature`; graphs of other
        versions have others
    weights: the checkpoint's tensors that it wants, by name, with their shapes
    """

    path: Path
    part: Part
    architecture: str
    precision: Precision
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: Mapping[str, tuple[int, ...]]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a graph's description; raises GraphError when the file is none of ours."""
        try:
            data = _read(path)
            described = json.loads(metadata(data)[METADATA_KEY])
            return cls(
                path=path,
                part=described["part"],
                architecture=described["architecture"],
                precision=described["precision"],
                inputs=tuple(described.get("inputs", ())),
                outputs=outputs(data),
                weights={name: tuple(shape) for name, shape in described["weights"].items()},
            )
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise GraphError(
                f"{path} is not a graph of this project ({type(error).__name__}: {error}); "
                "make it anew with `python -m export MODEL`"
            ) from error

    def data(self) -> bytes:
        """Read the serialised ModelProto; raises GraphError."""
        return _read(self.path)


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == COMPRESSED else data
    except (OSError, EOFError, zlib.error) as error:
        raise GraphError(
            f"{path} cannot be read ({error}); restore the file, or make the graph anew with "
            "`python -m export MODEL`"
        ) from error


def graph_name(part: Part, config: Config, precision: Precision) -> str:
    """Return the file name of a graph; XL's second text encoder is a text encoder like others."""
    kind = "text_encoder" if part == "text_encoder_2" else part
    return f"{kind}-{config.key()}-{precision}.onnx"


def graph_folders(chosen: Path | None = None) -> Sequence[Path]:
    """Return where graphs are looked for: the chosen folder, else the cache and the package."""
    return (chosen,) if chosen else (cache_folder() / "graphs", SHIPPED)


def find_graph(
    part: Part, config: Config, precision: Precision, folders: Sequence[Path], model: Path
) -> Graph:
    """Find the graph of an architecture; raises GraphError when no folder has it.

    One that another version of this project made is passed over.
    """
    if precision not in get_args(Precision):
        raise GraphError(
            f"the precision {precision!r} is not known; choose {' or '.join(get_args(Precision))}"
        )
    name, wanted = graph_name(part, config, precision), signature(part, config)
    stale = ""
    for path in (folder / f"{name}{suffix}" for folder in folders for suffix in ("", COMPRESSED)):
        if path.is_file():
            graph = Graph.read(path)
            if graph_name(graph.part, config, graph.precision) != name or (
                graph.architecture != config.key()
            ):
                raise GraphError(f"{path} holds another graph than its name says; delete it")
            if (graph.inputs, graph.outputs) == (tuple(wanted.inputs), tuple(wanted.outputs)):
                return graph
            stale = f" ({path.name} there is of another version)"
    command = "export language-model" if part == "language_model" else "export"
    raise GraphError(
        f"no {precision} graph for the {part} of {model} in {' or '.join(map(str, folders))}"
        f"{stale}; make it with `python -m {command} {model} --precision {precision}`"
    )
