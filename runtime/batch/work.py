"""What there is to do: the lines of a file, checked, less the pictures that are there."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from engine.errors import LatentrtError, OutputError
from runtime.batch.lines import Line, read_lines
from runtime.batch.requests import Defaults, digest

__all__ = ["Work", "works"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A line, and what of it is to be drawn.

    line: with an error where it is no request
    pictures: the indices of those that are not there; count: how many it asks for
    digest: of the line's fields
    """

    line: Line
    pictures: Sequence[int] = ()
    count: int = 0
    digest: str = ""


def works(path: Path, defaults: Defaults, done: Mapping[tuple[int, int], str]) -> Iterator[Work]:
    """Yield every line's work.

    done: as `Manifest.done` has it
    Raises RequestError or BackendError for a file that cannot be read, OutputError where a line is
    another request than the one that was drawn.
    """
    for line in read_lines(path):
        if line.error:
            yield Work(line=line)
            continue
        try:
            mark = digest(line.fields)
            request = defaults.request(line, with_pictures=False)
        except LatentrtError as error:
            yield Work(line=replace(line, error=str(error)))
            continue
        count = len(request.seeds or ())
        drawn = [done.get((line.number, index)) for index in range(count)]
        if any(before not in (None, mark) for before in drawn):
            raise OutputError(
                f"line {line.number} of {path} is another request than the one that was drawn; "
                "give another folder, or put new requests behind the others"
            )
        left = [index for index, before in enumerate(drawn) if before is None]
        yield Work(line=line, pictures=left, count=count, digest=mark)
