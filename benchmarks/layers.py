"""What does TensorRT-RTX's builder make of a graph? Its own list of kernels, without a GPU.

    python -m benchmarks.layers --model sd15 --part step --out layers.json

A built engine holds the list that its compiler made, as text: kernels by name, products and
convolutions, of which the GPU chooses later. It is counted for the graph as the backend gives it,
and with attention written otherwise. Weights are random numbers.
"""

import argparse
import json
import re
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.onnxruntime.attention import fuse_attention
from engine.backends.onnxruntime.webgpu_graph import with_products
from engine.backends.tensorrt.build_request import BuildRequest, BuildSettings
from engine.backends.tensorrt.library import LIBRARIES, library, version
from engine.backends.tensorrt.network import build_engine
from engine.backends.tensorrt.profiles import Profile, Range, Shapes, input_shapes
from engine.checkpoints.families.sd import SD1, SD2
from engine.checkpoints.families.xl import XL
from engine.command_line import CommandParser
from engine.configs.base import Config
from engine.errors import LatentrtError, exit_status
from engine.graphs.graph import Graph, Part, find_graph, graph_folders
from engine.model import Model, find_model
from engine.store.cache import write_atomically

__all__ = ["FORMS", "MODELS", "layers", "measure"]

NAME = "tensorrt_rtx"
# Attention as the graphs have it, splits of heads left to it, and all scores.
FORMS: Mapping[str, Callable[[bytes], bytes]] = {
    "as it is": lambda data: data,
    "attention of three dimensions": lambda data: fuse_attention(data, causal=True, standard=True),
    "attention as products": with_products,
}
MODELS: Mapping[str, tuple[Config | None, int]] = {
    "pictogram": (None, 128),
    "sd15": (SD1, 512),
    "sd21": (SD2, 768),
    "xl": (XL, 1024),
}
PARTS: tuple[Part, ...] = ("step", "step_shallow")
RANDOM = 2**24  # numbers, of which weights are pieces: the library keeps equal ones once
ENTRY = re.compile(rb"\n  ([a-z_]+)=\{ (?:name=\"?([^ \"]+))?")
ATTENTION, NORM = "mha", "Gnor"
# What the compiler calls its entries that are work for the GPU, and what they are here.
KINDS = {
    "function": "kernels",
    "fully_connected": "products",
    "corrltn": "convolutions",
    "runtime_fusion": "fused when it is run",
    "inorm": "group norms",
    "memset": "memsets",
    "copy": "copies",
    "resize": "resizes",
    "concat": "concatenations",
}


def layers(plan: bytes) -> dict[str, Any]:
    """Count the entries of a built engine that are work for the GPU.

    attention: fused kernels of it, among the kernels; heaviest: the names that come most often
    """
    found: Counter[str] = Counter()
    names: Counter[str] = Counter()
    for entry in ENTRY.finditer(plan):
        kind = entry[1].decode()
        if kind not in KINDS:
            continue
        found[KINDS[kind]] += 1
        if kind == "function" and entry[2]:
            names[re.sub(r"_0x.*", "", entry[2].decode())] += 1
    return {
        "entries": sum(found.values()),
        **{kind: found[kind] for kind in KINDS.values()},
        "attention": sum(count for name, count in names.items() if ATTENTION in name),
        "norms within kernels": sum(count for name, count in names.items() if NORM in name),
        "most frequent": dict(names.most_common(12)),
    }


def measure(
    model: str, part: Part, target: str, forms: Sequence[str] = tuple(FORMS)
) -> dict[str, Any]:
    """Build a part's float16 graph in each form for one size, and count; raises BackendError."""
    config, side = MODELS[model]
    if config is None:
        config = Model.open(find_model(model)).config(part)
    graph = find_graph(part, config, "float16", graph_folders(), find_model("pictogram"))
    size = Range(side, side, side)
    profile = Profile(height=size, width=size)
    request = BuildRequest(
        library=NAME,
        part=part,
        graph=graph.path,
        model=graph.path,
        settings=BuildSettings(profiles=(profile,), target=target),
    )
    shapes = _of_one_size(input_shapes(part, config, profile))
    module, weights = library(NAME), dict(_random(graph))
    found: dict[str, Any] = {}
    for form in forms:
        began = time.monotonic()
        data = FORMS[form](graph.data())
        try:
            plan = build_engine(module, data, weights.items(), [shapes], request, None)
        except LatentrtError as error:
            found[form] = {"refused": str(error)}
        else:
            found[form] = {"built_s": time.monotonic() - began, **layers(bytes(plan))}
    asked = {"model": model, "part": part, "side": side, "target": target}
    return {**asked, NAME: version(module), "forms": found}


def _of_one_size(shapes: Shapes) -> Shapes:
    """Return a profile of the best sizes alone, as `add_free_dimension_override` fixes them."""
    return {name: (best, best, best) for name, (_, best, _) in shapes.items()}


def _random(graph: Graph) -> Iterator[tuple[str, NDArray[Any]]]:
    pool = np.random.default_rng(0).standard_normal(RANDOM).astype(np.float16)
    for name, shape in graph.weights.items():
        start = zlib.crc32(name.encode()) % 2**20
        values = np.resize(pool[start : start + prod(shape)], shape)
        yield name, values * np.float16(prod(shape[1:]) ** -0.5)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the counts as JSON; return the exit status."""
    return exit_status(lambda: _run(_parser().parse_args(arguments)), cancelled="cancelled")


def _run(options: argparse.Namespace) -> int:
    found = measure(options.model, options.part, options.target, options.form or tuple(FORMS))
    text = json.dumps(found, indent=2) + "\n"
    if options.out:
        write_atomically(options.out, lambda file: file.write(text.encode()))
    print(text, end="")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m benchmarks.layers", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="pictogram")
    parser.add_argument("--part", choices=PARTS, default="step")
    parser.add_argument("--target", choices=LIBRARIES[NAME].targets, default="sm89")
    parser.add_argument("--form", choices=FORMS, action="append", help="may be given several times")
    parser.add_argument("--out", type=Path, metavar="JSON", help="write the counts here too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
