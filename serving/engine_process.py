"""The engine's process, as it is started: what it draws with it imports by itself.

Nothing of the project is imported here, so a server can start it before it imports its own.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Not `-m`, which would look in the working folder first.
START = "import sys; sys.path.insert(0, sys.argv[1]); from serving.child import main; "
START += "sys.exit(main())"
COMMAND = (sys.executable, "-P", "-c", START, str(ROOT))


def start_process(command: tuple[str, ...] = COMMAND) -> "subprocess.Popen[bytes]":
    """Start an engine's process, which waits on its input for its settings."""
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


@contextmanager
def started_process() -> Iterator["subprocess.Popen[bytes]"]:
    """Start an engine's process; where the `with` ends in an error, end it."""
    process = start_process()
    try:
        yield process
    except BaseException:
        process.kill()
        process.wait()
        for stream in filter(None, (process.stdin, process.stdout)):
            with suppress(OSError):
                stream.close()
        raise
