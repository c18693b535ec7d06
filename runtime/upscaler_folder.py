"""A folder of trained upscalers: which file a name means."""

import argparse
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from engine.errors import RequestError, nearest
from engine.store.cache import is_readable_folder
from runtime.images.a1111_reader import UPSCALER_FILES
from runtime.images.upscaling import is_trained, parse_upscaler

__all__ = ["find_choice", "find_upscaler", "settle_upscalers"]

ENDINGS = (".pth", ".safetensors", ".pt")


def find_upscaler(name: str, folder: Path) -> str:
    """Return the path of an upscaler's file; a file that is there is one itself.

    name: a file's of the folder or of those in it, with or without its ending, in any case, or the
        name that Automatic1111 has for it
    Raises RequestError where there is none.
    """
    with suppress(OSError, ValueError):  # a name that no system takes
        if Path(name).is_file():
            return name
    if not is_readable_folder(folder):
        raise RequestError(
            f"--upscaler-dir {folder} is no folder that can be read; give one that holds upscalers"
        )
    found = _listed(folder)
    key = UPSCALER_FILES.get(name.lower(), name).lower()
    if key in found:
        return str(found[key])
    near = nearest(key, found)
    hint = f"; did you mean {found[near].stem!r}?" if near else ", nor a file of that name"
    raise RequestError(f"there is no upscaler {name[:200]!r} in {folder}{hint}")


def find_choice(text: str, folder: Path) -> str:
    """Put the path of a file for the name in FILE or FILE:FACTOR. Raises RequestError."""
    choice = parse_upscaler(text)
    file = find_upscaler(str(choice.path), folder)
    return file if choice.factor is None else f"{file}:{choice.factor:g}"


def settle_upscalers(options: argparse.Namespace) -> None:
    """Put files for the upscalers that options name, where they name a folder of some.

    Raises RequestError for a folder or an upscaler that there is not.
    """
    folder: Path | None = options.upscaler_dir
    if folder is None:
        return
    if options.hires_upscaler and is_trained(options.hires_upscaler):
        options.hires_upscaler = find_upscaler(options.hires_upscaler, folder)
    if text := getattr(options, "upscale", None):
        options.upscale = find_choice(text, folder)


def _listed(folder: Path) -> Mapping[str, Path]:
    """Return files by their names in lower case, with and without endings; the least deep count."""
    files = [path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS]
    found: dict[str, Path] = {}
    for path in sorted(files, key=lambda path: (len(path.parts), path)):
        for name in (path.name, path.stem):
            found.setdefault(name.lower(), path)
    return found
