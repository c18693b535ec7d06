"""What goes out of a cache folder: what was used longest ago, and what nobody will come back for.

Processes may share the folder. Nothing goes that one of them holds, or that it is making.
"""

import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engine.errors import RequestError
from engine.store.cache import Cache
from engine.store.file_lock import locked, remove_lock, remove_unheld

DEFAULT_LIMIT = "20GB"
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
BINARY_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
STALE_SECONDS = 3600  # nothing small is being written for so long
_EVICTION = "eviction"  # the lock of those who remove, so that two do not remove twice as much
_ENTRY = re.compile(r"([0-9a-f]{64})\.[0-9a-f]{64}(\..*)?")
_UNFINISHED = re.compile(r"\.([0-9a-f]{64})\..*")
_FACTS = re.compile(r"facts-([0-9a-f]{64})\.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A file of the cache; size in bytes, last_use in nanoseconds since 1970."""

    key: str
    path: Path
    size: int
    last_use: int


def parse_size(text: str) -> int | None:
    """Read "20GB", "1.5 GiB" or a number of bytes; "none" is None. Raises RequestError."""
    if text.strip().lower() == "none":
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", text, re.IGNORECASE | re.ASCII)
    if match:
        number, unit, binary = match.group(1), match.group(2).upper(), match.group(3)
        if unit or not binary:
            return int(float(number) * (BINARY_UNITS if binary else UNITS)[unit])
    raise RequestError(f"{text!r} is no size; give one such as 20GB, 500MB or 1.5GiB, or none")


def cache_limit() -> int | None:
    """Return the size in bytes that the cache's engines may have, or None for any.

    It is LATENTRT_CACHE_LIMIT, or 20 GB; raises RequestError where that is no size.
    """
    text = os.environ.get("LATENTRT_CACHE_LIMIT") or DEFAULT_LIMIT
    try:
        return parse_size(text)
    except RequestError as error:
        raise RequestError(f"LATENTRT_CACHE_LIMIT: {error}") from error


def facts_path(folder: Path, key: str) -> Path:
    """Name the file beside an entry that tells what it is."""
    return folder / f"facts-{key}.json"


def entries(folder: Path) -> list[Entry]:
    """List a folder's entries, those used longest ago first."""
    found = []
    for path in folder.glob("[0-9a-f]*"):
        if match := _ENTRY.fullmatch(path.name):
            with suppress(OSError):  # gone meanwhile
                status = path.stat()
                found.append(
                    Entry(key=match[1], path=path, size=status.st_size, last_use=status.st_mtime_ns)
                )
    return sorted(found, key=lambda entry: (entry.last_use, entry.path))


def evict(folder: Path, limit: int | None) -> list[Path]:
    """Remove what is left over, then what was used longest ago until the others fit.

    limit: in bytes; None removes no entry
    Returns what was removed. What is held stays, whatever the limit.
    Raises OutputError when the folder cannot be written.
    """
    with Cache(folder).lock(_EVICTION):
        removed = sweep(folder)
        kept = entries(folder)
        size = sum(entry.size for entry in kept)
        for entry in kept:
            if limit is None or size <= limit:
                break
            if discard(entry):
                removed.append(entry.path)
                size -= entry.size
    return removed


def discard(entry: Entry) -> bool:
    """Remove an entry and its facts, unless it is held or being made; returns whether it went."""
    folder = entry.path.parent
    with locked(Cache(folder).lock_path(entry.key), wait=False) as mine:
        if not mine or not remove_unheld(entry.path):
            return False
        facts_path(folder, entry.key).unlink(missing_ok=True)
        return True


def sweep(folder: Path) -> list[Path]:
    """Remove files of writers that were killed, and facts whose entry is gone; returns them."""
    removed = [path for path in folder.glob(".*.tmp") if _is_stale(path) and _try_to_remove(path)]
    for path in sorted(folder.iterdir()):
        if (key := _left_over(path)) is None:
            continue
        with locked(Cache(folder).lock_path(key), wait=False) as mine:
            if mine and _left_over(path) and _try_to_remove(path):  # an entry may have come
                removed.append(path)
    return removed


def _left_over(path: Path) -> str | None:
    """Return the key of a file that nobody will come back for, if nobody has the key's lock."""
    if match := _UNFINISHED.fullmatch(path.name):
        return match[1]
    match = _FACTS.fullmatch(path.name)
    return match[1] if match and not any(path.parent.glob(f"{match[1]}.*")) else None


def remove_locks(folder: Path) -> None:
    """Remove the empty files that nobody locks."""
    for path in folder.glob(".lock-*"):
        remove_lock(path)


def _is_stale(path: Path) -> bool:
    with suppress(OSError):
        return time.time() - path.stat().st_mtime > STALE_SECONDS
    return False


def _try_to_remove(path: Path) -> bool:
    with suppress(OSError):
        path.unlink()
        return True
    return False
