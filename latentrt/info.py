"""`latentrt info FILE`: what a checkpoint, an adapter, a textual inversion or a picture is."""

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine.command_line import CommandParser
from engine.errors import RequestError, exit_status
from export.info import as_table, describe
from runtime.images.files import FORMATS, is_image
from runtime.images.info import describe_image


def main(arguments: Sequence[str] | None = None, prog: str = "latentrt info") -> int:
    """Run the command; return its exit status: 0, or 2 for a user's mistake."""
    return exit_status(lambda: _tell(arguments, prog))


def _tell(arguments: Sequence[str] | None, prog: str) -> None:
    parser = CommandParser(
        prog=prog,
        description="Say what a checkpoint, an adapter, a textual inversion or a picture is.",
    )
    parser.add_argument("file", metavar="FILE", help="or a model's folder, or one that ships")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    facts = find_facts(options.file)
    print(json.dumps(facts, indent=2) if options.json else as_table(facts))


def find_facts(file: str) -> dict[str, Any]:
    """Return what a file is, as values of JSON, `kind` first.

    Raises ModelError or RequestError when it is nothing that is known here, or damaged.
    """
    path = Path(file)
    with suppress(OSError):  # a name longer than the system allows
        if path.is_file() and is_image(path):
            return describe_image(path)
        if path.suffix.lower() in FORMATS and not path.exists():
            raise RequestError(f"the picture {file} does not exist")
    return describe(file)


if __name__ == "__main__":
    sys.exit(main())
