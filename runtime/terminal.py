"""What a command says on a terminal: lines, a sign of life while a model loads, a bar of steps.

Where nobody reads any more, or there is no terminal at all, what is said is lost and nothing else.
"""

import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TextIO

__all__ = ["Loading", "say", "show_bar", "show_progress"]

BAR_WIDTH, BAR_COLUMNS = 30, 80
SIGNS = (0.5, 8.0)  # seconds between signs of life on a terminal, and before one in a pipe


def say(text: str, stream: TextIO | None, end: str = "\n") -> None:
    """Print a line at once; where nobody reads any more, nothing is lost but what is said."""
    if stream is None:  # a windowed app has none
        return
    try:
        print(text, end=end, file=stream, flush=True)
    except (OSError, ValueError):
        with suppress(OSError, ValueError), Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())  # the last flush, at the end, would fail too


class Loading:
    """A sign of life while a model loads: a line that counts on a terminal, else one late note."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._shown = False
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._count, daemon=True)

    def __enter__(self) -> None:
        """Begin to count."""
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        """Erase the line."""
        self._over.set()
        self._thread.join()
        self._erase()

    def note(self, *notes: str) -> None:
        """Print notes, not into the line that counts."""
        with self._lock:
            for note in notes:
                self._erase()
                say(f"note: {note}", sys.stderr)

    def _count(self) -> None:
        if sys.stderr is None:
            return
        began, shows = time.monotonic(), sys.stderr.isatty()
        while not self._over.wait(SIGNS[not shows]):
            with self._lock:
                seconds = time.monotonic() - began
                if not shows:
                    say(f"note: loading {self._model}", sys.stderr)
                    return
                say(f"\rloading {self._model[-40:]}: {seconds:.0f} s", sys.stderr, end="")
                self._shown = True

    def _erase(self) -> None:
        if self._shown:
            say("\r\x1b[2K", sys.stderr, end="")
            self._shown = False


def show_progress(step: int, total: int, noun: str = "step") -> None:
    """Draw a bar on a terminal, within one line of it; elsewhere stay quiet.

    noun: what is counted
    """
    show_bar(f" {noun} {step}/{total}", step, total)


def show_bar(text: str, done: int, total: int) -> bool:
    """Draw a bar with a text behind it on a terminal; tells whether there is one."""
    terminal = sys.stderr
    if terminal is None or terminal.closed or not terminal.isatty():
        return False
    columns = BAR_COLUMNS
    with suppress(OSError, ValueError):  # it may not say, or say 0
        columns = os.get_terminal_size(terminal.fileno()).columns or columns
    width = max(0, min(BAR_WIDTH, columns - 1 - len(text)))
    full = width * done // total
    bar = "█" * full + "░" * (width - full)
    try:
        bar.encode(terminal.encoding or "ascii")
    except UnicodeEncodeError:
        bar = "#" * full + "." * (width - full)
    line = f"\r{bar}{text}"[:columns]
    say(line, terminal, end="\n" if done == total else "")
    return True
