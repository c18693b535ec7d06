"""Textual inversion: new words of a prompt, each some learned token embeddings.

Gal et al. 2022, arXiv:2208.01618. Files come from AUTOMATIC1111's web UI (`.pt` with
`string_to_param`, `.safetensors` with `emb_params`), from diffusers (`learned_embeds`: the word
itself is the tensor's name), and for XL with one tensor for each text encoder.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.adapters.names import TRAINING
from engine.checkpoints.formats.files import Weights, open_weights
from engine.checkpoints.formats.tensors import short
from engine.errors import ModelError

__all__ = ["Embedding", "embedding_of", "join_halves", "parse_embedding", "read_embedding"]

Name = TypeVar("Name", bound=str)

FILES = ("learned_embeds.safetensors", "learned_embeds.bin")  # in a folder of diffusers
SECOND = re.compile(r"(.+?)[-_]?2", re.ASCII)  # how XL's second half is called after the first
NUMBERED = "text_encoders_"  # of these the rows are <s0>, <s1> and so on, too
# Names that mean a text encoder, and no word.
ENCODERS: Mapping[str, str] = MappingProxyType(
    {
        "emb_params": "text_encoder",
        "clip_l": "text_encoder",
        "clip_g": "text_encoder_2",
        "text_encoders_0": "text_encoder",
        "text_encoders_1": "text_encoder_2",
    }
)
A1111 = "string_to_param."
# What files hold beside them: OneTrainer's vectors behind the text encoders, and those of other
# models' text encoders.
BESIDE = re.compile(r"clip_[lg]_out|(t5|qwen|llama|gemma)\w{0,20}", re.ASCII)
MAX_VECTORS = 1024  # a prompt has 75 tokens


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Embedding:
    """A word, and what stands for it in each text encoder.

    name: the file's name, or what was asked for: it means the embedding even if a token does
    inner_name: what the file states, "" for nothing; it means the embedding unless a token does
    vectors: (n, D) float32 by "text_encoder" and "text_encoder_2"; the word takes n tokens
    is_numbered: whether "<s0>", "<s1>" and so on mean the vectors one by one
    unused: the names of tensors that the file holds beside them
    """

    path: Path
    name: str
    vectors: Mapping[str, NDArray[np.float32]]
    inner_name: str = ""
    is_numbered: bool = False
    unused: tuple[str, ...] = ()

    @property
    def rows(self) -> Mapping[str, range]:
        """Which vectors each word means, `name` first."""
        count = len(next(iter(self.vectors.values())))
        words = dict.fromkeys(filter(None, (self.name, self.inner_name)), range(count))
        numbers = range(count if self.is_numbered else 0)
        return words | {f"<s{i}>": range(i, i + 1) for i in numbers}

    def check(self, widths: Mapping[Name, int]) -> None:
        """Compare with the widths D of a model's text encoders; raises ModelError."""
        ours = {component: vectors.shape[1] for component, vectors in self.vectors.items()}
        if ours != {str(component): width for component, width in widths.items()}:
            half = len(ours) < len(widths) and set(ours.values()) <= set(widths.values())
            advice = "give the file of its other half too, or " if half else ""
            raise ModelError(
                f"{self.path} is a textual inversion of {_widths(ours)}, and this model needs "
                f"{_widths(widths)}; {advice}use one that was trained for this model's family"
            )


def read_embedding(file: str | Path) -> Embedding:
    """Read a textual inversion.

    file: a .pt, .bin or .safetensors file, or a folder with diffusers' learned_embeds, of which XL
        has two halves; after it, "=WORD" says by which word it is meant, and by no other
    Raises ModelError when it is none, holds several words, or numbers that are not finite.
    """
    path, word = parse_embedding(str(file))
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise ModelError(f"{path} holds no textual inversion; give its file, or {FILES[0]}")
        embedding = _read(found[0])
        second = found[0].with_stem(f"{found[0].stem}_2")
        if second.is_file():
            embedding = _join(embedding, _read(second))
    else:
        embedding = _read(path)
    return replace(embedding, name=word, inner_name="", is_numbered=False) if word else embedding


def parse_embedding(text: str) -> tuple[Path, str]:
    """Read `FILE` or `FILE=WORD`; a file whose own name has such an end is one."""
    head, equals, word = text.rpartition("=")
    with suppress(OSError):  # a name longer than the system allows
        if equals and head and word.strip() and not Path(text).exists():
            return Path(head), word.strip()
    return Path(text), ""


def _read(path: Path) -> Embedding:
    weights = open_weights(path)
    beside = BESIDE, TRAINING
    unused = tuple(n for n in weights.tensors if any(each.fullmatch(n) for each in beside))
    left = {n: tensor for n, tensor in weights.tensors.items() if n not in unused}
    if left:
        weights = replace(weights, tensors=MappingProxyType(left))
    inner, names = _word(path, weights)
    embedding = embedding_of(path, path.stem, weights, names, inner)
    return replace(embedding, unused=unused if left else ())


