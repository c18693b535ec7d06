"""Words of textual inversion: which of them are taken, and how they are found in a prompt."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from engine.checkpoints.formats.tensors import short
from engine.errors import RequestError

if TYPE_CHECKING:
    from engine.adapters.textual_inversion import Embedding

__all__ = ["known_words", "split_at_words", "word_pattern"]


def known_words(
    embeddings: "Sequence[Embedding]", is_token: Callable[[str], bool]
) -> "tuple[dict[Embedding, Sequence[str]], list[str]]":
    """Choose the words of each embedding; returns them, and a sentence on each embedding.

    is_token: tells whether the model's vocabulary has a word
    A file's name counts even where it is a token of the model; a word that only the file states
    does not, nor one that is another's. Raises RequestError for two files of one name.
    """
    names = {embedding.name.lower() for embedding in embeddings}
    if len(names) < len(embeddings):
        counts = Counter(embedding.name.lower() for embedding in embeddings)
        raise RequestError(
            f"Two textual inversions mean the word {counts.most_common(1)[0][0]!r}; rename the "
            "file of one, or give FILE=WORD."
        )
    known: dict[Embedding, Sequence[str]] = {}
    notes = []
    for embedding in embeddings:
        words = [embedding.name]
        for word in list(embedding.rows)[1:]:
            if word.lower() in names:
                continue
            if is_token(word):
                notes.append(
                    f"{embedding.path} states the word {word!r}, which the model knows already: "
                    f"{embedding.name!r} means it, or give FILE={word}"
                )
                continue
            names.add(word.lower())
            words.append(word)
        known[embedding] = words
        if embedding.unused:
            held = ", ".join(map(short, embedding.unused))
            notes.append(f"{embedding.path} also holds {held}, which is not used")
        notes.append(f"{embedding.path} is meant by {' or '.join(map(repr, words))}")
    return known, notes


def word_pattern(words: Iterable[str]) -> re.Pattern[str]:
    """Find words, the longest first; one of letters stands alone: no "cat" within "category"."""
    patterns = []
    for word in sorted(words, key=len, reverse=True):
        whole = word[0].isalnum() and word[-1].isalnum()
        pattern = r"\s+".join(map(re.escape, word.split()))
        patterns.append(rf"(?<!\w){pattern}(?!\w)" if whole else pattern)
    return re.compile(f"({'|'.join(patterns)})", re.IGNORECASE)


def split_at_words(text: str, pattern: re.Pattern[str]) -> list[str]:
    """Split a text where words are found; texts and words follow each other by turns."""
    return pattern.split(unicodedata.normalize("NFC", text))
