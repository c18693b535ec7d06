"""`python -m runtime.calibration MODEL`: look how large numbers become, as int8 must know.

Some prompts are drawn, in bfloat16 where the processor has it; the smallest and largest input of
every layer of the UNet and of the decoder go into small files in the cache, under names that tell
the checkpoint. The same latents are then decoded in int8: a decoder whose pictures change visibly
stays in floating point.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.backends.base import Arrays, Engine, Ranges
from engine.backends.openvino.int8 import write_ranges
from engine.backends.settings import BackendSettings, ComputePrecision
from engine.command_line import CommandParser
from engine.engines import QUANTIZED, Engines, capabilities, ranges_of
from engine.errors import exit_status
from engine.graphs.graph import Part, graph_folders
from engine.graphs.variants import Variant
from engine.model import Model, find_model
from engine.store.cache import made_folder
from runtime.checks import OneOrMore, path_of, several
from runtime.conditioning.tokenizer import load_tokenizers
from runtime.images.files import psnr
from runtime.pipeline import Pipeline
from runtime.request import Request

PROMPTS = (
    "a red apple",
    "a photograph of an astronaut riding a horse",
    "a dark castle on a hill at night, oil painting",
    "a white cat in the snow, bright light",
)
STEPS = 10
SEED = 1000
DECODER_DB = 40.0  # of each picture beside the same latents decoded in floating point


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """What was found: the files of ranges, and how near int8 decodes, in dB of the worst picture.

    Below `DECODER_DB` the decoder's file holds no ranges.
    """

    files: tuple[Path, ...]
    decoder_db: float


class ObservingEngines(Engines):
    """Engines of which those with layers for int8 remember how large their inputs became."""

    def open(self, part: Part, weights: Arrays, variant: Variant | None = None) -> Engine:
        """Open a part; see `Engines`."""
        if part not in QUANTIZED or variant is not None:
            return super().open(part, weights, variant)
        from engine.backends.openvino.observer import ObservingEngine

        graph, threads = self.graph(part), self.settings.threads
        return ObservingEngine(graph, weights, threads, self.precision)

    def ranges_seen(self, part: Part) -> Ranges:
        """Return what a part has seen in all runs so far."""
        from engine.backends.openvino.observer import ObservingEngine

        engine = self.engine(part)
        assert isinstance(engine, ObservingEngine)
        return engine.ranges


def calibrate(
    model: str | Path = "pictogram",
    *,
    prompts: OneOrMore[str] = PROMPTS,
    steps: int = STEPS,
    folder: str | Path | None = None,
    precision: ComputePrecision | None = None,
    threads: int | None = None,
) -> Calibrated:
    """Draw pictures with a model and write the ranges that its layers need for int8.

    folder: where graphs and ranges are; None writes into the cache
    precision: to draw in, "float32" or "bfloat16"; None takes the faster one
    Raises ModelError, GraphError, BackendError or OutputError.
    """
    if precision is None:
        precision = "bfloat16" if "BF16" in capabilities() else "float32"
    folder, prompts = path_of(folder), several(prompts)
    made_folder(graph_folders(folder)[0])  # what is drawn is not to be lost
    opened = Model.open(find_model(model))
    settings = BackendSettings(backend="openvino", threads=threads)
    folders, tokenizers = graph_folders(folder), load_tokenizers(opened)
    observing = ObservingEngines(opened, settings, precision, folders=folders)
    pipeline = Pipeline(observing, tokenizers)
    latents = []
    for number, prompt in enumerate(prompts):
        asked = Request(prompt=prompt, num_inference_steps=steps, seed=SEED + number)
        *_, last = pipeline.denoise(pipeline.plan(asked))
        latents.append(last.latents)
    images = [pipeline.decode(each)[0] for each in latents]
    seen = {part: observing.ranges_seen(part) for part in QUANTIZED}
    ranges = {name: ends for found in seen.values() for name, ends in found.items()}
    rounded = Pipeline(
        Engines(opened, settings, "int8", ranges=ranges, folders=folders), tokenizers
    )
    near = min(
        psnr(*map(np.asarray, (rounded.decode(each)[0], image)))
        for each, image in zip(latents, images, strict=True)
    )
    files = []
    for part, name in ranges_of(opened).items():
        kept = seen[part]
        if part == "vae_decoder" and near < DECODER_DB:
            kept = {}
        files.append(folders[0] / name)
        write_ranges(files[-1], kept)
    return Calibrated(files=tuple(files), decoder_db=near)


def main(
    arguments: Sequence[str] | None = None, prog: str = "python -m runtime.calibration"
) -> int:
    """Run the command; return its exit status.

    prog: what the usage calls it
    """
    parser = _parser(prog)
    return exit_status(lambda: _calibrate(parser.parse_args(arguments)), wording=parser.in_options)


def _parser(prog: str) -> CommandParser:
    parser = CommandParser(prog=prog, description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="as --model of `python -m runtime`")
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="to draw instead; may be given often"
    )
    parser.add_argument(
        "--steps",
        dest="num_inference_steps",
        type=int,
        default=STEPS,
        metavar="N",
        help="of each picture (default: %(default)s)",
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
    return parser


def _calibrate(options: argparse.Namespace) -> None:
    found = calibrate(
        options.model,
        prompts=options.prompt or PROMPTS,
        steps=options.num_inference_steps,
        folder=options.graphs,
        precision=options.precision,
        threads=options.threads,
    )
    for path in found.files:
        print(path)
    if found.decoder_db < DECODER_DB:
        print(
            f"in int8 the decoder's pictures come within {found.decoder_db:.1f} dB of its own, and "
            f"{DECODER_DB:.0f} are wanted: it stays in floating point",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main())
