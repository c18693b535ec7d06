"""Models and adapters that are distilled to few steps, told by their names."""

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from engine.checkpoints.families.base import Variant

__all__ = ["find_variant", "find_variant_of_adapter", "name_words"]

WORDS = {"turbo": "turbo", "lightning": "lightning", "hyper": "hyper", "lcm": "lcm", "tcd": "tcd"}
CAPITALS = "(?:TURBO|LIGHTNING|HYPER|LCM|TCD|DMD)"  # glued to what it is of, as in "XLTURBOV10"
WORD = re.compile(
    rf"(?:SD)?XL(?={CAPITALS}(?![A-UW-Za-z]|V(?!\d)))|{CAPITALS}(?=V\d)"
    r"|[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+",
    re.ASCII,
)
# "hyper" before any other word belongs to it, as in "hyper realistic".
AFTER_HYPER = re.compile(
    r"\d+|sd(xl|v)?|xl|v|vae|baked\w*|lora|cfg|fp|bf|steps?|unet|inpaint\w*|pruned|merged?|mix|dpm\w*"
)
MODEL = re.compile(r"sd(xl|v)?|xl|lora|cfg|unet")  # beside such a word a name is a distillation's
UNTOLD = ("pytorch_lora_weights", "adapter_model", "model", "lora", "diffusion_pytorch_model")
MOST_STEPS = 32
CFG_SCALE = 5.0  # of what was distilled with its guidance left free, as "Hyper-SDXL-8steps-CFG"


def name_words(name: str) -> list[str]:
    """Split a name into words in small letters: capitals, digits and signs end one.

    "realvisxlV50_v50LightningBakedvae" has realvisxl, v, 50, v, 50, lightning, bakedvae.
    """
    return [word.lower() for word in WORD.findall(name[:300])]


def find_variant(name: str, variants: Sequence[Variant]) -> Variant | None:
    """Return the distilled form that a model's name tells, with the steps that it states."""
    words = name_words(name)
    for i, word in enumerate(words):
        if (kind := _kind(words, i)) and (found := _named(kind, variants)):
            after = words[i + 1 :][:1]
            if word != "hyper" or not after or AFTER_HYPER.fullmatch(after[0]) or _steps(words):
                return _stated(found, words)
    return None


def find_variant_of_adapter(path: Path, variants: Sequence[Variant]) -> Variant | None:
    """Return the distilled form that an adapter's name tells.

    Turbo, lightning and hyper are words of subjects too: they count beside the number of steps or
    a model's name. A file whose name every adapter has is told by its folder's.
    """
    name = path.parent.name if path.stem.lower() in UNTOLD else path.stem
    words = name_words(name)
    for i, word in enumerate(words):
        kind = _kind(words, i)
        if kind and (found := _named(kind, variants)):
            beside = [*words[max(i - 1, 0) : i], *words[i + 1 : i + 2]]
            told = word in ("lcm", "tcd", "dmd") or _steps(words)
            if told or any(MODEL.fullmatch(each) for each in beside):
                return _stated(found, words)
    return None


def _kind(words: Sequence[str], i: int) -> str | None:
    if words[i : i + 2] == ["dmd", "2"]:
        return "dmd2"
    return WORDS.get(words[i])


def _named(kind: str, variants: Sequence[Variant]) -> Variant | None:
    return next((variant for variant in variants if variant.name == kind), None)


def _steps(words: Sequence[str]) -> int:
    """Return the number of steps that a name states, as "4step" does; 0 where it states none."""
    for number, word in pairwise(words):
        if word in ("step", "steps") and number.isdigit() and 0 < int(number) <= MOST_STEPS:
            return int(number)
    return 0


def _stated(found: Variant, words: Sequence[str]) -> Variant:
    """Take the steps that a name states, and guidance where it says that some is left free."""
    if "cfg" in words:
        found = replace(found, guidance_scale=CFG_SCALE)
    steps = _steps(words)
    return replace(found, steps=(steps, steps)) if steps else found
