"""A folder of wildcards: text files, of which every line is something to choose."""

import fnmatch
from functools import cached_property, lru_cache
from pathlib import Path

from engine.errors import RequestError

__all__ = ["Wildcards"]

MAX_BYTES = 2**24  # of a file


class Wildcards:
    """The .txt files of a folder and of those in it, by their paths within it without the ending.

    Blank lines and those that begin with "#" are left out. Names match whatever their case.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise RequestError(f"{folder} is no folder; give one that holds wildcards' .txt files")
        self._folder = folder
        self._read = lru_cache(maxsize=256)(_read)

    @cached_property
    def _files(self) -> dict[str, Path]:
        paths = sorted(self._folder.rglob("*.txt"))
        return {
            path.relative_to(self._folder).with_suffix("").as_posix().lower(): path
            for path in paths
        }

    def lines(self, name: str) -> list[str]:
        """Return the lines of the file of this name, or of all that a pattern with * matches.

        Raises RequestError where a file cannot be read.
        """
        pattern = name.lower()
        named = [pattern] if "*" not in pattern else fnmatch.filter(self._files, pattern)
        return [
            line for key in named if key in self._files for line in self._read(self._files[key])
        ]


def _read(path: Path) -> tuple[str, ...]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RequestError(f"the wildcards {path.name} cannot be read ({error.strerror})") from None
    if len(data) > MAX_BYTES:
        raise RequestError(f"the wildcards {path.name} have more than {MAX_BYTES >> 20} MiB")
    lines = (line.strip() for line in data.decode("utf-8-sig", "replace").splitlines())
    return tuple(line for line in lines if line and not line.startswith("#"))
