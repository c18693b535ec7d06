"""The files of a model's `tokenizer/` folder: CLIP's byte-pair vocabulary and its special tokens.

Folders differ with their age. The tokens and merges stand in `vocab.json` and `merges.txt`, or in
`tokenizer.json`, which counts where both are there. The special tokens stand in
`tokenizer_config.json` beside a list `added_tokens_decoder`; in older folders
`special_tokens_map.json`, `added_tokens.json` and the list in `tokenizer.json` come before it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import ModelError

if TYPE_CHECKING:
    import tokenizers

__all__ = ["Vocabulary", "build_encoder", "read_json", "word_splitter"]

Merge = tuple[str, str]
Fields = dict[str, Any]
"""A token as JSON: its `content`, and the flags of the tokenizers library's `AddedToken`."""

CONTEXT_LENGTH = 77
"""Tokens of a row in CLIP, for folders that do not state `model_max_length`."""
CLIP_MERGES = Path(__file__).parent / "clip_vocabulary" / "merges.txt"
LONGEST_STATED = 10**6
"""Folders that know no length state 1e30."""

SPECIAL_TOKENS = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
"""CLIP's, for folders that do not say, in the order in which transformers registers them."""

WORD_PATTERN = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What a tokenizer folder says.

    ids: the id of each token
    merges: pairs of tokens to join, by rank
    added: by id, tokens that are found in the text before it is split into words
    named: the special tokens by name, which are found likewise
    max_length: tokens of a row, the start and the end token included
    """

    ids: Mapping[str, int]
    merges: Sequence[Merge]
    added: Mapping[int, Fields]
    named: Mapping[str, Fields]
    max_length: int

    def __post_init__(self) -> None:
        """Refuse special tokens without an id and a length without room for a token."""
        for name in self.named:
            self.special_id(name)
        if type(self.max_length) is not int or self.max_length < 3:
            raise ModelError(
                f"The tokenizer's model_max_length is {self.max_length!r}; it must be an integer "
                f"of 3 or more ({CONTEXT_LENGTH} in CLIP)."
            )

    @classmethod
    def clip(cls, pad_token: str) -> Vocabulary:
        """Return CLIP's own, which every Stable Diffusion was trained with; files hold none.

        49,408 tokens in the order of CLIP's: the bytes, the bytes at a word's end, the merges and
        two special tokens (Radford et al. 2021, arXiv:2103.00020).
        """
        merges = read_merges(CLIP_MERGES)
        letters = byte_letters()
        tokens = [
            *letters,
            *(f"{letter}</w>" for letter in letters),
            *("".join(merge) for merge in merges),
            SPECIAL_TOKENS["bos_token"],
            SPECIAL_TOKENS["eos_token"],
        ]
        named = {name: {"content": text, "special": True} for name, text in SPECIAL_TOKENS.items()}
        return cls(
            ids={token: index for index, token in enumerate(tokens)},
            merges=merges,
            added={},
            named=named | {"pad_token": {"content": pad_token, "special": True}},
            max_length=CONTEXT_LENGTH,
        )

    @classmethod
    def read(cls, folder: Path) -> Vocabulary:
        """Read a tokenizer folder; raises ModelError when a file is missing or cannot be used."""
        config = read_json(folder / "tokenizer_config.json")
        ids, merges, listed = read_pairs(folder)
        length = config.get("model_max_length", CONTEXT_LENGTH)
        if isinstance(length, int | float) and length > LONGEST_STATED:
            length = CONTEXT_LENGTH
        try:
            return cls(
                ids=ids,
                merges=merges,
                added=added_tokens(folder, config, listed),
                named=named_tokens(folder, config),
                max_length=length,
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"The special tokens in {folder} cannot be read ({error!r}); fetch the folder "
                f"again from where the model came from."
            ) from error

    def special_id(self, name: str) -> int:
        """Return the id of a special token by its name, such as "pad_token"; raises ModelError."""
        content = self.named[name]["content"]
        for index, fields in self.added.items():
            if fields["content"] == content:
                return index
        if content not in self.ids:
            raise ModelError(
                f"The tokenizer's {name} {content!r} is not among its {len(self.ids)} tokens; "
                f"fetch the tokenizer folder again from where the model came from."
            )
        return self.ids[content]

    def registered(self) -> list[Fields]:
        """Return the added and the special tokens in the order in which transformers adds them.

        One token may come twice with other flags, and then the last counts.
        """
        contents = {fields["content"] for fields in self.added.values()}
        tokens = [self.added[index] for index in sorted(self.added)]
        return tokens + [f for f in self.named.values() if f["content"] not in contents]


def byte_letters() -> list[str]:
    """Return the letter that stands for each byte in CLIP's (and GPT-2's) order of bytes.

    Bytes that print stand for themselves and come first; the others follow as the letters from
    256 on.
    """
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = 256 - len(printing)
    return [chr(code) for code in (*printing, *range(256, 256 + others))]


def added_tokens(
    folder: Path, config: Mapping[str, Any], listed: Sequence[Mapping[str, Any]]
) -> dict[int, Fields]:
    """Return the added tokens by id: the configuration's, else those of the older files."""
    if "added_tokens_decoder" in config:
        entries = config["added_tokens_decoder"].items()
        return {int(index): token_fields(fields) for index, fields in entries}
    added: dict[int, Fields] = {}
    if (folder / "added_tokens.json").exists():
        special = {fields["content"] for fields in named_tokens(folder, config).values()}
        for content, index in read_json(folder / "added_tokens.json").items():
            added[int(index)] = {"content": content, "special": content in special}
    return added | {int(entry["id"]): token_fields(entry) for entry in listed}


