"""How many blocks each transformer of a UNet has, and how its configuration says it."""

from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import ModelError

__all__ = [
    "ATTENDING_MIDDLE",
    "by_layer",
    "check_depths",
    "read_depths",
    "transformer_fields",
    "where_attended",
]

ATTENDING_MIDDLE = "UNetMidBlock2DCrossAttn"
DOWN, UP = "transformer_layers_per_block", "reverse_transformer_layers_per_block"


def transformer_fields(
    down: Sequence[Sequence[int]], up: Sequence[Sequence[int]], middle: int
) -> dict[str, Any]:
    """Return the fields that say how deep transformers are: one or a list where they are even.

    down, up: blocks by level and layer, in the order in which they are run, 0 where there is no
    transformer; middle: of the middle's
    Raises ModelError where the middle's is not that of the lowest level, if this has any.
    """
    lowest = down[-1][0]
    if lowest and middle and lowest != middle:
        raise ModelError(
            f"transformers have {lowest} blocks at the lowest level and {middle} in the middle; "
            "supported are equal numbers"
        )
    levels = [{*a, *b} - {0} for a, b in zip(down, reversed(up), strict=True)]
    levels[-1] |= {middle} - {0}
    mixed = any(0 in level and any(level) for level in (*down, *up))  # which is refused
    if not mixed and all(len(depths) < 2 for depths in levels):
        depths = [next(iter(level), 0) for level in levels]
        if len({*depths} - {0}) < 2:
            return {DOWN: max(*depths, 1)}
        return {DOWN: tuple(depth or 1 for depth in depths)}
    *above, last = map(tuple, down)
    return {
        DOWN: (*above, last if lowest else (middle,) * len(last)),
        UP: tuple(map(tuple, up)),
    }


def by_layer(
    depths: Sequence[int | tuple[int, ...]], layers: Sequence[int]
) -> list[tuple[int, ...]]:
    """Return depths by level and layer, of which each level has one or a list."""
    found: list[tuple[int, ...]] = []
    for depth, count in zip(depths, layers, strict=False):
        found.append((depth,) * count if isinstance(depth, int) else depth)
    return found


def check_depths(
    name: str, depths: Sequence[Sequence[int]], kinds: Sequence[str], layers: Sequence[int]
) -> None:
    """Raise ModelError unless each layer has a depth, above 0 where its block has transformers."""
    for level, kind, count in zip(depths, kinds, layers, strict=False):
        if len(level) != count or ("CrossAttn" in kind) != all(level):
            raise ModelError(
                f"{name} has {tuple(level)} for a {kind} of {count} layers; expected is a number "
                "above 0 for each layer that attends to the text: check the UNet's config.json"
            )


def read_depths(
    values: Mapping[str, Any], down_kinds: Sequence[str], up_kinds: Sequence[str]
) -> dict[str, Any]:
    """Read transformers that differ within a level, or on the way up, as diffusers writes them.

    An entry of a level is a number or a list of one for each layer. Returns no fields where they
    are even.
    values: a configuration; down_kinds, up_kinds: of blocks, where it does not say
    Raises ModelError.
    """
    down, up = values.get(DOWN), values.get(UP)
    nested = isinstance(down, list) and any(isinstance(entry, list) for entry in down)
    if not nested and up is None:
        return {}
    kinds = values.get("down_block_types") or down_kinds
    up_kinds = values.get("up_block_types") or up_kinds
    layers = values.get("layers_per_block", 2)
    counts = layers if isinstance(layers, list) else [layers] * len(kinds)
    lists = (down, up, counts, kinds, up_kinds)
    fits = all(isinstance(entry, list | tuple) and len(entry) == len(kinds) for entry in lists)
    if not fits or not all(type(count) is int for count in counts):
        raise ModelError(
            f"{DOWN} is {down!r:.80} and {UP} {up!r:.80}; expected are lists of one entry for each "
            "level: check the UNet's config.json"
        )
    assert isinstance(down, list)
    assert isinstance(up, list)
    downs = [_entry(DOWN, entry, count) for entry, count in zip(down, counts, strict=True)]
    ups = [_entry(UP, entry, count + 1) for entry, count in zip(up, counts[::-1], strict=True)]
    attends = values.get("mid_block_type", ATTENDING_MIDDLE) == ATTENDING_MIDDLE
    depths = where_attended(downs, kinds), where_attended(ups, up_kinds)
    return {UP: None, **transformer_fields(*depths, attends * downs[-1][0])}


def _entry(name: str, value: Any, layers: int) -> tuple[int, ...]:
    """Return a level's depths, of which its configuration has one or a list."""
    depths = tuple(value) if isinstance(value, list) else (value,) * layers
    if len(depths) != layers or not depths or not all(type(n) is int and n >= 0 for n in depths):
        raise ModelError(
            f"{name} has {value!r:.80} for a level of {layers} transformers; a whole number or as "
            "many are expected: check the UNet's config.json"
        )
    return depths


def where_attended(
    depths: Sequence[Sequence[int]], kinds: Sequence[str]
) -> tuple[tuple[int, ...], ...]:
    """Return depths with 0 for the levels whose blocks have no transformers."""
    return tuple(
        tuple(level) if "CrossAttn" in kind else (0,) * len(level)
        for level, kind in zip(depths, kinds, strict=False)
    )
