"""A folder of wildcards: text files, of which every line is something to choose."""

import codecs
import fnmatch
from functools import cached_property, lru_cache
from pathlib import Path

from engine.errors import RequestError, nearest
from engine.store.cache import is_readable_folder

__all__ = ["Wildcards"]

MAX_BYTES = 2**24  # of a file
MOST_NAMED = 3  # files in a sentence
WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Wildcards:
    """The .txt files of a folder and of those in it, by their paths within it without the ending.

    Files are UTF-8, or UTF-16 with its mark, as Windows' editor writes it. Blank lines and those
    that begin with "#" are left out. Names match whatever their case.
    """

    def __init__(self, folder: Path) -> None:
        if not is_readable_folder(folder):
            raise RequestError(
                f"{folder} is no folder that can be read; give one that holds wildcards' .txt files"
            )
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
        return [line for key in self._named(name) for line in self._read(self._files[key])]

    def why_none(self, name: str) -> str:
        """Say why there are no lines of this name."""
        if named := self._named(name):
            files = ", ".join(f"{key}.txt" for key in named[:MOST_NAMED])
            return f"there is no line to choose in {files}; write one choice a line, without #"
        near = nearest(name, self._files)
        hint = f"; did you mean __{near}__?" if near else ", which --wildcard-dir names"
        return f"there is no {name}.txt in the folder {self._folder.name}{hint}"

    def _named(self, name: str) -> list[str]:
        """Return the keys of the files that a name or a pattern stands for."""
        pattern = name.lower()
        named = fnmatch.filter(self._files, pattern) if "*" in pattern else [pattern]
        return [key for key in named if key in self._files]


def _read(path: Path) -> tuple[str, ...]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RequestError(f"the wildcards {path.name} cannot be read ({error.strerror})") from None
    if len(data) > MAX_BYTES:
        raise RequestError(f"the wildcards {path.name} have more than {MAX_BYTES >> 20} MiB")
    lines = (line.strip() for line in _decoded(data).splitlines())
    return tuple(line for line in lines if line and not line.startswith("#"))


def _decoded(data: bytes) -> str:
    """Return a file's text: UTF-16 or UTF-8, else what Windows' editors wrote before these."""
    if data.startswith(WIDE):
        return data.decode("utf-16", "replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")
