"""Locks between processes, which the system releases when a process ends, however it ends.

A lock file says that somebody makes or removes a thing; it may itself be removed by whoever holds
it. A file that is held stays where it is until it is let go of.
"""

import atexit
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_held: dict[Path, BinaryIO] = {}


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Lock a file, which is made; yields whether that was done, which is always so with `wait`.

    Raises OSError where the folder is missing or cannot be written.
    """
    while True:
        with path.open("ab") as file:
            if not _lock(file.fileno(), wait):
                yield False
                return
            if not _is_at(file, path):  # it was removed meanwhile: another is the lock now
                continue
            yield True
            return


def remove_lock(path: Path) -> None:
    """Remove a lock file that nobody holds."""
    with suppress(OSError):
        with locked(path, wait=False) as mine:
            if mine and sys.platform != "win32":
                path.unlink()
        if sys.platform == "win32":  # it must be closed first, and stays if another has it open
            path.unlink()


def hold(path: Path) -> bool:
    """Keep a file from `remove_unheld` of any process; returns whether it is there.

    It is held until `release`, or until this process ends.
    """
    if path in _held and _is_at(_held[path], path):
        return True
    release(path)
    try:
        file = path.open("rb")
    except OSError:
        return False
    with suppress(OSError):  # a file system without locks
        _share(file.fileno())
    if not _is_at(file, path):
        file.close()
        return False
    if not _held:
        atexit.register(_release_all)
    _held[path] = file
    return True


def release(path: Path) -> None:
    """Let go of a file that `hold` holds."""
    if file := _held.pop(path, None):
        file.close()


def _release_all() -> None:
    for path in [*_held]:
        release(path)


def _is_at(file: BinaryIO, path: Path) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int, wait: bool) -> bool:
        while True:
            try:
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
                return True
            except PermissionError:  # another process holds it
                if not wait:
                    return False
                time.sleep(0.05)

    def _share(descriptor: int) -> None:
        """Do nothing: Windows removes no file that is open."""

    def remove_unheld(path: Path) -> bool:
        """Remove a file unless a process holds it; returns whether it is gone."""
        with suppress(OSError):
            path.unlink(missing_ok=True)
            return True
        return False

else:
    import fcntl

    def _lock(descriptor: int, wait: bool) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return True
        except BlockingIOError:
            return False

    def _share(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_SH)

    def remove_unheld(path: Path) -> bool:
        """Remove a file unless a process holds it; returns whether it is gone."""
        try:
            with path.open("r+b") as file:  # NFS locks only what may be written
                if not _lock(file.fileno(), wait=False):
                    return False
                path.unlink(missing_ok=True)
                return True
        except FileNotFoundError:
            return True
        except OSError:
            return False
