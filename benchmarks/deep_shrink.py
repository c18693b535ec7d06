"""What deep shrink costs and saves, and how many subjects are doubled without it.

The model that ships was trained on 128 x 128 pixels, where a caption of one thing is one thing. At
256 it is drawn plainly, and with the first part of the calls shrunk. A picture counts as doubled
where it has more large shapes on its background than the picture of 128 pixels of the same caption
and seed: connected areas that differ from the corners' colour, of at least a fiftieth of the
picture. Pictures are drawn in turn, so that whatever else the machine does is shared.

    python -m benchmarks.deep_shrink --pictures 24 --out deep-shrink.json
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

from benchmarks.machine import describe
from engine.backends.settings import BackendSettings
from engine.command_line import CommandParser
from runtime import Pipeline

SUBJECTS = (
    *("red apple", "cat face", "rocket", "house", "umbrella", "teddy bear", "guitar", "bicycle"),
    *("tree", "key", "star", "fish", "clock", "crown", "ship", "lemon", "camera", "bell"),
    *("owl", "mushroom", "pumpkin", "snail", "sunflower", "violin"),
)
STYLE, SIDE, LARGE = "fluent style", 128, 256
PARTS = (None, 0.35, 0.5)  # of the calls that are shrunk
APART = 24  # of 255: how far a pixel is from the background to belong to a shape
SMALLEST = 1 / 50  # of the picture: what is less is a detail
STEPS, SEED = 20, 40


def shapes(pixels: NDArray[np.uint8]) -> int:
    """Count the large connected areas of a picture (H, W, 3) that are not its background."""
    corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
    far = np.abs(pixels.astype(int) - np.median(corners, axis=0)).max(axis=2) > APART
    labels = np.where(far, np.arange(1, far.size + 1).reshape(far.shape), 0)
    while True:  # every cell takes the largest label beside it, until nothing changes
        grown = labels.copy()
        for axis in (0, 1):
            for step in (1, -1):
                beside = np.roll(labels, step, axis)
                edge = [slice(None)] * 2
                edge[axis] = slice(0, 1) if step == 1 else slice(-1, None)
                beside[tuple(edge)] = 0
                grown = np.maximum(grown, np.where(far, beside, 0))
        if np.array_equal(grown, labels):
            break
        labels = grown
    _, counts = np.unique(labels[labels > 0], return_counts=True)
    return int((counts >= SMALLEST * far.size).sum())


def measure(pictures: int, threads: int | None = None, steps: int = STEPS) -> dict[str, Any]:
    """Draw each caption at both sizes; returns seconds and how many pictures are doubled."""
    pipeline = Pipeline.load(settings=BackendSettings(backend="cpu", threads=threads))
    found: dict[str, list[tuple[float, int]]] = {}
    for number in range(pictures):
        text = f"a {SUBJECTS[number % len(SUBJECTS)]}, {STYLE}"
        for side, part in ((SIDE, None), *((LARGE, each) for each in PARTS)):
            began = time.perf_counter()
            image = pipeline(
                text,
                height=side,
                width=side,
                deep_shrink=part,
                num_inference_steps=steps,
                seed=SEED + number,
                sampler="ddim",
            ).images[0]
            seconds = time.perf_counter() - began
            found.setdefault(_name(side, part), []).append((seconds, shapes(np.asarray(image))))
    usual = [count for _, count in found[_name(SIDE, None)]]
    return {
        "machine": describe(),
        "request": {"pictures": pictures, "steps": steps, "first_seed": SEED},
        "drawn": {
            name: {
                "seconds_median": round(float(np.median([s for s, _ in each])), 2),
                "shapes_mean": round(float(np.mean([count for _, count in each])), 2),
                "doubled": sum(n > m for (_, n), m in zip(each, usual, strict=True)),
            }
            for name, each in found.items()
        },
    }


def table(measured: Mapping[str, Any]) -> str:
    """Return the figures as a table in Markdown."""
    count = measured["request"]["pictures"]
    lines = ["| drawn | seconds a picture | large shapes | doubled |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {each['seconds_median']:.2f} | {each['shapes_mean']:.2f} | "
        f"{each['doubled']} of {count} |"
        for name, each in measured["drawn"].items()
    ]
    return "\n".join(lines)


def _name(side: int, part: float | None) -> str:
    return f"{side} × {side}" + ("" if part is None else f", deep shrink {part:g}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    parser: argparse.ArgumentParser = CommandParser(
        prog="python -m benchmarks.deep_shrink", description="Count doubled subjects at 256 pixels."
    )
    parser.add_argument("--pictures", type=int, default=len(SUBJECTS), metavar="N")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N")
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON of the figures")
    options = parser.parse_args(arguments)
    measured = measure(options.pictures, options.threads, options.steps)
    if options.out:
        options.out.write_text(json.dumps(measured, indent=1), encoding="utf-8")
    print(table(measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
