"""What the UNet is told beside the latent: the texts, and in XL the pooled text and the sizes.

Rows of every array are groups of conditionings, [uncond, cond], each for every picture. The texts
are read as `runtime.conditioning.syntax` says, by which they may change from call to call.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import Engine
from engine.graphs.graph import Part, TextPart
from engine.model import Model
from runtime.conditioning.guidance import Guidance, embedded_guidance
from runtime.conditioning.syntax import schedule
from runtime.conditioning.tokenizer import (
    Chunk,
    Tokenizer,
    check_text,
    emphasize,
    load_tokenizers,
    make_chunks,
)
from runtime.conditioning.words import known_words

if TYPE_CHECKING:
    from engine.adapters.textual_inversion import Embedding

__all__ = ["Encoder", "Texts"]

Array = NDArray[np.float32]
Groups = tuple[tuple[str, ...], ...]  # of texts, at one call

# What the refiner is told: pictures that people liked, and for the negative prompt others.
# (Podell et al. 2023, arXiv:2307.01952; the numbers are those of the published pipeline.)
AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5
MAX_ROWS = 256  # of one call of a text encoder, which bounds its memory
CACHE_BYTES = 2**26  # some fifty pairs of prompts in XL


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Texts:
    """The texts of one call.

    negatives: the groups that guidance moves away from, each with one text for every prompt
    prompts: the groups that it moves to, one for each part of the prompts
    parts: (groups of prompts, prompts), how much each part counts; None for one part that counts 1
    maps: (groups of prompts, h, w) float32, the share of each at every cell of the latents; None
        where each counts everywhere
    repeats: pictures of each prompt
    """

    negatives: Sequence[Sequence[str]] = ()
    prompts: Sequence[Sequence[str]]
    parts: NDArray[np.float64] | None = None
    maps: Array | None = None
    repeats: int = 1

    @property
    def images(self) -> int:
        """B."""
        return len(self.prompts[0]) * self.repeats


@dataclass(slots=True, eq=False)
class EmbeddingCache:
    """What text encoders gave for the latest keys, as much as fits; safe for several threads."""

    limit: int = CACHE_BYTES
    _arrays: OrderedDict[Hashable, tuple[Array, ...]] = field(default_factory=OrderedDict)
    _bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, key: Hashable) -> tuple[NDArray[np.float32], ...] | None:
        """Return the arrays that were put there, of any shape, or None."""
        with self._lock:
            found = self._arrays.get(key)
            if found is not None:
                self._arrays.move_to_end(key)
            return found

    def put(self, key: Hashable, arrays: tuple[NDArray[np.float32], ...]) -> None:
        """Keep arrays, of any shape, in place of those that were not asked for the longest."""
        with self._lock:
            self._bytes += _size(arrays) - _size(self._arrays.pop(key, ()))
            self._arrays[key] = arrays
            while self._bytes > self.limit:
                _, gone = self._arrays.popitem(last=False)
                self._bytes -= _size(gone)


def _size(arrays: tuple[NDArray[np.float32], ...]) -> int:
    return sum(array.nbytes for array in arrays)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Encoder:
    """The text encoders of a model with their tokenizers.

    extra: (e, D) for each, the rows of the words that textual inversion taught them
    embedding_words: the known words of each textual inversion; notes: what was concluded of them
    cache: of what the engines gave lately; new weights need another
    """

    model: Model
    tokenizers: Mapping[TextPart, Tokenizer]
    engine: Callable[[Part], Engine]
    extra: Mapping[TextPart, Array] = field(default_factory=dict)
    embedding_words: "Mapping[Embedding, Sequence[str]]" = field(default_factory=dict)
    notes: Sequence[str] = ()
    cache: EmbeddingCache = field(default_factory=EmbeddingCache)

    def without_cache(self) -> "Encoder":
        """Return the encoder for other weights, whose cache is empty."""
        return replace(self, cache=EmbeddingCache())

    def with_embeddings(self, embeddings: "Sequence[Embedding]") -> "Encoder":
        """Return encoders that know these words and no others; raises ModelError, RequestError."""
        from engine.adapters.textual_inversion import join_halves

        encoders = self.model.text_encoders
        widths = {str(name): config.hidden_size for name, config in encoders.items()}
        joined = join_halves(embeddings, widths)
        for embedding in joined:
            embedding.check(widths)
        tokenizers, extra = load_tokenizers(self.model), {}
        known, notes = known_words(joined, next(iter(tokenizers.values())).is_token)
        for name, config in encoders.items() if joined else ():
            words, first = {}, config.vocab_size
            for embedding in joined:
                for word in known[embedding]:
                    rows = embedding.rows[word]
                    words[word] = range(first + rows.start, first + rows.stop)
                first += len(embedding.vectors[name])
            tokenizers[name] = tokenizers[name].with_words(words)
            extra[name] = np.concatenate([embedding.vectors[name] for embedding in joined])
        return replace(
            self,
            tokenizers=tokenizers,
            extra=extra,
            embedding_words=known,
            notes=notes,
            cache=EmbeddingCache(),
        )

    @property
    def words(self) -> dict[str, str]:
        """The words that textual inversion taught, by themselves in small letters."""
        return {word.lower(): word for words in self.embedding_words.values() for word in words}

    def unused_words(self, texts: Sequence[str]) -> list[str]:
        """Say of each textual inversion of which the texts hold no word, which words it has."""
        tokenizer = next(iter(self.tokenizers.values()))
        held = {word for text in texts for word in tokenizer.words_in(text)}
        return [
            f"the prompt holds no word of {embedding.path}: write {' or '.join(map(repr, words))}"
            for embedding, words in self.embedding_words.items()
            if not held & {tokenizer.normal(word).strip() for word in words}
        ]

    def condition(
        self,
        texts: Texts,
        guidance: Guidance,
        height: int,
        width: int,
        *,
        clip_skip: int = 1,
        clean_prompt: bool = False,
    ) -> list[Mapping[str, Array]]:
        """Encode the texts, and add what else the model is told; height and width in pixels.

        clip_skip: 1, or 2 for the text encoder's states before its last layer
        clean_prompt: whether HTML entities and curly quotes are resolved
        Returns for each call of the UNet its inputs that are not the latent's: context
        (g, B, n, D), guidance (g, B, 1, 1, 1), or with maps (g, B, 1, h, w); where the model takes
        them text_embeds (g, B, P), time_ids (g, B, T), timestep_cond (B, E). n is that of the
        longest prompt; what is the same in several calls is the same array.
        Raises RequestError for a text that is none.
        """
        embeds_scale = bool(self.model.unet.time_cond_proj_dim)  # such a model guides itself
        guided = [guidance.is_guided(scale) and not embeds_scale for scale in guidance.scales]
        shown = _shown(texts, guided)
        distinct = dict.fromkeys(text for groups in shown for group in groups for text in group)
        encoded = self._encode(list(distinct), clip_skip, clean_prompt)
        contexts = {
            groups: self._lay_out(groups, len(groups) - len(texts.prompts), texts.repeats, encoded)
            for groups in dict.fromkeys(shown)
        }
        if "time_ids" in self.model.unet.extra_inputs:
            for groups, inputs in contexts.items():
                inputs["time_ids"] = self._time_ids(texts, len(groups), height, width)
        counts = {
            scale: self._counts(scale, texts, guidance) for scale in dict.fromkeys(guidance.scales)
        }
        return [
            {**contexts[groups], **counts[scale]}
            for groups, scale in zip(shown, guidance.scales, strict=True)
        ]

    def _counts(self, scale: float, texts: Texts, guidance: Guidance) -> dict[str, Array]:
        """Say how much the groups count, or tell the model the scale where it guides itself."""
        parts = np.ones((1, len(texts.prompts[0]))) if texts.parts is None else texts.parts
        parts = parts[..., None, None, None]
        if texts.maps is not None:
            parts = parts * texts.maps[:, None, None]
        channels = self.model.unet.time_cond_proj_dim
        weights = guidance.weights(1.0 if channels else scale, parts)
        counts = {"guidance": np.repeat(weights, texts.repeats, axis=1)}
        if channels:
            row = embedded_guidance(scale, channels)
            counts["timestep_cond"] = np.repeat(row[None], texts.images, 0)
        return counts

    def _lay_out(
        self,
        groups: Groups,
        negatives: int,
        repeats: int,
        encoded: Mapping[str, tuple[Array, Array]],
    ) -> dict[str, Array]:
        """Put encoded texts where they belong: the context, and in XL the pooled text."""
        rows = [[text for text in group for _ in range(repeats)] for group in groups]
        context, pooled = (
            np.stack([np.stack([encoded[text][part] for text in row]) for row in rows])
            for part in (0, 1)
        )
        if self.model.zeros_for_empty_prompt:
            for group, negative in enumerate(rows[:negatives]):
                empty = [not text for text in negative]
                context[group, empty], pooled[group, empty] = 0, 0
        inputs: dict[str, Array] = {"context": context}
        takes_pooled = "text_embeds" in self.model.unet.extra_inputs
        return inputs | {"text_embeds": pooled} if takes_pooled else inputs

    def _encode(
        self, texts: Sequence[str], clip_skip: int, clean_prompt: bool
    ) -> dict[str, tuple[Array, Array]]:
        """Return each text's states, (n, D), and its pooled text, (P,), of the first chunk.

        All get as many chunks as the longest has; the encoders' states stand side by side, and
        the pooled text is the last encoder's.
        """
        tokenizers = {
            name: replace(tokenizer, cleans=clean_prompt)
            for name, tokenizer in self.tokenizers.items()
        }
        chunked = {
            name: {text: make_chunks(text, tokenizer) for text in texts}
            for name, tokenizer in tokenizers.items()
        }
        count = max(len(chunks) for found in chunked.values() for chunks in found.values())
        states: dict[str, list[Array]] = {text: [] for text in texts}
        pooled: dict[str, Array] = {}
        for name, found in chunked.items():
            empty = Chunk.of([], self.tokenizers[name])
            padded = {
                text: chunks + [empty] * (count - len(chunks)) for text, chunks in found.items()
            }
            rows = {c.key: c.input_ids for chunks in padded.values() for c in chunks}
            index = {key: i for i, key in enumerate(rows)}
            hidden, ends = self._run(name, np.stack(list(rows.values())), clip_skip)
            for text, chunks in padded.items():
                parts = [emphasize(hidden[index[c.key]], c.weights) for c in chunks]
                states[text].append(np.concatenate(parts))
                pooled[text] = ends[index[chunks[0].key]]
        return {text: (np.concatenate(states[text], axis=-1), pooled[text]) for text in texts}

    def _run(
        self, name: TextPart, input_ids: NDArray[np.int64], clip_skip: int
    ) -> tuple[Array, ...]:
        """Return the states, (rows, n, D), and the pooled texts, (rows, P), perhaps kept ones.

        They are kept for all rows together: what a row gives depends in the last bits on the rows
        beside it, and a picture must not depend on what was drawn before it.
        """
        before_last = clip_skip == 2 and self.model.family.context == "last_hidden_state"
        key = (name, before_last, input_ids.shape, input_ids.tobytes())
        found = self.cache.get(key)
        if found is None:
            found = self._run_rows(name, input_ids, before_last)
            self.cache.put(key, found)
        return found

    def _run_rows(
        self, name: TextPart, input_ids: NDArray[np.int64], before_last: bool
    ) -> tuple[Array, Array]:
        """Run a text encoder on at most MAX_ROWS rows at a time."""
        none = np.zeros((1, self.model.text_encoders[name].hidden_size), np.float32)
        inputs = {"extra_embeddings": self.extra.get(name, none)}
        states, pooled = [], []
        for at in range(0, len(input_ids), MAX_ROWS):
            given = self.engine(name).run({**inputs, "input_ids": input_ids[at : at + MAX_ROWS]})
            if before_last:
                states.append(self._final_norm(name, given["penultimate_hidden_state"]))
            else:
                states.append(given[self.model.family.context])
            pooled.append(given["pooled"])
        return np.concatenate(states), np.concatenate(pooled)  # copies, engines reuse buffers

    def _final_norm(self, name: TextPart, hidden_states: Array) -> Array:
        """Apply the layer norm that the graph applies after the last layer only."""
        weights, prefix = self.model.find(name), self.model.text_encoders[name].final_norm
        if prefix is None:
            return hidden_states
        scale, shift = (weights[f"{prefix}.{part}"].astype("f") for part in ("weight", "bias"))
        centered = hidden_states - hidden_states.mean(-1, keepdims=True)
        variance = np.square(centered).mean(-1, keepdims=True)
        epsilon = self.model.text_encoders[name].layer_norm_eps
        normed: Array = centered / np.sqrt(variance + np.float32(epsilon)) * scale + shift
        return normed

    def _time_ids(self, texts: Texts, groups: int, height: int, width: int) -> Array:
        """Return (g, B, T): the size before cropping, the corner cropped at, then the size wanted.

        The refiner is told a score in place of the last (arXiv:2307.01952, section 2.2).
        """
        origin = [height, width, 0, 0]
        if self.model.unet.addition_time_ids == len(origin) + 1:
            negatives, prompts = groups - len(texts.prompts), len(texts.prompts)
            scores = [NEGATIVE_AESTHETIC_SCORE] * negatives + [AESTHETIC_SCORE] * prompts
            rows = [[*origin, score] for score in scores]
        else:
            rows = [[*origin, height, width]] * groups
        return np.repeat(np.array(rows, np.float32)[:, None], texts.images, 1)


def _shown(texts: Texts, guided: Sequence[bool]) -> list[Groups]:
    """Return the groups of texts at each call, as prompts that change have them there."""
    groups = [*(texts.negatives if any(guided) else ()), *texts.prompts]
    schedules = {}
    for text in dict.fromkeys(text for group in groups for text in group):
        check_text(text)
        schedules[text] = schedule(text, len(guided))

    def at(text: str, call: int) -> str:
        return next(version for end, version in schedules[text] if call < end)

    return [
        tuple(
            tuple(at(text, call) for text in group)
            for group in (*(texts.negatives if negated else ()), *texts.prompts)
        )
        for call, negated in enumerate(guided)
    ]
