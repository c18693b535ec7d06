"""Prompts of any length as chunks, rows of the tokenizer, with what each token counts.

A text encoder sees one row at a time; the UNet attends to the chunks' states one after the other.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.errors import RequestError
from runtime.conditioning.syntax import parse
from runtime.conditioning.tokenizer import Tokenizer

__all__ = ["Chunk", "emphasize", "make_chunks"]

# How far back a chunk may end at a comma rather than within a phrase, as in Automatic1111.
COMMA_TOKENS = 20
MAX_CHUNKS = 64  # some 4,800 tokens; a longer prompt is a slip, and would take the memory


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chunk:
    """A row of tokens: input_ids (n,) int64; weights (n,) float32, 1 for start, end, padding."""

    input_ids: NDArray[np.int64]
    weights: NDArray[np.float32]

    @property
    def key(self) -> bytes:
        """What equal rows have in common, whatever their weights."""
        return self.input_ids.tobytes()

    @classmethod
    def of(cls, tokens: list[tuple[int, float]], tokenizer: Tokenizer) -> "Chunk":
        """Make the row of these ids and weights."""
        row = tokenizer.row([index for index, _ in tokens])
        weights = np.ones(len(row), np.float32)
        weights[1 : len(tokens) + 1] = [weight for _, weight in tokens]
        return cls(input_ids=row, weights=weights)


def make_chunks(text: str, tokenizer: Tokenizer) -> list[Chunk]:
    """Return the chunks of a prompt, at least one.

    BREAK ends a chunk; a full one ends after its last comma if that is near. The words of textual
    inversion stay whole if one fits a chunk at all. Raises RequestError for what is not text, and
    for more than 64 chunks.
    """
    room, comma = tokenizer.max_length - 2, tokenizer.encoder.token_to_id(",</w>")
    full: list[list[tuple[int, float]]] = []
    for stretch in parse(text):
        chunk: list[tuple[int, float]] = []
        after_comma = 0  # where in the chunk a phrase began, 0 for none
        for piece in stretch:
            for ids in _words(tokenizer, piece.text, room):
                is_comma = tuple(ids) == (comma,)
                if len(chunk) + len(ids) > room:
                    near = after_comma and room - after_comma < COMMA_TOKENS
                    moved = near and len(chunk) == room and not is_comma
                    end = after_comma if moved else len(chunk)
                    full.append(chunk[:end])
                    chunk, after_comma = chunk[end:], 0
                    if len(chunk) + len(ids) > room:  # a word of many tokens, after what moved
                        full.append(chunk)
                        chunk = []
                chunk += [(index, piece.weight) for index in ids]
                if is_comma:
                    after_comma = len(chunk)
        full.append(chunk)
    if len(full) > 1 and not full[-1]:
        full.pop()  # a BREAK at the end
    if len(full) > MAX_CHUNKS:
        raise RequestError(
            f"A prompt has {len(full)} chunks of {room} tokens; up to {MAX_CHUNKS} fit, shorten it "
            f"(it begins {text[:40]!r})."
        )
    return [Chunk.of(tokens, tokenizer) for tokens in full]


def _words(tokenizer: Tokenizer, text: str, room: int) -> Iterator[tuple[int, ...]]:
    """Yield the ids that must stay in one chunk."""
    for ids, _ in tokenizer.words_of(text):
        for start in range(0, len(ids), room):
            yield tuple(ids[start : start + room])


def emphasize(
    hidden_states: NDArray[np.float32], weights: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Multiply the states of a chunk, (n, D), by its tokens' weights, (n,), and keep their mean.

    Weights of 1 change no bit. The mean is that of all numbers, as in Automatic1111.
    """
    if np.all(weights == 1):
        return hidden_states
    weighted = hidden_states.astype(np.float64) * weights[:, None]
    mean = weighted.mean()
    if mean:
        weighted *= hidden_states.mean(dtype=np.float64) / mean
    return weighted.astype(np.float32)
