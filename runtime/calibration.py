"""`python -m runtime.calibration MODEL`: look how large numbers become, as int8 must know.

Some prompts are drawn, in bfloat16 where the processor has it; the least and the greatest input of
every layer go into a small file in the cache, under a name that tells the checkpoint.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.backends import Arrays, BackendSettings, ComputePrecision, Engine, open_engine
from engine.errors import LatentrtError
from engine.graphs import find_graph, graph_folders
from engine.model import Model
from engine.models import find_model
from engine.opening import capabilities
from engine.quantization import ranges_name, write_ranges
from engine.signature import Part
from runtime.pipeline import Pipeline
from runtime.tokenizer import load_tokenizers

PROMPTS = (
    "a red apple",
    "a photograph of an astronaut riding a horse",
    "a dark castle on a hill at night, oil painting",
    "a white cat in the snow, bright light",
)
STEPS = 10
SEED = 1000
USER_ERROR = 2


def calibrate(
    model: str | Path = "pictogram",
    *,
    prompts: Sequence[str] = PROMPTS,
    steps: int = STEPS,
    folder: Path | None = None,
    precision: ComputePrecision | None = None,
    threads: int | None = None,
) -> Path:
    """Draw pictures with a model and write the ranges that its UNet's layers need for int8.

    folder: where graphs and ranges are; None writes into the cache
    precision: to draw in, "float32" or "bfloat16"; None takes the faster one
    Returns the file. Raises ModelError, GraphError, BackendError or OutputError.
    """
    from engine.openvino_observer import ObservingEngine

    if precision is None:
        precision = "bfloat16" if "BF16" in capabilities() else "float32"
    opened = Model.open(find_model(model))
    settings = BackendSettings(backend="openvino", threads=threads)
    folders = graph_folders(folder)

    def open_part(part: Part, weights: Arrays) -> Engine:
        graph = find_graph(part, opened.config(part), "float32", folders, opened.path)
        if part == "step":
            return ObservingEngine(graph, weights, threads, precision)
        return open_engine(graph, weights, settings, precision)

    pipeline = Pipeline(opened, load_tokenizers(opened), open_part)
    for number, prompt in enumerate(prompts):
        pipeline(prompt, num_inference_steps=steps, seed=SEED + number)
    engine = pipeline.engine("step")
    assert isinstance(engine, ObservingEngine)
    path = folders[0] / ranges_name(opened.unet.key(), opened.find("unet"))
    write_ranges(path, engine.ranges)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m runtime.calibration", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="as --model of `python -m runtime`")
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="to draw instead; may be given often"
    )
    parser.add_argument(
        "--steps", type=int, default=STEPS, help="of each picture (default: %(default)s)"
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        help="to draw in (default: bfloat16 where the processor has it)",
    )
    parser.add_argument(
        "--graphs", type=Path, metavar="FOLDER", help="where to write, and look for graphs"
    )
    parser.add_argument("--threads", type=int, metavar="N")
    options = parser.parse_args(arguments)
    try:
        path = calibrate(
            options.model,
            prompts=options.prompt or PROMPTS,
            steps=options.steps,
            folder=options.graphs,
            precision=options.precision,
            threads=options.threads,
        )
    except LatentrtError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
