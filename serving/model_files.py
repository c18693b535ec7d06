"""Whether models' files are still those that a server began with.

A file that is mapped stays what it is when another is put in its place or it is deleted, so what is
loaded is drawn with all the same. What must be opened again, after its engine died or made room,
must be the same file; and one that was written over is refused even where it is loaded.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

Files = Mapping[str, Sequence[int]]
"""Inode, size in bytes and time of change in nanoseconds, by the name in the folder; "" of a file.
"""


def list_files(path: Path) -> dict[str, list[int]]:
    """Return what tells a model's files from others; nothing of what is not there."""
    try:
        if not path.is_dir():
            return {"": _told(path)}
        found = sorted(each for each in path.rglob("*") if each.is_file())
        return {str(each.relative_to(path)): _told(each) for each in found}
    except OSError:
        return {}


def is_written_over(path: Path, before: Files) -> bool:
    """Return whether one of a model's files was changed in its place since it was listed."""
    now = list_files(path)
    return any(
        name in now and now[name][0] == told[0] and now[name] != list(told)
        for name, told in before.items()
    )


def is_same(path: Path, before: Files) -> bool:
    """Return whether a model's files are those that were listed."""
    now = list_files(path)
    return all(now.get(name) == list(told) for name, told in before.items())


def _told(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_ino, status.st_size, status.st_mtime_ns]
