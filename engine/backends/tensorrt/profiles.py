"""Shape profiles: the sizes for which an engine is built, and what they mean for a part's inputs.

An engine runs every size of its profile and is fastest at `best`; a range of one size is compiled
as a constant. What changes from one request to the next on any model (the sampler's registers,
guidance on or off, the words of textual inversion) is always a range.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, Self

from engine.configs.base import Config
from engine.errors import BackendError
from engine.graphs.graph import Part, Symbol, signature

Shape = tuple[int, ...]
Shapes = Mapping[str, tuple[Shape, Shape, Shape]]
"""By the name of an input: the smallest, the best and the largest shape."""


@dataclass(frozen=True, slots=True)
class Range:
    """Sizes from `min` to `max`, of which `best` comes most often."""

    min: int
    best: int
    max: int

    def __post_init__(self) -> None:
        """Refuse what is no range of whole numbers."""
        sizes = (self.min, self.best, self.max)
        if (
            any(type(size) is not int for size in sizes)
            or not 0 <= sizes[0] <= sizes[1] <= sizes[2]
        ):
            raise BackendError(
                f"{':'.join(map(str, sizes))} is no range; give SIZE, MIN:MAX or "
                "MIN:BEST:MAX in whole numbers that do not fall, such as 512:768:1024"
            )

    def __contains__(self, size: int) -> bool:
        """Tell whether a size is in the range."""
        return self.min <= size <= self.max

    def __str__(self) -> str:
        """Write the range as a person says it: "512", "512 to 1024"."""
        return str(self.best) if self.min == self.max else f"{self.min} to {self.max}"


def parse_range(text: str) -> Range:
    """Read "512", "512:1024" (the smallest is the best) or "512:768:1024"; raises BackendError."""
    parts = text.split(":")
    if len(parts) > 3 or not all(part.isascii() and part.isdigit() for part in parts):
        raise BackendError(
            f"{text!r} is no range of sizes; give SIZE, MIN:MAX or MIN:BEST:MAX in whole "
            "numbers, such as 512:768:1024"
        )
    sizes = [int(part) for part in parts]
    return Range(sizes[0], sizes[len(sizes) // 2 if len(sizes) == 3 else 0], sizes[-1])


ONE, TOKENS, GROUPS, ROWS = Range(1, 1, 1), Range(77, 77, 77), Range(1, 2, 2), Range(1, 2, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The sizes of requests that an engine serves.

    height, width: of pictures in pixels, multiples of the autoencoder's compression
    batch: pictures that are drawn at once
    tokens: of the longest prompt, a multiple of the text encoder's row
    groups: of conditionings: 1 unguided, 2 guided, more for composed prompts and two-sided guidance
    rows: that a text encoder reads at once, one for each chunk of each different text
    """

    height: Range
    width: Range
    batch: Range = ONE
    tokens: Range = TOKENS
    groups: Range = GROUPS
    rows: Range = ROWS

    def __post_init__(self) -> None:
        """Refuse sizes of nothing."""
        for field in fields(self):
            if getattr(self, field.name).min < 1:
                raise BackendError(f"the profile's {field.name} begins at 0; give a range from 1")

    def fits(self, sizes: Mapping[str, int]) -> bool:
        """Tell whether a request of these sizes can be run; names are this class's fields."""
        return all(size in getattr(self, name) for name, size in sizes.items())

    def describe(self) -> str:
        """Say in words what the profile allows."""
        pictures = "picture" if self.batch.max == 1 else "pictures"
        return (
            f"{self.width} × {self.height} pixels (width × height), {self.batch} {pictures} at "
            f"once, {self.tokens} tokens, {self.groups} groups of conditionings"
        )

    def to_dict(self) -> dict[str, list[int]]:
        """Return JSON's values: by the name of a field, [min, best, max]."""
        ranges = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: [each.min, each.best, each.max] for name, each in ranges.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_dict` returned; raises BackendError for anything else."""
        try:
            return cls(**{name: Range(*sizes) for name, sizes in values.items()})
        except (AttributeError, TypeError) as error:
            raise BackendError(
                f"{values!r} is no shape profile ({error}); build the engine anew"
            ) from error


ANY_SIZE = Range(64, 64, 64)  # of pictures, for a part that sees none
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


def relevant(part: Part, profile: Profile) -> Profile:
    """Return a profile without what a part does not see, so that others may share its engine."""
    if part in TEXT_ENCODERS:
        unseen = {"height": ANY_SIZE, "width": ANY_SIZE, "batch": ONE, "tokens": TOKENS}
        return replace(profile, groups=GROUPS, **unseen)
    if part in ("step", "step_shallow"):
        return replace(profile, rows=ROWS)
    return replace(profile, groups=GROUPS, tokens=TOKENS, rows=ROWS)


# The same for every model, so that one engine serves every sampler and every prompt.
REGISTERS = Range(1, 2, 7)  # ComfyUI's UniPC keeps five, and inpainting two more
TAUGHT_ROWS = Range(1, 1, 256)  # of textual inversion, 32 words of 8 vectors; zeros are none


def input_shapes(part: Part, config: Config, profile: Profile, *, compression: int = 8) -> Shapes:
    """Return the shapes of a part's inputs that a profile allows.

    compression: pixels along one side of a latent
    Raises BackendError when the sizes do not suit the model, or a part has others.
    """
    sizes: dict[str, Range | int] = {**_ranges(profile, compression), **config.symbols()}
    if config.tokens_per_row:  # a text encoder, whose batch is the rows that it reads at once
        sizes |= {"B": profile.rows, "n": config.tokens_per_row}
    return MappingProxyType(
        {
            name: _shapes([_size(symbol, sizes) for symbol in tensor.shape])
            for name, tensor in signature(part, config).inputs.items()
        }
    )


def _shapes(sizes: list[Range]) -> tuple[Shape, Shape, Shape]:
    return (
        tuple(size.min for size in sizes),
        tuple(size.best for size in sizes),
        tuple(size.max for size in sizes),
    )


def _size(symbol: Symbol, sizes: Mapping[str, Range | int]) -> Range:
    """Evaluate a symbol of `engine.graphs.graph`: a number, a name, "r + 2", or "h or 1".

    What may be 1 is 1 here: an engine whose shapes are broadcast as they come is untried.
    """
    if str(symbol).endswith(" or 1"):
        return ONE
    name, _, more = str(symbol).partition(" + ")
    if not name.isdecimal() and name not in sizes:
        raise BackendError(f"no profile has the size {name} of this part; run it on the processor")
    size = int(name) if name.isdecimal() else sizes[name]
    if isinstance(size, int):
        size = Range(size, size, size)
    added = int(more or 0)
    return Range(size.min + added, size.best + added, size.max + added)


def _ranges(profile: Profile, compression: int) -> dict[str, Range]:
    """Return the sizes that change."""
    return {
        "B": profile.batch,
        "g": profile.groups,
        "r": REGISTERS,
        "e": TAUGHT_ROWS,
        "n": profile.tokens,
        "H": profile.height,
        "W": profile.width,
        "h": _latent("height", profile.height, compression),
        "w": _latent("width", profile.width, compression),
    }


def _latent(name: str, pixels: Range, compression: int) -> Range:
    sizes = (pixels.min, pixels.best, pixels.max)
    if any(size % compression for size in sizes):
        raise BackendError(
            f"the profile's {name} is {':'.join(map(str, sizes))} pixels; every number of it must "
            f"be a multiple of {compression}"
        )
    return Range(*(size // compression for size in sizes))
