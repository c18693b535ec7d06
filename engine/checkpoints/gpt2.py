"""A language model: a GPT-2 in a folder in transformers' layout."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from engine.checkpoints.component import Component, Source, assemble, refuse_left_over
from engine.checkpoints.formats.files import Weights, open_weights
from engine.configs.base import read_json
from engine.configs.gpt2 import GPT2Config
from engine.errors import ModelError

__all__ = ["LanguageModel"]

PREFIX = "transformer."  # GPT2LMHeadModel's; a GPT2Model is saved without it
HEAD, EMBEDDING = "lm_head.weight", "wte.weight"
# The causal mask and the number that it masks with; the head, where it is the embedding.
UNUSED = r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)|lm_head\.weight"
END_OF_TEXT = 50256  # GPT-2's, for configurations that name none


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LanguageModel:
    """What a language model says of itself, and its weights under its graph's names, mapped.

    bos_token_id: what stands before a text; None where the model has none
    eos_token_ids: what ends one
    """

    path: Path
    config: GPT2Config
    weights: Component
    bos_token_id: int | None
    eos_token_ids: frozenset[int]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read a folder of `config.json` and weights; raises ModelError when it cannot be used."""
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{path} holds no config.json; give the folder of a GPT-2 in transformers' layout "
                "(config.json, model.safetensors, vocab.json and merges.txt or tokenizer.json)"
            )
        values = read_json(path / "config.json")
        weights = open_weights(path)
        prefix = PREFIX if any(name.startswith(PREFIX) for name in weights) else ""
        config = GPT2Config.from_dict(values)
        tied = config.tie_word_embeddings if HEAD not in weights else _is_tied(weights, prefix)
        config = replace(config, tie_word_embeddings=tied)
        sources = {
            name: Source(name=name if name == HEAD else prefix + name.removeprefix(PREFIX))
            for name in config.tensor_shapes()
        }
        component = assemble(path, weights, config, sources)
        refuse_left_over(path, weights, component.used(), UNUSED)
        known = [i for i in _ids(values, "bos_token_id") if i < config.vocab_size]
        return cls(
            path=path,
            config=config,
            weights=component,
            bos_token_id=known[0] if known else None,
            eos_token_ids=frozenset(_ids(values, "eos_token_id")),
        )


def _is_tied(weights: Weights, prefix: str) -> bool:
    """Tell whether a head that is stored is the embedding: some files hold it twice."""
    embedding = prefix + EMBEDDING
    return embedding in weights and np.array_equal(weights[HEAD], weights[embedding])


def _ids(values: Mapping[str, Any], name: str) -> list[int]:
    """Read one token's id, several or none."""
    given = values.get(name, END_OF_TEXT)
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if any(type(i) is not int or i < 0 for i in ids):
        raise ModelError(
            f"config.json has {name} = {json.dumps(given)}; a token's id is expected: "
            "restore the file"
        )
    return ids
