"""The axes of a sheet: an option and the values that it takes, as the command line writes them."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Self

from engine.errors import RequestError
from runtime.images.upscaling import is_trained

__all__ = ["Axis", "read_axis"]

OF_FILES = ("hires-upscaler",)  # axes whose values may be files


class Axis(NamedTuple):
    """An option, without its dashes, and the values that it takes."""

    name: str
    values: tuple[str, ...]

    @property
    def text(self) -> str:
        """The axis as the command line writes it, and `read_axis` reads it."""
        quoted = ['"' + v.replace('"', '""') + '"' if {*v} & {*',"'} else v for v in self.values]
        return f"{self.name}={','.join(quoted)}"

    @property
    def named(self) -> Self:
        """The axis with its files' names, without their folders."""
        return self.with_files(lambda path: Path(path).name)

    def with_files(self, change: Callable[[str], str]) -> Self:
        """Return the axis with other files: change takes and returns each of its paths."""
        if self.name not in OF_FILES:
            return self
        return self._replace(values=tuple(change(v) if is_trained(v) else v for v in self.values))


def read_axis(text: str) -> Axis:
    """Read NAME=VALUE,VALUE; a value with a comma stands in quotes. Raises RequestError."""
    name, _, values = text.partition("=")
    found = tuple(value.strip() for value in next(csv.reader([values], skipinitialspace=True), []))
    if not name.strip() or not found or not all(found):
        raise RequestError(f"{text!r} is no axis; write NAME=VALUE,VALUE, such as steps=10,20")
    return Axis(name.strip().lstrip("-").lower().replace("_", "-"), found)
