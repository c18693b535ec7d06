"""The lines of a file of requests: JSON lines, CSV, Parquet, or a prompt on each line of a text.

Files are read piece by piece, however long they are, and may be a stranger's: a line that cannot be
read is one with an error, and the others count.
"""

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from engine.errors import BackendError, RequestError, first_line, install

__all__ = ["FORMATS", "Line", "read_lines"]

MAX_BYTES = 2**20  # of a line of text or JSON
ROWS = 1024  # of Parquet that are read at once
SEPARATORS = ",;\t"
TEXT_FIELDS = frozenset(
    ("prompt", "negative_prompt", "preset", "sampler", "schedule", "noise", "image", "mask")
) | {"inpaint_area", "hires_upscaler"}
TRUTHS = {"true": True, "false": False}  # as spreadsheets write them, in any case
UTF16 = (b"\xff\xfe", b"\xfe\xff")
BOM = b"\xef\xbb\xbf"
SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line of the file.

    number: the line where it begins, or Parquet's row, from 1
    fields: what it asks for; error: why it cannot be read, "" where it can
    """

    number: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""


def read_lines(path: Path) -> Iterator[Line]:
    """Yield the lines of a file, which its name's ending says how to read; empty ones are left out.

    Raises RequestError for a file that cannot be read at all, BackendError without pyarrow for
    Parquet.
    """
    read = FORMATS.get(path.suffix.lower())
    if read is None:
        raise RequestError(f"{path} is no file of requests; give one in {', '.join(FORMATS)}")
    if not path.is_file():
        raise RequestError(f"{path} is not a file; give a file of requests")
    try:
        yield from read(path)
    except OSError as error:
        raise RequestError(
            f"{path} cannot be read ({error.strerror or first_line(error)})"
        ) from error


def _texts(path: Path) -> Iterator[Line]:
    for number, text, error in _decoded(path):
        yield Line(number=number, fields={} if error else {"prompt": text}, error=error)


def _objects(path: Path) -> Iterator[Line]:
    for number, text, error in _decoded(path):
        if number == 1 and text.startswith("["):
            raise RequestError(f"{path} is one JSON array; give an object on each line")
        fields: Any = {}
        if not error:
            try:
                given = json.loads(text)
            except (ValueError, RecursionError) as wrong:
                error = f"it is no JSON ({first_line(wrong)})"
            else:
                fields = {"prompt": given} if isinstance(given, str) else given
                if not isinstance(fields, dict):
                    fields, error = {}, "it is neither an object nor a text"
        yield Line(number=number, fields=fields, error=error)


def _decoded(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield each line's number, its text, and why it has none."""
    with path.open("rb") as file:
        for number in count(1):
            raw = file.readline(MAX_BYTES + 1)
            if not raw:
                return
            if number == 1:
                _check_encoding(path, raw)
                raw = raw.removeprefix(BOM)
            if len(raw) > MAX_BYTES and not raw.endswith(b"\n"):
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(MAX_BYTES)
                yield number, "", f"it is longer than {MAX_BYTES} bytes"
                continue
            try:
                text = raw.decode().strip()
            except UnicodeDecodeError:
                yield number, "", "it is not written in UTF-8"
                continue
            if text:
                yield number, text, ""


def _table(path: Path) -> Iterator[Line]:
    with path.open("rb") as raw:
        _check_encoding(path, raw.readline(MAX_BYTES))
    # What is not UTF-8 becomes surrogates, so that it spoils its own line only.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        header = file.readline(MAX_BYTES)
        file.seek(0)
        rows = csv.reader(file, delimiter=max(SEPARATORS, key=header.count))
        names: list[str] = []
        while True:
            number = rows.line_num + 1
            try:
                cells = next(rows, None)
            except csv.Error as wrong:
                yield Line(number=number, error=f"it is no CSV ({wrong})")
                continue
            if cells is None:
                return
            if not any(cell.strip() for cell in cells):
                continue
            if not names:
                names = _header(path, cells)
            else:
                yield _row(number, names, cells)


def _header(path: Path, cells: Sequence[str]) -> list[str]:
    """Return the names of columns. Raises RequestError where they are none."""
    names = [cell.strip() for cell in cells]
    if "prompt" not in names or len(set(names)) < len(names):
        raise RequestError(
            f"{path} begins with the columns {', '.join(names)[:200]!r}; give each a field's name "
            "of its own, prompt among them"
        )
    return names


def _row(number: int, names: Sequence[str], cells: Sequence[str]) -> Line:
    if len(cells) > len(names):
        return Line(number=number, error=f"it has {len(cells)} cells for {len(names)} columns")
    if any(map(SURROGATES.search, cells)):
        return Line(number=number, error="it is not written in UTF-8")
    given = zip(names, cells, strict=False)
    return Line(
        number=number, fields={name: _value(name, cell) for name, cell in given if cell.strip()}
    )


def _value(name: str, cell: str) -> Any:
    """Return what a cell means: a text, or JSON where the field is none."""
    text = cell.strip()
    if name in TEXT_FIELDS:
        return text
    if text.lower() in TRUTHS:
        return TRUTHS[text.lower()]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text  # which the request refuses


def _check_encoding(path: Path, start: bytes) -> None:
    if start.startswith(UTF16):
        raise RequestError(f"{path} is written in UTF-16; save it as UTF-8")


def _parquet(path: Path) -> Iterator[Line]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise BackendError(
            f"{path} needs pyarrow, which is not installed; {install('pyarrow', 'parquet')}"
        ) from error
    number = 0
    try:
        with ParquetFile(path) as file:
            if "prompt" not in file.schema_arrow.names:
                raise RequestError(f"{path} has no column prompt")
            for batch in file.iter_batches(batch_size=ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield Line(
                        number=number,
                        fields={name: value for name, value in row.items() if value is not None},
                    )
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"{path} cannot be read as Parquet behind row {number} ({first_line(error)})"
        ) from error


FORMATS = {
    ".jsonl": _objects,
    ".ndjson": _objects,
    ".json": _objects,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
    ".txt": _texts,
}
