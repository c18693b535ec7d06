"""CLIP's tokenizer: prompts to rows of `input_ids`.

Byte-level byte-pair encoding (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909) as CLIP uses
it (Radford et al. 2021, https://arxiv.org/abs/2103.00020): NFC, white space collapsed, lower case,
words split by one pattern, each word merged by rank with "</w>" at its end. The ids equal those of
transformers' `CLIPTokenizer` for the same folder.

A row is [start, tokens of the prompt, end, padding]. The padding is the model's own: Stable
Diffusion 1.x pads with the end token, 2.x with "!".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.errors import ModelError, RequestError
from engine.graphs.graph import TextPart
from engine.model import Model
from runtime.conditioning.cleaning import clean_text
from runtime.conditioning.syntax import parse
from runtime.conditioning.vocabulary import Vocabulary, build_encoder, read_json
from runtime.conditioning.words import split_at_words, word_pattern

if TYPE_CHECKING:
    import tokenizers

PAD_TOKENS = {"quick_gelu": "<|endoftext|>", "gelu": "!"}  # CLIP's own encoders, and OpenCLIP's


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokens:
    """The ids of some prompts; input_ids: (batch, max_length), int64."""

    input_ids: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokenizer:
    """A model's tokenizer; `load` makes it from the model's `tokenizer/` folder.

    max_length: tokens of a row, the start and the end token included
    words: by the words of textual inversion, in small letters, the ids that each stands for
    pattern: finds them in a text
    cleans: whether HTML entities and curly quotes are resolved first, as CLIP's original does
    has_start: whether the start token stands before the text, as CLIP's and BERT's does
    """

    max_length: int
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int
    encoder: tokenizers.Tokenizer
    words: Mapping[str, Sequence[int]] = field(default_factory=dict)
    pattern: re.Pattern[str] | None = None
    cleans: bool = False
    has_start: bool = True

    @property
    def begin(self) -> int:
        """How many tokens stand before the text in a row."""
        return int(self.has_start)

    @property
    def room(self) -> int:
        """How many tokens of text fit a row."""
        return self.max_length - self.begin - 1

    @property
    def vocab_size(self) -> int:
        """How many ids there are, added tokens included."""
        return self.encoder.get_vocab_size(with_added_tokens=True)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read a tokenizer folder as diffusers writes it.

        It holds `tokenizer_config.json`, and `vocab.json` with `merges.txt` or `tokenizer.json`.
        Another class than CLIP's has `tokenizer.json`. Raises ModelError when a file is missing or
        cannot be used.
        """
        kind = str(read_json(folder / "tokenizer_config.json").get("tokenizer_class") or "CLIP")
        if not kind.startswith("CLIP"):
            from runtime.conditioning.other_tokenizers import OTHER, load_other

            if any(kind.startswith(name) for name in OTHER):
                return cls(**load_other(folder, kind))
        return cls.of(Vocabulary.read(folder), str(folder))

    @classmethod
    def clip(cls, pad_token: str) -> Tokenizer:
        """Return CLIP's own tokenizer, for checkpoints that come without one."""
        return cls.of(Vocabulary.clip(pad_token), "the package")

    @classmethod
    def of(cls, vocabulary: Vocabulary, source: str) -> Tokenizer:
        """Build the tokenizer of a vocabulary; raises ModelError naming its source."""
        try:
            encoder = build_encoder(vocabulary)
        except Exception as error:  # the library raises bare Exception
            raise ModelError(
                f"The tokenizer files in {source} do not fit together ({error}); fetch the folder "
                f"again from where the model came from."
            ) from error
        return cls(
            max_length=vocabulary.max_length,
            bos_token_id=vocabulary.special_id("bos_token"),
            eos_token_id=vocabulary.special_id("eos_token"),
            pad_token_id=vocabulary.special_id("pad_token"),
            encoder=encoder,
        )

    def with_words(self, words: Mapping[str, Sequence[int]]) -> Tokenizer:
        """Return a tokenizer that knows more words, whatever their case; each becomes its ids.

        A word counts before a token. Raises RequestError for one that is known, or special.
        """
        known = dict(self.words)
        special = {added.content for added in self.encoder.get_added_tokens_decoder().values()}
        for word, ids in words.items():
            normal = self.normal(word).strip()
            if not normal or normal in {self.normal(token) for token in special}:
                raise RequestError(
                    f"The word {word!r} of a textual inversion is a token of the model that means "
                    "no text; rename its file, or give FILE=WORD."
                )
            if normal in known:
                raise RequestError(f"Two textual inversions mean the word {word!r}; rename one.")
            known[normal] = tuple(ids)
        return replace(self, words=MappingProxyType(known), pattern=word_pattern(known))

    @property
    def comma(self) -> int | None:
        """The id of a comma, after which a full chunk may end."""
        ids = (self.encoder.token_to_id(token) for token in (",</w>", ","))
        return next((index for index in ids if index is not None), None)

    def is_token(self, word: str) -> bool:
        """Tell whether a word is one token of the vocabulary."""
        normal = self.normal(word)
        pieces = (word, normal, f"{normal}</w>")
        return any(self.encoder.token_to_id(piece) is not None for piece in pieces)

    def normal(self, text: str) -> str:
        """Write a text as it is tokenised: in small letters, white space as single spaces."""
        normalizer = self.encoder.normalizer  # GPT-2 has none
        return text if normalizer is None else str(normalizer.normalize_str(text))

    def words_in(self, prompt: str) -> set[str]:
        """Return the taught words that a prompt holds, as `normal` writes them."""
        return {self.normal(word) for word in self._pieces(prompt)[1::2]}

    def _pieces(self, prompt: str) -> list[str]:
        return split_at_words(prompt, self.pattern) if self.pattern else [prompt]

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Tokenise prompts; rows are cut or padded to `max_length`.

        Raises RequestError for a prompt that is no string or is not text.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise RequestError(
                f"The prompts came as {type(prompts).__name__}; give a list of strings."
            )
        ids = ([i for meant in self.words_of(prompt) for i in meant] for prompt in prompts)
        rows = [self.row(each[: self.room]) for each in ids]
        return Tokens(input_ids=np.array(rows, np.int64).reshape(len(rows), self.max_length))

    def words_of(self, prompt: str) -> list[Sequence[int]]:
        """Return the ids of each token; a word of textual inversion is one of several ids.

        Raises RequestError for a prompt that is no string or is not text.
        """
        check_text(prompt)
        if self.cleans:
            prompt = clean_text(prompt)
        found: list[Sequence[int]] = []
        for i, piece in enumerate(self._pieces(prompt)):
            if i % 2:
                found.append(self.words[self.normal(piece)])
            elif piece:
                # One by one: the library's batches start threads, which do not survive a fork.
                encoding = self.encoder.encode(piece, add_special_tokens=False)
                found += [(given,) for given in encoding.ids]
        return found

    def row(self, ids: Sequence[int]) -> NDArray[np.int64]:
        """Return (max_length,): the start, up to `room` ids, the end and padding."""
        row = np.full(self.max_length, self.pad_token_id, np.int64)
        start = [self.bos_token_id] if self.has_start else []
        row[: len(ids) + self.begin + 1] = [*start, *ids, self.eos_token_id]
        return row


