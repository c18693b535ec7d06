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

from engine.adapters.textual_inversion import Embedding, join_halves, read_embedding
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
    assert embedding.name == (token if file.startswith("learned") else "a")
    assert token in embedding.rows
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
    assert list(read_embedding(save(tmp_path / "c.pt", worded)).rows) == ["c", "cat"]


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


def test_a_word_is_the_files_name_and_what_the_file_states(tmp_path: Path) -> None:
    path = save(tmp_path / "nice-style.pt", A1111)
    embedding = read_embedding(path)
    assert dict(embedding.rows) == {"nice-style": range(3), "my-cat": range(3)}
    assert (embedding.name, embedding.inner_name) == ("nice-style", "my-cat")


def test_who_asks_chooses_the_word(tmp_path: Path) -> None:
    path = save(tmp_path / "nice-style.pt", A1111)
    assert list(read_embedding(f"{path}=a cat").rows) == ["a cat"]
    odd = save(tmp_path / "a=b.pt", A1111)
    assert read_embedding(odd).name == "a=b"
    assert read_embedding(f"{odd}=c").name == "c"
    with pytest.raises(ModelError, match="does not exist"):
        read_embedding(f"{tmp_path / 'no.pt'}=c")


def test_rows_of_pivotal_tuning_are_words(tmp_path: Path) -> None:
    state = {"text_encoders_0": torch.ones(2, 8), "text_encoders_1": torch.ones(2, 16)}
    embedding = read_embedding(save(tmp_path / "emb.safetensors", state))
    rows = {"emb": range(2), "<s0>": range(1), "<s1>": range(1, 2)}
    assert dict(embedding.rows) == rows


def halves(folder: Path, first: str, second: str, word: str = "<cat>") -> list[Embedding]:
    folder.mkdir(exist_ok=True)
    files = {first: torch.full((2, 8), 1.0), second: torch.full((2, 16), 2.0)}
    for name, vectors in files.items():
        save(folder / f"{name}.safetensors", {word: vectors})
    return [read_embedding(folder / f"{name}.safetensors") for name in files]


WIDTHS = {"text_encoder": 8, "text_encoder_2": 16}


def is_whole(embedding: Embedding) -> bool:
    embedding.check(WIDTHS)
    values = {name: set(v.flatten().tolist()) for name, v in embedding.vectors.items()}
    return values == {"text_encoder": {1.0}, "text_encoder_2": {2.0}}


def test_a_folder_holds_both_halves(tmp_path: Path) -> None:
    halves(tmp_path, "learned_embeds", "learned_embeds_2")
    embedding = read_embedding(tmp_path)
    assert is_whole(embedding)
    assert list(embedding.rows) == ["<cat>"]
    assert list(read_embedding(f"{tmp_path}=cat").rows) == ["cat"]


@pytest.mark.parametrize(
    ("first", "second", "word"),
    [
        ("learned_embeds", "learned_embeds_2", "<cat>"),
        ("cat", "cat_2", "emb_params"),  # by their names
        ("cat-l", "cat-g", "<cat>"),  # by the word
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_two_files_are_halves_of_one_word(
    tmp_path: Path, first: str, second: str, word: str, turned: bool
) -> None:
    both = halves(tmp_path, first, second, word)
    (embedding,) = join_halves(both[::-1] if turned else both, WIDTHS)
    assert is_whole(embedding)


def test_halves_of_equal_widths_are_told_by_their_order(tmp_path: Path) -> None:
    files = [
        save(tmp_path / f"cat{end}.pt", {"<cat>": VECTORS + i}) for i, end in enumerate(["", "_2"])
    ]
    (embedding,) = join_halves([read_embedding(f) for f in files], {"a": 12, "b": 12})
    assert np.array_equal(embedding.vectors["text_encoder"], VECTORS.numpy())
    assert np.array_equal(embedding.vectors["text_encoder_2"], VECTORS.numpy() + 1)


def test_what_is_no_pair_of_halves(tmp_path: Path) -> None:
    one, other = (
        read_embedding(save(tmp_path / f"{name}.pt", {f"<{name}>": VECTORS})) for name in "ab"
    )
    assert join_halves([one, other], {"a": 12, "b": 12}) == [one, other]
    assert join_halves(halves(tmp_path, "c", "c_2"), {"text_encoder": 8})[0].name == "c"
    with pytest.raises(ModelError, match="give the file of its other half too, or use one"):
        one.check({"text_encoder": 12, "text_encoder_2": 16})
    save(tmp_path / "learned_embeds.safetensors", {"<a>": VECTORS})
    save(tmp_path / "learned_embeds_2.safetensors", {"<a>": VECTORS[:2].clone()})
    with pytest.raises(ModelError, match="unequal numbers of vectors"):
        read_embedding(tmp_path)


BESIDE = ("clip_l_out", "clip_g_out", "t5", "t5xxl_out", "step", "optimizer_state")


@pytest.mark.parametrize("beside", BESIDE)
def test_what_else_an_embedding_holds_is_told(beside, tmp_path):
    state = {"clip_l": torch.ones(2, 8), "clip_g": torch.ones(2, 16), beside: torch.zeros(3)}
    embedding = read_embedding(save(tmp_path / "cat.pt", state))
    assert set(embedding.vectors) == {"text_encoder", "text_encoder_2"}
    assert embedding.unused == (beside,)


def test_a_file_of_nothing_else_is_no_embedding(tmp_path):
    with pytest.raises(ModelError, match="such as 'step'"):
        read_embedding(save(tmp_path / "a.pt", {"step": torch.tensor(3)}))


@pytest.mark.parametrize("names", [("<a>", "<b>"), ("string_to_param.a", "string_to_param.b")])
def test_several_words_are_refused_with_what_to_do(names, tmp_path):
    path = tmp_path / "two.safetensors"
    save_file(dict.fromkeys(names, VECTORS.clone()) | {names[1]: VECTORS + 1}, path)
    with pytest.raises(ModelError, match="of several words save each as a file"):
        read_embedding(path)
