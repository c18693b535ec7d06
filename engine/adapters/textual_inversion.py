"""Textual inversion: new words of a prompt, each some learned token embeddings.

Gal et al. 2022, arXiv:2208.01618. Files come from AUTOMATIC1111's web UI (`.pt` with
`string_to_param`, `.safetensors` with `emb_params`), from diffusers (`learned_embeds`: the word
itself is the tensor's name), and for XL with one tensor for each text encoder.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.checkpoints.formats.files import Weights, open_weights
from engine.checkpoints.formats.tensors import short
from engine.errors import ModelError

__all__ = ["Embedding", "read_embedding"]

Name = TypeVar("Name", bound=str)

FILES = ("learned_embeds.safetensors", "learned_embeds.bin")  # in a folder of diffusers
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
MAX_VECTORS = 1024  # a prompt has 75 tokens


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Embedding:
    """A word, and what stands for it in each text encoder.

    vectors: (n, D) float32 by "text_encoder" and "text_encoder_2"; the word takes n tokens
    """

    path: Path
    name: str
    vectors: Mapping[str, NDArray[np.float32]]

    def check(self, widths: Mapping[Name, int]) -> None:
        """Compare with the widths D of a model's text encoders; raises ModelError."""
        ours = {component: vectors.shape[1] for component, vectors in self.vectors.items()}
        if ours != {str(component): width for component, width in widths.items()}:
            raise ModelError(
                f"{self.path} is a textual inversion of {_widths(ours)}, and this model needs "
                f"{_widths(widths)}; use one that was trained for this model's family"
            )


def read_embedding(path: Path) -> Embedding:
    """Read a textual inversion.

    path: a .pt, .bin or .safetensors file, or a folder with diffusers' learned_embeds
    Returns it under the word that the file states, or else the file's name without its ending.
    Raises ModelError when it is none, holds several words, or numbers that are not finite.
    """
    if path.is_dir():
        folder = path
        path = next((folder / name for name in FILES if (folder / name).is_file()), folder)
        if path is folder:
            raise ModelError(f"{folder} holds no textual inversion; give its file, or {FILES[0]}")
    weights = open_weights(path)
    word, names = _word(path, weights)
    vectors = {component: _vectors(path, name, weights) for component, name in names.items()}
    counts = {len(array) for array in vectors.values()}
    if len(counts) > 1:
        raise ModelError(
            f"{path} has {' and '.join(map(str, sorted(counts)))} vectors for one word; "
            "both text encoders must get the same number"
        )
    return Embedding(path=path, name=word or path.stem, vectors=MappingProxyType(vectors))


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
            f"such as {short(names[0])}; expected are emb_params, "
            "string_to_param, clip_l and clip_g, or the word's own name"
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
