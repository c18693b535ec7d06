"""What image prompts add to a step: operations, and time beside the plain step in turn.

The step of a published size with random weights, guided, and the same step attending to pictures
that an IP-Adapter has encoded, as many tokens each as the kinds of adapters make. Encoding a
picture, once a run, is not in it.

    python -m benchmarks.image_prompts --model sd15 --repeats 7 --out image-prompts.json
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.flops import count
from benchmarks.machine import describe, summary
from benchmarks.scenarios import Scenario, engine_inputs
from engine.backends.settings import BackendSettings
from engine.command_line import CommandParser
from engine.engines import Engines
from engine.graphs.graph import Part, find_graph, graph_folders
from engine.graphs.steering import ip_weights
from engine.model import Model

PLAIN = "no picture"
# What is attended to, by what it is called: pictures, and tokens of each.
PROMPTS: Mapping[str, tuple[int, int]] = {
    "a picture, plain": (1, 4),
    "a picture, Plus": (1, 16),
    "four pictures, Plus": (4, 16),
    "a picture, full-face": (1, 257),
}
Inputs = dict[str, NDArray[Any]]


def picture_inputs(
    model: Model, step: Mapping[str, NDArray[Any]], prompts: int, tokens: int
) -> Inputs:
    """Return what a step is given of pictures beside the inputs of a plain one, all float32.

    ip_keys and ip_values (B, k, t, W), ip_bias (B, k, t), each level's weights (g, B, k, h, w).
    A guided step has as many pictures again, for what guidance moves away from.
    """
    groups, batch = step["context"].shape[:2]
    pictures = prompts * min(groups, 2)
    width = sum(layer.width for layer in model.unet.cross_attentions())
    rng = np.random.default_rng(0)
    given: Inputs = {
        name: rng.standard_normal((batch, pictures, tokens, width)).astype(np.float32)
        for name in ("ip_keys", "ip_values")
    }
    given["ip_bias"] = np.zeros((batch, pictures, tokens), np.float32)
    height, columns = step["noise"].shape[2:]
    for level, name in ip_weights(model.unet).items():
        sides = [-(-side // 2**level) for side in (height, columns)]
        given[name] = np.ones((groups, batch, pictures, *sides), np.float32)
    return given


def measure(
    model: Model, scenario: Scenario, repeats: int, folders: Sequence[Path], threads: int | None
) -> dict[str, Any]:
    """Time each kind of step, all in turn, after one that warms up; folders: of graphs."""
    settings = BackendSettings(backend="cpu", threads=threads)
    engines = Engines(model, settings, "float32", folders=folders)
    plain = engine_inputs(scenario, model)["step"]
    inputs: dict[str, tuple[Part, Inputs]] = {PLAIN: ("step", plain)}
    for name, (prompts, tokens) in PROMPTS.items():
        seen = picture_inputs(model, plain, prompts, tokens)
        inputs[name] = "step_ip", {**plain, **seen}
    taken: dict[str, list[float]] = {name: [] for name in inputs}
    for _ in range(repeats + 1):
        for name, (part, given) in inputs.items():
            began = time.perf_counter()
            engines.engine(part).run(given)
            taken[name].append(time.perf_counter() - began)
    operations = {
        name: _operations(model, part, given, folders) for name, (part, given) in inputs.items()
    }
    return {
        "machine": describe(),
        "request": {"model": scenario.name, "size": scenario.size, "repeats": repeats},
        "steps": {
            name: {
                "gflop": round(operations[name] / 1e9, 2),
                "operations_share": round(operations[name] / operations[PLAIN] - 1, 4),
                "seconds": summary(taken[name][1:]),
                "seconds_share": summary(
                    [a / b - 1 for a, b in zip(taken[name][1:], taken[PLAIN][1:], strict=True)]
                ),
            }
            for name in inputs
        },
    }


def _operations(model: Model, part: Part, given: Inputs, folders: Sequence[Path]) -> int:
    graph = find_graph(part, model.unet, "float32", folders, model.path)
    return count(graph.data(), {name: array.shape for name, array in given.items()})


def table(measured: Mapping[str, Any]) -> str:
    """Return the figures as a table in Markdown."""
    lines = [
        "| a step with | GFLOP | more operations | seconds | more time |",
        "|---|---|---|---|---|",
    ]
    for name, each in measured["steps"].items():
        shares = f"{each['operations_share']:.1%} | {each['seconds']['median']:.3f}"
        lines.append(
            f"| {name} | {each['gflop']:.1f} | {shares} | {each['seconds_share']['median']:.1%} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    parser: argparse.ArgumentParser = CommandParser(
        prog="python -m benchmarks.image_prompts",
        description="Measure what pictures add to a step.",
    )
    parser.add_argument("--model", default="sd15", metavar="NAME", help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, metavar="N")
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument(
        "--graphs", type=Path, metavar="FOLDER", help="that `latentrt export` wrote"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON of the figures")
    options = parser.parse_args(arguments)
    scenario = Scenario.of(options.model)
    model = Model.open(scenario.model())
    measured = measure(
        model, scenario, options.repeats, graph_folders(options.graphs), options.threads
    )
    if options.out:
        options.out.write_text(json.dumps(measured, indent=1), encoding="utf-8")
    print(table(measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
