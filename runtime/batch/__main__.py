"""`latentrt batch FILE --out FOLDER`: draw the requests of a file, and go on where it was ended."""

import argparse
import json
import secrets
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from numbers import Integral
from pathlib import Path
from typing import Any

from engine.command_line import CommandParser
from engine.errors import OutputError, RequestError, exit_status, libraries_of
from runtime.again import made_with
from runtime.batch.cluster import draw_on_cluster
from runtime.batch.drawing import Batch
from runtime.batch.lines import FORMATS
from runtime.batch.manifest import (
    MANIFEST,
    Manifest,
    check_facts,
    opened_folder,
    read_facts,
    write_facts,
)
from runtime.batch.progress import Progress
from runtime.batch.requests import ANY_SEED, Defaults
from runtime.batch.store import FolderStore
from runtime.batch.work import Work, works
from runtime.checks import check_choice, check_number
from runtime.images.files import FORMATS as PICTURES
from runtime.noise import MAX_SEED
from runtime.options import FIELDS, HIRES, add_request_options, load_arguments, marking
from runtime.output_options import MARKING_OPTIONS
from runtime.pipeline import Pipeline
from runtime.request import MAX_IMAGES
from runtime.terminal import Loading, say
from runtime.upscaler_folder import settle_upscalers

PASSED_OVER = 1  # the status where a line was no request or could not be drawn
MOST_ACTORS = 10_000
MOST_NAMED = 20  # lines that are passed over, on the terminal; the manifest has all


def main(arguments: Sequence[str] | None = None, prog: str = "latentrt batch") -> int:
    """Run the command; return its exit status.

    0, 1 where a line was passed over, 2 for a user's mistake, 130 for Ctrl-C
    """
    return exit_status(
        lambda: _run(make_parser(prog).parse_args(arguments)),
        cancelled="cancelled; what is drawn is kept, and the same command goes on",
        wording=lambda sentence: make_parser(prog).in_options(sentence),
    )


def make_parser(prog: str) -> CommandParser:
    """Return the parser; prog: what the usage calls the command."""
    parser = CommandParser(
        prog=prog,
        description="Draw the requests of a file to a folder. The options hold where a line says "
        "nothing else; ended at any moment, the same command goes on.",
    )
    parser.add_argument(
        "requests", type=Path, metavar="FILE", help=f"requests, a line each: {', '.join(FORMATS)}"
    )
    written = parser.add_argument_group("what is written")
    written.add_argument(
        "-o", "--out", type=Path, required=True, metavar="FOLDER", help="a new one, or one begun"
    )
    written.add_argument(
        "--format", default="png", metavar="NAME", help="png, jpg or webp (default: %(default)s)"
    )
    for flags, settings in MARKING_OPTIONS:
        written.add_argument(*flags, **settings)
    written.add_argument(
        "--image-dir",
        type=Path,
        metavar="FOLDER",
        help="in which lines may name pictures (default: that of FILE)",
    )
    spread = parser.add_argument_group("who draws")
    spread.add_argument(
        "--ray",
        action="store_true",
        help="draw on the Ray cluster that RAY_ADDRESS names, or on one of this machine",
    )
    spread.add_argument(
        "--actors",
        type=int,
        metavar="N",
        help="processes with a model on the cluster (default: one for each GPU, or machine)",
    )
    parser.add_argument(
        "--negative-prompt", default="", metavar="TEXT", help="what to keep away from"
    )
    add_request_options(parser)
    parser.set_defaults(hires=None, prompt=None)
    return parser


def _run(options: argparse.Namespace) -> int:
    _check(options)
    sign = marking(options)
    with ExitStack() as stack:
        stack.enter_context(opened_folder(options.out))
        found = read_facts(options.out)
        manifest = stack.enter_context(Manifest.opened(options.out)) if found else None
        folder = options.image_dir or options.requests.resolve().parent
        defaults = Defaults.of(options, _seed(options, found), folder)
        defaults.check()
        done = manifest.done if manifest else {}
        progress = _surveyed(options.requests, defaults, done)
        if progress.left:
            before = found["options"] if found else {}
            options.backend = options.backend or before.get("backend")
            options.precision = options.precision or before.get("precision")
            pipeline, made = _load(options)
            facts = _facts(options, made, pipeline)
            if found:
                check_facts(options.out, before, facts)
            else:
                write_facts(options.out, {"seed": defaults.seed, "options": facts})
        manifest = manifest or stack.enter_context(Manifest.opened(options.out))
        good = _good(works(options.requests, defaults, done), manifest)
        store = FolderStore(folder=options.out, manifest=manifest, progress=progress)
        if progress.left and options.ray:
            draw_on_cluster(good, store, options, defaults, made)
        elif progress.left:
            Batch(
                pipeline=pipeline,
                defaults=defaults,
                store=store,
                made_with=made,
                ending=f".{options.format}",
                mark=options.mark,
                sign=sign,
                watermark=options.watermark,
                batch_size=options.batch_size,
            ).draw(good)
        else:
            deque(good, 0)  # which records the bad lines
    said = f"{progress.there + progress.drawn} pictures are in {options.out}"
    if failed := progress.bad + progress.lost:
        said += f"; {failed} lines or pictures were passed over, {MANIFEST} there says why"
    print(said)
    return PASSED_OVER if failed else 0


