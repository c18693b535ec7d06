"""How far a batch is: pictures, their rate, and the time that is left."""

import sys
import time
from collections.abc import Callable
from threading import Lock

from runtime.batch.lines import Line
from runtime.terminal import say, show_bar

__all__ = ["Progress", "duration", "rate"]

EVERY = 60.0  # seconds between lines where there is no terminal
MINUTE, HOUR = 60, 3600  # seconds


class Progress:
    """A bar on a terminal, a line a minute elsewhere; may be told by several threads.

    there: pictures of earlier runs; left: those to be drawn
    bad: lines that are no requests; clock: in seconds
    """

    def __init__(
        self, there: int, left: int, bad: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.there, self.left, self.bad = there, left, bad
        self.drawn = self.lost = 0
        self._clock = clock
        self._began = self._said = clock()
        self._lock = Lock()

    def drew(self) -> None:
        """Count a picture."""
        with self._lock:
            self.drawn += 1
            self._show()

    def lose(self, line: Line, pictures: int) -> None:
        """Count pictures that cannot be drawn, and say why."""
        with self._lock:
            self.lost += pictures
            if sys.stderr is not None and sys.stderr.isatty():
                say("\r\x1b[2K", sys.stderr, end="")
            say(f"line {line.number} is passed over: {line.error}", sys.stderr)
            self._show()

    def _show(self) -> None:
        now = self._clock()
        over, total = self.there + self.drawn + self.lost, self.there + self.left
        text = f" {over}/{total} pictures"
        if self.drawn and now > self._began:
            a_second = self.drawn / (now - self._began)
            text += f", {rate(a_second)}"
            if over < total:
                text += f", {duration((total - over) / a_second)} left"
        if not show_bar(text, over, total) and now - self._said >= EVERY:
            self._said = now
            say(text.strip(), sys.stderr)


def rate(a_second: float) -> str:
    """Write a rate of pictures, by the second, the minute or the hour."""
    for seconds, name in ((1, "a second"), (MINUTE, "a minute")):
        if a_second * seconds >= 1:
            return f"{a_second * seconds:.1f} {name}"
    return f"{a_second * HOUR:.1f} an hour"


def duration(seconds: float) -> str:
    """Write a time in two of its units at most."""
    if round(seconds) < MINUTE:
        return f"{seconds:.0f} s"
    minutes = round(seconds / MINUTE)
    if minutes < MINUTE:
        return f"{minutes} min"
    return f"{minutes // MINUTE} h {minutes % MINUTE:02} min"
