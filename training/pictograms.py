"""The pictogram data set: subjects drawn in four styles, rendered from open SVG icon sets.

A subject is an emoji that all four sets have, without skin-tone variants and flags. The (subject,
style) pairs of `held_out.txt` are held out of training: whether the model draws them tells whether
the text steers the picture, since it has seen the subject in other styles and the style on others.
At most one style of a subject is among them, and each style equally often, whatever is added.
"""

import io
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from training.packages import ICON_SETS, KEYWORDS, NAMES, fetch, read_member

SIZE = 128  # pixels along one side
MARGIN = 4  # white pixels around every icon
STYLES = tuple(str(package.style) for package in ICON_SETS)
HELD_OUT = Path(__file__).with_name("held_out.txt")
# Everyday subjects are whole groups less what these patterns name: near-copies of one another
# (clock faces, moon phases, mail boxes) and what is drawn as a letter or an abstract sign.
EVERYDAY_GROUPS = {
    "Animals & Nature": r"^(?!)",
    "Food & Drink": r"^(?!)",
    "Activities": r"medal$|ticket|suit$|mahjong|ribbon$|dolls$|tanabata|ceremony|hockey|cricket|"
    r"lacrosse|badminton|goal net|running shirt|streamer|pine dec|decor|martial|sparkles$",
    "Travel & Places": r"thirty|o’clock|oncoming|globe|moon|post office|Japan|hotel|office|"
    r"hospital|"
    r"bank|store|school|church|mosque|temple|synagogue|shrine|kaaba|tower|sun behind|cloud with|"
    r"railway|metro|station|tram|light rail|monorail|high-speed|minibus|trolleybus|departure|"
    r"arrival|wheelchair|motorway|bus stop|construction|stop sign|barber|sunset|dusk|night|foggy|"
    r"sunrise|fog$|wind|cyclone|comet|milky|houses|derelict|factory|wedding|Statue|stadium|"
    r"sport utility|articulated|umbrella (with|on)|without snow|hourglass done|mantelpiece|timer|"
    r"stopwatch|small airplane|motor boat|ferry$|passenger|suspension|aerial|cableway|national|"
    r"fuji|map|hot springs|horizontal|seat|wheel$|brick|wood$|rock$|building",
    "Objects": r"speaker|mailbox|tray|envelope$|envelope with|banknote|money with|book|notebook|"
    r"ledger|page|scroll|paper$|newspaper|label|receipt|chart|card|folder|calendar|notepad|file|"
    r"lock|clip|ruler|pushpin|nib|memo|pen$|muted|level|control|pager|fax|disk|optical|dvd|abacus|"
    r"film|clapper|video|cassette|right$|white cane|chain|link|placard|moai|hamsa|nazar|urn|"
    r"headstone|coffin|cigarette|syringe|blood|bandage|crutch|x-ray|elevator|mouse trap|razor|"
    r"safety pin|low battery|flashlight|diya|prayer|hair pick|clutch|briefs|sari|one-piece|"
    r"flat shoe|ballet|keyboard|trackball|with arrow|receiver|camera with|e-mail|outbox|package|"
    r"ballot|hammer and|clamp|petri|dna|lotion|roll of|pick$|old key|long drum|maracas|slash|"
    r"musical score|musical notes|postal|megaphone|safety vest|lab coat|sponge|bubbles|printer",
    "Smileys & Emotion": r"^(?!(grinning face|face with tears of joy|smiling face with heart-eyes|"
    r"smiling face with sunglasses|thinking face|sleeping face|crying face|loudly crying face|"
    r"angry face|exploding head|cowboy hat face|nerd face|partying face|hot face|cold face|"
    r"nauseated face|smiling face with horns|skull|pile of poo|clown face|ogre|ghost|alien|"
    r"alien monster|robot|see-no-evil monkey|red heart|broken heart|blue heart|green heart|"
    r"yellow heart|heart with arrow|collision|speech balloon|kiss mark)$)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictograms:
    """The subjects in every style.

    images: (subjects, styles, 128, 128, 3) uint8 on white, or larger
    held_out: (subjects, styles) bool
    everyday: (subjects,) bool, those that a training is about; the others teach it the styles
    """

    names: tuple[str, ...]
    keywords: tuple[tuple[str, ...], ...]
    images: np.ndarray
    held_out: np.ndarray
    everyday: np.ndarray

    def save(self, path: Path) -> None:
        """Write everything as one `.npz`, whole or not at all."""
        partial = path.with_suffix(".partial.npz")
        np.savez(
            partial,
            names=np.array(self.names),
            keywords=np.array(["\n".join(words) for words in self.keywords]),
            images=self.images,
            held_out=self.held_out,
            everyday=self.everyday,
        )
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote; no pickles."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(
                names=tuple(map(str, arrays["names"])),
                keywords=tuple(tuple(filter(None, str(w).split("\n"))) for w in arrays["keywords"]),
                images=arrays["images"],
                held_out=arrays["held_out"],
                everyday=arrays["everyday"],
            )


def caption(name: str, style: str | None) -> str:
    """Write the plain caption of a picture, as the evaluation and the README use it."""
    return name if style is None else f"{name}, {style} style"


