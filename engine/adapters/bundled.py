"""Textual inversions that training programs put into an adapter's file.

bundle_emb.NAME.string_to_param.*                 kohya, Automatic1111
bundle_emb.NAME.clip_l, bundle_emb.NAME.clip_g    OneTrainer
"""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from engine.adapters.textual_inversion import BESIDE, ENCODERS, Embedding, embedding_of
from engine.checkpoints.formats.files import Weights
from engine.checkpoints.formats.tensors import short
from engine.errors import ModelError

__all__ = ["BUNDLED", "read_bundled"]

BUNDLED = "bundle_emb."
PARTS = {"string_to_param.*": "text_encoder", **ENCODERS}


def read_bundled(path: Path, weights: Weights) -> tuple[Embedding, ...]:
    """Read the textual inversions in an adapter's file, under the names that it gives them.

    Raises ModelError for one that is none.
    """
    found: dict[str, dict[str, str]] = defaultdict(dict)
    unused: dict[str, list[str]] = defaultdict(list)
    for name in weights:
        if not name.startswith(BUNDLED):
            continue
        rest = name.removeprefix(BUNDLED)
        word, _, last = rest.rpartition(".")
        if word and BESIDE.fullmatch(last):
            unused[word].append(last)
            continue
        part = next((part for part in PARTS if rest.endswith(f".{part}")), None)
        word = rest.removesuffix(f".{part}")
        if part is None or not word:
            raise ModelError(
                f"{path} holds {short(name)}, which is no textual inversion that is known; known "
                f"are bundle_emb.NAME with {', '.join(PARTS)}"
            )
        found[word][PARTS[part]] = name
    return tuple(
        replace(embedding_of(path, word, weights, names), unused=tuple(unused[word]))
        for word, names in found.items()
    )
