"""`python -m benchmarks`: measure, print, write JSON; make the README's table of it."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import load, overhead, prompt, report
from engine.cache import write_atomically
from engine.errors import LatentrtError

USER_ERROR = 2
_MEASURES = {"prompt": prompt.measure, "load": load.measure, "overhead": overhead.measure}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark; return its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if options.benchmark == "report":
            _write(report.README, report.insert(report.README.read_text(encoding="utf-8")))
            return 0
        if options.repeats < 1:
            parser.error(f"--repeats is {options.repeats}; give 1 or more")
        measured = _MEASURES[options.benchmark](options.repeats)
        text = json.dumps(measured, indent=2) + "\n"
        if options.out:
            _write(options.out, text)
        print(text, end="")
    except LatentrtError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    return 0


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
    commands.add_parser("report", help="make the README's table of benchmarks/results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