def named_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, Fields]:
    """Return the four special tokens by name; an older folder's own file of them counts first."""
    stated = dict(config)
    older = folder / "special_tokens_map.json"
    if "added_tokens_decoder" not in config and older.exists():
        stated |= read_json(older)
    return {
        name: token_fields(stated.get(name, content)) | {"special": True}
        for name, content in SPECIAL_TOKENS.items()
    }


def token_fields(entry: object) -> Fields:
    """Return the library's fields of a token, a string or an object in JSON; else ValueError."""
    if isinstance(entry, str):
        return {"content": entry}
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
        raise ValueError(f"{entry!r} is not a token")
    return {name: value for name, value in entry.items() if name not in ("id", "__type")}


def read_pairs(folder: Path) -> tuple[dict[str, int], list[Merge], list[Fields]]:
    """Return ids, merges by rank and the added tokens of a tokenizer's folder.

    Raises ModelError when its `tokenizer.json` has no byte-pair vocabulary.
    """
    whole = folder / "tokenizer.json"
    if not whole.exists():
        return read_json(folder / "vocab.json"), read_merges(folder / "merges.txt"), []
    content = read_json(whole)
    try:
        model = content["model"]
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        pairs = [(left, right) for left, right in merges]
        return dict(model["vocab"]), pairs, list(content.get("added_tokens", []))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{whole} holds no byte-pair vocabulary ({error!r}); give a CLIP tokenizer's folder."
        ) from error


def read_text(path: Path) -> str:
    """Return the text of a file; raise ModelError when there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ModelError(
            f"The tokenizer folder {path.parent} has no {path.name}; it must hold "
            f"tokenizer_config.json, and vocab.json with merges.txt or tokenizer.json."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} cannot be read as text: {error}.") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file; raise ModelError when it holds none."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{path} is not valid JSON ({error}); fetch it again from where the model came from."
        ) from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a JSON {type(content).__name__}; it must hold an object.")
    return content


def read_merges(path: Path) -> list[Merge]:
    """Return the merges of a `merges.txt` by rank; raise ModelError for a line that is none."""
    merges = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        symbols = line.rstrip("\r").split(" ")
        if line.startswith("#version") or symbols == [""]:
            continue
        if len(symbols) != 2:
            raise ModelError(
                f"Line {number} of {path} is {line!r}; a merge is two symbols and one space."
            )
        merges.append((symbols[0], symbols[1]))
    return merges


def word_splitter() -> tuple[
    tokenizers.normalizers.Normalizer, tokenizers.pre_tokenizers.PreTokenizer
]:
    """Return what makes CLIP's words of a text: the normalizer and the pre-tokenizer."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return normalizer, splitter


def build_encoder(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    """Build the library's tokenizer as transformers does, without start, end and padding.

    Raises ValueError, or what the library raises, for parts that do not fit together.
    """
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import BPE

    encoder = Tokenizer(
        BPE(
            vocab=dict(vocabulary.ids),
            merges=list(vocabulary.merges),
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
            unk_token=vocabulary.named["unk_token"]["content"],
        )
    )
    encoder.normalizer, encoder.pre_tokenizer = word_splitter()
    encoder.add_tokens([AddedToken(**fields) for fields in vocabulary.registered()])
    for index, fields in vocabulary.added.items():
        if encoder.token_to_id(fields["content"]) != index:
            raise ValueError(f"the added token {fields['content']!r} cannot have the id {index}")
    return encoder
