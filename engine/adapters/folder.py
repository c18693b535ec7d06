"""A folder of adapters: which file a name means."""

from collections.abc import Mapping
from pathlib import Path

from engine.errors import ModelError, nearest
from engine.store.cache import is_readable_folder

__all__ = ["check_folder", "find_adapter", "list_adapters"]

ENDINGS = (".safetensors", ".pt", ".ckpt", ".bin")


def check_folder(folder: Path) -> Path:
    """Return the folder. Raises ModelError where there is none."""
    if not is_readable_folder(folder):
        raise ModelError(
            f"{folder} is no folder that can be read; give one that holds adapters as lora_dir"
        )
    return folder


def list_adapters(folder: Path) -> Mapping[str, Path]:
    """Return the adapters' files of a folder and of those in it, by their names in lower case.

    A name is a file's without its ending, and its path within the folder without it; where two
    files have one name it means the one that lies less deep.
    """
    files = [path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS]
    found: dict[str, Path] = {}
    for path in sorted(files, key=lambda path: (len(path.parts), path)):
        within = path.relative_to(folder).with_suffix("").as_posix()
        for name in (path.stem, within):
            found.setdefault(name.lower(), path)
    return found


def find_adapter(name: str, folder: Path | None) -> Path | str:
    """Return the file of an adapter; where there is none, the reason.

    name: as `list_adapters` has it, with or without the ending, in any case
    """
    if folder is None:
        return f"no adapter {name!r} was given, and no folder to look in; --lora-dir names one"
    found = list_adapters(folder)
    key = name.lower().replace("\\", "/")
    key = next((key.removesuffix(end) for end in ENDINGS if key.endswith(end)), key)
    if key in found:
        return found[key]
    near = nearest(key, found)
    hint = f" (did you mean {found[near].stem!r}?)" if near else ""
    return f"there is no adapter {name!r} in {folder}{hint}"
