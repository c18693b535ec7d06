"""`python -m benchmarks prompt`: measure, print and optionally write JSON."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import prompt
from engine.cache import write_atomically
from engine.errors import LatentrtError

USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK", dest="benchmark")
    added = commands.add_parser("prompt", help="one prompt as a whole process, and its parts")
    added.add_argument("--repeats", type=int, default=7, help="(default: %(default)s)")
    added.add_argument("--out", type=Path, metavar="JSON", help="also write the figures here")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}; give 1 or more")
    text = json.dumps(prompt.measure(options.repeats), indent=2) + "\n"
    try:
        if options.out:
            write_atomically(options.out, lambda file: file.write(text.encode()))
    except LatentrtError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
