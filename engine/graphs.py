"""Graphs: an architecture without weights, as ONNX, found by what the architecture is.

A graph's file name says the part, the architecture's key and the precision, so one graph serves
every checkpoint of its architecture. Graphs of known architectures ship with the package;
`python -m export` traces the others.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, get_args

from engine.cache import cache_folder
from engine.config import Config
from engine.errors import GraphError
from engine.signature import Part

Precision = Literal["float32", "float16"]
METADATA_KEY = "latentrt"
SHIPPED = Path(__file__).parent / "shipped_graphs"
_METADATA_FIELD = 14  # `metadata_props` of ONNX's ModelProto
_LENGTH_DELIMITED = 2  # protobuf's wire type of strings, bytes and messages


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """An ONNX file and what it says of itself.

    weights: the names of the checkpoint's tensors that it wants.
    """

    path: Path
    part: Part
    architecture: str
    precision: Precision
    weights: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a graph's description; raises GraphError when the file is none of ours."""
        try:
            described = json.loads(_metadata(path.read_bytes())[METADATA_KEY])
            weights = described["weights"]
            if not isinstance(weights, list) or not all(isinstance(name, str) for name in weights):
                raise TypeError("weights is no list of names")
            return cls(
                path=path,
                part=described["part"],
                architecture=described["architecture"],
                precision=described["precision"],
                weights=tuple(weights),
            )
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise GraphError(
                f"{path} is not a graph of this project ({type(error).__name__}: {error}); "
                "make it anew with `python -m export MODEL`"
            ) from error


def graph_name(part: Part, config: Config, precision: Precision) -> str:
    """Return the file name of a graph."""
    return f"{part}-{config.key()}-{precision}.onnx"


def graph_folders(chosen: Path | None = None) -> Sequence[Path]:
    """Return where graphs are looked for: the chosen folder, else the cache and the package."""
    return (chosen,) if chosen else (cache_folder() / "graphs", SHIPPED)


def find_graph(
    part: Part, config: Config, precision: Precision, folders: Sequence[Path], model: Path
) -> Graph:
    """Find the graph of an architecture; raises GraphError when no folder has it."""
    if precision not in get_args(Precision):
        raise GraphError(
            f"the precision {precision!r} is not known; choose {' or '.join(get_args(Precision))}"
        )
    name = graph_name(part, config, precision)
    for folder in folders:
        if (folder / name).is_file():
            graph = Graph.read(folder / name)
            if (graph.part, graph.architecture, graph.precision) != (part, config.key(), precision):
                raise GraphError(
                    f"{folder / name} holds another graph than its name says; delete it"
                )
            return graph
    raise GraphError(
        f"no {precision} graph for the {part} of {model} in {' or '.join(map(str, folders))}; "
        f"make it with `python -m export {model} --precision {precision}`"
    )


def _metadata(data: bytes) -> dict[str, str]:
    """Read `metadata_props` of a serialised ModelProto, without parsing the graph."""
    entries = (dict(_fields(value)) for field, value in _fields(data) if field == _METADATA_FIELD)
    return {entry[1].decode(): entry[2].decode() for entry in entries}


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Walk a protobuf message; yield its length-delimited fields and skip its numbers."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        if tag & 7 == _LENGTH_DELIMITED:
            length, position = _varint(data, position)
            if position + length > len(data):
                raise ValueError("the file ends early")
            yield tag >> 3, data[position : position + length]
            position += length
        elif tag & 7 == 0:
            _, position = _varint(data, position)
        else:
            raise ValueError(f"unexpected wire type {tag & 7}")


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")
