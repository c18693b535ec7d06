"""Tokenizers of BERT, T5 and GPT-2: what their `tokenizer.json` says, in rows as CLIP's.

A row is what transformers makes of the same folder with `padding="max_length"`: [CLS] and [SEP]
around BERT's tokens, `</s>` behind T5's, and GPT-2's end of text, which also pads, behind its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ModelError
from runtime.conditioning.vocabulary import LONGEST_STATED, read_json

__all__ = ["OTHER", "load_other"]

LONGEST = 512  # tokens of a row, for folders that do not state `model_max_length`


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """The tokens around a text, by their names in the configuration and by default."""

    start: tuple[str, str] | None
    end: tuple[str, str]
    pad: tuple[str, str]


# By what `tokenizer_class` begins with.
OTHER: Mapping[str, Marks] = {
    "Bert": Marks(
        start=("cls_token", "[CLS]"), end=("sep_token", "[SEP]"), pad=("pad_token", "[PAD]")
    ),
    "T5": Marks(start=None, end=("eos_token", "</s>"), pad=("pad_token", "<pad>")),
    "GPT2": Marks(
        start=None, end=("eos_token", "<|endoftext|>"), pad=("eos_token", "<|endoftext|>")
    ),
}


def load_other(folder: Path, kind: str) -> dict[str, Any]:
    """Read a folder with `tokenizer.json`; return a Tokenizer's fields.

    kind: its `tokenizer_class`. Raises ModelError when a file is missing or cannot be used.
    """
    import tokenizers

    config = read_json(folder / "tokenizer_config.json")
    whole = folder / "tokenizer.json"
    try:
        encoder = tokenizers.Tokenizer.from_str(whole.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"The tokenizer folder {folder} has no tokenizer.json; save it with a fast tokenizer "
            "of transformers."
        ) from error
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{whole} cannot be read as a tokenizer ({error}); fetch it again.") from (
            error
        )
    encoder.no_padding()
    encoder.no_truncation()
    marks = next(marks for name, marks in OTHER.items() if kind.startswith(name))

    def special(mark: tuple[str, str]) -> int:
        stated = config.get(mark[0], mark[1])
        text = stated.get("content") if isinstance(stated, dict) else stated
        found = encoder.token_to_id(text) if isinstance(text, str) else None
        if found is None:
            raise ModelError(
                f"{whole} has no token {text!r}, which {mark[0]} names; fetch it again."
            )
        return int(found)

    length = config.get("model_max_length", LONGEST)
    if isinstance(length, int | float) and length > LONGEST_STATED:
        length = LONGEST
    if type(length) is not int or length < 3:
        raise ModelError(f"{folder} states model_max_length {length!r}; a number from 3 on is due.")
    end = special(marks.end)
    return {
        "max_length": length,
        "bos_token_id": special(marks.start) if marks.start else end,
        "eos_token_id": end,
        "pad_token_id": special(marks.pad),
        "encoder": encoder,
        "has_start": marks.start is not None,
    }
