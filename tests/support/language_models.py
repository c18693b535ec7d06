"""A small random GPT-2 with a byte-level tokenizer, in a folder as transformers writes it."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config as ReferenceConfig
from transformers import GPT2LMHeadModel

from engine.configs.gpt2 import GPT2Config
from engine.graphs.graph import graph_name
from tests.support.parity import randomised
from tests.support.traced import trace_once

END_OF_TEXT = "<|endoftext|>"
TEXTS = (
    "a red apple on a table, highly detailed, digital painting, concept art, sharp focus",
    "portrait of a cat, (oil on canvas:1.2), intricate [details], soft light, café, naïve 🍎\n",
)
SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
}
VOCABULARY = 290


def small_tokenizer() -> Tokenizer:
    """Train GPT-2's kind of tokenizer on two lines; the end of text is its id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def small_gpt2(**changes: Any) -> Any:
    """Draw a model whose logits differ, from place to place too: it does not stammer."""
    torch.manual_seed(0)
    settings = {**SMALL, "bos_token_id": 0, "eos_token_id": 0, **changes}
    model = randomised(GPT2LMHeadModel(ReferenceConfig(**settings)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 4 if parameter.ndim == 2 else 1
        model.transformer.wpe.weight *= 10
    return model


def write_folder(folder: Path, model: Any, *, whole_tokenizer: bool = True) -> Path:
    """Save a model with `tokenizer.json`, or else with `vocab.json` and `merges.txt`."""
    model.save_pretrained(folder)
    tokenizer = small_tokenizer()
    if whole_tokenizer:
        tokenizer.save(str(folder / "tokenizer.json"))
    else:
        tokenizer.model.save(str(folder))
    return folder


def write_graph(config: GPT2Config, folder: Path) -> Path:
    """Write the float32 graph of a model; tracing, the slow part, is done once."""
    traced = trace_once("language_model", config, "float32")
    path = folder / graph_name("language_model", config, "float32")
    path.write_bytes(traced.model.SerializeToString())
    return path


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