def _check(options: argparse.Namespace) -> None:
    """Refuse what no line could be drawn with. Raises RequestError, BackendError without Ray."""
    options.format = options.format.lower()
    check_choice("--format", options.format, [ending.removeprefix(".") for ending in PICTURES])
    if options.batch_size is not None:
        check_number("--batch-size", options.batch_size, Integral, 1, MAX_IMAGES)
    if options.ray:
        with libraries_of("ray"):
            import_module("ray.data")
    if options.actors is not None:
        check_number("--actors", options.actors, Integral, 1, MOST_ACTORS)
        if not options.ray:
            raise RequestError("--actors are those of a Ray cluster; give --ray, or leave it out")
    settle_upscalers(options)
    if options.seed == ANY_SEED:
        options.seed = None
    if options.seed is not None:
        check_number("--seed", options.seed, Integral, 0, MAX_SEED)


def _seed(options: argparse.Namespace, found: Mapping[str, Any] | None) -> int:
    """Return the seed of lines without one: that of before, or one that is drawn."""
    if found is None:
        return secrets.randbelow(2**32) if options.seed is None else options.seed
    if options.seed not in (None, found["seed"]):
        raise OutputError(
            f"{options.out} was begun with --seed {found['seed']}, and now it is {options.seed}; "
            "give the same, or another folder"
        )
    seed: int = found["seed"]
    return seed


def _surveyed(path: Path, defaults: Defaults, done: Mapping[tuple[int, int], str]) -> Progress:
    """Check all lines before anything is drawn, and name the bad ones. Raises RequestError."""
    there = left = bad = 0
    for work in works(path, defaults, done):
        there, left = there + work.count - len(work.pictures), left + len(work.pictures)
        if not work.line.error:
            continue
        bad += 1
        if bad <= MOST_NAMED:
            say(f"line {work.line.number} is passed over: {work.line.error}", sys.stderr)
    if bad > MOST_NAMED:
        say(f"and {bad - MOST_NAMED} more lines", sys.stderr)
    if not there and not left:
        raise RequestError(f"{path} has no line that can be drawn")
    return Progress(there, left, bad)


def _good(work: Iterable[Work], manifest: Manifest) -> Iterator[Work]:
    """Yield what can be drawn; lines that cannot get their record."""
    for each in work:
        if each.line.error:
            manifest.add_error(each.line)
        elif each.pictures:
            yield each


def _load(options: argparse.Namespace) -> tuple[Pipeline, dict[str, Any]]:
    """Load the model; return it, and what makes its pictures again beside their requests."""
    loading = Loading(options.model)
    with loading:
        pipeline = Pipeline.load(options.model, **load_arguments(options))
        loading.note(*pipeline.notes)
    chosen = pipeline.engines
    options.backend, options.precision = chosen.settings.backend, chosen.precision
    return pipeline, made_with(options, pipeline.model_path)


def _facts(
    options: argparse.Namespace, made: Mapping[str, Any], pipeline: Pipeline
) -> dict[str, Any]:
    """Return what must stay the same in a folder, by the options' names."""
    own = {*FIELDS, *HIRES, "format", "mark"} - {"prompt", "seed", "image", "mask", "hires"}
    if not pipeline.engines.is_exact:
        own.add("batch_size")
    facts = {name: getattr(options, name) for name in own}
    facts["c2pa_cert"] = options.c2pa_cert and options.c2pa_cert.name
    facts |= {name: value for name, value in made.items() if name != "latentrt"}
    return dict(json.loads(json.dumps(facts, sort_keys=True)))


if __name__ == "__main__":
    sys.exit(main())