def load_tokenizers(model: Model) -> dict[TextPart, Tokenizer]:
    """Load the tokenizer of each text encoder: the folder's own, or CLIP's; raises ModelError."""
    tokenizers: dict[TextPart, Tokenizer] = {}
    for name, config in model.text_encoders.items():
        folder = model.path / name.replace("text_encoder", "tokenizer")
        if (model.path / "model_index.json").is_file() or folder.is_dir():
            tokenizers[name] = Tokenizer.load(folder)
        else:
            tokenizers[name] = Tokenizer.clip(PAD_TOKENS[config.hidden_act])
    check_tokenizers(model, tokenizers)
    return tokenizers


def check_tokenizers(model: Model, tokenizers: Mapping[TextPart, Tokenizer]) -> None:
    """Raise ModelError unless every text encoder knows its tokenizer's tokens."""
    for name, tokenizer in tokenizers.items():
        encoder = model.text_encoders[name]
        if tokenizer.max_length > encoder.max_position_embeddings:
            raise ModelError(
                f"the tokenizer of {model.path} makes rows of {tokenizer.max_length} tokens and "
                f"its {name} takes {encoder.max_position_embeddings}; use parts of one model"
            )
        if tokenizer.vocab_size > encoder.vocab_size:
            raise ModelError(
                f"the tokenizer of {model.path} knows {tokenizer.vocab_size} tokens and its "
                f"{name} {encoder.vocab_size}; use parts of one model"
            )


def check_text(prompt: object) -> None:
    """Raise RequestError unless the prompt is a string that can be encoded."""
    if not isinstance(prompt, str):
        raise RequestError(f"A prompt came as {type(prompt).__name__}; give a string.")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"The prompt holds half a surrogate pair ({prompt[error.start]!a}) at character "
            f"{error.start}, which is not text; remove it."
        ) from error


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
    def of(cls, tokens: list[tuple[int, float]], tokenizer: Tokenizer) -> Chunk:
        """Make the row of these ids and weights."""
        row = tokenizer.row([index for index, _ in tokens])
        weights = np.ones(len(row), np.float32)
        begin = tokenizer.begin
        weights[begin : len(tokens) + begin] = [weight for _, weight in tokens]
        return cls(input_ids=row, weights=weights)


def make_chunks(text: str, tokenizer: Tokenizer) -> list[Chunk]:
    """Return the chunks of a prompt, at least one.

    BREAK ends a chunk; a full one ends after its last comma if that is near. The words of textual
    inversion stay whole if one fits a chunk at all. Raises RequestError for what is not text, and
    for more than 64 chunks.
    """
    room, comma = tokenizer.room, tokenizer.comma
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
    for ids in tokenizer.words_of(text):
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