def embedding_of(
    path: Path, name: str, tensors: Weights, names: Mapping[str, str], inner_name: str = ""
) -> Embedding:
    """Make an embedding of tensors of a file; names: that of each text encoder's.

    Raises ModelError for numbers that are not finite and for unequal counts of vectors.
    """
    vectors = {component: _vectors(path, stored, tensors) for component, stored in names.items()}
    counts = {len(array) for array in vectors.values()}
    if len(counts) > 1:
        raise ModelError(
            f"{path} has {' and '.join(map(str, sorted(counts)))} vectors for one word; "
            "both text encoders must get the same number"
        )
    known = f"{name}." in FILES[0] or (SECOND.fullmatch(name) and f"{name[:-2]}." in FILES[0])
    if known and inner_name:  # as every such file is called
        name, inner_name = inner_name, ""
    return Embedding(
        path=path,
        name=name,
        inner_name=inner_name,
        vectors=MappingProxyType(vectors),
        is_numbered=any(stored.startswith(NUMBERED) for stored in names.values()),
    )


def join_halves(embeddings: Sequence[Embedding], widths: Mapping[Name, int]) -> list[Embedding]:
    """Join the halves of words that two files hold, where a model has two text encoders.

    widths: of the text encoders. Two files are halves of one word when they state it or are called
    so: `cat.safetensors` and `cat_2.safetensors`.
    """
    if len(widths) < 2:
        return list(embeddings)
    joined: list[Embedding] = []
    for embedding in embeddings:
        other = next((e for e in joined if _are_halves(e, embedding)), None)
        if other is None:
            joined.append(embedding)
            continue
        first, last = widths.values()
        turned = first != last and _width(other) == last and _width(embedding) == first
        pair = (embedding, other) if turned else (other, embedding)
        joined[joined.index(other)] = _join(*pair)
    return joined


def _are_halves(one: Embedding, other: Embedding) -> bool:
    halves = all(set(each.vectors) == {"text_encoder"} for each in (one, other))
    stems = [
        SECOND.sub(r"\1", each.name) if SECOND.fullmatch(each.name) else each.name
        for each in (one, other)
    ]
    same = {one.name, one.inner_name} & {other.name, other.inner_name} - {""}
    return halves and one.path != other.path and (bool(same) or stems[0] == stems[1])


def _width(embedding: Embedding) -> int:
    _, width = embedding.vectors["text_encoder"].shape
    return int(width)


def _join(first: Embedding, second: Embedding) -> Embedding:
    """Make one word of the halves for XL's text encoders; its names are the first one's."""
    if len(first.vectors["text_encoder"]) != len(second.vectors["text_encoder"]):
        raise ModelError(
            f"{first.path} and {second.path} have unequal numbers of vectors for one word; give "
            "the two halves of one training"
        )
    vectors = {
        "text_encoder": first.vectors["text_encoder"],
        "text_encoder_2": second.vectors["text_encoder"],
    }
    return replace(first, vectors=MappingProxyType(vectors))


def _word(path: Path, weights: Weights) -> tuple[str, Mapping[str, str]]:
    """Find the word, if the file states one, and the tensor's name for each text encoder."""
    names = list(weights.tensors)
    if not names:
        raise ModelError(f"{path} holds no tensors, and so no textual inversion; download it again")
    stated = weights.metadata.get("name", "").strip()
    if any(name.startswith(A1111) for name in names):
        names = [name for name in names if name.startswith(A1111)]
        stated = stated or names[0].removeprefix(A1111).strip("*")
        found = dict.fromkeys(["text_encoder"], names[0])
    elif set(names) <= ENCODERS.keys():
        found = {ENCODERS[name]: name for name in names}
    else:
        stated, found = names[0], {"text_encoder": names[0]}
    if len(found) != len(names) or not all(len(weights.tensors[n].shape) in (1, 2) for n in names):
        raise ModelError(
            f"{path} is no textual inversion of one word: it holds {len(weights.tensors)} tensors, "
            f"such as {short(names[0])}; expected are emb_params, string_to_param, clip_l and "
            "clip_g, or the word's own name: of several words save each as a file"
        )
    return stated, found


def _vectors(path: Path, name: str, weights: Weights) -> NDArray[np.float32]:
    """Read a tensor (D,) or (n, D) as (n, D) float32."""
    tensor = weights.tensors[name]
    if not tensor.is_float or 0 in tensor.shape:
        raise ModelError(
            f"{path} holds {short(name)} as {tensor.dtype} of the shape {list(tensor.shape)}; "
            "an embedding is (n, D) of floating-point numbers"
        )
    if len(tensor.shape) == 2 and tensor.shape[0] > MAX_VECTORS:
        raise ModelError(
            f"{path} has {tensor.shape[0]} vectors for one word; at most {MAX_VECTORS} are read"
        )
    with np.errstate(over="ignore"):
        vectors = tensor.array().astype(np.float32).reshape(-1, tensor.shape[-1])
    if not np.isfinite(vectors).all():
        raise ModelError(f"{path} holds numbers that are not finite in {short(name)}")
    return vectors


def _widths(widths: Mapping[Name, int]) -> str:
    """List widths for a message."""
    return " and ".join(f"{width} numbers for the {name}" for name, width in widths.items())
