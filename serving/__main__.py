"""`latentrt serve`: serve pictures until somebody ends it."""

import argparse
import os
import sys
from collections.abc import Sequence

from engine.errors import exit_status, libraries_of
from serving.configuration import parse_options
from serving.options import engine_settings, make_parser, read_keys
from serving.supervisor import ProcessEngine


def main(arguments: Sequence[str] | None = None, prog: str = "python -m serving") -> int:
    """Run the command; return its exit status: 0, 2 for a user's mistake, 130 for Ctrl-C.

    prog: what the usage calls it
    """
    parser = make_parser(prog)
    return exit_status(lambda: _serve(parser, arguments), cancelled="ended")


def _serve(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> None:
    """Start the engine, and the server while its model is loaded."""
    options = parse_options(parser, arguments, os.environ)
    keys, engine = read_keys(options), ProcessEngine(engine_settings(options))
    engine.launch()
    try:
        with libraries_of("serving"):
            from serving.server import serve

        serve(options, keys, engine)
    finally:
        engine.stop()


if __name__ == "__main__":
    sys.exit(main())
