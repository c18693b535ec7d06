"""Names in a prompt that stand for files: adapters and words of textual inversion.

    <lora:name>  <lora:name:0.8>            an adapter, and how much of it
    <lora:name:0.5:0.8>  <lora:name:te=0.5:unet=0.8>     of the text encoders and of the UNet
    embedding:name                          ComfyUI's way to write the word of a textual inversion
    <name>                                  diffusers' way to call such a word

Tags are Automatic1111's (`modules/extra_networks.py`, `extra_networks_lora.py`); `lyco` is another
name of `lora` there. They are no words of the text, and neither is the name of a word that nobody
taught the model: both are taken out, and what loads nothing is said. A backslash before a name
makes it text.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from engine.adapters.choice import AdapterChoice
from engine.adapters.folder import find_adapter
from engine.errors import RequestError

__all__ = ["MARKS", "AdapterTag", "NamedText", "named_adapters", "take_names"]

MARKS = re.compile("<|embedding:", re.IGNORECASE)  # in every text that names something
_NAMES = re.compile(
    r"\\.|<(?P<kind>lora|lyco|hypernet):(?P<tag>[^<>]*)>|<(?=[\w*-]*[^\W\d_])[\w*-]+>"
    r"|(?<![^\s,(\[{|])embedding:(?P<word>[^\s,()\[\]{}:|<>\\]+)",
    re.DOTALL | re.IGNORECASE,
)
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_ENDINGS = (".safetensors", ".pt", ".bin")
MAX_WEIGHT = 100.0  # of an adapter; beyond is no picture


class AdapterTag(NamedTuple):
    """An adapter that a prompt names; written: as it stands there."""

    written: str
    name: str
    unet: float
    text_encoder: float


class NamedText(NamedTuple):
    """A prompt without the names in it.

    text: for `compose` and `schedule`; notes: on names that load nothing, a sentence each
    """

    text: str
    adapters: tuple[AdapterTag, ...]
    notes: tuple[str, ...]


def take_names(text: str, words: Mapping[str, str]) -> NamedText:
    """Take the names out of a prompt; a word that the model was taught stays.

    words: of textual inversion, by their names and their files' names in lower case
    """
    adapters: list[AdapterTag] = []
    notes: list[str] = []

    def said(match: re.Match[str]) -> str:
        written = match[0]
        if written.startswith("\\"):
            return written
        if match["kind"] is not None:
            tag = _tag(match["kind"].lower(), match["tag"], written)
            if isinstance(tag, str):
                notes.append(f"{written} loads nothing and is left out of the text: {tag}")
            else:
                adapters.append(tag)
            return ""
        name = match["word"] or written
        end = name[len(name.rstrip(".")) :]
        known = _word(name.removesuffix(end), words)
        if known is None:
            notes.append(
                f"{written} is left out of the text: the model was taught no such word; give its "
                "file as an embedding, or write a backslash before it if it is meant as text"
            )
        return (known or "") + end

    text = _NAMES.sub(said, text)
    return NamedText(text, tuple(adapters), tuple(dict.fromkeys(notes)))


def named_adapters(
    prompts: Sequence[str],
    negative_prompts: Sequence[str],
    *,
    words: Mapping[str, str],
    folder: Path | None,
    given: Collection[str] = (),
) -> tuple[list[AdapterChoice], list[str]]:
    """Return the adapters that prompts name, and notes on all that they name in vain.

    words: as `take_names` takes them; folder: of adapters, if there is one
    given: names of adapters that are on anyway, which a prompt does not put on once more
    Raises RequestError where the prompts name different adapters.
    """
    named = [take_names(text, words) for text in prompts]
    notes = [note for each in named for note in each.notes]
    for text in dict.fromkeys(negative_prompts):
        negative = take_names(text, words)
        notes += negative.notes
        notes += [
            f"{tag.written} loads nothing in a negative prompt and is left out of the text; write "
            "it into the prompt, with a weight below 0 to draw away from it"
            for tag in negative.adapters
        ]
    if any(each.adapters != named[0].adapters for each in named):
        raise RequestError(
            "the prompts name different adapters, which all pictures of a call share; draw them "
            "one after the other"
        )
    adapters = []
    for tag in named[0].adapters if named else ():
        if tag.name.lower() in given:
            continue
        found = find_adapter(tag.name, folder)
        if isinstance(found, Path):
            adapters.append(AdapterChoice(path=found, unet=tag.unet, text_encoder=tag.text_encoder))
        else:
            notes.append(f"{tag.written} loads nothing and is left out of the text: {found}")
    return adapters, list(dict.fromkeys(notes))


def _tag(kind: str, said: str, written: str) -> AdapterTag | str:
    """Read what a tag says; return the reason where it is none that can be loaded."""
    if kind == "hypernet":
        return "hypernetworks are not supported; take a LoRA"
    name, *parameters = (part.strip() for part in said.split(":"))
    if not name:
        return "it names no adapter; write <lora:NAME:WEIGHT>"
    given: dict[str, str] = {}
    for place, parameter in enumerate(parameters):
        key, equals, value = parameter.partition("=")
        if not equals and place < 2:
            key, value = ("te", "unet")[place], parameter
        given.setdefault(key.strip().lower(), value.strip())
    if unknown := given.keys() - {"te", "unet"}:
        return f"{sorted(unknown)[0]!r} cannot be set; write <lora:NAME:WEIGHT>"
    text_encoder = given.get("te", "1")
    weights = [given.get("unet", text_encoder), text_encoder]
    for weight in weights:
        if not _NUMBER.fullmatch(weight) or abs(float(weight)) > MAX_WEIGHT:
            return f"{weight!r} is no weight from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}"
    return AdapterTag(written, name, *map(float, weights))


def _word(name: str, words: Mapping[str, str]) -> str | None:
    """Return the word of a textual inversion by its name, or by its file's."""
    low = name.lower()
    bare = next((low.removesuffix(end) for end in _ENDINGS if low.endswith(end)), low)
    return words.get(low, words.get(bare))
