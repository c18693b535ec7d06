"""How many rows a call may have: what fits into memory, and what one more row gains.

What a call takes is noted while pictures are drawn, so nothing is measured beforehand. A form of
call (a model, its sides, tokens and groups) is given one more rung of `LADDER` as long as a row
more raises the rows a second by `GAIN`. The times are kept in a file, from which the next process
goes on.
"""

import json
import statistics
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Any, Literal, Protocol

from engine.errors import OutputError, RequestError
from engine.store.cache import write_atomically

ROWS = 8  # at least, where an early first step matters more than an early end
LADDER = (1, 2, 3, 4, 6, 8, 12, 16)
GAIN = 0.01  # of rows a second, that a row more must bring
SAMPLES = 5  # of a call's time; their median counts
FORMS = 256  # that are remembered, those last used
Aim = Literal["preview", "capacity"]
LEAST: Mapping[Aim, int] = {"preview": ROWS, "capacity": 1}


class Call(Protocol):
    """What is asked of a row before a call."""

    @property
    def form(self) -> str:
        """What calls of an equal number of rows have in common, in every process."""
        ...

    def fitting_rows(self) -> int:
        """Return how many rows of this form fit into what memory is free."""
        ...


class RowLimits:
    """Limits by form.

    rows: "preview" allows `ROWS` at least, "capacity" what gains, and a number so many
    path: of the file where times are kept; None keeps none
    ladder: numbers of rows that are tried, those that a call is made for
    """

    def __init__(
        self,
        rows: int | Aim = ROWS,
        path: Path | None = None,
        ladder: Sequence[int] = LADDER,
    ) -> None:
        self._ladder = ladder
        self.rows = rows
        self._least = rows if isinstance(rows, int) else LEAST[rows]
        self._path = path
        self._times: OrderedDict[str, dict[int, list[float]]] = OrderedDict()
        self._fitting: dict[str, int] = {}
        self._changed = False
        self._lock = Lock()
        if path is not None:
            self._times.update(_read(path))

    @property
    def largest(self) -> int:
        """The most rows that a call of any form may have."""
        with self._lock:
            return max(map(self._limit, self._fitting), default=self._least)

    def limit(self, call: Call) -> int:
        """Return how many rows a call of this form may have."""
        form = call.form
        with self._lock:
            if form not in self._fitting:
                self._fitting[form] = max(call.fitting_rows(), 1)
            self._use(form)
            return self._limit(form)

    def took(self, form: str, rows: int, seconds: float) -> None:
        """Note the time of a call."""
        if isinstance(self.rows, int) or rows not in self._ladder:
            return
        with self._lock:
            times = self._times.setdefault(form, {}).setdefault(rows, [])
            if len(times) < SAMPLES:
                times.append(seconds)
                self._changed = self._changed or len(times) == SAMPLES

    def too_many(self, form: str, rows: int) -> None:
        """Note that so many rows failed whose halves did not, which are as many as may be then."""
        with self._lock:
            self._fitting[form] = min(self._fitting.get(form, rows), (rows + 1) // 2)

    def save(self) -> bool:
        """Keep the times, if there are new ones; return whether there were. Waits for the disk."""
        with self._lock:
            if self._path is None or not self._changed:
                return False
            self._changed = False
            text = json.dumps({form: dict(times) for form, times in self._times.items()})
        with suppress(OutputError, OSError):  # the next process measures again
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, lambda file: file.write(text.encode()))
        return True

    def _limit(self, form: str) -> int:
        wanted = self.rows if isinstance(self.rows, int) else self._by_gain(form)
        return min(wanted, self._fitting[form])

    def _by_gain(self, form: str) -> int:
        times = self._times.get(form, {})
        medians = {
            rows: statistics.median(taken) for rows, taken in times.items() if len(taken) == SAMPLES
        }
        return max(gaining_rows(medians, self._ladder), self._least)

    def _use(self, form: str) -> None:
        """Make a form the last used, and forget the first where there are too many."""
        self._times.setdefault(form, {})
        self._times.move_to_end(form)
        while len(self._times) > FORMS:
            oldest, _ = self._times.popitem(last=False)
            self._fitting.pop(oldest, None)


def gaining_rows(seconds: Mapping[int, float], ladder: Sequence[int] = LADDER) -> int:
    """Return the rung to which rows gain, or the first whose time is not known.

    seconds: of a call, by its rows
    """
    for below, above in pairwise(ladder):
        if below not in seconds:
            return below
        if above not in seconds:
            return above
        if (above / seconds[above]) / (below / seconds[below]) < (1 + GAIN) ** (above - below):
            return below
    return ladder[-1]


def parse_rows(text: str) -> int | Aim:
    """Read a number of rows or an aim. Raises RequestError."""
    for aim in LEAST:
        if text == aim:
            return aim
    if text.isascii() and text.isdecimal() and int(text) >= 1:
        return int(text)
    raise RequestError(f"--rows is {text}; give {', '.join(LEAST)} or a number from 1")


def _read(path: Path) -> dict[str, dict[int, list[float]]]:
    """Read kept times; a file that is none of ours counts as none."""
    try:
        given = json.loads(path.read_bytes())
        return {
            str(form): {int(rows): _seconds(taken) for rows, taken in times.items()}
            for form, times in list(given.items())[-FORMS:]
        }
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _seconds(taken: Iterable[Any]) -> list[float]:
    found = [float(value) for value in taken][:SAMPLES]
    if not all(0 < value < float("inf") for value in found):
        raise ValueError("no times")
    return found
