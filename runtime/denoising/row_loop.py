"""Rows from their first call to their last: which share the next, and which are begun when."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Protocol

from engine.errors import LatentrtError
from runtime.denoising.rows import Row, Start

__all__ = ["StepRows", "finished_rows"]

Failed = Callable[[Row, LatentrtError], None]
"""Is told of a row that cannot be drawn, and why."""


class StepRows(Protocol):
    """As `AdaptedModel.step_rows`: makes the next call of rows of one bucket together."""

    def __call__(self, rows: Sequence[Row], *, filled_to: int = 0) -> None:
        """Make it; filled_to: rows that the call has at least. Raises BackendError."""
        ...


def finished_rows(
    rows: Iterable[Row],
    step: StepRows,
    start: Start,
    limit: Callable[[Row], int],
    *,
    is_exact: bool,
    most_begun: int | None = None,
    failed: Failed | None = None,
) -> Iterator[Row]:
    """Make all calls of rows, the oldest's bucket first; yields each row as it is done.

    A row is taken and begun when there is room for it beside the oldest.
    step: makes their calls
    limit: returns how many rows a call of this one's bucket may have; where they are not exact,
        repeats fill every call up to it
    most_begun: rows that may be on their way at once, None for any number
    failed: is told of a row that cannot be begun, or whose call fails even without others, and the
        rest goes on; None raises what it raises, such as BackendError
    """
    waiting, begun, has_more = iter(rows), list[Row](), True
    while has_more or begun:
        while has_more and _has_room(begun, limit, most_begun):
            row = next(waiting, None)
            has_more = row is not None
            if row is not None and _is_entered(row, start, failed):
                begun.append(row)
        if not begun:
            continue
        oldest = begun[0]
        alone = is_exact and oldest.is_sensitive
        together = [oldest] if alone else [r for r in begun if r.bucket == oldest.bucket]
        most = limit(oldest)
        lost = _step(together[:most], partial(step, filled_to=0 if is_exact else most), failed)
        begun = [row for row in begun if row not in lost]
        for row in [row for row in begun if row.is_done]:
            begun.remove(row)
            yield row
        begun = [row for row in begun if not row.run_is_over or _is_entered(row, start, failed)]


def _has_room(begun: Sequence[Row], limit: Callable[[Row], int], most_begun: int | None) -> bool:
    """Tell whether another row may be begun, which could share the oldest's next call."""
    if not begun:
        return True
    beside = sum(row.bucket == begun[0].bucket for row in begun)
    return beside < limit(begun[0]) and (most_begun is None or len(begun) < most_begun)


def _is_entered(row: Row, start: Start, failed: Failed | None) -> bool:
    """Begin a row's next run; tells whether that was done."""
    try:
        row.enter(start)
    except LatentrtError as error:
        if failed is None:
            raise
        failed(row, error)
        return False
    return True


def _step(
    rows: Sequence[Row], step: Callable[[Sequence[Row]], None], failed: Failed | None
) -> list[Row]:
    """Make the next call of rows, of its halves where it fails; returns those that are lost."""
    try:
        step(rows)
    except LatentrtError as error:
        if failed is None:
            raise
        if len(rows) == 1:
            failed(rows[0], error)
            return list(rows)
        half = (len(rows) + 1) // 2
        return [row for part in (rows[:half], rows[half:]) for row in _step(part, step, failed)]
    return []
