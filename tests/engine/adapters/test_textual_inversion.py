from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders.textual_inversion import (
    TextualInversionLoaderMixin,
    load_textual_inversion_state_dicts,
)
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from engine.adapters.textual_inversion import Embedding, read_embedding
from engine.errors import ModelError

VECTORS = torch.randn((3, 12), generator=torch.Generator().manual_seed(0))
A1111: dict[str, Any] = {
    "string_to_token": {"*": 265},
    "string_to_param": {"*": VECTORS},
    "name": "my-cat",
    "step": 999,
    "sd_checkpoint": "cc6cb27103",
    "sd_checkpoint_name": None,
}


def diffusers_reads(state: dict[str, Any]) -> tuple[str, NDArray[Any]]:
    tokenizer = SimpleNamespace(get_vocab=dict)
    (token,), (embedding,) = TextualInversionLoaderMixin._retrieve_tokens_and_embeddings(
        [None], [state], tokenizer
    )
    return token, embedding.detach().float().numpy()


def save(path: Path, state: dict[str, Any]) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def only(embedding: Embedding) -> NDArray[Any]:
    assert set(embedding.vectors) == {"text_encoder"}
    vectors = embedding.vectors["text_encoder"]
    assert vectors.dtype == np.float32
    assert vectors.ndim == 2
    return vectors


@pytest.mark.parametrize(
    ("file", "state"),
    [
        ("a.pt", A1111),
        ("a.bin", A1111 | {"string_to_param": {"*": torch.nn.Parameter(VECTORS)}}),
        ("a.pt", A1111 | {"string_to_param": {"*": VECTORS.half()}}),
        ("learned_embeds.bin", {"<cat-toy>": VECTORS}),
        ("learned_embeds.safetensors", {"<cat-toy>": VECTORS[0].clone()}),
        ("learned_embeds.safetensors", {"<cat-toy>": VECTORS.bfloat16()}),
        ("a.safetensors", {"cat": VECTORS.double()}),
    ],
)
def test_files_agree_with_diffusers(tmp_path: Path, file: str, state: dict[str, Any]) -> None:
    embedding = read_embedding(save(tmp_path / file, state))
    token, vectors = diffusers_reads(state)
    assert embedding.name == token
    assert np.array_equal(only(embedding), np.atleast_2d(vectors))


@pytest.mark.parametrize("file", ["learned_embeds.bin", "learned_embeds.safetensors"])
def test_folders_agree_with_diffusers(tmp_path: Path, file: str) -> None:
    save(tmp_path / file, {"<cat-toy>": VECTORS})
    (state,) = load_textual_inversion_state_dicts([str(tmp_path)], local_files_only=True)
    embedding = read_embedding(tmp_path)
    token, vectors = diffusers_reads(state)
    assert embedding.name == token == "<cat-toy>"
    assert np.array_equal(only(embedding), vectors)


def test_a_file_that_states_no_word_is_named_after_itself(tmp_path: Path) -> None:
    embedding = read_embedding(
        save(tmp_path / "easy.negative.safetensors", {"emb_params": VECTORS})
    )
    assert embedding.name == "easy.negative"
    assert np.array_equal(only(embedding), VECTORS.numpy())
    nameless = {"string_to_param": {"*": VECTORS}, "name": ""}
    assert read_embedding(save(tmp_path / "b.pt", nameless)).name == "b"
    worded = {"string_to_param": {"cat": VECTORS}}
    assert read_embedding(save(tmp_path / "c.pt", worded)).name == "cat"


@pytest.mark.parametrize(
    "names", [("clip_l", "clip_g"), ("clip_g", "clip_l"), ("text_encoders_0", "text_encoders_1")]
)
def test_xl_has_vectors_for_both_text_encoders(tmp_path: Path, names: tuple[str, str]) -> None:
    parts = {"text_encoder": torch.randn(2, 8), "text_encoder_2": torch.randn(2, 16)}
    first, second = parts.values() if names[0] != "clip_g" else reversed(parts.values())
    embedding = read_embedding(
        save(tmp_path / "a.safetensors", {names[0]: first, names[1]: second})
    )
    assert embedding.name == "a"
    assert set(embedding.vectors) == set(parts)
    for component, vectors in parts.items():
        assert np.array_equal(embedding.vectors[component], vectors.numpy())
    embedding.check({"text_encoder": 8, "text_encoder_2": 16})


def test_widths_are_compared(tmp_path: Path) -> None:
    embedding = read_embedding(save(tmp_path / "a.safetensors", {"emb_params": VECTORS}))
    embedding.check({"text_encoder": 12})
    for widths in ({"text_encoder": 13}, {"text_encoder": 12, "text_encoder_2": 5}, {}):
        with pytest.raises(ModelError, match=r"inversion of 12 numbers for the text_encoder, and"):
            embedding.check(widths)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": VECTORS, "b": VECTORS.clone()}, "it holds 2 tensors, such as 'a'"),
        ({"clip_l": VECTORS, "text_encoders_0": VECTORS.clone()}, "it holds 2 tensors"),
        ({"a": torch.ones(())}, "of one word: it holds 1 tensors"),
        ({"a": torch.ones(2, 3, 4)}, "of one word: it holds 1 tensors"),
        ({"a": torch.ones(0, 3)}, r"F32 of the shape \[0, 3\]"),
        ({"a": torch.ones(2, 3, dtype=torch.int32)}, "as I32"),
        ({"a": torch.ones(2000, 1)}, "has 2000 vectors"),
        ({"a": torch.tensor([1.0, float("nan")])}, "not finite in 'a'"),
        ({"a": torch.tensor([1.0, 1e300], dtype=torch.float64)}, "not finite in 'a'"),
        ({"clip_l": VECTORS, "clip_g": VECTORS[:2].clone()}, "has 2 and 3 vectors"),
    ],
)
def test_what_is_no_textual_inversion_is_refused(
    tmp_path: Path, state: dict[str, Tensor], message: str
) -> None:
    path = save(tmp_path / "a.safetensors", state)
    with pytest.raises(ModelError, match=message) as error:
        read_embedding(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) - len(str(path)) < 400


def test_places_without_textual_inversions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no textual inversion"):
        read_embedding(tmp_path)
    with pytest.raises(ModelError, match=r"does not exist"):
        read_embedding(tmp_path / "a.pt")
    save_file({}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=r"holds no tensors"):
        read_embedding(tmp_path / "a.safetensors")
    two = {"string_to_param": {"a": VECTORS, "b": VECTORS}}
    with pytest.raises(ModelError, match=r"of one word: it holds"):
        read_embedding(save(tmp_path / "b.pt", two))
