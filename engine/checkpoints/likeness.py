"""What a file that lacks tensors does hold: how many of its family's names, and where."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from engine.checkpoints.architecture import Stored
from engine.checkpoints.component import ComponentName, shown
from engine.checkpoints.families import Family
from engine.configs.base import Shape

__all__ = ["likeness"]


def likeness(path: Path, shapes: Mapping[str, Shape], family: Family) -> str:
    """Say how many names of a family's published architecture a file has and where, as a clause."""
    places, found = _places(shapes), []
    for part, names in _names(path, family):
        prefix, count = _held(names, places)
        usual = prefix in family.parts[part].prefixes
        where = "" if usual else f" under {shown(prefix, 60)!r}"
        found += [f"{count} of {len(names)} of the {part}{where}"] if count else []
    if not found:
        return f"none of its {len(shapes)} names is one of {family.title}"
    return f"of the names of {family.title} it holds {', '.join(found)}"


def _names(path: Path, family: Family) -> Iterator[tuple[ComponentName, list[str]]]:
    """Yield the parts of a family, each with its names in the original layout without prefixes."""
    for part, layout in family.parts.items():
        nothing = Stored(path=path, prefix=".", shapes={}, modules=frozenset())
        configs = family.published.get(part) or family.published.get("text_encoder", ())
        for config in configs[-1:] if part == "text_encoder_2" else configs[:1]:
            sources = layout.sources(config, nothing)
            yield part, [source.name.removeprefix(".") for source in sources.values()]


def _places(names: Iterable[str]) -> dict[str, list[str]]:
    """Map each ending of a name, from a dot on, to what stands before it."""
    places: dict[str, list[str]] = {}
    for name in names:
        parts = name[:200].split(".")
        for i in range(min(len(parts), 6)):
            before = "".join(f"{part}." for part in parts[:i])
            places.setdefault(".".join(parts[i:]), []).append(before)
    return places


def _held(names: Iterable[str], places: Mapping[str, list[str]]) -> tuple[str, int]:
    """Return the prefix under which most of the names are, and how many."""
    prefixes = Counter(before for name in names for before in places.get(name, ()))
    return prefixes.most_common(1)[0] if prefixes else ("", 0)
