"""Where the pictures of a batch go as they are drawn: into the folder, file before record."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from engine.store.cache import write_atomically
from runtime.batch.lines import Line
from runtime.batch.manifest import Manifest
from runtime.batch.progress import Progress

__all__ = ["FolderStore", "Store"]


class Store(Protocol):
    """Takes what was drawn, and what was not."""

    def add(self, name: str, data: bytes, record: Mapping[str, Any]) -> None:
        """Take a picture: its file's name and bytes, and what the manifest says of it."""
        ...

    def lose(self, line: Line, picture: int | None, pictures: int) -> None:
        """Take why a line, or a picture of it, is passed over; pictures: how many that are."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderStore:
    """A `Store` on the disk; progress: is told of every picture."""

    folder: Path
    manifest: Manifest
    progress: Progress

    def add(self, name: str, data: bytes, record: Mapping[str, Any]) -> None:
        """As `Store` says. Raises OutputError or OSError where nothing can be written."""
        write_atomically(self.folder / name, lambda file: file.write(data))
        self.manifest.add(record)
        self.progress.drew()

    def lose(self, line: Line, picture: int | None, pictures: int) -> None:
        """As `Store` says. Raises OSError where nothing can be written."""
        self.manifest.add_error(line, picture)
        self.progress.lose(line, pictures)
