"""`python -m benchmarks`: measure, print, write JSON; make the README's table of it."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import latency, load, overhead, prompt, quality, report
from benchmarks.scenarios import SCENARIOS
from engine.cache import write_atomically
from engine.errors import LatentrtError

EXCEEDED, USER_ERROR = 1, 2
_MEASURES = {"prompt": prompt.measure, "load": load.measure, "overhead": overhead.measure}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark; return its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if options.benchmark == "report":
            _write(report.README, report.insert(report.README.read_text(encoding="utf-8")))
            return 0
        for name in ("repeats", "threads"):
            if (number := getattr(options, name, None)) is not None and number < 1:
                parser.error(f"--{name} is {number}; give 1 or more")
        measured = _measure(options)
        text = json.dumps(measured, indent=2) + "\n"
        if options.out:
            _write(options.out, text)
        print(text, end="")
        if measured.get("exceeded"):
            print(f"error: beyond their bounds: {', '.join(measured['exceeded'])}", file=sys.stderr)
            return EXCEEDED
    except LatentrtError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    return 0


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    if options.benchmark == "latency":
        choice = latency.Choice.of(
            options.model,
            repeats=options.repeats,
            threads=options.threads,
            only=options.only,
            whole=options.whole,
        )
        return latency.measure(choice, options.out)
    if options.benchmark == "quality":
        return quality.measure(options.pictures, options.steps, options.threads)
    return _MEASURES[options.benchmark](options.repeats)


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="benchmark")
    for name, text in (
        ("prompt", "one prompt as a whole process, and its parts"),
        ("load", "from a checkpoint's file to the first step, and switching an adapter"),
        ("overhead", "what the loop itself costs a step, engines excluded"),
    ):
        added = commands.add_parser(name, help=text)
        added.add_argument("--repeats", type=int, default=7, help="(default: %(default)s)")
        added.add_argument("--out", type=Path, metavar="JSON", help="also write the figures here")
    _add_latency(commands.add_parser("latency", help="a request and its parts, beside others'"))
    _add_quality(commands.add_parser("quality", help="pictures beside those of float32"))
    commands.add_parser("report", help="make the README's table of benchmarks/results")
    return parser


def _add_latency(added: argparse.ArgumentParser) -> None:
    added.add_argument(
        "--model",
        default="pictogram",
        choices=tuple(SCENARIOS),
        help="the model that ships, in two minutes, or random weights of Stable Diffusion 1.5's "
        "size (default: %(default)s)",
    )
    added.add_argument("--repeats", type=int, default=5, help="rounds (default: %(default)s)")
    added.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="TEXT",
        help="contenders whose name holds this, and no others; may be given several times",
    )
    added.add_argument(
        "--whole", action="store_true", help="run whole requests of sd15 instead of adding up parts"
    )
    _add_threads(added)
    added.add_argument(
        "--out", type=Path, metavar="JSON", help="write the figures here, or go on with those here"
    )


def _add_quality(added: argparse.ArgumentParser) -> None:
    added.add_argument("--pictures", type=int, default=20, help="(default: %(default)s)")
    added.add_argument("--steps", type=int, default=20, help="(default: %(default)s)")
    _add_threads(added)
    added.add_argument("--out", type=Path, metavar="JSON", help="also write the figures here")


def _add_threads(added: argparse.ArgumentParser) -> None:
    added.add_argument(
        "--threads", type=int, help="of a contender (default: one for each processor core)"
    )


if __name__ == "__main__":
    sys.exit(main())
