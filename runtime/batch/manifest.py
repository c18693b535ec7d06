"""What a folder of a batch keeps beside its pictures, so that the same command goes on.

`batch.json` says with what the pictures are drawn, `manifest.jsonl` what came of every line, one
record a picture. A picture's file is whole on the disk before its record is written: a kill between
the two has the picture drawn and put in its place again, with the same bytes.
"""

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import Any, Self

from engine.errors import OutputError, RequestError
from engine.store.cache import write_atomically
from engine.store.file_lock import locked
from runtime.batch.lines import Line
from runtime.batch.requests import digest

__all__ = ["MANIFEST", "Manifest", "check_facts", "opened_folder", "read_facts", "write_facts"]

FACTS, MANIFEST, LOCK = "batch.json", "manifest.jsonl", ".lock"
TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp")  # of `write_atomically`, whose process was killed


@contextmanager
def opened_folder(folder: Path) -> Iterator[None]:
    """Make a folder for a batch, or take one that was begun; no other process may have it then.

    Raises OutputError, also for a folder that holds anything else.
    """
    try:
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / LOCK, wait=False) as mine:
            if not mine:
                raise OutputError(f"another process draws into {folder}; wait until it has ended")
            try:
                _tidy(folder)
                yield
            finally:
                if not (folder / FACTS).exists():  # nothing was begun
                    with suppress(OSError):
                        (folder / LOCK).unlink()
                        if is_new:
                            folder.rmdir()
    except OutputError:
        raise
    except OSError as error:
        if error.filename and not Path(str(error.filename)).is_relative_to(folder):
            raise  # of another file, such as the requests'
        raise OutputError(
            f"{folder} cannot be written ({error.strerror or error}); check the permissions and "
            "the disk's space, or choose another folder"
        ) from error


def _tidy(folder: Path) -> None:
    """Remove what a kill left half written; refuses a folder of anything else: OutputError."""
    names = {entry.name for entry in os.scandir(folder)} - {LOCK}
    if names and FACTS not in names:
        raise OutputError(
            f"{folder} holds {min(names)[:100]!r} and was not begun by this command; give an empty "
            "folder or a new one"
        )
    for name in filter(TEMPORARY.fullmatch, names):
        (folder / name).unlink(missing_ok=True)


def read_facts(folder: Path) -> dict[str, Any] | None:
    """Return with what a folder's pictures are drawn, None where none was begun.

    Raises OutputError for a file that cannot be read.
    """
    path = folder / FACTS
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise OutputError(f"{path} cannot be read ({error}); give another folder") from error
    if (
        not isinstance(found, dict)
        or not isinstance(found.get("seed"), int)
        or not isinstance(found.get("options"), dict)
    ):
        raise OutputError(f"{path} is not what this command writes; give another folder")
    return found


def check_facts(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with other options than a folder was begun with. Raises OutputError."""
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            raise OutputError(
                f"{folder} was begun with {name} {before.get(name)!r}, and now it is "
                f"{now.get(name)!r}; give the same options, or another folder"
            )


class Manifest:
    """The records of a folder, which are added to.

    done: the digest of the line's fields by the line and the index of a picture that is there
    """

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self.done: dict[tuple[int, int], str] = {}
        self._errors: set[tuple[int, int | None, str]] = set()
        self._lock = Lock()

    @classmethod
    @contextmanager
    def opened(cls, folder: Path) -> Iterator[Self]:
        """Read a folder's records, of those whose files are there; what a kill cut off goes.

        Raises OSError.
        """
        path, whole = folder / MANIFEST, 0
        with path.open("ab", buffering=0) as file, path.open("rb") as before:
            files = {entry.name for entry in os.scandir(folder)}
            manifest = cls(file)
            for raw in before:
                if not raw.endswith(b"\n"):
                    file.truncate(whole)
                    break
                whole += len(raw)
                manifest._read(raw, files)
            yield manifest

    def _read(self, raw: bytes, files: set[str]) -> None:
        with suppress(ValueError, KeyError, TypeError, RecursionError):  # a disk's zeros
            record = json.loads(raw)
            if record["error"] is not None:
                self._errors.add((record["line"], record["picture"], record["error"]))
            elif record["file"] in files:
                self.done[record["line"], record["picture"]] = record["digest"]

    def add(self, record: Mapping[str, Any]) -> None:
        """Add a picture's record, on the disk when this returns; on any thread. Raises OSError."""
        # A lone surrogate becomes JSON's escape of it.
        text = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        with self._lock:
            before = os.fstat(self._file.fileno()).st_size
            if self._file.write(text) < len(text):
                self._file.truncate(before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())

    def add_error(self, line: Line, picture: int | None = None) -> None:
        """Add why a line, or a picture of it, was passed over, unless that is there."""
        if (line.number, picture, line.error) not in self._errors:
            self._errors.add((line.number, picture, line.error))
            try:
                request = line.fields if digest(line.fields) else None
            except RequestError:
                request = None  # holds what JSON cannot
            nothing = dict.fromkeys(("digest", "seed", "file", "hash", "seconds"))
            record = {"line": line.number, "picture": picture, "request": request, **nothing}
            self.add({**record, "error": line.error})


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write with what a folder's pictures are drawn. Raises OutputError."""
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / FACTS, lambda file: file.write(text.encode()))
