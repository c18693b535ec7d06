"""A short prompt made longer by a language model, a GPT-2 that was fine-tuned on prompts.

Tokens are drawn one by one: the logits that follow the text so far, divided by the temperature,
of which the top_k highest count (Fan et al. 2018, arXiv:1805.04833, section 5.4). Keys and values
of all tokens are kept, so each new token costs one pass over one token.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from engine.backends.base import Engine
from engine.backends.settings import BackendSettings
from engine.checkpoints.gpt2 import LanguageModel
from engine.engines import open_engine
from engine.errors import ModelError, RequestError
from engine.graphs.graph import Precision, find_graph, graph_folders
from runtime.checks import check_number
from runtime.conditioning.syntax import escape
from runtime.conditioning.tokenizer import check_text
from runtime.conditioning.vocabulary import read_json, read_merges
from runtime.noise import MAX_SEED

if TYPE_CHECKING:
    import tokenizers

__all__ = ["PromptExpander", "Sampling"]

MAX_NEW_TOKENS = 10_000
END_OF_LINE = "\n"
END_OF_TEXT = "<|endoftext|>"  # GPT-2's; found in a text before it is split into words
NO_CHARACTER = "\ufffd"  # what bytes decode to that are no UTF-8


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    temperature: above 1 is bolder, below 1 safer; 0 takes the likeliest token
    top_k: how many tokens are drawn from; 0 for all, 1 takes the likeliest
    repetition_penalty: 1 is none; above it, tokens of the text so far become less likely (Keskar
        et al. 2019, arXiv:1909.05858, section 4.1)
    """

    temperature: float = 0.9
    top_k: int = 50
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what is no number, and numbers out of range."""
        check_number("temperature", self.temperature, Real, 0, 100)
        check_number("top_k", self.top_k, Integral, 0, 2**31)
        check_number("repetition_penalty", self.repetition_penalty, Real, 0.01, 100)

    def probabilities(
        self, logits: NDArray[np.float32], seen: Sequence[int]
    ) -> NDArray[np.float64]:
        """Return how likely each token is taken; logits and result: (V,).

        As in transformers, the penalty comes first, and tokens as likely as the last of the top_k
        stay too. seen: the tokens so far.
        """
        scores: NDArray[np.float64] = logits.astype(np.float64)
        known = np.unique(np.asarray(seen, np.int64))
        penalty = self.repetition_penalty
        scores[known] *= np.where(scores[known] < 0, penalty, 1 / penalty)
        if self.temperature == 0 or self.top_k == 1:
            greedy = np.zeros_like(scores)
            greedy[scores.argmax()] = 1
            return greedy
        if 0 < self.top_k < len(scores):
            scores[scores < np.partition(scores, -self.top_k)[-self.top_k]] = -math.inf
        with np.errstate(over="ignore"):  # a temperature of nearly 0
            np.exp((scores - scores.max()) / self.temperature, out=scores)
        scores /= scores.sum()
        return scores

    def token(self, logits: NDArray[np.float32], seen: Sequence[int], uniform: float) -> int:
        """Return the token that a number of [0, 1) falls on, by logits of (tokens,)."""
        upto = self.probabilities(logits, seen).cumsum()
        return int(np.searchsorted(upto, uniform * upto[-1], side="right"))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PromptExpander:
    """A language model with its tokenizer and its engine; `load` makes one."""

    model: LanguageModel
    tokenizer: "tokenizers.Tokenizer"
    engine: Engine

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        graphs: str | Path | None = None,
        precision: Precision = "float32",
        settings: BackendSettings | None = None,
    ) -> Self:
        """Load a GPT-2 from a folder in transformers' layout.

        graphs: a folder that `python -m export language-model` wrote; None looks in the cache.
        Raises ModelError, GraphError or BackendError.
        """
        model = LanguageModel.open(Path(folder))
        tokenizer = load_tokenizer(model)
        graph = find_graph(
            "language_model", model.config, precision, graph_folders(graphs), model.path
        )
        engine = open_engine(graph, model.weights, settings or BackendSettings())
        return cls(model=model, tokenizer=tokenizer, engine=engine)

    def __call__(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 60,
        temperature: float = 0.9,
        top_k: int = 50,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        prompt_syntax: bool = True,
    ) -> str:
        """Return the prompt, as it was given, with what the model would write after it.

        It ends with the model's end of text, the line, the model's context or max_new_tokens.
        temperature, top_k, repetition_penalty: as in `Sampling`
        seed: the same gives the same text; None draws one
        prompt_syntax: whether brackets mean something in the result
            (`runtime.conditioning.syntax`); then those that the model wrote are escaped
        Raises RequestError.
        """
        check_text(prompt)
        check_number("max_new_tokens", max_new_tokens, Integral, 1, MAX_NEW_TOKENS)
        if seed is not None:
            check_number("seed", seed, Integral, 0, MAX_SEED)
        sampling = Sampling(
            temperature=temperature, top_k=top_k, repetition_penalty=repetition_penalty
        )
        # Its stream is the same in every version of numpy.
        twister = np.random.RandomState(None if seed is None else seed & 0xFFFF_FFFF)

        def choose(logits: NDArray[np.float32], seen: Sequence[int]) -> int:
            return sampling.token(logits, seen, twister.random_sample())

        # Its words have their blanks before them: one at the prompt's end would be a word without.
        known = prompt.rstrip(" ")
        tokens = self.tokens(self._ids(known, max_new_tokens), choose)
        written = self._text(islice(tokens, max_new_tokens))
        if known != prompt:
            written = written.lstrip(" ")
        return prompt + (escape(written) if prompt_syntax else written)

    def tokens(
        self, ids: Sequence[int], choose: Callable[[NDArray[np.float32], Sequence[int]], int]
    ) -> Iterator[int]:
        """Yield the tokens after these, until the context is full.

        ids: one or more, no more than the context takes
        choose: is given the logits (V,) and all tokens so far
        """
        config = self.model.config
        past = np.zeros((config.n_layer, 2, 1, config.n_head, 0, config.head_width), np.float32)
        seen, new = list(ids), list(ids)
        while len(seen) <= config.n_positions:
            outputs = self.engine.run({"input_ids": np.array([new], np.int64), "past": past})
            past = outputs["present"]
            new = [choose(outputs["logits"][0], seen)]
            seen += new
            yield new[0]

    def _ids(self, text: str, room: int) -> list[int]:
        """Return the tokens of a text's end that leaves room for new ones, where that can be."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if not ids:
            if self.model.bos_token_id is None:
                raise RequestError("the prompt is empty; this language model needs a word or more")
            return [self.model.bos_token_id]
        context = self.model.config.n_positions
        return list(ids[-max(context - room, context // 2, 1) :])

    def _text(self, tokens: Iterator[int]) -> str:
        """Return the text of tokens up to the end of the text or of the line."""
        ids: list[int] = []
        for token in tokens:
            if token in self.model.eos_token_ids:
                break
            ids.append(token)
            if END_OF_LINE in self.tokenizer.decode([token]):
                break
        text = self.tokenizer.decode(ids).partition(END_OF_LINE)[0]
        return text.replace(NO_CHARACTER, "").rstrip()


def load_tokenizer(model: LanguageModel) -> "tokenizers.Tokenizer":
    """Read GPT-2's byte-level byte-pair encoding; raises ModelError.

    The folder holds `tokenizer.json`, or `vocab.json` with `merges.txt`.
    """
    from tokenizers import Tokenizer

    whole = model.path / "tokenizer.json"
    try:
        encoder = Tokenizer.from_file(str(whole)) if whole.is_file() else _byte_level(model.path)
    except ModelError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise ModelError(
            f"the tokenizer files in {model.path} cannot be used ({error}); fetch the folder "
            "again from where the model came from"
        ) from error
    largest = max(encoder.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= model.config.vocab_size:
        raise ModelError(
            f"the tokenizer of {model.path} has ids up to {largest} and its model up to "
            f"{model.config.vocab_size - 1}; use files of one model"
        )
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def _byte_level(folder: Path) -> "tokenizers.Tokenizer":
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        raise ModelError(
            f"{folder} holds no tokenizer; put tokenizer.json there, or vocab.json and merges.txt"
        )
    vocabulary = read_json(folder / "vocab.json")
    encoder = Tokenizer(models.BPE(vocab=vocabulary, merges=read_merges(folder / "merges.txt")))
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    if END_OF_TEXT in vocabulary:
        encoder.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False)])
    return encoder
