"""Settings read back from a picture's file: what a stranger's file holds may be anything."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engine.errors import RequestError
from runtime.images.files import read_settings

__all__ = ["settings_of"]


def settings_of(path: Path, actions: Iterable[argparse.Action]) -> dict[str, Any]:
    """Return what a picture was made with, for these options, by their names.

    Raises RequestError when the picture does not say, or says what an option cannot be.
    """
    settings = read_settings(path)
    if not settings:
        raise RequestError(
            f"{path} does not say what it was made with; give a PNG of this program or of "
            "Automatic1111's"
        )
    hires = settings.get("hires")
    if isinstance(hires, dict):
        settings = {**settings, **{f"hires_{name}": value for name, value in hires.items()}}
    known = {}
    for action in actions:
        value = settings.get(action.dest)
        if value is None:
            continue
        if not _fits(action, value):
            raise RequestError(
                f"{path} says that {action.dest} is {value!r}, which it cannot be; make the "
                "picture anew from its prompt"
            )
        known[action.dest] = value
    return known


def _fits(action: argparse.Action, value: object) -> bool:
    """Tell whether a value from a file is of the kind that an option reads from its text."""
    if isinstance(action.default, bool):
        return isinstance(value, bool)
    if isinstance(action.default, list):
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if action.type in (None, Path):
        return isinstance(value, str) and (not action.choices or value in action.choices)
    numbers = value if isinstance(value, list) and action.type not in (int, float) else [value]
    return all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers)
