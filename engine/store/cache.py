"""Files that are made once for a content, and files that are written whole or not at all.

An entry of the cache is one file, `<key>.<SHA-256 of its bytes><suffix>`: a single rename makes it
seen, and its name tells whether it is whole.
"""

import hashlib
import json
import os
import secrets
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import BinaryIO

from engine.errors import LatentrtError, OutputError
from engine.store.file_lock import locked

__all__ = [
    *("Cache", "cache_folder", "check_writable", "fingerprint", "is_intact"),
    *("is_readable_folder", "made_folder", "write_atomically", "write_new"),
]

PIECE = 2**16  # bytes
WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt")


def cache_folder() -> Path:
    """Name the user's cache folder: LATENTRT_CACHE, or where the system keeps caches.

    Nothing is made. Raises OutputError when there is neither the variable nor a home folder, or
    when it is closed to us.
    """
    try:
        if chosen := os.environ.get("LATENTRT_CACHE"):
            return _open_to_us(Path(chosen).expanduser())
        if sys.platform == "win32":
            local = os.environ.get("LOCALAPPDATA")
            base = Path(local) if local else Path.home() / "AppData" / "Local"
        elif sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        else:
            base = Path(os.environ.get("XDG_CACHE_HOME", ""))
            if not base.is_absolute():  # to be ignored, says the XDG specification
                base = Path.home() / ".cache"
    except RuntimeError as error:
        raise OutputError(
            f"no cache folder is known ({error}); set LATENTRT_CACHE to a folder"
        ) from error
    return _open_to_us(base / "latentrt")


def _open_to_us(folder: Path) -> Path:
    """Return a folder, there or not, in which files can be looked for. Raises OutputError."""
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.stat(os.path.join(folder, os.curdir))  # noqa: PTH116, PTH118 - a Path drops the dot
    except (OSError, ValueError) as error:
        raise OutputError(
            f"the cache folder {folder} cannot be used ({getattr(error, 'strerror', error)}); set "
            "LATENTRT_CACHE to another"
        ) from error
    return folder


@dataclass(frozen=True, slots=True)
class Cache:
    """A folder of files, each made once for a content and checked whenever it is taken out.

    Processes may share it. Whoever is killed leaves a temporary file, which is never taken for an
    entry and goes when its key is put again, and an empty lock file for each key.
    """

    folder: Path

    @staticmethod
    def key(**facts: object) -> str:
        """Hash all that can change a thing: 64 hexadecimal digits, the SHA-256 of its facts.

        facts: JSON's values; raises TypeError or ValueError for others (paths, arrays, NaN).
        """
        text = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def get(self, key: str) -> Path | None:
        """Find an entry, or None; what is damaged is removed and never returned."""
        entries = self._entries(key)
        intact = next((entry for entry in entries if is_intact(entry, key)), None)
        if entries and not intact:
            with suppress(OutputError), self.lock(key):  # unless the folder may only be read
                return self.take(key)
        return intact

    def put(self, key: str, write: Callable[[Path], object], suffix: str = "") -> Path:
        """Make an entry, unless it is there; of several processes one makes it, the others wait.

        write: makes the file at the path it is given, whose name ends with `suffix`.
        Raises OutputError when that cannot be done, and what `write` raises except OSError.
        """
        with self.lock(key):
            return self.take(key) or self.make(key, write, suffix)

    def get_or_build(self, key: str, write: Callable[[Path], object], suffix: str = "") -> Path:
        """Find an entry, or make it as `put` does."""
        return self.get(key) or self.put(key, write, suffix)

    def take(self, key: str) -> Path | None:
        """Find an intact entry and remove the others; only with the key's lock."""
        for entry in self._entries(key):
            if is_intact(entry, key):
                return entry
            _remove(entry)
        return None

    def make(self, key: str, write: Callable[[Path], object], suffix: str) -> Path:
        """Write beside, to the disk, then rename; only with the key's lock."""
        for leftover in self.folder.glob(f".{key}.*"):
            _remove(leftover)
        temporary = self.folder / f".{key}.{secrets.token_hex(4)}{suffix}"
        try:
            write(temporary)
            with temporary.open("r+b") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
            return temporary.replace(self.folder / f"{key}.{digest}{suffix}")
        finally:
            _remove(temporary)

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold a key's lock, and say of any OSError meanwhile what can be done about it."""
        with _output_errors(f"the cache folder {self.folder}", "set LATENTRT_CACHE"):
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(self.lock_path(key)):
                yield

    def lock_path(self, key: str) -> Path:
        """Name the file that a key is locked with."""
        return self.folder / f".lock-{key}"

    def _entries(self, key: str) -> list[Path]:
        return sorted(self.folder.glob(f"{key}.*"))


