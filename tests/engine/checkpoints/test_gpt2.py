import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoints.gpt2 import LanguageModel
from engine.configs.gpt2 import GPT2Config
from engine.errors import ModelError
from tests.support.language_models import change_config, small_gpt2, write_folder


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path, small_gpt2())


def rewrite(folder, change, name="model.safetensors"):
    """Change the stored tensors; write them in either format."""
    tensors = load_file(folder / "model.safetensors")
    tensors = change(tensors) or tensors
    (folder / "model.safetensors").unlink()
    if name.endswith(".bin"):
        torch.save(tensors, folder / name)
    else:
        save_file(tensors, folder / name)


def numbers(folder):
    weights = LanguageModel.open(folder).weights
    return {name: np.array(weights[name], np.float32) for name in weights}


def with_old_buffers(tensors):
    for i in range(3):
        tensors[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
        tensors[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)


def without_prefix(tensors):
    return {name.removeprefix("transformer."): value for name, value in tensors.items()}


def with_the_head_twice(tensors):
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("change", [with_old_buffers, without_prefix, with_the_head_twice])
def test_checkpoints_of_every_age_are_the_same(folder, change, name):
    expected = numbers(folder)
    rewrite(folder, change, name)
    given = numbers(folder)
    assert given.keys() == expected.keys()
    assert all(np.array_equal(given[key], expected[key]) for key in expected)
    assert LanguageModel.open(folder).config.tie_word_embeddings


def test_float16_weights(folder):
    expected = numbers(folder)
    rewrite(folder, lambda tensors: {name: value.half() for name, value in tensors.items()})
    given = numbers(folder)
    assert all(np.array_equal(given[key], expected[key].astype("f2")) for key in expected)


def test_a_head_of_its_own_is_told_by_its_numbers(folder):
    def own_head(tensors):
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1

    rewrite(folder, own_head)
    model = LanguageModel.open(folder)
    assert not model.config.tie_word_embeddings
    assert "lm_head.weight" in model.weights


@pytest.mark.parametrize(
    ("stated", "expected"),
    [(7, {7}), ([3, 5], {3, 5}), (None, set())],
)
def test_ends_of_text(folder, stated, expected):
    change_config(folder, eos_token_id=stated)
    assert LanguageModel.open(folder).eos_token_ids == expected


@pytest.mark.parametrize(("stated", "expected"), [(5, 5), (None, None), (50256, None)])
def test_what_stands_before_a_text(folder, stated, expected):
    change_config(folder, bos_token_id=stated)
    assert LanguageModel.open(folder).bos_token_id == expected


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "llama"}, "describes a llama; use GPT-2"),
        ({"add_cross_attention": True}, "gpt2 with cross-attention"),
        ({"activation_function": "swish"}, "activation_function is 'swish'; supported are"),
        ({"n_head": 5}, "n_embd 32 is not a multiple of n_head 5"),
        ({"n_layer": 4}, r"lacks transformer.h.3.ln_1.weight and 11 more"),
        ({"n_layer": 2}, "for which this architecture has no place"),
        ({"n_embd": 36}, "transformer.wte.weight has shape"),
        ({"tie_word_embeddings": False}, "lacks lm_head.weight"),
        ({"n_positions": "many"}, "n_positions is 'many'"),
        ({"eos_token_id": "end"}, 'eos_token_id = "end"; a token\'s id is expected'),
        ({"bos_token_id": -1}, "bos_token_id = -1"),
    ],
)
def test_what_cannot_be_used_gets_one_sentence(folder, changes, said):
    change_config(folder, **changes)
    with pytest.raises(ModelError, match=said) as caught:
        LanguageModel.open(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(ModelError, match=r"holds no config.json; give the folder of a GPT-2"):
        LanguageModel.open(tmp_path)


def test_one_architecture_has_one_key():
    plain = GPT2Config()
    assert GPT2Config.from_dict({"n_inner": 3072}).key() == plain.key()
    assert GPT2Config.from_dict({"n_inner": None}).key() == plain.key()
    assert GPT2Config.from_dict({"activation_function": "gelu_pytorch_tanh"}).key() == plain.key()
    assert GPT2Config.from_dict({"n_inner": 3000}).key() != plain.key()