def random_caption(
    name: str, keywords: tuple[str, ...], style: int, rng: np.random.Generator
) -> str:
    """Draw one of the ways a person may ask for a picture; one in eight leaves the style out."""
    word, draw, subject = STYLES[style], rng.random(), name
    if draw < 0.35:
        subject = f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
    elif draw < 0.45 and keywords:
        subject = f"{name} {keywords[int(rng.integers(len(keywords)))]}"
    forms = (
        subject,
        *(f"{subject}, {word} style",) * 5,
        f"{word} style {subject}",
        f"{subject} {word}",
    )
    return forms[int(rng.integers(len(forms)))]


def unseen_synonyms(pictograms: Pictograms) -> dict[int, str]:
    """Return for everyday subjects a keyword of whose words no other text has one.

    Texts are all names and keywords: with `hide_synonyms` no caption holds these words.
    """
    counts = Counter(
        word
        for name, keywords in zip(pictograms.names, pictograms.keywords, strict=True)
        for text in (name, *keywords)
        for word in set(text.split())
    )
    found = {}
    for subject in np.flatnonzero(pictograms.everyday):
        alone = [k for k in pictograms.keywords[subject] if all(counts[w] == 1 for w in k.split())]
        if alone:
            found[int(subject)] = min(alone, key=lambda text: (len(text.split()), text))
    return found


def hide_synonyms(pictograms: Pictograms) -> Pictograms:
    """Return the data set without the keywords of `unseen_synonyms`."""
    hidden = unseen_synonyms(pictograms)
    keywords = tuple(
        tuple(word for word in words if word != hidden.get(subject))
        for subject, words in enumerate(pictograms.keywords)
    )
    return replace(pictograms, keywords=keywords)


def all_captions(pictograms: Pictograms) -> list[str]:
    """List texts with every word whose tokens must be whole: names and styles, not keywords."""
    return [*pictograms.names, *(f"a an {style} style," for style in STYLES)]


def render(svg: str, size: int = SIZE) -> np.ndarray:
    """Draw an SVG on white: (size, size, 3) uint8, with a margin in proportion."""
    import resvg_py

    inner = size - 2 * (MARGIN * size // SIZE)
    png = resvg_py.svg_to_bytes(svg_string=svg, width=inner, height=inner)
    icon = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    canvas = Image.new("RGBA", (size, size), "white")
    canvas.alpha_composite(icon, ((size - icon.width) // 2, (size - icon.height) // 2))
    return np.asarray(canvas.convert("RGB"))


def build(
    folder: Path,
    *,
    everyday: bool,
    size: int = SIZE,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> Pictograms:
    """Fetch the packages into `folder`, choose the subjects and render them in every style.

    size: of the pictures in pixels
    `everyday` takes about 500 subjects (animals, food, plants, vehicles, things, faces); otherwise
    all that the four sets share. Raises ModelError when a package cannot be had.
    """
    icon_sets = [read_member(fetch(package, folder), "icons.json") for package in ICON_SETS]
    emoji = read_member(fetch(NAMES, folder), "data-by-emoji.json")
    keywords = read_member(fetch(KEYWORDS, folder), "dist/emoji-en-US.json")
    chosen = {
        character: facts
        for character, facts in emoji.items()
        if all(_icon(icons, _slug(facts)) for icons in icon_sets)
        and facts["group"] != "Flags"
        and (not everyday or _is_everyday(facts))
    }
    images = np.stack(
        [
            np.stack([render(_svg(icons, _slug(chosen[character])), size) for icons in icon_sets])
            for character in progress(chosen)
        ]
    )
    names = tuple(facts["name"].lower().replace("’", "'") for facts in chosen.values())
    return Pictograms(
        names=names,
        keywords=tuple(
            _words(keywords.get(character, ()), name)
            for character, name in zip(chosen, names, strict=True)
        ),
        images=images,
        held_out=hold_out(names),
        everyday=np.array([_is_everyday(facts) for facts in chosen.values()]),
    )


def hold_out(names: Iterable[str]) -> np.ndarray:
    """Say of each subject in each style, (subjects, styles) bool, whether it is held out."""
    listed = set(HELD_OUT.read_text(encoding="utf-8").splitlines())
    return np.array([[caption(name, style) in listed for style in STYLES] for name in names])


def _is_everyday(facts: dict[str, Any]) -> bool:
    left_out = EVERYDAY_GROUPS.get(facts["group"])
    return left_out is not None and re.search(left_out, facts["name"]) is None


def _slug(facts: dict[str, Any]) -> str:
    return str(facts["slug"]).replace("_", "-")


def _words(keywords: Iterable[str], name: str) -> tuple[str, ...]:
    """Keep keywords that are words and say something that the name does not."""
    spaced = (word.replace("_", " ").lower() for word in keywords)
    return tuple(word for word in spaced if re.fullmatch("[a-z ]+", word) and word not in name)


def _icon(icons: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Look an icon up, following plain aliases."""
    for _ in range(5):
        if name in icons["icons"]:
            return dict(icons["icons"][name])
        alias = icons.get("aliases", {}).get(name)
        if alias is None or set(alias) - {"parent"}:
            return None
        name = alias["parent"]
    return None


def _svg(icons: dict[str, Any], name: str) -> str:
    icon = _icon(icons, name)
    assert icon is not None
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}">{icon["body"]}</svg>'
    )