def check_writable(path: Path, *, replaces: bool = True) -> None:
    """Refuse a path that no file could be written to, before any work is done for it.

    replaces: whether in the place of a file that is there, or beside it
    Raises OutputError.
    """
    try:
        target, is_folder = path.resolve(), path.is_dir()
        folder = target.parent
        found, writable = folder.is_dir(), os.access(folder, os.W_OK)
        is_kept = replaces and _is_kept(target)
    except (OSError, RuntimeError, ValueError) as error:  # too long, closed to us, a loop of links
        why = getattr(error, "strerror", None) or error
        raise OutputError(
            f"{str(path)!r} cannot be written ({why}); choose another path"
        ) from error
    if not found:
        raise OutputError(f"the folder {path.parent} does not exist; make it first")
    if is_folder:
        raise OutputError(f"{path} is a folder; give the name of a file")
    if not writable:
        raise OutputError(f"the folder {folder} may not be written to; choose another")
    if is_kept:
        raise OutputError(f"{path} is another user's and may not be replaced; choose another name")


def is_readable_folder(folder: Path) -> bool:
    """Tell whether a folder is there and what it holds may be read."""
    return os.path.isdir(folder) and os.access(folder, os.R_OK | os.X_OK)  # noqa: PTH112 - raises not


def made_folder(folder: Path) -> Path:
    """Make a folder that files are to be written to, before any work is done for them.

    Raises OutputError where that cannot be.
    """
    with _output_errors(f"the folder {folder}", "choose another"):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise OutputError(f"the folder {folder} may not be written to; choose another")
    return folder


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that at any moment there is the old one or the whole new one.

    Raises OutputError when it cannot be written, and what `write` raises except OSError; then the
    old file, if there was one, stays as it was, and nothing is left beside it.
    """
    with _output_errors(str(path), "choose another path"):
        target = _destination(path)
        with _written(target.parent, write) as temporary:
            temporary.replace(target)


def write_new(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    """Write a file beside those that are there: NAME.png, or the next free of NAME-2.png, ...

    Returns its path; of several processes each gets one of its own. Raises as `write_atomically`.
    """
    with _output_errors(str(path), "choose another path"), _written(path.parent, write) as file:
        free = path
        for number in count(2):
            if _is_placed(file, free):
                break
            free = path.with_stem(f"{path.stem}-{number}")
        return free


@contextmanager
def _written(folder: Path, write: Callable[[BinaryIO], object]) -> Iterator[Path]:
    """Write a temporary file of a folder, to the disk; what is left of it goes."""
    temporary = folder / f".{secrets.token_hex(8)}.tmp"
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        _remove(temporary)


def _is_placed(file: Path, target: Path) -> bool:
    """Give a file a name that no other has; tells whether it was free."""
    try:
        os.link(file, target)
    except FileExistsError:
        return False
    except OSError:  # the file system knows no second name of a file
        try:
            target.open("xb").close()
        except FileExistsError:
            return False
        file.replace(target)
    return True


def _is_kept(target: Path) -> bool:
    """Tell whether a file is another user's in a folder where each keeps his own, such as /tmp."""
    if not target.exists() or not hasattr(os, "geteuid"):
        return False
    folder = target.parent.stat()
    owners = (0, folder.st_uid, target.stat().st_uid)
    return bool(folder.st_mode & stat.S_ISVTX) and os.geteuid() not in owners


def _destination(path: Path) -> Path:
    """Follow links, and refuse a path where no file can be; `/dev/null` must stay what it is."""
    try:
        target = path.resolve()
    except (RuntimeError, ValueError) as error:  # a loop of links, a zero byte
        raise OutputError(f"{str(path)!r} is no path ({error}); choose another") from error
    if target.is_dir():
        raise OutputError(f"{path} is a folder; give the name of a file in it")
    if target.is_symlink() or (path.exists() and not path.is_file()):
        raise OutputError(f"{path} is a device, a pipe or a loop of links; give a file's name")
    if not target.parent.is_dir():
        raise OutputError(f"{target.parent} is not a folder; make it, or choose another path")
    return target


@contextmanager
def _output_errors(place: str, choice: str) -> Iterator[None]:
    try:
        yield
    except LatentrtError:
        raise
    except OSError as error:
        raise OutputError(
            f"{place} cannot be written ({error.strerror or error}); check the permissions and "
            f"the disk's space, or {choice}"
        ) from error


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)


def fingerprint(path: Path) -> str:
    """Return 16 hexadecimal digits that tell a file's or a folder's content, in milliseconds.

    They are of a SHA-256 over the size and 16 pieces of 64 KiB, all over the file: enough to tell a
    changed file, not to prove that one is the same. Of a folder, over the files of weights in it.
    Raises OSError.
    """
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in WEIGHTS)
        facts = [f"{f.relative_to(path).as_posix()} {fingerprint(f)}" for f in files]
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
    size, pieces = path.stat().st_size, 16
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for piece in range(pieces):
            file.seek(max(0, (size - PIECE) * piece // (pieces - 1)))
            digest.update(file.read(PIECE))
    return digest.hexdigest()[:16]


def is_intact(entry: Path, key: str) -> bool:
    """Tell whether an entry has the SHA-256 that its name states."""
    with suppress(OSError), entry.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return entry.name[len(key) + 1 :].startswith(digest)
    return False
