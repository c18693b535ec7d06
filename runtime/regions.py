"""Regions: areas of a picture that have a text of their own.

Legend
    m_i  the mask of region i, 0 to 1 at every cell of the latents; s_i its weight
    m_0  that of the prompt, max(0, 1 - sum_i s_i m_i): what the regions leave
The conditioned output is the weighted mean of what every text gives at the cell,
sum_i s_i m_i cond_i / sum_i s_i m_i with s_0 = 1, as ComfyUI has it of masked conditionings.
Guidance is applied to that, so a region costs a call's group of conditionings and nothing else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.adapters.choice import NUMBER
from engine.errors import RequestError
from runtime.checks import check_image, check_number
from runtime.conditioning import alternatives
from runtime.conditioning.names import take_names
from runtime.conditioning.syntax import MAX_PARTS, compose
from runtime.images.canvas import gray_of
from runtime.images.files import WHITE, open_image, upright
from runtime.images.frame import Frame

__all__ = [
    "Region",
    "check_regions",
    "parse_region",
    "shares_of",
    "split_region",
    "with_regions",
]

Array = NDArray[np.float32]

MAX_WEIGHT = 100.0
LEAST = 0.5 / WHITE  # that the regions leave to the prompt: half a level of gray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Region:
    """An area of the picture and its text. Raises RequestError for what cannot be one.

    mask: white where the text counts, gray where it counts in part; a mask of another size is
        stretched over the picture
    prompt: read as the request's prompts are, parts that AND joins included
    weight: how much it counts beside the other regions and, below 1, the prompt
    """

    mask: Image.Image
    prompt: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a mask without white, and a text that is none."""
        check_image("a region's mask", self.mask)
        object.__setattr__(self, "mask", upright(self.mask))
        if not isinstance(self.prompt, str):
            raise RequestError(
                f"a region's prompt came as {type(self.prompt).__name__}; give a text"
            )
        check_number("a region's weight", self.weight, Real, 0, MAX_WEIGHT)
        if not gray_of(self.mask, self.mask.height, self.mask.width).any():
            raise RequestError(
                f"the mask of the region {self.prompt!r} is black everywhere; make white where its "
                "text is to count"
            )


def check_regions(regions: object, *, prompt_syntax: bool) -> None:
    """Refuse what is no list of regions, or more than can be drawn together. RequestError.

    prompt_syntax: whether their texts are read for what a region cannot choose
    """
    if not isinstance(regions, Sequence) or not all(isinstance(r, Region) for r in regions):
        raise RequestError(
            "regions is no list of regions; give [Region(mask=..., prompt='a red car')]"
        )
    if len(regions) >= MAX_PARTS:
        raise RequestError(
            f"{len(regions)} regions came; up to {MAX_PARTS - 1} can be drawn together"
        )
    for region in regions if prompt_syntax else ():
        if alternatives.MARKS.search(region.prompt):
            raise RequestError(
                f"the region {region.prompt!r} has alternatives or wildcards, which only prompts "
                "have; write its text out"
            )
        if take_names(region.prompt, {}).adapters:
            raise RequestError(
                f"the region {region.prompt!r} names an adapter, which changes the whole picture; "
                "name it in the prompt"
            )


def with_regions(
    composed: tuple[list[list[str]], NDArray[np.float64]], texts: Sequence[str], shares: Array
) -> tuple[list[list[str]], NDArray[np.float64], Array]:
    """Put regions before the parts of the prompts, which stay the last.

    composed: of the prompts, as `compose_all` has it; texts: of the regions, as the encoder is to
        read them; shares: as `shares_of` has them
    Returns the texts, (m, P), what each counts, (m, P), and its share of every cell, (m, h, w). A
    text without a share is left out. Raises RequestError for more than can be drawn together.
    """
    prompts, weights = composed
    groups, counts, maps = list[list[str]](), list[NDArray[np.float64]](), list[Array]()
    for text, share in zip(texts, shares[:-1], strict=True):
        for piece in compose(text) if share.any() else ():
            groups.append([piece.text] * len(prompts[0]))
            counts.append(np.full(len(prompts[0]), piece.weight))
            maps.append(share)
    if shares[-1].any():
        groups += prompts
        counts += [*weights]
        maps += [shares[-1]] * len(prompts)
    if len(groups) > MAX_PARTS:
        raise RequestError(
            f"the prompt and its regions have {len(groups)} parts; up to {MAX_PARTS} can be drawn "
            "together"
        )
    return groups, np.array(counts), np.stack(maps)


def shares_of(
    regions: Sequence[Region],
    frame: Frame | None,
    height: int,
    width: int,
    compression: int = 8,
) -> Array:
    """Return how much each text counts at each cell, (regions + 1, h, w), 1 in all.

    The last is the prompt's. Of a frame the masks lie over its whole image, of which the drawn part
    is taken.
    height, width: of what is drawn, in pixels; compression: pixels along a side of a cell
    """
    size, masks = (width // compression, height // compression), []
    for region in regions:
        sides = (region.mask.height, region.mask.width)
        gray = Image.fromarray(gray_of(region.mask, *sides))
        if frame is not None:
            gray = frame.drawn(gray)
        cells = gray.convert("F").resize(size, Image.Resampling.BOX)
        masks.append(np.asarray(cells, np.float32) / WHITE * np.float32(region.weight))
    total = np.sum(masks, axis=0)
    own = np.where(total < 1 - LEAST, 1 - total, 0)
    shares: Array = np.stack([*masks, own]) / (total + own)
    return shares


def split_region(text: str) -> tuple[str, str]:
    """Part a mask's file from the weight behind it: "left.png:0.8" into "left.png" and ":0.8"."""
    head, colon, last = text.rpartition(":")
    if colon and head and NUMBER.fullmatch(last.strip().lower()):
        return head, text[len(head) :]
    return text, ""


def parse_region(mask: str, prompt: str) -> Region:
    """Read what the command line says of a region: MASK or MASK:WEIGHT, and its text.

    Raises RequestError, also where the mask's file cannot be read.
    """
    path, weight = split_region(mask)
    given: Mapping[str, float] = {"weight": float(weight[1:])} if weight else {}
    return Region(mask=open_image(Path(path)), prompt=prompt, **given)
