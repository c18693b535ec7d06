"""A server whose engine draws nothing: what is left is what HTTP and the two processes cost."""

import sys
from pathlib import Path

from benchmarks.serving.simulation import SimulatedRunner
from serving.child import main as child
from serving.options import engine_settings, make_parser
from serving.server import serve
from serving.supervisor import ProcessEngine

START = "import sys; sys.path.insert(0, sys.argv[1]); "
START += "from benchmarks.serving.fake_engine import draw; draw()"
COMMAND = (sys.executable, "-P", "-c", START, str(Path(__file__).parents[2]))


def draw() -> None:
    """Be the engine's process."""
    sys.exit(
        child(lambda settings: SimulatedRunner(curve=lambda rows: 0.0, work=lambda seconds: None))
    )


def main() -> None:
    """Serve with the options of `latentrt serve`."""
    options = make_parser("fake_engine").parse_args()
    serve(options, None, ProcessEngine(engine_settings(options), command=COMMAND))


if __name__ == "__main__":
    main()
