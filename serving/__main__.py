"""`latentrt serve`: serve pictures until somebody ends it."""

import os
import sys
from collections.abc import Sequence
from functools import partial

from engine.errors import exit_status, libraries_of
from serving.engine_process import started_process


def main(arguments: Sequence[str] | None = None, prog: str = "python -m serving") -> int:
    """Run the command; return its exit status: 0, 2 for a user's mistake, 130 for Ctrl-C.

    prog: what the usage calls it
    """
    return exit_status(
        lambda: _serve(arguments, prog), cancelled="ended", wording=partial(_in_options, prog)
    )


def _in_options(prog: str, sentence: str) -> str:
    from serving.options import make_parser  # after the engine's process is started

    return make_parser(prog).in_options(sentence)


def _serve(arguments: Sequence[str] | None, prog: str) -> None:
    """Start the engine, and the server while its model is loaded.

    The engine's process imports its libraries while this one imports others, so it is the first
    thing that is started.
    """
    with started_process() as process:
        from serving.configuration import parse_options
        from serving.options import engine_settings, make_parser, read_cards, read_keys

        options = parse_options(make_parser(prog), arguments, os.environ)
        keys, settings = read_keys(options), engine_settings(options)
        from serving.engine_group import make_engine

        engine = make_engine(settings, read_cards(options), process)
        engine.launch()
        try:
            with libraries_of("serving"):
                from serving.server import serve

            serve(options, keys, engine)
        finally:
            engine.stop()


if __name__ == "__main__":
    sys.exit(main())
