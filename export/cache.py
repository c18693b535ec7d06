"""What is in the cache folder, whether it is whole, and what may go."""

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from engine.backends.tensorrt.engine_store import EngineFacts
from engine.errors import GraphError
from engine.graphs.graph import COMPRESSED, Graph
from engine.store.cache import is_intact
from engine.store.eviction import Entry, discard, entries, evict, remove_locks, sweep

UNCHECKED, WHOLE, DAMAGED, UNKNOWN = "not checked", "whole", "damaged", "without readable facts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A file of the cache.

    file: below the cache folder; what: in words; bytes: its size; last_use: in seconds since 1970
    state: "not checked", "whole", "damaged" or "without readable facts"
    facts: of an engine
    """

    file: str
    what: str
    bytes: int
    last_use: float
    state: str = UNCHECKED
    facts: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What is in the cache, and the files that were removed."""

    folder: Path
    limit: int | None
    items: tuple[Item, ...]
    removed: tuple[str, ...] = ()


def list_cache(folder: Path, limit: int | None, *, verify: bool = False) -> Listing:
    """List a cache folder: engines by their last use, then graphs and other files.

    limit: in bytes, of its engines; verify: read every byte of the engines, and parse the graphs
    """
    items = [*_engines(folder, verify), *_files(folder, verify)]
    return Listing(folder=folder, limit=limit, items=tuple(items))


def prune_cache(folder: Path, limit: int | None, size: int | None) -> Listing:
    """Verify everything, remove what is damaged or left over, then list what stays.

    size: in bytes; engines go, those used longest ago first, until the others fit; None removes
        none that is whole. What another process is using stays.
    Raises OutputError when the folder cannot be written.
    """
    found = list_cache(folder, limit, verify=True)
    bad = {item.file for item in found.items if item.state in (DAMAGED, UNKNOWN)}
    removed = [file for file in sorted(bad) if _remove(folder, file)]
    if _engine_folder(folder).is_dir():
        paths = evict(_engine_folder(folder), size)
        remove_locks(_engine_folder(folder))
        removed += [str(path.relative_to(folder)) for path in paths]
    for path in (folder, folder / "graphs"):
        if path.is_dir():
            removed += [str(left.relative_to(folder)) for left in sweep(path)]
    kept = tuple(item for item in found.items if item.file not in removed)
    return replace(found, items=kept, removed=tuple(removed))


def as_json(listing: Listing) -> dict[str, Any]:
    """Return a listing as JSON's values."""
    return {**asdict(listing), "folder": str(listing.folder), "bytes": _size(listing)}


def as_text(listing: Listing) -> str:
    """Lay a listing out as a table and a sum."""
    rows = [
        (_bytes(item.bytes), _time(item.last_use), item.state, item.what, _short(item.file))
        for item in listing.items
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(4)]
    lines = [
        "  ".join(
            [*(f"{cell:{width}}" for cell, width in zip(row[:4], widths, strict=True)), row[4]]
        )
        for row in rows
    ]
    lines += [f"removed {file}" for file in listing.removed]
    limit = "without a limit" if listing.limit is None else f"limited to {_bytes(listing.limit)}"
    total = f"{len(rows)} files, {_bytes(_size(listing))}, in {listing.folder}; engines are {limit}"
    return "\n".join([*lines, total])


def _engine_folder(folder: Path) -> Path:
    return folder / "engines"


def _engines(folder: Path, verify: bool) -> Iterator[Item]:
    for entry in reversed(entries(_engine_folder(folder))):
        facts = EngineFacts.read(entry.path.parent, entry.key)
        yield Item(
            file=str(entry.path.relative_to(folder)),
            what=_what(facts) if facts else "engine",
            bytes=entry.size,
            last_use=entry.last_use / 1e9,
            state=_engine_state(entry, facts) if verify else UNCHECKED,
            facts=asdict(facts) if facts else None,
        )


def _engine_state(entry: Entry, facts: EngineFacts | None) -> str:
    if not is_intact(entry.path, entry.key):
        return DAMAGED
    return WHOLE if facts else UNKNOWN


def _files(folder: Path, verify: bool) -> Iterator[Item]:
    """List what is no entry: graphs, ranges for int8, the libraries' own caches."""
    known = {entry.path for entry in entries(_engine_folder(folder))}
    for path in sorted(folder.rglob("[!.]*")):
        if path in known or path.name.startswith("facts-") or not path.is_file():
            continue
        try:
            status = path.stat()
        except OSError:  # gone meanwhile
            continue
        is_graph = path.name.removesuffix(COMPRESSED).endswith(".onnx")
        yield Item(
            file=str(path.relative_to(folder)),
            what="graph" if is_graph else "file",
            bytes=status.st_size,
            last_use=status.st_mtime,
            state=_graph_state(path) if is_graph and verify else UNCHECKED,
        )


def _graph_state(path: Path) -> str:
    try:
        Graph.read(path)
    except GraphError:
        return DAMAGED
    return WHOLE


def _remove(folder: Path, file: str) -> bool:
    path = folder / file
    for entry in entries(path.parent):
        if entry.path == path:
            return discard(entry)
    path.unlink(missing_ok=True)
    return True


def _what(facts: EngineFacts) -> str:
    profiles = " or ".join(
        " ".join(f"{name} {_range(sizes)}" for name, sizes in profile.items())
        for profile in facts.profiles
    )
    where = facts.device or facts.sm
    return f"{facts.part} {facts.precision}, {facts.library} {facts.version}, {where}, {profiles}"


def _range(sizes: Any) -> str:
    """Write [512, 512, 1024] as 512:512:1024, and one size that does not change once."""
    if not isinstance(sizes, list):
        return str(sizes)
    return ":".join(map(str, sizes if len(set(map(str, sizes))) > 1 else sizes[:1]))


def _short(file: str) -> str:
    """Leave the most of an engine's two hashes out."""
    return re.sub(r"([0-9a-f]{12})[0-9a-f]{52}\.[0-9a-f]{64}", r"\1…", file)


def _size(listing: Listing) -> int:
    return sum(item.bytes for item in listing.items)


def _bytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
