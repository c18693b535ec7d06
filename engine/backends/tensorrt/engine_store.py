"""Compiled engines in the cache: each with the facts that made it, the least used going first.

Beside an engine, `<key>.<SHA-256 of its bytes>.engine`, lies `facts-<key>.json`; the key is the
hash of these facts.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import numpy as np

from engine.backends.base import Arrays
from engine.store.cache import Cache, cache_folder, write_atomically
from engine.store.eviction import cache_limit, entries, evict, facts_path
from engine.store.file_lock import hold, release

SUFFIX = ".engine"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """All that can change an engine.

    library, version: what builds and runs it
    part, architecture, precision: of its graph, and graph: the SHA-256 of that file's bytes
    weights: `weights_hash` of what is built in; None where they are given later, by a refit
    profiles: the shapes that it takes, as JSON's values
    sm: the GPU's architecture, "sm89"
    device, driver: the GPU's name and its driver's version; None where they make no difference
    refit, optimization_level, workspace_bytes: how it is built; None is the library's own choice
    """

    library: str
    version: str
    part: str
    architecture: str
    graph: str
    weights: str | None
    precision: str
    profiles: tuple[Mapping[str, Any], ...]
    sm: str
    device: str | None = None
    driver: str | None = None
    refit: bool = False
    optimization_level: int | None = None
    workspace_bytes: int | None = None

    def __post_init__(self) -> None:
        """Bring profiles into one form; raises TypeError or ValueError where they are not JSON."""
        profiles = json.loads(json.dumps(self.profiles, allow_nan=False))
        object.__setattr__(self, "profiles", tuple(profiles))

    def key(self) -> str:
        """Return the key of this engine in the cache."""
        return Cache.key(**asdict(self))

    @classmethod
    def read(cls, folder: Path, key: str) -> Self | None:
        """Read the facts beside an entry; None where they are missing, or not those of the key."""
        try:
            facts = cls(**json.loads(facts_path(folder, key).read_bytes()))
            return facts if facts.key() == key else None
        except (OSError, TypeError, ValueError, RecursionError):
            return None


@dataclass(frozen=True, slots=True)
class EngineStore:
    """A folder of engines, which processes may share.

    What a process has taken out is held: no eviction removes it before `release`, or before the
    process ends.

    limit: in bytes; when an engine has been added, those used longest ago go until the others fit;
        None keeps all
    """

    folder: Path = field(default_factory=lambda: cache_folder() / "engines")
    limit: int | None = field(default_factory=cache_limit)

    def get(self, facts: EngineFacts) -> Path | None:
        """Find the engine of these facts, check its every byte and hold it; None without one."""
        path = Cache(self.folder).get(facts.key())
        if path is None or not hold(path):
            return None
        with suppress(OSError):  # a folder that may only be read
            os.utime(path)
        return path

    def get_or_build(self, facts: EngineFacts, build: Callable[[Path], object]) -> Path:
        """Find the engine of these facts, or build it; hold it.

        Of several processes one builds, the others wait for it.
        build: makes the file at the path it is given
        Raises OutputError when it cannot be written, and what `build` raises except OSError.
        """
        key, cache = facts.key(), Cache(self.folder)
        if (path := self.get(facts)) and EngineFacts.read(self.folder, key):
            return path
        with cache.lock(key):
            path = cache.take(key) or cache.make(key, build, SUFFIX)
            hold(path)  # before the lock is let go of: whoever evicts takes it
            text = json.dumps(asdict(facts), indent=1) + "\n"
            write_atomically(facts_path(self.folder, key), lambda file: file.write(text.encode()))
        with suppress(OSError):  # the engine is there; the next one finds what is left over
            evict(self.folder, self.limit)
        return path

    def find(self, **wanted: object) -> list[tuple[EngineFacts, Path]]:
        """List the engines whose facts have these values, the last used first.

        wanted: some fields of EngineFacts; raises TypeError for other names
        The files are not checked or held yet: `get` does that for the facts that are chosen.
        """
        if unknown := wanted.keys() - {entry.name for entry in fields(EngineFacts)}:
            raise TypeError(f"no facts of an engine: {', '.join(sorted(unknown))}")
        found = []
        for entry in reversed(entries(self.folder)):
            facts = EngineFacts.read(self.folder, entry.key)
            if facts and all(getattr(facts, name) == value for name, value in wanted.items()):
                found.append((facts, entry.path))
        return found

    @staticmethod
    def release(path: Path) -> None:
        """Let go of an engine that is no longer used, so that it may be removed."""
        release(path)


def weights_hash(weights: Arrays) -> str:
    """Hash named arrays, on all cores: their names, dtypes, shapes and numbers."""

    def one(name: str) -> bytes:
        array = weights[name]
        digest = hashlib.sha256(f"{name} {array.dtype.str} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return digest.digest()

    with ThreadPoolExecutor() as pool:
        return hashlib.sha256(b"".join(pool.map(one, sorted(weights)))).hexdigest()
